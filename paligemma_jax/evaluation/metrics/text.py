"""Metrics of answers in words. A prediction is a text; a reference is a text, or several of which each is right."""

import re
from collections.abc import Sequence

import numpy as np

from paligemma_jax.evaluation.metrics.metric import Metric, Score, Scores, mean_of, texts

_TOLERANCE = 0.05  # of ChartQA's relaxed accuracy
_LETTER = re.compile(r"the answer is \(?([a-z])\)?\.")
_YES, _NO = "yes", "no"


def _measure_exact(prediction: str, reference: str | Sequence[str]) -> Score:
    """Right to the letter but for white space at the ends; `exact_lower` also whatever the case."""
    said, right = prediction.strip(), [text.strip() for text in texts(reference)]
    return {"exact": float(said in right), "exact_lower": float(said.lower() in map(str.lower, right))}


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_match(prediction: str, target: str) -> bool:
    """Numbers within 5% of the target, `%` read as a hundredth; anything else, and a target of 0, to the letter.

    The case is ignored. Source: arXiv 2203.10244, section 5.1, and big_vision's transfers/chartqa.py.
    """
    prediction, target = prediction.lower(), target.lower()
    said, right = _number(prediction), _number(target)
    if said is not None and right:
        return abs(said - right) / abs(right) <= _TOLERANCE
    return prediction == target


def _measure_relaxed(prediction: str, reference: str | Sequence[str]) -> Score:
    right = texts(reference)
    return {
        "relaxed_accuracy": float(any(relaxed_match(prediction, target) for target in right)),
        "exact_lower": float(prediction.lower() in map(str.lower, right)),
    }


def _letter(text: str) -> str:
    """The option that an answer names, "" when it names none; a reference may be the letter alone."""
    text = text.strip().lower()
    found = _LETTER.match(text)
    return found[1] if found else text if len(text) == 1 else ""


def _measure_science_qa(prediction: str, reference: str) -> Score:
    """The letter behind "the answer is", as in big_vision's transfers/science_qa.py; brackets around it are fine."""
    found = _LETTER.match(prediction.strip().lower())
    right = _letter(texts(reference)[0])
    return {"accuracy": float(found is not None and found[1] == right), "valid": float(found is not None)}


def _measure_pope(prediction: str, reference: str) -> Score:
    """In lower case to the letter, as in big_vision's transfers/pope.py."""
    said, right = prediction.lower(), texts(reference)[0].lower()
    return {
        "accuracy": float(said == right),
        "valid": float(said in (_YES, _NO)),
        "said": said == _YES,
        "is": right == _YES,
    }


def _summarize_pope(scores: Sequence[Score]) -> Scores:
    """Besides accuracy: F1, precision and recall of "yes", and the share of "yes" among answers (arXiv 2305.10355)."""
    result = mean_of(scores)
    said, true = (np.array([score[name] for score in scores], bool) for name in ("said", "is"))
    both = float((said & true).sum())
    precision, recall = both / max(1, said.sum()), both / max(1, true.sum())
    values = {
        "accuracy": result.values["accuracy"],
        "f1": float(2 * both / max(1, said.sum() + true.sum())),
        "precision": float(precision),
        "recall": float(recall),
        "yes": float(said.mean()),
        "valid": result.values["valid"],
    }
    return Scores(values, result.per_example)


EXACT = Metric("exact", _measure_exact, mean_of)
RELAXED = Metric("relaxed", _measure_relaxed, mean_of)
SCIENCE_QA = Metric("science_qa", _measure_science_qa, mean_of)
POPE = Metric("pope", _measure_pope, _summarize_pope)
