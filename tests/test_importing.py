"""Imports without the garbage collector, which is as it was afterwards."""

import gc
import sys

import pytest

from gen_dist.importing import quick_import_of


def test_the_collector_is_off_for_a_first_import_alone() -> None:
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    with quick_import_of("a_module_that_is_not_there"):
        assert not gc.isenabled()
        made = {"a": "container"}
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen
    assert made not in gc.get_objects()
    frozen = gc.get_freeze_count()
    with quick_import_of(next(iter(sys.modules))):
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
    gc.unfreeze()


def test_the_collector_is_on_again_after_a_failed_import() -> None:
    with pytest.raises(ImportError), quick_import_of("a_module_that_is_not_there"):
        raise ImportError
    assert gc.isenabled()
    gc.unfreeze()
