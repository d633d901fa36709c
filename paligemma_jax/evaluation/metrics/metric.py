"""What a metric is: a score of each example, and a summary of all."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from paligemma_jax.errors import DataError
from paligemma_jax.tasks.detections import Detections

Prediction = str | Detections
Score = dict[str, Any]  # of one example, plain values that JSON can hold


@dataclasses.dataclass(frozen=True)
class Scores:
    """The result of a metric over N examples.

    values: numbers by name, the main one first. Shares are 0..1.
    per_example: f64 [N], whose weighted mean is the main number; empty where it is no mean (average precision).
    weights: f64 [N], by default all 1.
    """

    values: dict[str, float]
    per_example: np.ndarray
    weights: np.ndarray | None = None

    @property
    def main(self) -> float:
        """The main number."""
        return next(iter(self.values.values()))


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of the field: `metric(predictions, references) -> Scores`.

    name: as in `METRICS`.
    measure: a prediction and its reference to the score of this example.
    summarize: the scores of all examples to the result.
    objects: predictions are boxes or masks: `Detections`, or for boxes also the text that `tasks.detection` parses.
    masks: each of the objects needs its mask.
    read: text, size of the picture and decoder of mask codes to objects; None where answers are read as any other.
    needs_pycocotools: the summary is pycocotools' own.
    """

    name: str
    measure: Callable[[Any, Any], Score]
    summarize: Callable[[Sequence[Score]], Scores]
    objects: bool = False
    masks: bool = False
    read: Callable[[str, tuple[int, int], Callable[[np.ndarray], np.ndarray]], Detections] | None = None
    needs_pycocotools: bool = False

    def __call__(self, predictions: Sequence[Prediction], references: Sequence[Any]) -> Scores:
        """Score all examples.

        Args:
          predictions: a text for each example; for metrics of objects a text, or `Detections` in the picture's pixels.
          references: what is right for each: a text, or several of which each is right; of objects the same as for
            predictions.

        Raises:
          DataError: another number of references than of predictions, or one of the wrong kind; no examples.
        """
        if len(predictions) != len(references):
            raise DataError(f"{len(predictions)} predictions and {len(references)} references: give as many")
        if not len(predictions):
            raise DataError(f"{self.name} of no examples is not known: give at least one")
        return self.summarize([self.measure(*pair) for pair in zip(predictions, references, strict=True)])

    def score(self, predictions: Sequence[Prediction], references: Sequence[Any]) -> dict[str, float]:
        """The numbers alone."""
        return self(predictions, references).values


def texts(reference: str | Sequence[str]) -> list[str]:
    """The texts of which each is right; DataError when there is none."""
    found = [reference] if isinstance(reference, str) else list(reference)
    if not found or not all(isinstance(text, str) for text in found):
        raise DataError(f"reference {reference!r:.80} is not possible: give a text, or a list of texts")
    return found


def mean_of(scores: Sequence[Score]) -> Scores:
    """The mean of each field of the scores, of which there is at least one."""
    fields = {name: np.array([score[name] for score in scores], np.float64) for name in scores[0]}
    return Scores({name: float(values.mean()) for name, values in fields.items()}, next(iter(fields.values())))


def ratio_of(numerators: Sequence[float], denominators: Sequence[float], values: Mapping[str, float]) -> Scores:
    """A ratio of two sums over examples, the first of `values`, as a mean that is weighted by the denominators."""
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    each = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return Scores(dict(values), each, below)
