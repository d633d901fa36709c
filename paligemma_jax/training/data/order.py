"""Which example comes when: a pure function of a counter and a seed, without a list of all.

So a run goes on in the middle of an epoch with nothing saved but its step, on any number of workers and hosts.
"""

import dataclasses
from fractions import Fraction

_MASK = 2**64 - 1
_ROUNDS = 6


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of examples of one source or several.

    An epoch shows `weight * size` examples of each source, the sources evenly mixed; what is left over of a source is
    shown in the next one. A source is shown whole before any of it is shown again, each time in another order.

    sizes: number of examples of each source.
    weights: how often each of its examples is shown in an epoch, above 0.
    """

    sizes: tuple[int, ...]
    weights: tuple[Fraction, ...]
    seed: int

    def num_examples(self, epochs: int) -> int:
        """How many examples some epochs show; a fraction is left out."""
        return int(epochs * sum(map(_times, self.weights, self.sizes)))

    def __call__(self, counter: int) -> tuple[int, int]:
        """The source of the example that is shown at `counter`, and its index there."""
        source, position = self._source(counter)
        epoch, place = divmod(position, self.sizes[source])
        return source, shuffled_index(place, self.sizes[source], _mixed(self.seed, source, epoch))

    def _source(self, counter: int) -> tuple[int, int]:
        """The source, and how many of its examples were shown before.

        The first source has `round(share * counter)` of the first `counter` examples; the others share the rest so.
        """
        if len(self.sizes) == 1:
            return 0, counter
        left = sum(map(_times, self.weights, self.sizes))
        for source, (weight, size) in enumerate(zip(self.weights, self.sizes, strict=True)):
            share = weight * size / left
            before, after = (int(share * n + Fraction(1, 2)) for n in (counter, counter + 1))
            if after > before or source == len(self.sizes) - 1:
                return source, before
            counter -= before
            left -= weight * size
        raise AssertionError("no sources")


def _times(weight: Fraction, size: int) -> Fraction:
    return weight * size


def shuffled_index(index: int, size: int, key: int) -> int:
    """The place of `index` in a permutation of range(size) that `key` names.

    A Feistel network over the next even number of bits, applied until the result is in range.
    Source: Black and Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mix(right ^ _mix(key + number)) & low)
        index = left << half | right
        if index < size:
            return index


def _mixed(*values: int) -> int:
    key = 0
    for value in values:
        key = _mix(key ^ (value & _MASK))
    return key


def _mix(value: int) -> int:
    """64 bits in which every bit depends on all of `value`: a step of splitmix64."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31
