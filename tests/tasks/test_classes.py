import pytest

from paligemma_jax.errors import DataError
from paligemma_jax.tasks.classes import class_names, number_of, numbered, one_per_class

PROMPTS = [
    ("detect cat", ["cat"]),
    ("detect cat ; dog", ["cat", "dog"]),
    ("  segment cat;traffic   light ;; cat;", ["cat", "traffic light"]),
    ("detect", []),
    ("detect ;", []),
    ("caption en", []),
    ("answer en cat ; dog", []),
    ("detective story ; dog", []),
    ("", []),
]


@pytest.mark.parametrize("prompt, names", PROMPTS)
def test_classes_of_a_prompt(prompt, names):
    assert class_names(prompt) == names
    parts = one_per_class(prompt)
    assert [name for part in parts for name in class_names(part)] == names
    assert (
        parts == [prompt] if len(names) < 2 else [part.split()[0] for part in parts] == prompt.split()[:1] * len(names)
    )


def test_numbers():
    assert numbered(["cat", "dog", "cat"]) == {"cat": 0, "dog": 1}
    assert numbered(["cat", "dog"], first=1) == {"cat": 1, "dog": 2}
    assert number_of("dog", {"dog": 7}) == 7
    with pytest.raises(DataError, match="label 'cow' is not among the classes"):
        number_of("cow", {"dog": 7})
