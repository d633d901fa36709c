"""Numbers of classes in the files of other tools, where each object has one."""

from collections.abc import Mapping, Sequence

from paligemma_jax.errors import DataError

UNNAMED = "object"  # the class of what has no label


def numbered(classes: Sequence[str], first: int = 0) -> dict[str, int]:
    """The number of each class, counted from `first`; of equal names the first counts."""
    numbers: dict[str, int] = {}
    for number, name in enumerate(classes, first):
        numbers.setdefault(name, number)
    return numbers


def number_of(label: str, numbers: Mapping[str, int]) -> int:
    """The number of a label's class; DataError when there is none.

    An object without a label is of the only class, or of `UNNAMED`.
    """
    if not label and "" not in numbers:
        if len(numbers) == 1:
            return next(iter(numbers.values()))
        if UNNAMED not in numbers:
            raise DataError(f"an object has no label: give it one, or add {UNNAMED!r} to the classes")
        return numbers[UNNAMED]
    if label not in numbers:
        raise DataError(f"label {label!r} is not among the classes: add it to them")
    return numbers[label]
