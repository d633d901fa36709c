"""What a request asks for, and how its answer is to be generated: plain values, checked when they are made."""

import dataclasses
import math
import operator
from typing import Any

from paligemma_jax.errors import SamplingError
from paligemma_jax.tasks.prompts import Prompt, read_prompt


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are greedy decoding.

    temperature: 0 takes the likeliest token; above, logits are divided by it and a token is drawn.
    top_k: draw among the k likeliest tokens only; 0 means all.
    top_p: draw among the fewest tokens that hold this probability together (arXiv 1904.09751); 1 means all.
    min_p: draw among tokens at least this much as probable as the likeliest (arXiv 2407.01082); 0 means all.
    num_beams: 1, or the number of beams of a beam search, which does not sample.
    seed: of the random draws; the same seed, prompt and image give the same answer, in whatever batch.

    The filters apply in this order to the distribution after temperature; tokens as likely as the last one kept are
    kept too.

    Raises:
      SamplingError: a value without meaning, or beams together with a temperature.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    num_beams: int = 1
    seed: int = 0

    def __post_init__(self):
        _require(_is_real(self.temperature) and self.temperature >= 0, self, "temperature", "a number of at least 0")
        _require(_is_real(self.top_p) and 0 < self.top_p <= 1, self, "top_p", "above 0 and at most 1 (all)")
        _require(_is_real(self.min_p) and 0 <= self.min_p <= 1, self, "min_p", "between 0 (all) and 1")
        for name, least, most in (("top_k", 0, None), ("num_beams", 1, None), ("seed", 0, 2**32 - 1)):
            object.__setattr__(self, name, integer(name, getattr(self, name), least, most))
        if self.num_beams > 1 and self.temperature > 0:
            raise SamplingError(
                f"num_beams={self.num_beams} with temperature={self.temperature}: beam search does not sample, "
                "set one of them back to its default"
            )

    @property
    def filters(self) -> bool:
        """Whether tokens are left out before one is drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Options of one answer.

    max_new_tokens: <eos> included.
    min_new_tokens: <eos> is not said before; not together with `constrain`.
    sampling: how tokens are chosen.
    constrain: answers to `detect` and `segment` prompts can be nothing but objects with the labels asked for, or empty;
      see `engine.constraints.grammar`. Other prompts are answered freely.
    speculate: propose draft tokens and check them all at once: the same answer, faster or slower. None leaves it to
      `engine.strategies.speculation.choose_num_drafts`.

    Raises:
      SamplingError: a value without meaning, or beams together with speculation.
    """

    max_new_tokens: int = 100
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    constrain: bool = False
    speculate: bool | None = None
    min_new_tokens: int = 0

    def __post_init__(self):
        object.__setattr__(self, "max_new_tokens", integer("max_new_tokens", self.max_new_tokens, 1))
        minimum = integer("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens)
        object.__setattr__(self, "min_new_tokens", minimum)
        if minimum and self.constrain:
            raise SamplingError(
                f"min_new_tokens={minimum} with constrain: a grammar ends answers, leave out one of them"
            )
        if not isinstance(self.sampling, Sampling):
            raise SamplingError(f"sampling={self.sampling!r} is not possible: give a paligemma_jax.Sampling")
        if self.speculate and self.sampling.num_beams > 1:
            raise SamplingError(
                f"num_beams={self.sampling.num_beams} with speculation: beams have none, leave out one of them"
            )


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt about one image or several seen together.

    images: as `load_image` takes them.
    prompt: what is asked, taken apart once.
    options: how the answer is generated.
    """

    images: tuple[Any, ...]
    prompt: Prompt
    options: GenerateOptions = dataclasses.field(default_factory=GenerateOptions)

    @classmethod
    def of(cls, image: Any, prompt: str, **options: Any) -> "Request":
        """A request from plain values: an image or a list of images, a text, and fields of `GenerateOptions`."""
        images = tuple(image) if isinstance(image, list | tuple) else (image,)
        return cls(images, read_prompt(prompt, len(images)), GenerateOptions(**options))


def integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """`value` as an int, which numpy's integers become; SamplingError when it is none or out of range."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise SamplingError(f"{name}={value!r} is not possible: give an integer {allowed}")
    return number


def _require(holds: bool, sampling: Sampling, name: str, allowed: str) -> None:
    if not holds:
        raise SamplingError(f"{name}={getattr(sampling, name)!r} is not possible: give {allowed}")


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
