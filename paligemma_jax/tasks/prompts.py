"""What a prompt asks: the one table of tasks, and a prompt taken apart.

Parser, grammar, drafts, command line and report all look here.
"""

import dataclasses

from paligemma_jax.tasks.detection import NUM_CODES


@dataclasses.dataclass(frozen=True)
class Task:
    """What the first word of a prompt asks for.

    words: first words that ask for it.
    has_objects: answers are boxes with labels, else text.
    num_codes: mask codes of an object.
    """

    name: str
    words: tuple[str, ...]
    has_objects: bool = False
    num_codes: int = 0


TASKS = {
    task.name: task
    for task in (
        Task("caption", ("caption", "cap", "describe")),
        Task("answer", ("answer",)),
        Task("question", ("question",)),
        Task("detect", ("detect",), has_objects=True),
        Task("segment", ("segment",), has_objects=True, num_codes=NUM_CODES),
        Task("ocr", ("ocr",)),
    )
}
TASK_WORDS = {word: task for task in TASKS.values() for word in task.words}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt and what it asks.

    text: as it was given.
    task: of its first word, None for a free prompt.
    labels: the classes that a detect or segment prompt names, each once; () for other tasks.
    """

    text: str
    task: Task | None
    labels: tuple[str, ...]

    @property
    def canonical(self) -> str:
        """The text with its labels joined as the models were trained: "detect cat ; dog" for "detect cat;dog"."""
        return f"{self.task.name} {' ; '.join(self.labels)}" if self.task and self.labels else self.text

    def per_label(self) -> list["Prompt"]:
        """The same question in parts, "detect cat" and "detect dog" for "detect cat ; dog"; itself for one label."""
        if len(self.labels) < 2:
            return [self]
        return [read_prompt(f"{self.task.name} {label}") for label in self.labels]


def read_prompt(text: str) -> Prompt:
    """Take a prompt apart: task and labels."""
    word, *rest = text.split(maxsplit=1) or [""]
    task = TASK_WORDS.get(word)
    names = rest[0].split(";") if rest and task and task.has_objects else []
    return Prompt(text, task, tuple(dict.fromkeys(label for name in names if (label := " ".join(name.split())))))
