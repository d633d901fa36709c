"""Questions about a scene with their answers: prefixes and suffixes in English and German.

Order is fixed, so that each prompt has one right answer: captions go by shape, then by colour, in the order of the
tables in `scenes`; boxes and masks go by the classes of the prompt, then from left to right.
"""

import dataclasses
from collections import Counter

import numpy as np

from paligemma_jax.shapes_world.scenes import COLORS, SHAPES

Kind = tuple[str, str]  # colour, shape

_NUMBERS = {"en": ("no", "a", "two", "three", "four", "five"), "de": ("kein", "ein", "zwei", "drei", "vier", "fünf")}
NOTHING = {"en": "nothing", "de": "nichts"}  # caption of an empty scene, by language
_GERMAN_SHAPES = {  # singular, plural, gender
    "circle": ("Kreis", "Kreise", "m"),
    "square": ("Quadrat", "Quadrate", "n"),
    "triangle": ("Dreieck", "Dreiecke", "n"),
    "star": ("Stern", "Sterne", "m"),
    "diamond": ("Raute", "Rauten", "f"),
}
_GERMAN_COLORS = {
    "red": "rot",
    "green": "grün",
    "blue": "blau",
    "yellow": "gelb",
    "purple": "violett",
    "orange": "orangefarben",
}
_GERMAN_ENDINGS = {"m": "er", "n": "es", "f": "e"}


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt and its answer; `objects` are (index, label) of the objects to box or mask, in order."""

    prefix: str
    suffix: str = ""
    task: str = "answer"  # caption | answer | detect | segment
    objects: tuple[tuple[int, str], ...] = ()


def caption(kinds: list[Kind], language: str = "en") -> str:
    """Names everything: "a red circle and two blue squares", or "nothing"."""
    if not kinds:
        return NOTHING[language]
    counts = Counter(kinds)
    ordered = sorted(counts, key=lambda kind: (SHAPES.index(kind[1]), COLORS.index(kind[0])))
    name = {"en": _english, "de": _german}[language]
    parts = [name(kind, counts[kind]) for kind in ordered]
    conjunction = {"en": " and ", "de": " und "}[language]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + conjunction + parts[-1]


def _english(kind: Kind, count: int) -> str:
    color, shape = kind
    return f"{article(color)} {color} {shape}" if count == 1 else f"{_NUMBERS['en'][count]} {color} {shape}s"


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _german(kind: Kind, count: int) -> str:
    singular, plural, gender = _GERMAN_SHAPES[kind[1]]
    color = _GERMAN_COLORS[kind[0]]
    if count > 1:
        return f"{_NUMBERS['de'][count]} {color}e {plural}"
    return f"{'eine' if gender == 'f' else 'ein'} {color}{_GERMAN_ENDINGS[gender]} {singular}"


def matches(kind: Kind, name: str) -> bool:
    """Whether a name, such as "circle" or "red circle", is of this kind."""
    return name in (kind[1], f"{kind[0]} {kind[1]}")


def locate(task: str, names: list[str], kinds: list[Kind], left: np.ndarray) -> Question:
    """`detect` or `segment` of one or more classes; `left` [K] are the left edges, which give the order."""
    order = np.argsort(left, kind="stable")
    found = [(int(i), name) for name in names for i in order if i < len(kinds) and matches(kinds[i], name)]
    return Question(f"{task} {' ; '.join(names)}", task=task, objects=tuple(found))


def how_many(kinds: list[Kind], color: str | None, shape: str | None) -> Question:
    count = sum(color in (None, c) and shape in (None, s) for c, s in kinds)
    words = " ".join(filter(None, [color, f"{shape or 'shape'}s"]))
    return Question(f"answer en how many {words} are there?", str(count))


def is_there(kinds: list[Kind], color: str | None, shape: str) -> Question:
    there = any(color in (None, c) and shape == s for c, s in kinds)
    words = f"{color} {shape}" if color else shape
    return Question(f"answer en is there {article(words)} {words}?", "yes" if there else "no")


def what_color(kinds: list[Kind], shape: str) -> Question | None:
    """None when objects of that shape differ in colour; an empty answer when there is none."""
    colors = {c for c, s in kinds if s == shape}
    if len(colors) > 1:
        return None
    return Question(f"answer en what color is the {shape}?", colors.pop() if colors else "")


def what_shape(kinds: list[Kind], color: str) -> Question | None:
    shapes = {s for c, s in kinds if c == color}
    if len(shapes) > 1:
        return None
    return Question(f"answer en what shape is the {color} one?", shapes.pop() if shapes else "")


def _pick(options: tuple[str, ...], present: list[str], rng: np.random.Generator, absent: float) -> str:
    """One of the present ones, or with probability `absent` and if there are none any at all."""
    return str(rng.choice(options if rng.random() < absent or not present else present))


def sample_answer(kinds: list[Kind], rng: np.random.Generator, absent: float = 0.4) -> Question:
    """A random question with a word for an answer."""
    while True:
        color = _pick(COLORS, [c for c, _ in kinds], rng, absent)
        shape = _pick(SHAPES, [s for _, s in kinds], rng, absent)
        draw = rng.random()
        if draw < 0.45:
            asked = [(None, shape), (None, shape), (color, None), (color, shape), (None, None)][rng.integers(5)]
            return how_many(kinds, *asked)
        if draw < 0.65:
            return is_there(kinds, color if rng.random() < 0.75 else None, shape)
        if draw < 0.9:
            shape = _pick(SHAPES, [s for _, s in kinds], rng, 0.08)
            question = what_color(kinds, shape)
        else:
            question = what_shape(kinds, _pick(COLORS, [c for c, _ in kinds], rng, 0.08))
        if question is not None:
            return question


def sample_locate(
    task: str, kinds: list[Kind], left: np.ndarray, rng: np.random.Generator, absent: float = 0.15
) -> Question:
    """A random `detect` or `segment` of one class, or now and then of two."""
    names: list[str] = []
    for _ in range(2 if rng.random() < 0.25 else 1):
        if kinds:
            color, shape = kinds[rng.integers(len(kinds))]
        if not kinds or rng.random() < absent:
            color, shape = str(rng.choice(COLORS)), str(rng.choice(SHAPES))
        name = shape if rng.random() < 0.4 else f"{color} {shape}"
        if not any(name in old or old in name for old in names):
            names.append(name)
    return locate(task, names, kinds, left)


def sample_question(task: str, kinds: list[Kind], left: np.ndarray, rng: np.random.Generator) -> Question:
    """A random question of a task: caption | answer | detect | segment."""
    if task == "caption":
        language = "de" if rng.random() < 0.3 else "en"
        return Question(f"caption {language}", caption(kinds, language), "caption")
    if task == "answer":
        return sample_answer(kinds, rng)
    return sample_locate(task, kinds, left, rng)
