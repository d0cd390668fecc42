"""Imports without the garbage collector, whose state is restored afterwards."""

import gc

import pytest

from gen_dist.importing import quick_import


def test_the_collector_is_off_within_and_restored_afterwards() -> None:
    assert gc.isenabled()
    with quick_import():
        assert not gc.isenabled()
        with quick_import():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_the_collector_is_on_again_after_a_failed_import() -> None:
    with pytest.raises(ImportError), quick_import():
        raise ImportError
    assert gc.isenabled()
