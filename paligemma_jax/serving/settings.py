"""How much an engine serves at once."""

import dataclasses

from paligemma_jax.processing.request import integer


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """How much is served at once, and the most that a request may ask for.

    num_slots: answers that run at once.
    max_waiting: requests that wait for a slot.
    max_new_tokens: of an answer.
    max_prompt_tokens: of a prompt without its images.
    max_images: of a request.
    cache_bytes: of embedded images that are kept for the next request.
    num_steps: decode steps between two looks at what is done; by default 4 on CPU, 8 elsewhere.

    Raises:
      SamplingError: a value without meaning.
    """

    num_slots: int = 16
    max_waiting: int = 256
    max_new_tokens: int = 512
    max_prompt_tokens: int = 512
    max_images: int = 4
    cache_bytes: int = 2**28
    num_steps: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None or field.name != "num_steps":
                integer(field.name, value, 0 if field.name == "cache_bytes" else 1)
