"""Tensors of a set of images in the cache, such as the features of a test split: computed once for all runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from gen_dist.files import read_sealed, write_sealed
from gen_dist.parallel.collectives import in_main
from gen_dist.parallel.processes import Processes

_FORMAT = 3


class KeptTensors:
    """Named tensors of one set of images and one feature network, in one file. Methods are collective calls."""

    def __init__(self, cache: Path, digest: str, which: str, network: str | None, processes: Processes) -> None:
        """
        Args:
            cache: directory of the cache.
            digest: of the data set.
            which: the part of it, such as `test`.
            network: digest of the feature network, if any.
            processes: processes that share the work.
        """
        key = hashlib.sha256(json.dumps([_FORMAT, digest, which, network]).encode()).hexdigest()
        self._file = cache / f"reference-{key[:16]}.tensors"
        self._processes = processes
        self._tensors: dict[str, Tensor] | None = None
        self._is_new = False

    def get(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """All tensors by name, on the device. `compute` is called if the file lacks `name`."""
        if self._tensors is None:
            kept = in_main(lambda: _read_tensors(self._file), self._processes) or {}
            self._tensors = {key: tensor.to(self._processes.device) for key, tensor in kept.items()}
        if name not in self._tensors:
            self._tensors |= compute()
            self._is_new = True
        return self._tensors

    def keep(self) -> None:
        """Write new tensors to the cache, unless it is read-only."""
        if self._is_new and self._tensors and self._processes.is_main:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in self._tensors.items()}
            with contextlib.suppress(OSError):
                write_sealed(self._file, save_tensors(tensors))
        self._is_new = False


def _read_tensors(file: Path) -> dict[str, Tensor] | None:
    """None without the file, and for a damaged one: its tensors are computed again."""
    content = read_sealed(file)
    return None if content is None else load_tensors(content)
