"""Functions for sandboxes that do whatever a text says: the worst that a worker can be told."""

import ctypes
import time


def make_run():
    """The value of a text of Python, which ends in an assignment to `value`."""

    def run(text):
        names = {"ctypes": ctypes, "libc": ctypes.CDLL(None, use_errno=True)}
        exec(text, names)
        return names.get("value")

    return run


def make_number():
    """How many items this worker had before; `None` in place of an item takes a second first."""
    seen = []

    def number(item):
        if item == "crash if not fresh" and seen:
            ctypes.string_at(0)
        if item == "memory if not fresh" and seen:
            raise MemoryError
        if isinstance(item, float):
            time.sleep(item)
        seen.append(item)
        return len(seen) - 1

    return number


def make_nothing():
    raise RuntimeError("there is nothing to import")
