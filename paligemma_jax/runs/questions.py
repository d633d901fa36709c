"""A prompt as the user gave it, and the prompts that the model is asked for it."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

import paligemma_jax as pj
from paligemma_jax.runs import settings
from paligemma_jax.tasks.classes import one_per_class, written_out


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt and its parts: itself, or a prompt for each of its classes; there is one answer to each."""

    prompt: str
    parts: tuple[str, ...]

    @classmethod
    def whole(cls, prompt: str) -> "Question":
        """A prompt that is asked as it is."""
        return cls(prompt, (written_out(prompt),))


def questions(config: ConfigDict) -> list[Question]:
    """The prompts of a run, in parts if it says so."""
    prompts = settings.prompts(config)
    return [Question(p, tuple(one_per_class(p))) if config.split_classes else Question.whole(p) for p in prompts]


def together(outputs: Sequence[pj.Output]) -> pj.Output:
    """The answers to a question's parts as one: texts that are not empty joined by " ; ", tokens one after the other.

    It is cut off when one of them is; its time per token is that of all parts side by side, as they are worked out.
    """
    if len(outputs) == 1:
        return outputs[0]
    tokens = np.concatenate([output.tokens for output in outputs])
    return pj.Output(
        text=" ; ".join(text for output in outputs if (text := output.text.strip())),
        tokens=tokens,
        logprobs=np.concatenate([output.logprobs for output in outputs]),
        finish_reason="length" if any(output.finish_reason == "length" for output in outputs) else "eos",
        timing=dataclasses.replace(outputs[0].timing, new_tokens=len(tokens)),
        near=np.concatenate([output.near for output in outputs]),
        expected=np.concatenate([output.expected for output in outputs]),
    )
