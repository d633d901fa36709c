import itertools
import re

import numpy as np
import pytest

from paligemma_jax.shapes_world.questions import caption, how_many, is_there, locate, matches, sample_question
from paligemma_jax.shapes_world.questions import what_color as ask_color
from paligemma_jax.shapes_world.questions import what_shape as ask_shape
from paligemma_jax.shapes_world.scenes import COLORS, SHAPES

NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5}
GERMAN_NUMBERS = {"ein": 1, "eine": 1, "zwei": 2, "drei": 3, "vier": 4, "fünf": 5}
RNG = np.random.default_rng(0)
KINDS = [[(str(RNG.choice(COLORS)), str(RNG.choice(SHAPES[:3]))) for _ in range(n)] for n in (1, 2, 3, 4) * 20]
FIVE = [[KINDS[3 + 4 * i][0]] * i + (KINDS[3 + 4 * i] + KINDS[2])[i:5] for i in range(6)]


def parts(text, conjunction):
    return re.split(f", | {conjunction} ", text)


@pytest.mark.parametrize("kinds", KINDS + FIVE)
def test_captions_name_everything_once(kinds):
    said = []
    for part in parts(caption(kinds), "and"):
        number, color, shape = part.split()
        assert shape.endswith("s") == (NUMBERS[number] > 1)
        said += [(color, shape.removesuffix("s"))] * NUMBERS[number]
    assert sorted(said) == sorted(kinds)
    german = parts(caption(kinds, "de"), "und")
    assert sum(GERMAN_NUMBERS[part.split()[0]] for part in german) == len(kinds)
    assert len(set(german)) == len(german) == len(set(kinds))


@pytest.mark.parametrize("kinds", KINDS[3::4])
@pytest.mark.parametrize("language", ["en", "de"])
def test_captions_have_one_order(kinds, language):
    assert len({caption(list(order), language) for order in itertools.permutations(kinds)}) == 1


@pytest.mark.parametrize(
    "kinds, english, german",
    [
        ([("red", "circle")], "a red circle", "ein roter Kreis"),
        ([("orange", "square")], "an orange square", "ein orangefarbenes Quadrat"),
        ([("green", "diamond")], "a green diamond", "eine grüne Raute"),
        ([("blue", "star")] * 3, "three blue stars", "drei blaue Sterne"),
        ([("red", "diamond")] * 5, "five red diamonds", "fünf rote Rauten"),
        ([], "nothing", "nichts"),
        (
            [("yellow", "triangle"), ("red", "circle"), ("yellow", "triangle")],
            "a red circle and two yellow triangles",
            "ein roter Kreis und zwei gelbe Dreiecke",
        ),
        (
            [("purple", "star"), ("blue", "square"), ("red", "square")],
            "a red square, a blue square and a purple star",
            "ein rotes Quadrat, ein blaues Quadrat und ein violetter Stern",
        ),
    ],
)
def test_grammar(kinds, english, german):
    assert (caption(kinds), caption(kinds, "de")) == (english, german)


@pytest.mark.parametrize("kinds", KINDS[1::8])
def test_answers_are_what_counting_gives(kinds):
    for color, shape in itertools.product((None, *COLORS), (None, *SHAPES)):
        fitting = [kind for kind in kinds if color in (None, kind[0]) and shape in (None, kind[1])]
        assert how_many(kinds, color, shape).suffix == str(len(fitting))
        if shape:
            assert is_there(kinds, color, shape).suffix == ("yes" if fitting else "no")
    for shape in SHAPES:
        colors = {c for c, s in kinds if s == shape}
        question = ask_color(kinds, shape)
        assert question.suffix == "".join(colors) if len(colors) < 2 else question is None
    for color in COLORS:
        shapes = {s for c, s in kinds if c == color}
        question = ask_shape(kinds, color)
        assert question.suffix == "".join(shapes) if len(shapes) < 2 else question is None


def test_questions_read_well():
    kinds = [("orange", "star")]
    assert how_many(kinds, None, None).prefix == "answer en how many shapes are there?"
    assert how_many(kinds, "red", None).prefix == "answer en how many red shapes are there?"
    assert how_many(kinds, "red", "star").prefix == "answer en how many red stars are there?"
    assert is_there(kinds, "orange", "star").prefix == "answer en is there an orange star?"
    assert is_there(kinds, None, "star").prefix == "answer en is there a star?"
    assert ask_color(kinds, "star").prefix == "answer en what color is the star?"
    assert ask_shape(kinds, "orange").prefix == "answer en what shape is the orange one?"


def test_things_go_by_class_and_then_from_left_to_right():
    kinds = [("red", "star"), ("blue", "circle"), ("green", "star"), ("red", "star")]
    left = np.array([0.7, 0.5, 0.1, 0.3])
    question = locate("detect", ["star", "blue circle"], kinds, left)
    assert question.prefix == "detect star ; blue circle" and question.task == "detect"
    assert question.objects == ((2, "star"), (3, "star"), (0, "star"), (1, "blue circle"))
    assert locate("segment", ["red star"], kinds, left).objects == ((3, "red star"), (0, "red star"))


def test_what_is_not_there_is_not_found():
    kinds = [("red", "star")]
    assert locate("detect", ["blue star", "circle"], kinds, np.array([0.5])).objects == ()
    assert ask_color(kinds, "circle").suffix == ask_shape(kinds, "blue").suffix == ""
    assert how_many(kinds, "blue", None).suffix == "0"


@pytest.mark.parametrize("task", ["answer", "detect", "segment"])
def test_questions_about_nothing(task):
    rng = np.random.default_rng(0)
    questions = [sample_question(task, [], np.array([]), rng) for _ in range(80)]
    assert all(question.objects == () for question in questions)
    assert {question.suffix for question in questions} == ({"0", "no", ""} if task == "answer" else {""})
    assert len({question.prefix for question in questions}) > 25


@pytest.mark.parametrize("task", ["caption", "answer", "detect", "segment"])
def test_random_questions(task):
    def draw(seed):
        rng = np.random.default_rng(seed)
        return [sample_question(task, kinds, rng.random(len(kinds)), rng) for kinds in KINDS * 3]

    questions = draw(0)
    assert questions == draw(0) != draw(1)
    for question, kinds in zip(questions, KINDS * 3, strict=True):
        assert question.prefix.split()[0] == task == question.task
        if task in ("caption", "answer"):
            assert not question.objects
            continue
        names = question.prefix.removeprefix(task).strip().split(" ; ")
        assert [label for _, label in question.objects] == sorted(
            (label for _, label in question.objects), key=names.index
        )
        for name in names:
            places = [place for place, label in question.objects if label == name]
            assert sorted(places) == [i for i, kind in enumerate(kinds) if matches(kind, name)]
    answered = [bool(q.suffix or q.objects) for q in questions]
    assert any(answered) and (all(answered) == (task == "caption"))


def test_answers_are_not_lopsided():
    """A model that always says the same is wrong about half the time or more."""
    rng = np.random.default_rng(0)
    questions = [sample_question("answer", KINDS[rng.integers(len(KINDS))], np.zeros(4), rng) for _ in range(1500)]
    for start in ("how many", "is there", "what color", "what shape"):
        said = [q.suffix for q in questions if q.prefix.startswith(f"answer en {start}")]
        assert len(said) > 75
        assert max(said.count(word) for word in set(said)) < 0.65 * len(said)
