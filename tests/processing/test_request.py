"""Values that a request may have, and those that are refused."""

import dataclasses

import numpy as np
import pytest

import paligemma_jax as pj
from paligemma_jax.errors import SamplingError
from paligemma_jax.processing.request import GenerateOptions, Request, Sampling, integer


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": True}, "temperature=True"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"min_p": 2}, "min_p=2"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beams": 4, "temperature": 0.5}, "num_beams=4 with temperature=0.5"),
        ({"num_beams": True}, "num_beams=True"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
    ],
)
def test_values_without_meaning_are_named_in_one_line(values, named):
    with pytest.raises(SamplingError) as error:
        Sampling(**values)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_integers_of_numpy_are_taken():
    sampling = Sampling(top_k=np.int8(100), num_beams=np.int32(1), seed=np.uint32(7))
    assert sampling == Sampling(top_k=100, seed=7)
    assert {type(value) for value in (sampling.top_k, sampling.num_beams, sampling.seed)} == {int}
    options = GenerateOptions(np.int64(7), min_new_tokens=np.uint8(2))
    assert options == GenerateOptions(7, min_new_tokens=2)
    assert {type(options.max_new_tokens), type(options.min_new_tokens)} == {int}
    assert integer("x", np.int32(3), 0) == 3


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 is not possible: give an integer of at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"max_new_tokens": "many"}, "max_new_tokens='many'"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens=5 is not possible: give an integer from 0 to 4"),
        ({"min_new_tokens": 1.0}, "min_new_tokens=1.0"),
        ({"min_new_tokens": 1, "constrain": True}, "min_new_tokens=1 with constrain"),
        ({"sampling": {"temperature": 1.0}}, "give a paligemma_jax.Sampling"),
        ({"sampling": None}, "sampling=None"),
        ({"sampling": Sampling(num_beams=2), "speculate": True}, "num_beams=2 with speculation"),
    ],
)
def test_options_without_meaning_are_named_in_one_line(values, named):
    with pytest.raises(SamplingError) as error:
        GenerateOptions(**values)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(SamplingError):
        Request.of("cat.png", "caption en", **values)


def test_options_that_are_possible_are_taken():
    options = GenerateOptions(max_new_tokens=4, min_new_tokens=4)
    assert (options.max_new_tokens, options.min_new_tokens) == (4, 4)
    GenerateOptions(sampling=Sampling(num_beams=2), speculate=False)
    GenerateOptions(sampling=Sampling(num_beams=2), speculate=None, constrain=True)
    assert GenerateOptions().sampling == Sampling() and GenerateOptions().max_new_tokens == 100
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.max_new_tokens = 5


@pytest.mark.parametrize(
    "values, filters",
    [
        ({}, False),
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.1}, False),  # greedy all the same
        ({"temperature": 1.0}, False),
        ({"temperature": 1.0, "top_k": 3}, True),
        ({"temperature": 1.0, "top_p": 0.5}, True),
        ({"temperature": 1.0, "min_p": 0.1}, True),
    ],
)
def test_what_filters(values, filters):
    assert Sampling(**values).filters is filters


def test_a_request_of_plain_values():
    image = np.zeros((2, 2, 3), np.uint8)
    request = Request.of(image, "detect cat ; dog", max_new_tokens=7, constrain=True)
    assert len(request.images) == 1 and request.images[0] is image
    assert (request.prompt.text, request.prompt.labels) == ("detect cat ; dog", ("cat", "dog"))
    assert request.options == GenerateOptions(7, constrain=True)
    assert Request.of(["a.png", image], "caption en").images == ("a.png", image)
    assert Request.of(("a.png", "b.png"), "caption en").images == ("a.png", "b.png")
    assert Request.of("a.png", "caption en").options == GenerateOptions()
    with pytest.raises(TypeError, match="temperature"):
        Request.of("a.png", "caption en", temperature=1.0)
    assert pj.Request is Request and pj.GenerateOptions is GenerateOptions
