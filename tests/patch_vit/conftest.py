"""The small students and the small CLIP of `small` as fixtures."""

import pytest

from paligemma_jax.patch_vit import Clip, Student
from tests.patch_vit.small import VARIANTS, small_clip, small_student, small_vocabulary


@pytest.fixture(params=list(VARIANTS))
def student(request) -> Student:
    """Both variants."""
    return small_student(request.param)


@pytest.fixture
def masked_student() -> Student:
    return small_student("masked")


@pytest.fixture
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    return small_vocabulary()


@pytest.fixture
def clip() -> Clip:
    return small_clip()
