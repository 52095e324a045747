"""Packing that keeps the order: best fit over the last few open bins.

Packing a whole data set best-first would sort it by length and destroy a curriculum. Here an example may only
go into one of the last K bins, and bins are given out in the order in which they were opened, so it moves by
fewer than K bins from its place.
"""

from typing import Any

from rewarm.checks import at_least


class Packer:
    """Fills bins of a fixed capacity from a stream of examples.

    Args:
        capacity: Tokens per bin, >= 1.
        open_bins: K, how many bins are held back at most, >= 1. 1 keeps the order strictly (next fit) and
            wastes the most.

    Raises:
        ValueError: If an argument is below 1.

    Example:
        >>> packer = Packer(capacity=10, open_bins=2)
        >>> [packer.add(example, length) for example, length in enumerate([6, 7, 4, 9])]
        [[], [], [[0, 2]], []]
        >>> packer.flush()
        [[1], [3]]

    Source: best fit over a window is textbook bin packing; giving bins out in the order of opening and the
    window of 16 are ours.
    """

    def __init__(self, capacity: int, open_bins: int = 16) -> None:
        at_least(1, capacity=capacity, open_bins=open_bins)
        self.capacity, self.open_bins = capacity, open_bins
        self._bins: list[tuple[int, list[int]]] = []  # (free tokens, examples), oldest first

    def add(self, example: int, length: int) -> list[list[int]]:
        """Put an example in the open bin that it fills best.

        Args:
            example: Its number.
            length: Its tokens, in [1, capacity].

        Returns:
            The bins that this closed, oldest first. A full bin waits for the older ones.

        Raises:
            ValueError: If the example is longer than a bin.
        """
        if not 1 <= length <= self.capacity:
            raise ValueError(f"example {example} has {length} tokens; a bin holds 1 to {self.capacity}")
        fitting = [(free, place) for place, (free, _) in enumerate(self._bins) if free >= length]
        if fitting:
            free, place = min(fitting)
            self._bins[place][1].append(example)
            self._bins[place] = (free - length, self._bins[place][1])
        else:
            self._bins.append((self.capacity - length, [example]))
        closed: list[list[int]] = []
        while self._bins and (self._bins[0][0] == 0 or len(self._bins) > self.open_bins):
            closed.append(self._bins.pop(0)[1])
        return closed

    def flush(self) -> list[list[int]]:
        """Close every open bin and return them, oldest first."""
        bins = [examples for _, examples in self._bins]
        self._bins = []
        return bins

    def state_dict(self) -> dict[str, Any]:
        """Return the open bins as plain Python values."""
        return {"capacity": self.capacity, "bins": [(free, list(examples)) for free, examples in self._bins]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: If the bins were of another capacity.
        """
        if state["capacity"] != self.capacity:
            raise ValueError(
                f"the checkpoint packed rows of {state['capacity']} tokens, this run of {self.capacity}"
            )
        self._bins = [(free, list(examples)) for free, examples in state["bins"]]
