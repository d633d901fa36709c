"""What prompts ask for: tasks and labels."""

import pytest

from paligemma_jax.errors import PromptError
from paligemma_jax.tasks.prompts import (
    FORM,
    TASK_WORDS,
    TASKS,
    Prompt,
    advice,
    check_form,
    class_prompts,
    plain,
    read_prompt,
)
from paligemma_jax.tasks.reading import NUM_CODES

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
    assert prompt.text == text and list(prompt.labels) == labels and read_prompt(prompt) is prompt
    for split in (False, True):
        parts = prompt.parts(split_classes=split)
        assert [label for part in parts for label in part.labels] == labels
        assert {part.task for part in parts} == {prompt.task}
        assert len(parts) == (len(labels) if split and labels else 1)
        assert parts == [read_prompt(part.text) for part in parts]
        if len(labels) > 1 and split:
            assert [part.text for part in parts] == [f"{text.split()[0]} {label}" for label in labels]
        else:
            assert [part.text for part in parts] == [prompt.canonical]


@pytest.mark.parametrize(
    "form, split, asked",
    [
        (FORM, False, ["segment red cat ; dog"]),
        (FORM, True, ["segment red cat", "segment dog"]),
        ("bare", False, ["red cat", "dog"]),
        ("{phrase}", True, ["red cat", "dog"]),
        ("{task} {phrase}", False, ["segment red cat", "segment dog"]),
        ("{task} all {classes}.", False, ["segment all red cat ; dog."]),
        ("{task} all {classes}.", True, ["segment all red cat.", "segment all dog."]),
        ("{classes}", False, ["red cat ; dog"]),
    ],
)
def test_classes_are_asked_for_in_another_form(form, split, asked):
    """prompt_form and split_classes."""
    for parts in (
        read_prompt("segment  red cat;dog").parts(form, split),
        class_prompts("segment", ["red cat", "dog"], form, split),
        class_prompts("segment", "red cat ;dog", form, split),
    ):
        assert [part.text for part in parts] == asked
        assert [label for part in parts for label in part.labels] == ["red cat", "dog"]
        assert {(part.task.name, part.is_bare) for part in parts} == {("segment", form != FORM)}
        assert [part.canonical for part in parts] == asked
        assert [part for again in parts for part in again.parts()] == [
            part for again in parts for part in read_prompt(f"segment {' ; '.join(again.labels)}").parts()
        ]
    assert [part.text for part in read_prompt("caption en").parts(form, split)] == ["caption en"]


def test_names_of_classes_are_plain_too():
    for names in ("<image>cat ; dog\\n", ["<image>cat", "dog\n"], ("cat", "dog"), "cat;dog\n"):
        assert [part.text for part in class_prompts("detect", names)] == ["detect cat ; dog"]


def test_a_label_with_braces_is_put_in_as_it_is():
    assert class_prompts("detect", ["{task}", "a {b}"], "bare") == [
        Prompt(name, TASKS["detect"], (name,), True) for name in ("{task}", "a {b}")
    ]


@pytest.mark.parametrize(
    "form",
    ["", "detect", "{task}", "{phrase} {label}", "{classes} {phrase}", "{phrase", "{", "{0}", "{}", 3],
)
def test_a_form_without_meaning_is_one_line(form):
    for ask in (read_prompt("detect cat").parts, read_prompt("caption en").parts, check_form):
        with pytest.raises(PromptError, match=r"^prompt_form=.* is not possible: give bare, or a text with .*classes"):
            ask(form)


@pytest.mark.parametrize("classes", ["", " ; ", [], ["cat", ""], [3], 3, None, ["a;b"], "<loc0001>", [","]])
def test_classes_that_no_object_can_have(classes):
    with pytest.raises(PromptError, match=r"^classes=.* is not possible: give names"):
        class_prompts("detect", classes)


def test_only_detect_and_segment_ask_for_classes():
    with pytest.raises(PromptError, match=r"^task='caption' is not possible: give detect or segment"):
        class_prompts("caption", "cat")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<image>caption en", "caption en"),
        ("<image><image>caption en", "caption en"),
        ("<image><bos>caption en", "caption en"),
        ("<bos><image>caption en", "caption en"),
        ("<image><image><bos>caption en\n", "caption en"),
        ("<bos>caption en", "caption en"),
        ("<image> caption en", "caption en"),
        (" <image>\n<image>\ncaption en", "caption en"),
        ("<image>", ""),
        ("caption en\n", "caption en"),
        ("caption en\n\n", "caption en"),
        ("caption en\r\n", "caption en"),
        ("caption en\\n", "caption en"),
        ("caption en \\n", "caption en"),
        ("caption en\\n\n", "caption en"),
        ("caption en\\r\\n ", "caption en"),
        ("\\n", ""),
        ("\n", ""),
        # everything else is the prompt
        (" caption en ", " caption en "),
        ("a\nb", "a\nb"),
        ("a\\nb", "a\\nb"),
        ("caption <image> en", "caption <image> en"),
        ("caption en <image>", "caption en <image>"),
        ("<eos><image>caption en", "<eos><image>caption en"),
        ("<IMAGE>caption en", "<IMAGE>caption en"),
        ("image caption en", "image caption en"),
        ("caption en\\", "caption en\\"),
        ("", ""),
    ],
)
def test_what_other_processors_want_is_taken_off(text, expected):
    assert plain(text) == plain(text, 2) == plain(expected) == expected
    prompt = read_prompt(text)
    assert prompt.text == text and prompt.canonical == expected
    assert prompt.task == read_prompt(expected).task
    assert [part.text for part in prompt.parts()] == [expected]


def test_labels_have_no_part_in_what_is_taken_off():
    assert read_prompt("<image><bos>detect cat;dog\\n").labels == ("cat", "dog")
    assert read_prompt("<image>segment cat\n").canonical == "segment cat"


@pytest.mark.parametrize("text, images", [("<image>" * 2 + "x", 1), ("<bos><image> <image>x", 1), ("<image>", 0)])
def test_more_placeholders_than_images_are_one_line(text, images):
    count = text.count("<image>")
    told = rf"^a prompt begins with {count} <image> and has {images} images?: write one for each, or none$"
    with pytest.raises(PromptError, match=told):
        read_prompt(text, images)
    assert plain(text, count) == plain(text)


@pytest.mark.parametrize("text", [None, 3, b"caption en", ["caption en"]])
def test_a_prompt_is_a_text(text):
    with pytest.raises(PromptError, match=r"^a prompt is a text, not"):
        read_prompt(text)


@pytest.mark.parametrize(
    "text, better",
    [
        ("detect Circle; Star", "detect circle ; star"),
        ("detect a,b", "detect a ; b"),
        ("segment cat, dog and bird", "segment cat ; dog ; bird"),
        ("Detect cat", "detect cat"),
        ("DETECT: Cat; cat", "detect cat"),
        ("detect:cat", "detect cat"),
        ("detect cat.", "detect cat"),
        ('segment "cat" | dog', "segment cat ; dog"),
        ("detect cat；dog", "detect cat ; dog"),
        ("Caption EN", "caption en"),
        ("<image>Answer EN How many?\\n", "answer en How many?"),
        ("OCR", "ocr"),
        *[(text, None) for text in ("detect cat", "detect cat;dog", "segment red cat ; dog", "caption en", "ocr", "")],
        *[(text, None) for text in ("detect", "detect ;", "what is this?", "Cat; Dog", "answer en A, B?", "detect ,")],
    ],
)
def test_advice_for_prompts_without_a_result(text, better):
    assert advice(read_prompt(text)) == better
    if better:
        assert advice(read_prompt(better)) is None


def test_there_is_no_advice_for_another_form():
    assert advice(class_prompts("detect", "The Cat, left", "bare")[0]) is None


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
