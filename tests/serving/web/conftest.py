"""A question, and a model that says what it is told."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.serving.answer import Answer
from paligemma_jax.serving.events import Finished, Piece
from paligemma_jax.serving.web.backend import Status
from paligemma_jax.serving.web.questions import Question
from paligemma_jax.serving.web.snippets import Source
from paligemma_jax.tasks.prompts import read_prompt

STAR = "<loc0000><loc0512><loc1023><loc1023>"


def question(prompt: str = "caption en", name: str = "a.png", size: tuple[int, int] = (40, 20), **options) -> Question:
    options = pj.GenerateOptions(**options)
    return Question(Image.new("RGB", size, "white"), name, read_prompt(prompt), options)


def output(text: str, reason: str = "eos", count: int = 3) -> pj.Output:
    half = np.full(count, 0.5, np.float32)
    return pj.Output(text, np.arange(count), np.log(half), reason, pj.Timing(0, 1, 2, count), half, half)


def finished(text: str, reason: str = "eos", count: int = 3) -> Finished:
    return Finished(output(text, reason, count), reason, 0.0, 0.5, 1.0)


class Served:
    """Says pieces, and perhaps fails; objects get masks where `segment` is asked."""

    model = tokenizer = None
    source = Source("assets/tiny")

    def __init__(
        self, pieces: Sequence[str] = (), error: Exception | None = None, end: bool = True, by_turns: bool = False
    ):
        self._pieces, self._error, self._end, self._by_turns = pieces, error, end, by_turns
        self._later: list[object] = []
        self.asked: list[tuple[Question, str]] = []
        self.cancelled = 0
        self.answers: list[Answer] = []

    def ask(self, question: Question, client: str) -> Answer:
        def cancel() -> None:
            self.cancelled += 1

        self.asked.append((question, client))
        answer = Answer(cancel)
        self.answers.append(answer)
        events = [Piece(piece, np.zeros(1, np.int32), np.zeros(1, np.float32)) for piece in self._pieces]
        if self._error is not None:
            events.append(self._error)
        elif self._end:
            events.append(finished("".join(self._pieces), count=max(1, len(self._pieces))))
        self._later = events
        for _ in range(1 if self._by_turns else len(events)):
            self.go_on()
        return answer

    def go_on(self) -> None:
        """Say the next thing; pieces without text are said with it."""
        while self.answers and self._later:
            event = self._later.pop(0)
            self.answers[-1].put(event)
            if not isinstance(event, Piece) or event.text:
                return

    def objects(self, output, size, labels):
        found, dropped = pj.parse(output.text, size, labels=labels)
        mask = np.ones(size[::-1], bool)
        scored = [pj.Detection(o.label, o.box, 0.5, o.codes, mask if o.codes else None, o.span) for o in found]
        return scored, dropped


@pytest.fixture
def backend() -> Callable[[object], SimpleNamespace]:
    """backend(served): a backend with this model; one with an error instead raises it, one with None has none yet."""

    def make(served: object) -> SimpleNamespace:
        def get() -> object:
            if isinstance(served, Exception):
                raise served
            return served

        return SimpleNamespace(served=get, status=lambda: Status("ready", "tiny"), can_load=True)

    return make
