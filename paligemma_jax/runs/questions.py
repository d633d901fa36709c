"""A prompt as the user gave it, and the prompts that the model is asked for it."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

import paligemma_jax as pj
from paligemma_jax.runs import settings
from paligemma_jax.tasks.prompts import Prompt, read_prompt


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt and its parts: itself, or a prompt for each of its classes; there is one answer to each."""

    prompt: str
    parts: tuple[Prompt, ...]

    @classmethod
    def of(cls, text: str, split_classes: bool = False) -> "Question":
        """A prompt that is asked as it is, or class by class."""
        prompt = read_prompt(text)
        parts = prompt.per_label() if split_classes else [prompt]
        return cls(text, tuple(read_prompt(part.canonical) for part in parts))


def questions(config: ConfigDict) -> list[Question]:
    """The prompts of a run, in parts if it says so."""
    prompts = settings.prompts(config)
    return [Question.of(prompt, config.split_classes) for prompt in prompts]


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
