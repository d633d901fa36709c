"""Metrics that count edits: ANLS of document questions, and error rates of reading.

ANLS is the mean over questions of the greatest similarity to an answer, 1 - edit distance / longer length, or 0 where
that is too low (arXiv 1907.00490). There are two customs, which differ at a distance of exactly one half:
`anls` keeps it, as the DocVQA server does, after lower case and single blanks; `anls_big_vision` drops it, after lower
case only, as big_vision's transfers/vqa.py does for DocVQA, InfoVQA and ST-VQA.
"""

from collections.abc import Callable, Sequence

import numpy as np

from paligemma_jax.evaluation.metrics.metric import Metric, Score, Scores, mean_of, texts

_MOST = 0.5  # normalized distance from which an answer counts as wrong


def edit_distance(a: Sequence, b: Sequence) -> int:
    """Fewest insertions, deletions and replacements of items that make one sequence the other (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def similarity(prediction: str, target: str, keeps_half: bool) -> float:
    """1 - distance / longer length, 0 where that distance is above one half, or is one half and `keeps_half` is not."""
    if not target:
        return float(not prediction)
    distance = edit_distance(target, prediction) / max(len(target), len(prediction))
    return 1 - distance if distance < _MOST or (keeps_half and distance == _MOST) else 0.0


def plain(text: str) -> str:
    """Lower case with single blanks."""
    return " ".join(text.lower().split())


def _anls(name: str, keeps_half: bool, clean: Callable[[str], str]) -> Metric:
    def measure(prediction: str, reference: str | Sequence[str]) -> Score:
        said = clean(prediction)
        return {name: max(similarity(said, clean(right), keeps_half) for right in texts(reference))}

    return Metric(name, measure, mean_of)


def _measure_reading(prediction: str, reference: str) -> Score:
    said, right = " ".join(prediction.split()), " ".join(texts(reference)[0].split())
    words, true_words = said.split(), right.split()
    return {
        "exact": float(said == right),
        "edits": edit_distance(right, said),
        "characters": len(right),
        "word_edits": edit_distance(true_words, words),
        "words": len(true_words),
        "said_words": len(words),
        "shared_words": _shared(words, true_words),
    }


def _shared(a: Sequence[str], b: Sequence[str]) -> int:
    """Words that two texts have in common, each as often as both have it."""
    return sum(min(a.count(word), b.count(word)) for word in set(a))


def _summarize_reading(scores: Sequence[Score]) -> Scores:
    total = {name: sum(score[name] for score in scores) for name in scores[0]}
    values = {
        "exact": total["exact"] / len(scores),
        "cer": total["edits"] / max(1, total["characters"]),
        "wer": total["word_edits"] / max(1, total["words"]),
        "token_f1": 2 * total["shared_words"] / max(1, total["words"] + total["said_words"]),
    }
    return Scores(values, np.array([score["exact"] for score in scores], np.float64))


ANLS = _anls("anls", keeps_half=True, clean=plain)
ANLS_BIG_VISION = _anls("anls_big_vision", keeps_half=False, clean=str.lower)
READING = Metric("reading", _measure_reading, _summarize_reading)
