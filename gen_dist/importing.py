"""Importing large packages without Python's garbage collector, which takes a seventh of the time that torch takes."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quick_import_of(module: str) -> Iterator[None]:
    """Within it, unless the module is there already, nothing is collected, and what is made is never looked at again.

    Modules, classes and functions stay as long as the process does. Looking through them finds nothing, at imports and
    later in the training loop.
    """
    if module in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
