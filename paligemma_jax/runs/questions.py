"""A prompt as the user gave it, and the prompts that the model is asked for it."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

import paligemma_jax as pj
from paligemma_jax.runs import settings
from paligemma_jax.tasks.prompts import FORM, Prompt, check_form, read_prompt


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt as given and its parts: itself, or a prompt for each of its classes; there is one answer to each."""

    prompt: str
    parts: tuple[Prompt, ...]

    @classmethod
    def of(cls, text: str, form: str = FORM, split_classes: bool = False) -> "Question":
        """A prompt about one picture, as `Prompt.parts` asks it."""
        return cls(text, tuple(read_prompt(text, num_images=1).parts(form, split_classes)))


def questions(config: ConfigDict) -> list[Question]:
    """The prompts of a run, in parts if it says so."""
    check_form(config.prompt_form)  # whatever is asked
    return [Question.of(prompt, config.prompt_form, config.split_classes) for prompt in settings.prompts(config)]


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
