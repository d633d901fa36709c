"""What prompts ask for: tasks and labels."""

import pytest

from paligemma_jax.tasks.detection import NUM_CODES
from paligemma_jax.tasks.prompts import TASK_WORDS, TASKS, Prompt, read_prompt

LABELS = [
    ("detect cat", ["cat"]),
    ("detect cat ; dog", ["cat", "dog"]),
    ("  segment cat;traffic   light ;; cat;", ["cat", "traffic light"]),
    ("detect\tcat", ["cat"]),
    ("detect", []),
    ("detect ;", []),
    ("caption en", []),
    ("answer en cat ; dog", []),
    ("detective story ; dog", []),
    ("", []),
]


@pytest.mark.parametrize("text, labels", LABELS)
def test_labels_of_a_prompt(text, labels):
    prompt = read_prompt(text)
    assert prompt.text == text and list(prompt.labels) == labels
    parts = prompt.per_label()
    assert [label for part in parts for label in part.labels] == labels
    if len(labels) < 2:
        assert parts == [prompt]
    else:
        assert [part.text for part in parts] == [f"{text.split()[0]} {label}" for label in labels]
        assert {part.task for part in parts} == {prompt.task}


@pytest.mark.parametrize(
    "text, task",
    [
        ("caption en", "caption"),
        ("cap de", "caption"),
        ("describe en", "caption"),
        ("answer en what is this?", "answer"),
        ("question en a cat", "question"),
        ("detect cat", "detect"),
        ("  segment cat", "segment"),
        ("ocr", "ocr"),
        ("Detect cat", None),
        ("detection", None),
        ("what is this?", None),
        (" ", None),
    ],
)
def test_the_first_word_is_the_task(text, task):
    assert read_prompt(text).task == (TASKS[task] if task else None)


@pytest.mark.parametrize(
    "text, canonical",
    [
        ("detect cat;dog", "detect cat ; dog"),
        ("  segment  cat ;traffic   light;; cat ", "segment cat ; traffic light"),
        ("detect cat", "detect cat"),
        ("detect", "detect"),
        ("detect ;", "detect ;"),
        ("caption  en", "caption  en"),
        ("a ; b", "a ; b"),
    ],
)
def test_labels_are_joined_as_in_training(text, canonical):
    prompt = read_prompt(text)
    assert prompt.canonical == canonical
    again = read_prompt(canonical)
    assert (again.task, again.labels, again.canonical) == (prompt.task, prompt.labels, canonical)


def test_what_answers_hold_is_in_one_table():
    assert {name for name, task in TASKS.items() if task.has_objects} == {"detect", "segment"}
    assert {name: task.num_codes for name, task in TASKS.items() if task.num_codes} == {"segment": NUM_CODES}
    assert all(task.name == name and name in task.words for name, task in TASKS.items())
    assert all(word in task.words for word, task in TASK_WORDS.items())
    assert len(TASK_WORDS) == sum(len(task.words) for task in TASKS.values())  # no word asks for two


def test_equal_prompts_are_equal_keys():
    """Tables of grammars are looked up by them."""
    assert {read_prompt("detect cat"): 1}[read_prompt("detect cat")] == 1
    assert read_prompt("detect cat") == Prompt("detect cat", TASKS["detect"], ("cat",)) != read_prompt("segment cat")
