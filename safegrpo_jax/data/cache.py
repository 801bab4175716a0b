"""What the processor made of an image or a text, kept up to a total size: training meets each of them again.

Owns eviction only, the least recently used first. Keys compare by content, so no two data sets can be taken for each
other; the hash of bytes and str is computed once and kept by Python.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable
from typing import Any


class SizedCache:
    """Values by key up to `max_size` in total, in the unit of the `measure` that `get` is given."""

    def __init__(self, max_size: int):
        self._max_size = max_size
        self._size = 0
        self._values: collections.OrderedDict[Hashable, tuple[Any, int]] = collections.OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any], measure: Callable[[Any], int] = lambda value: 1) -> Any:
        """The value of `key`, made if it is not there. A value beyond `max_size` is made and not kept."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key][0]
        value = make()
        size = measure(value)
        if size > self._max_size:
            return value
        self._values[key] = (value, size)
        self._size += size
        while self._size > self._max_size:
            _, (_, freed) = self._values.popitem(last=False)
            self._size -= freed
        return value
