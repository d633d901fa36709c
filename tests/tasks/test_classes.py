import pytest

from paligemma_jax.errors import DataError
from paligemma_jax.tasks.classes import number_of, numbered


def test_numbers():
    assert numbered(["cat", "dog", "cat"]) == {"cat": 0, "dog": 1}
    assert numbered(["cat", "dog"], first=1) == {"cat": 1, "dog": 2}
    assert number_of("dog", {"dog": 7}) == 7
    with pytest.raises(DataError, match="label 'cow' is not among the classes"):
        number_of("cow", {"dog": 7})


def test_an_object_without_a_label_has_a_class():
    assert number_of("", {"dog": 7}) == 7
    assert number_of("", {"dog": 7, "object": 3}) == 3
    assert number_of("", {"": 0, "dog": 1}) == 0
    for numbers in ({"dog": 7, "cat": 8}, {}):
        with pytest.raises(DataError, match="an object has no label: give it one, or add 'object' to the classes"):
            number_of("", numbers)
