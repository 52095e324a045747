"""What all tests share: no network, and no cache of data but their own."""

import gc
import os
import tempfile
from unittest import mock

import pytest

_CACHE = tempfile.TemporaryDirectory(prefix="rewarm-tests-")
os.environ["HF_DATASETS_CACHE"] = _CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a second thread makes tiny models slower


def pytest_collection_modifyitems(items):
    """Files that have slow tests come first: of two workers, none is then left with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def environment_of_its_own():
    """A trainer leaves variables by which the next one, and what it starts, would take itself for a rank."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def no_worker_outlives_the_test():
    """Ends loader workers now: collected during a later test, they would take its time and its alarms."""
    yield
    gc.collect()
