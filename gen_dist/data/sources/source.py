"""A source of images: its interface to packing, and the registry of sources by name.

A source is one file in this folder. It registers a name, or a prefix that takes a path, and is imported only when its
file is looked for: see `gen_dist.data.catalogue`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from numpy.typing import NDArray

from gen_dist.config import DataConfig
from gen_dist.config.data import Form
from gen_dist.config.labels import LabelScheme
from gen_dist.data.image_files import Encoded
from gen_dist.plugins.tables import Table

SplitName = Literal["train", "test"]
SPLITS: tuple[SplitName, SplitName] = ("train", "test")


@dataclass(frozen=True)
class Block:
    """Some images of one split, in order."""

    split: SplitName
    """The split; `train` for sources without a test split."""
    images: NDArray[Any] | Sequence[Encoded]
    """[n, C, H, W] of a dtype in `gen_dist.data.values.DTYPES`, or n encoded images."""
    labels: NDArray[Any]
    """int64 [n] of classes; or int64 or float32 [n, A] of a source that `HasLabels`. -1 or NaN is a missing label."""
    names: Sequence[str] | str
    """Name of each image in error messages; a single text is followed by the image's position in the block."""

    def name(self, position: int) -> str:
        """Name of one image in error messages."""
        return f"{self.names} image {position}" if isinstance(self.names, str) else self.names[position]


class Source(Protocol):
    """Origin of images. One object serves one call of `open_dataset`."""

    @property
    def name(self) -> str:
        """The source as the user wrote it."""

    @property
    def slug(self) -> str:
        """Start of the cache directory's name."""

    @property
    def has_test_split(self) -> bool:
        """False if test images are held out from the train split."""

    @property
    def default_size(self) -> int | None:
        """Side in pixels when no size is configured. None keeps the size of the images, which must be alike."""

    def fingerprint(self) -> object | None:
        """Content key as JSON, with path, names and `gen_dist.data.identity` of files. None while files are missing."""

    def remarks(self) -> list[str]:
        """Lines about what is not used, or may not be meant as it is said; announced at every opening."""

    def fetch(self) -> None:
        """Download missing files; called in one process at a time, only without a packed cache."""

    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ..."""

    def image_count(self) -> int | None:
        """Number of images, for the progress bar. None hides it."""

    def blocks(self) -> Iterator[Block]:
        """All images, blocks of one split in the split's order. A second call starts anew."""


@runtime_checkable
class KeepsDepth(Protocol):
    """A source of encoded images that may have more than 8 bits. Those of other sources are reduced to 8."""

    def deep_dtype(self) -> str | None:
        """Type of the values of all images, if it has more than 8 bits and all readable images have it."""


@runtime_checkable
class HasLabels(Protocol):
    """A source whose labels may be other than classes. `class_names` of others says what there is to know."""

    def label_scheme(self) -> LabelScheme:
        """Meaning of the labels; which of them are missing, and their moments, are found out by packing."""


@runtime_checkable
class HasForm(Protocol):
    """A source whose rows may be signals or vectors; its blocks hold them as `gen_dist.data.forms` says."""

    @property
    def form(self) -> Form:
        """Kind of rows: images, signals or vectors."""


def form_of_source(source: Source) -> Form:
    """Form of the rows of a source; images, unless it says something else."""
    return source.form if isinstance(source, HasForm) else "images"


ATTRIBUTES = tuple(name for name in vars(Source) if not name.startswith("_"))
"""Names of what every source has."""


@dataclass(frozen=True)
class Request:
    """Parsed value of `--data`."""

    path: Path
    """The part behind `NAME:`, with the home directory expanded; empty for sources without a path."""
    root: Path
    """Directory of torchvision's data sets."""
    packing: DataConfig


@dataclass(frozen=True)
class SourceKind:
    """A registered source."""

    name: str
    """`--data NAME`, or `--data NAME:PATH` if it takes a path."""
    takes_path: bool
    open: Callable[[Request], Source]


_KINDS: Table[SourceKind] = Table("data source")


def register(name: str, open_source: Callable[[Request], Source], *, takes_path: bool = False) -> None:
    """Register a source under a name.

    Raises:
        ConfigError: the name is taken.
    """
    _KINDS.add(name, SourceKind(name, takes_path, open_source))


def registered() -> dict[str, SourceKind]:
    """The registered sources by name."""
    return dict(_KINDS.parts)
