"""Numbers of classes in the files of other tools."""

from collections.abc import Mapping, Sequence

from paligemma_jax.errors import DataError


def numbered(classes: Sequence[str], first: int = 0) -> dict[str, int]:
    """The number of each class, counted from `first`; of equal names the first counts."""
    numbers: dict[str, int] = {}
    for number, name in enumerate(classes, first):
        numbers.setdefault(name, number)
    return numbers


def number_of(label: str, numbers: Mapping[str, int]) -> int:
    """The number of a label's class; DataError when there is none."""
    if label not in numbers:
        raise DataError(f"label {label!r} is not among the classes: add it to them")
    return numbers[label]
