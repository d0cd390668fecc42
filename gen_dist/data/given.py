"""Images given from Python: arrays, PyTorch's and Hugging Face's data sets, brought to one form."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gen_dist.config.data import Form, Layout
from gen_dist.data.eight_bits import image_as_pixels
from gen_dist.data.labelling import joined_columns, raw_labels
from gen_dist.data.naming import some
from gen_dist.data.values import DTYPES
from gen_dist.errors import DataError

_NO_LABEL = object()
"""Stands for the label of an item that is an image alone."""


@dataclass(frozen=True)
class Given:
    """Images of one split in memory."""

    images: NDArray[Any] | Sequence[NDArray[Any]]
    """[N, C, H, W] of a dtype in `DTYPES`, or N images [C, H, W] where they differ in shape."""
    labels: NDArray[Any]
    """Raw labels, see `gen_dist.data.labelling.raw_labels`; int64 [N], all 0, without labels."""
    class_names: tuple[str, ...] | None
    """Names of the classes, attributes or numbers; None if the data have none."""
    are_labelled: bool = True
    """False if the images have no labels."""
    form: Form = "images"
    """Kind of rows; signals and vectors are [N, C, 1, L] and [N, D, 1, 1]."""

    def digest(self) -> str:
        """SHA-256 of shapes, values, labels and class names: 32 hexadecimal digits of it."""
        digest = hashlib.sha256(json.dumps([self.class_names, len(self.labels)]).encode())
        digest.update(b"" if self.form == "images" else self.form.encode())  # images keep their digests, too
        for image in self.images:
            kind = "" if image.dtype == np.uint8 else image.dtype.str  # 8-bit images keep the digest of older versions
            digest.update(f"{image.shape!r}{kind}".encode())
            digest.update(np.ascontiguousarray(image).data)
        if self.labels.dtype.kind == "U":
            digest.update(json.dumps(self.labels.tolist()).encode())
        else:
            if self.labels.ndim > 1:
                digest.update(f"{self.labels.shape!r}".encode())
            digest.update(self.labels.astype("<f4" if self.labels.dtype.kind == "f" else "<i8").tobytes())
        return digest.hexdigest()[:32]


def names_of_labels(parts: Sequence[Given]) -> tuple[str, ...] | None:
    """Names of classes, attributes or numbers in all splits. None where the data have none.

    Raises:
        DataError: the splits have different names, or one has labels and the other none.
    """
    if len({part.are_labelled for part in parts}) > 1:
        train, test = ("have labels" if part.are_labelled else "have none" for part in parts)
        raise DataError(f"train data {train} and test data {test}; give both labels, or none")
    named = {part.class_names for part in parts if part.class_names is not None}
    if len(named) > 1:
        first, second = sorted(named)[:2]
        raise DataError(f"train and test data have different classes: {some(first)} and {some(second)}")
    return named.pop() if named else None


def images_given(data: Any, layout: Layout | None = None, array_of: Form | None = None) -> Given:
    """Read images, signals or vectors from Python objects.

    Args:
        data: one of

            - [N, H, W], [N, H, W, C] or [N, C, H, W] of uint8, uint16, int16, float16 or float32: a NumPy array or a
              tensor, with C 1 or 3, or any C if `layout` says where it is; [N, D] of vectors; or [N, C, L] or [N, L] of
              signals, if `array_of` says so;
            - a pair (images, labels) of such an array and labels: integers or texts [N] for classes, integers or texts
              [N, A] for attributes, floating point [N] or [N, A] for numbers, or a dict of such columns [N] by name.
              -1, an empty text, None and NaN are missing labels;
            - a `torch.utils.data.Dataset` with a length, or a list. An item is an image or a tuple (image, label) with
              such a label of one image: a PIL image, or an array or tensor [H, W], [H, W, C] or [C, H, W], of whole
              numbers as above, or floating point in [0, 1], which becomes 8-bit; a vector [D]; or a signal as above;
            - a `datasets.Dataset` of Hugging Face with one column of images, and one of class labels or none.
        layout: order of the axes of [N, a, b, c] if both are possible.
        array_of: what the rows of arrays are. None is vectors for [N, D] or items [D], else images.

    Raises:
        DataError: no such data, or both orders of the axes are possible; one line.
    """
    if layout not in (None, *get_args(Layout)):
        raise DataError(f"layout {layout!r} is not one of {', '.join(get_args(Layout))}")
    if getattr(data, "features", None) is not None and hasattr(data, "column_names"):
        return _of_hugging_face(data, layout)
    if _is_pair(data, array_of):
        images, form = _of_array(data[0], layout, array_of)
        if isinstance(data[1], dict):
            return Given(images, _of_columns(data[1], len(images)), tuple(map(str, data[1])), form=form)
        return Given(images, raw_labels(_as_numpy(data[1], "data, its labels,"), len(images)), None, form=form)
    if _is_array(data):
        images, form = _of_array(data, layout, array_of)
        return Given(images, np.zeros(len(images), np.int64), None, are_labelled=False, form=form)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, str | bytes | dict):
        return _of_items(_items_of(data), _names_of(data), layout, array_of)
    raise DataError(
        f"data is a {type(data).__name__}; give an array [N, H, W], [N, H, W, C], [N, C, H, W] or [N, D], a pair "
        "(images, labels), a torch.utils.data.Dataset with a length, or a datasets.Dataset"
    )


def _of_array(data: Any, layout: Layout | None, array_of: Form | None) -> tuple[NDArray[Any], Form]:
    found = _as_numpy(data, "data")
    form = form_of(found.ndim, array_of)
    return array_images(found, layout, "data", form), form


def form_of(axes: int, array_of: Form | None) -> Form:
    """Form of an array of so many axes: what is said of it, or vectors for two."""
    return array_of or ("vectors" if axes == 2 else "images")


def _is_pair(data: Any, array_of: Form | None) -> bool:
    """True for (images, labels) as arrays, not for a sequence of two images."""
    if not (isinstance(data, tuple) and len(data) == 2 and _is_array(data[0])):
        return False
    if np.ndim(data[0]) == 2 and array_of != "images":
        # Two arrays [H, W] are two images. Vectors or signals have a label each, or several in a dict.
        of_labels = isinstance(data[1], dict) or (not isinstance(data[1], str) and np.ndim(data[1]) == 1)
        return of_labels or (array_of is not None and np.ndim(data[1]) == 2)
    if np.ndim(data[0]) < 3 or not _is_array(data[1]):
        return np.ndim(data[0]) > 2
    return np.ndim(data[1]) < 2 or (np.ndim(data[1]) == 2 and len(data[0]) == len(data[1]))


def _of_columns(columns: dict[Any, Any], count: int) -> NDArray[Any]:
    """Raw labels [N, A] from columns [N] by name: numbers if one is of floating point, else attributes."""
    found = [raw_labels(_as_numpy(of, f"data, its labels {name},"), count) for name, of in columns.items()]
    return joined_columns(found, count)


def _items_of(data: Any) -> Iterator[Any]:
    try:
        count = len(data)
    except Exception as error:
        raise DataError(f"data, a {type(data).__name__}, has no length: {_told(error)}") from error
    return _each(data[place] for place in range(count))


def _each(items: Iterable[Any]) -> Iterator[Any]:
    """Items of a user's data set, whose own errors become a line with the item's number.

    Raises:
        DataError: an item cannot be read. Its cause is the error itself, with the user's own lines.
    """
    iterator = iter(items)
    for place in itertools.count():
        try:
            item = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(f"item {place} of data cannot be read: {_told(error)}") from error
        yield item


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _of_hugging_face(data: Any, layout: Layout | None) -> Given:
    """Images of a `datasets.Dataset`: its column of type Image, or else one called image or img."""
    kinds = {name: type(feature).__name__ for name, feature in data.features.items()}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    images = images or [name for name in ("image", "images", "img") if name in kinds]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"] or [
        name for name in kinds if name == "label"
    ]
    if len(images) != 1 or len(labels) > 1:
        raise DataError(
            f"data has the columns {', '.join(map(str, kinds))}; one of images and at most one of class labels are "
            "needed: choose them with data.select_columns([...])"
        )
    names = getattr(data.features[labels[0]], "names", None) if labels else None
    columns = [images[0], *labels]
    rows = data.select_columns(columns) if hasattr(data, "select_columns") else data
    items = (tuple(row[name] for name in columns) for row in _each(rows))
    return _of_items(items if labels else (item[0] for item in items), tuple(names) if names else None, layout)


def _of_items(
    items: Iterator[Any], names: tuple[str, ...] | None, layout: Layout | None, array_of: Form | None = None
) -> Given:
    images: list[NDArray[Any]] = []
    labels: list[Any] = []
    form = array_of
    for place, item in enumerate(items):
        image, label = item if isinstance(item, tuple | list) and len(item) == 2 else (item, _NO_LABEL)
        if isinstance(item, tuple | list) and len(item) != 2:
            raise DataError(f"item {place} of data has {len(item)} parts; an image, or (image, label) is needed")
        if form is None:  # the first decides
            form = form_of(1 + np.ndim(image), None) if _is_array(image) else "images"
        images.append(_image(image, place, layout, form))
        if place > 0 and (label is not _NO_LABEL) != bool(labels):
            has = "has no" if label is _NO_LABEL else "has a"
            raise DataError(f"item {place} of data {has} label, unlike those before")
        if label is not _NO_LABEL:
            labels.append(_label(label, place))
    if not images:
        raise DataError("data has no images")
    alike = len({(image.shape, image.dtype) for image in images}) == 1  # `stack` would convert some
    are_labelled = any(label is not None for label in labels)  # images are (image, None) where there are no labels
    of_all = _of_list(labels) if are_labelled else np.zeros(len(images), np.int64)
    of_classes = names if are_labelled else None
    return Given(np.stack(images) if alike else images, of_all, of_classes, are_labelled, form or "images")


def _image(image: Any, place: int, layout: Layout | None, form: Form) -> NDArray[Any]:
    """One image as [C, H, W], whose floating point becomes uint8; or one signal or vector."""
    if isinstance(image, Image.Image) and form == "images":
        return image_as_pixels(image)
    if not _is_array(image):
        raise DataError(
            f"item {place} of data is a {type(image).__name__}; an image of PIL, an array or a tensor is needed"
        )
    what = f"item {place} of data"
    pixels = _as_numpy(image, what)
    if pixels.dtype.kind == "f" and form == "images":
        if not (pixels.size and np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
            raise DataError(f"{what} has floating-point pixels outside [0, 1]; leave out its normalization")
        pixels = np.rint(pixels * 255).astype(np.uint8)
    return array_images(pixels[None], layout, what, form, is_one=True)[0]


def array_images(
    images: NDArray[Any], layout: Layout | None, name: str, form: Form = "images", *, is_one: bool = False
) -> NDArray[Any]:
    """Rows of an array as [N, C, H, W] of a dtype in `DTYPES`, as a view where its bytes have the machine's order.

    Args:
        images: the array.
        layout: order of its axes, if it is ambiguous.
        name: its name in errors.
        form: what its rows are.
        is_one: True for a single image, whose first axis the user does not know of.

    Raises:
        DataError: another dtype or shape, or both orders are possible.
    """
    what = f"{name} is {images.dtype} {list(images.shape[is_one:])}"
    rows = "" if is_one else "N, "
    dtype = images.dtype.newbyteorder("=")
    if str(dtype) not in DTYPES:
        raise DataError(
            f"{what}; {', '.join(DTYPES[:-1])} or {DTYPES[-1]} is needed: convert it with .astype('{_nearest(dtype)}')"
        )
    images = images.astype(dtype, copy=False)
    if form != "images":
        return _plain_rows(images, layout, what, form, rows)
    if images.ndim not in (3, 4) or not images.size:
        raise DataError(f"{what}; [{rows}H, W], [{rows}H, W, C] or [{rows}C, H, W] is needed")
    if images.ndim == 3:
        return images[:, None]
    if layout is None:
        first, last = (images.shape[axis] in (1, 3) for axis in (1, 3))
        if first == last:
            which = "which may be" if first else "with no axis of 1 or 3 channels: it may be"
            raise DataError(
                f"{what}, {which} [{rows}C, H, W] or [{rows}H, W, C]; say which with layout='NCHW' or 'NHWC' (--layout)"
            )
        layout = "NCHW" if first else "NHWC"
    return images if layout == "NCHW" else images.transpose(0, 3, 1, 2)


def _plain_rows(rows: NDArray[Any], layout: Layout | None, what: str, form: Form, first: str) -> NDArray[Any]:
    """Vectors [N, D, 1, 1] or signals [N, C, 1, L] of an array without them; `first` is the axis N in errors."""
    if form == "vectors":
        if rows.ndim != 2 or not rows.size:
            raise DataError(f"{what}; [{first}D] is needed for vectors")
        return rows[:, :, None, None]
    if rows.ndim not in (2, 3) or not rows.size:
        raise DataError(f"{what}; [{first}C, L] or [{first}L] is needed for signals")
    if rows.ndim == 2:
        return rows[:, None, None]
    channels, length = rows.shape[1:]
    if layout is None and channels > length:
        raise DataError(
            f"{what}: as [{first}C, L] these would be signals of {channels} channels and {length} values each; say "
            "layout='NCHW' if they are, or 'NHWC' for [N, L, C] (--layout)"
        )
    return (rows.transpose(0, 2, 1) if layout == "NHWC" else rows)[:, :, None]


def _nearest(dtype: np.dtype[Any]) -> str:
    """Dtype to convert another one to, in an error."""
    return "float32" if dtype.kind in "fc" or dtype.itemsize > 2 else "uint8" if dtype.kind == "b" else "int16"


def _label(label: Any, place: int) -> Any:
    """Label of one item: None, a text, a number, or numbers [A]."""
    if label is None or isinstance(label, str):
        return label
    number = _as_numpy(label, f"the label of item {place} of data")
    if number.ndim > 1 or number.dtype.kind not in "iufbU":
        raise DataError(f"the label of item {place} of data is {str(label)[:60]!r}, neither numbers nor a text")
    return number.item() if number.ndim == 0 else number


def _of_list(labels: list[Any]) -> NDArray[Any]:
    """Raw labels of all items."""
    if isinstance(labels[0], np.ndarray):
        if len({one.shape if isinstance(one, np.ndarray) else None for one in labels}) > 1:
            raise DataError("the labels of items of data differ in their number; give each as many")
        return raw_labels(np.stack(labels), len(labels))
    column = np.empty(len(labels), object)
    column[:] = labels
    return raw_labels(column, len(labels))


def _names_of(data: Any) -> tuple[str, ...] | None:
    """Class names of a data set in torchvision's manner."""
    names = getattr(data, "classes", None)
    return tuple(map(str, names)) if isinstance(names, list | tuple) and names else None


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) or hasattr(value, "detach")


def _as_numpy(value: Any, name: str) -> NDArray[Any]:
    """An array of NumPy; of a tensor without its graph, whatever its device. `name` is its name in errors."""
    try:
        if not hasattr(value, "detach"):
            return np.asarray(value)
        tensor = value.detach().cpu()
        # NumPy has no bfloat16.
        return np.asarray((tensor.float() if tensor.is_floating_point() else tensor).numpy())
    except Exception as error:  # of a ragged list, a sparse tensor, one without memory, ...
        raise DataError(f"{name} cannot be read as an array: {_told(error)}") from error
