"""Shuffles by formula: where an example goes is computed, so that a corpus of any size needs no list."""

import hashlib
import math
import struct

from rewarm.checks import at_least

_MASK = 2**64 - 1
_ROUNDS = 16


class Permutation:
    """A pseudo-random order of 0..size-1 that takes no memory: place -> example, and back.

    Numbers are written as x = a * b_side + b on a board of a_side * b_side >= size fields. A round adds to
    one coordinate a keyed hash of the other, modulo its side, and so can be undone; 16 rounds alternate. A
    result outside 0..size-1 goes through again. The board has fewer than 2 sqrt(size) + 3 fields too many, so
    that this is rare but for the smallest sizes.

    Args:
        size: Number of examples, >= 1.
        seed: Seed of the order.
        stream: Numbers that tell orders of one seed apart, such as the source and the pass.

    Example:
        >>> shuffled = Permutation(10, seed=1)
        >>> [shuffled(place) for place in range(10)]
        [7, 0, 5, 8, 2, 4, 1, 9, 3, 6]
        >>> shuffled.inverse(5)
        2

    Raises:
        ValueError: If the size is below 1.

    Source: Feistel network over two unequal sides (Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains", with their cycle walking). Differs: the hash is a multiplication and a shift, twice, which is
    fast and not secret; the second side is even, since with two odd sides no order would be an odd
    permutation (ours).
    """

    def __init__(self, size: int, seed: int = 0, stream: tuple[int, ...] = ()) -> None:
        at_least(1, size=size)
        self.size = size
        self._a_side = math.isqrt(size - 1) + 1
        self._b_side = 2 * -(-size // (2 * self._a_side))
        name = repr((int(seed), *map(int, stream))).encode()
        self._keys = struct.unpack(f"<{_ROUNDS}Q", hashlib.shake_128(name).digest(8 * _ROUNDS))

    def __len__(self) -> int:
        """Return the number of examples."""
        return self.size

    def __call__(self, place: int) -> int:
        """Return the example at a place, both in [0, size).

        Raises:
            ValueError: If the place is out of range.
        """
        self._check("place", place)
        while True:
            a, b = divmod(place, self._b_side)
            for number, key in enumerate(self._keys):
                if number % 2:
                    a = (a + _hash(b, key)) % self._a_side
                else:
                    b = (b + _hash(a, key)) % self._b_side
            place = a * self._b_side + b
            if place < self.size:
                return place

    def inverse(self, example: int) -> int:
        """Return the place of an example, both in [0, size).

        Raises:
            ValueError: If the example is out of range.
        """
        self._check("example", example)
        while True:
            a, b = divmod(example, self._b_side)
            for number in reversed(range(_ROUNDS)):
                if number % 2:
                    a = (a - _hash(b, self._keys[number])) % self._a_side
                else:
                    b = (b - _hash(a, self._keys[number])) % self._b_side
            example = a * self._b_side + b
            if example < self.size:
                return example

    def _check(self, name: str, number: int) -> None:
        if not 0 <= number < self.size:
            raise ValueError(f"{name} is {number}; it must be in 0 to {self.size - 1}")


def _hash(number: int, key: int) -> int:
    number = (number + key) * 0x9E3779B97F4A7C15 & _MASK
    number = (number ^ number >> 32) * 0xD6E8FEB86659FD93 & _MASK
    return number ^ number >> 32
