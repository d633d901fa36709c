import pytest

from paligemma_jax.errors import DataError
from paligemma_jax.tasks.classes import number_of, numbered


def test_numbers():
    assert numbered(["cat", "dog", "cat"]) == {"cat": 0, "dog": 1}
    assert numbered(["cat", "dog"], first=1) == {"cat": 1, "dog": 2}
    assert number_of("dog", {"dog": 7}) == 7
    with pytest.raises(DataError, match="label 'cow' is not among the classes"):
        number_of("cow", {"dog": 7})
