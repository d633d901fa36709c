"""Who answers the page's questions: what a model in this process and a server elsewhere have in common."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

import paligemma_jax as pj
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.serving.answer import Answer
from paligemma_jax.serving.web.questions import Question
from paligemma_jax.serving.web.snippets import Source

State = Literal["loading", "warming", "ready", "failed"]
TIMEOUT_S = 120.0  # for an answer


@dataclasses.dataclass(frozen=True)
class Status:
    """What visitors are told about the model.

    state: of the one that answers, or of the first one on its way.
    name: of that one.
    news: one line about a model that is being loaded in its place, or could not be; "" for none.
    is_error: the news are bad.
    """

    state: State
    name: str
    news: str = ""
    is_error: bool = False


class Served(Protocol):
    """A model that answers.

    source: how others reach it.
    model: itself, None when it is elsewhere.
    tokenizer: of its tokens, None when they are not known.
    """

    source: Source
    model: pj.PaliGemma | None
    tokenizer: Tokenizer | None

    def ask(self, question: Question, client: str) -> Answer:
        """Have a question answered; UserError when it cannot be. Clients take turns."""

    def objects(
        self, output: pj.Output, size: tuple[int, int], labels: Sequence[str]
    ) -> tuple[list[pj.Detection], list[str]]:
        """The objects of an answer in pixels of a picture of `size`, with all that is known of them; and the rest."""


class Backend(Protocol):
    """Gives the model that answers now."""

    can_load: bool  # another model, while this one answers

    def served(self) -> Served | None:
        """The model; None while the first one is loaded. UserError when there is none to come."""

    def status(self) -> Status: ...

    def load(self, source: Source) -> None:
        """Begin to load another model, which takes the place of this one once it is ready.

        Raises:
          ConfigError: one is being loaded, or models cannot be chosen here.
        """

    def close(self) -> bool:
        """End; whether nothing runs any more, as a model that is being read or compiled may."""
