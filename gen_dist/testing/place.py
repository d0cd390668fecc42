"""The line of a part's own code behind a call: not torch's, not that of the package's machinery."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path
from types import FrameType

import numpy
import torch

_PACKAGE = Path(__file__).parent.parent
_TESTING = f"{Path(__file__).parent}{os.sep}"
_PARTS = tuple(
    f"{_PACKAGE / room}{os.sep}" for room in ("objectives", "networks", "data/sources", "evaluation/metrics")
)
_LIBRARIES = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, numpy.__file__, os.__file__))
_SCRIPTS = f"{sysconfig.get_paths()['scripts']}{os.sep}"
_SITE = tuple(f"{sysconfig.get_paths()[name]}{os.sep}" for name in ("purelib", "platlib"))


def is_of_a_part(file: str) -> bool:
    """True for a file with the code of an objective, network, source or metric, ours or a user's."""
    if file.startswith(_PARTS):
        return True
    if file.startswith((f"{_PACKAGE}{os.sep}", "<", _SCRIPTS)):
        return False
    in_site = file.startswith(_SITE)
    return not file.startswith(_LIBRARIES) or (in_site and not file.startswith(_LIBRARIES[:2]))


def place_of(frame: FrameType | None) -> str | None:
    """`file:line` of the innermost frame with a part's code, up to the check that called it."""
    inside = False
    while frame:
        file = frame.f_code.co_filename
        if is_of_a_part(file):
            return f"{_short(file)}:{frame.f_lineno}"
        if not file.startswith(_TESTING):
            inside = True
        elif inside:
            return None
        frame = frame.f_back
    return None


def current_place() -> str | None:
    """`file:line` of the part's code that is running."""
    return place_of(sys._getframe(1))


def has_its_own_gradient() -> bool:
    """True within torch's own modules, as its spectral normalization, and within a `torch.autograd.Function`."""
    frame: FrameType | None = sys._getframe(1)
    while frame and frame.f_code.co_filename.startswith(_TESTING):
        frame = frame.f_back
    while frame and Path(frame.f_code.co_filename).name in ("_tensor.py", "functional.py", "overrides.py"):
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(_LIBRARIES[0]):
        return True
    while not frame.f_code.co_filename.startswith(_TESTING):
        if frame.f_code.co_name == "forward" and frame.f_code.co_varnames[:1] == ("ctx",):
            return True
        if frame.f_back is None:
            break
        frame = frame.f_back
    return False


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file
