"""Names of classes: those that a prompt asks for, and their numbers in the files of other tools."""

from collections.abc import Mapping, Sequence

from paligemma_jax.errors import DataError

_TASKS = ("detect", "segment")


def class_names(prompt: str) -> list[str]:
    """The classes that a detect or segment prompt names, each once: cat and dog in "detect cat ; dog".

    Empty for prompts of other tasks.
    """
    task, *names = prompt.split(maxsplit=1) or [""]
    found = (" ".join(name.split()) for name in names[0].split(";")) if task in _TASKS and names else ()
    return list(dict.fromkeys(name for name in found if name))


def one_per_class(prompt: str) -> list[str]:
    """The same question in parts: "detect cat" and "detect dog" for "detect cat ; dog".

    A prompt that names no more than one class comes back alone, as it is.
    """
    names = class_names(prompt)
    return [f"{prompt.split()[0]} {name}" for name in names] if len(names) > 1 else [prompt]


def written_out(prompt: str) -> str:
    """The prompt with its classes joined as the models were trained, "detect cat ; dog" for "detect cat;dog"."""
    names = class_names(prompt)
    return f"{prompt.split()[0]} {' ; '.join(names)}" if names else prompt


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
