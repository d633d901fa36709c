"""What a prompt asks: the one table of tasks, and a prompt taken apart.

Parser, grammar, drafts, command line and report all look here; so does whatever takes a prompt from outside.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence

from paligemma_jax.errors import PromptError
from paligemma_jax.tasks.reading import NUM_CODES, is_label

FORM = "{task} {classes}"  # how the released models are asked for objects
BARE = "bare"  # short for "{phrase}": fine-tunes on RefCOCO are asked with the phrase alone

_PLACEHOLDERS = re.compile(r"\s*(?:(?:<image>|<bos>)\s*)+")  # white space too, as "<image> caption en" has it
_FIELD = re.compile(r"\{[^{}]*\}|[{}]")
_FIELDS = ("{task}", "{classes}", "{phrase}")


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
    is_bare: the classes are asked for in a form of their own, and objects in the answer may have no label.
    """

    text: str
    task: Task | None
    labels: tuple[str, ...]
    is_bare: bool = False

    @property
    def canonical(self) -> str:
        """The text as the models were trained: "detect cat ; dog" for "<image>detect cat;dog"."""
        is_usual = self.task and self.labels and not self.is_bare
        return _fill(FORM, self.task, self.labels) if is_usual else plain(self.text)

    def parts(self, form: str = FORM, split_classes: bool = False) -> list["Prompt"]:
        """The prompts to ask for this one; there is one answer to each.

        Args:
          form: how a detect or segment prompt is written, see `check_form`.
          split_classes: ask for each class in a prompt of its own, as forms with {phrase} do anyway.
        """
        form = check_form(form)
        if not self.labels:
            return [read_prompt(self.canonical)]
        each = split_classes or "{phrase}" in form
        groups = [(label,) for label in self.labels] if each else [self.labels]
        return [Prompt(_fill(form, self.task, group), self.task, group, form != FORM) for group in groups]


def plain(text: str, num_images: int | None = None) -> str:
    """A prompt without what other processors want to see in it, as the model's own is laid out anyway.

    That is `<image>`, once for each image, and `<bos>` at its beginning, and line breaks at its end, real ones or the
    two letters `\\n` of a shell, with the white space around them. Elsewhere they are text.

    Args:
      num_images: how many there are, if known; PromptError when there are more `<image>` than that.
    """
    if not isinstance(text, str):
        raise PromptError(f"a prompt is a text, not {type(text).__name__}: {text!r:.80}")
    if opening := _PLACEHOLDERS.match(text):
        count = opening[0].count("<image>")
        if num_images is not None and count > num_images:
            images = "1 image" if num_images == 1 else f"{num_images} images"
            raise PromptError(f"a prompt begins with {count} <image> and has {images}: write one for each, or none")
        text = text[opening.end() :]
    short, rest = text, ""
    while short != rest:  # from the end, as often as there is something to take off
        rest, short = short, short.rstrip().removesuffix("\\n").removesuffix("\\r")
    return short if "\n" in text[len(short) :] or "\\n" in text[len(short) :] else text


def read_prompt(prompt: str | Prompt, num_images: int | None = None) -> Prompt:
    """Take a prompt apart: task and labels; one that is taken apart stays as it is. `num_images` as for `plain`."""
    if isinstance(prompt, Prompt):
        return prompt
    word, *rest = plain(prompt, num_images).split(maxsplit=1) or [""]
    task = TASK_WORDS.get(word)
    return Prompt(prompt, task, split_labels(rest[0]) if rest and task and task.has_objects else ())


def split_labels(text: str) -> tuple[str, ...]:
    """The names in "cat ; grey dog", each once, in their order, with single blanks."""
    return tuple(dict.fromkeys(label for name in text.split(";") if (label := " ".join(name.split()))))


def class_prompts(
    task: str, classes: str | Sequence[str], form: str = FORM, split_classes: bool = False
) -> list[Prompt]:
    """The prompts to ask for some classes: "cat ; dog", or a list of names. The rest is as for `Prompt.parts`.

    Raises:
      PromptError: no classes, or some that no object can have for a label; another task than detect and segment.
    """
    names = list(classes) if isinstance(classes, Iterable) and not isinstance(classes, str) else [classes]
    if task not in TASKS or not TASKS[task].has_objects:
        raise PromptError(f"task={task!r} is not possible: give detect or segment")
    is_text = all(isinstance(name, str) for name in names)
    names = list(map(plain, names)) if is_text else []
    prompt = read_prompt(f"{task} {' ; '.join(names)}")
    if not prompt.labels or not all(map(is_label, prompt.labels if isinstance(classes, str) else names)):
        raise PromptError(f"classes={classes!r} is not possible: give names, as in 'cat ; dog' or ['cat', 'dog']")
    return prompt.parts(form, split_classes)


def check_form(form: str) -> str:
    """A form of prompts for classes: a text with {classes} (all, joined by " ; ") or {phrase} (a prompt for each).

    It may hold {task} too; `BARE` is short for "{phrase}". PromptError for another one.
    """
    form = "{phrase}" if form == BARE else form
    fields = _FIELD.findall(form) if isinstance(form, str) else []
    if len({"{classes}", "{phrase}"}.intersection(fields)) != 1 or not set(fields) <= set(_FIELDS):
        raise PromptError(
            f"prompt_form={form!r} is not possible: give {BARE}, or a text with {{classes}} or {{phrase}} "
            f"and perhaps {{task}} in it, as in '{FORM}'"
        )
    return form


def advice(prompt: Prompt) -> str | None:
    """How a prompt without a result might be asked better, as the models were trained; None when it is so already."""
    asked = prompt.canonical
    word, *rest = re.split(r"[\s:]+", asked.strip(), maxsplit=1)
    task = TASK_WORDS.get(word.lower())
    if task is None or prompt.is_bare:
        return None
    if task.has_objects:
        names = dict.fromkeys(_names(rest[0].split(";") if rest else []))
        better = f"{task.name} {' ; '.join(names)}" if names else asked
    else:
        language, *question = rest[0].split(maxsplit=1) if rest else [""]
        better = " ".join(filter(None, (word.lower(), language.lower(), *question)))
    return None if better == asked else better


def _names(labels: Sequence[str]) -> Iterator[str]:
    """Labels in lower case, those apart that were joined in another way than by " ; "."""
    for label in labels:
        for name in re.split(r"[,;|/\n，；、]|\s(?:and|or|und|&)\s", label.lower()):
            if short := " ".join(name.strip(" \t.!?\"'“”").split()):
                yield short


def _fill(form: str, task: Task, labels: Sequence[str]) -> str:
    values = {"{task}": task.name, "{classes}": " ; ".join(labels), "{phrase}": labels[0]}
    return _FIELD.sub(lambda field: values[field[0]], form)
