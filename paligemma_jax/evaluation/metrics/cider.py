"""CIDEr-D of captions: how like the references they are, in n-grams weighted by how rare these are.

Source: Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation" (arXiv 1411.5726), as pycocoevalcap
computes it: n-grams of 1 to 4 words, document frequencies from the references at hand, counts clipped, a Gaussian
penalty on lengths with sigma 6, times 10. Papers print it times 100.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from paligemma_jax.evaluation.metrics.caption_tokens import words
from paligemma_jax.evaluation.metrics.metric import Metric, Score, Scores, texts

_LONGEST = 4  # words of an n-gram
_SIGMA = 6.0  # words
_SCALE = 10.0

Grams = Counter[tuple[str, ...]]


def _grams(tokens: Sequence[str]) -> list[Grams]:
    """How often each n-gram occurs, for n = 1 to 4."""
    return [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in range(1, _LONGEST + 1)]


def cider(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> np.ndarray:
    """CIDEr-D of each caption, f64 [N], 0..10.

    Args:
      predictions: the words of a caption for each of N images.
      references: the words of the captions that people gave, one or more for each image. With fewer than two images
        every n-gram is in all of them, and all scores are 0.
    """
    true = [[_grams(tokens) for tokens in captions] for captions in references]
    frequency = Counter(gram for captions in true for gram in {g for each in captions for part in each for g in part})
    rarest = math.log(len(references))

    def weigh(grams: list[Grams]) -> tuple[list[dict], list[float], int]:
        vectors = [
            {g: count * (rarest - math.log(max(1, frequency[g]))) for g, count in part.items()} for part in grams
        ]
        norms = [math.sqrt(sum(value * value for value in vector.values())) for vector in vectors]
        return vectors, norms, sum(grams[1].values())  # pycocoevalcap takes the number of word pairs for the length

    def similarity(said: tuple, right: tuple) -> float:
        penalty = math.exp(-((said[2] - right[2]) ** 2) / (2 * _SIGMA**2))
        total = 0.0
        for vector, other, norm, other_norm in zip(said[0], right[0], said[1], right[1], strict=True):
            if norm and other_norm:
                both = sum(min(value, other[g]) * other[g] for g, value in vector.items() if g in other)
                total += both / (norm * other_norm)
        return penalty * total / _LONGEST

    scores = []
    for tokens, captions in zip(predictions, true, strict=True):
        said = weigh(_grams(tokens))
        scores.append(_SCALE * sum(similarity(said, weigh(right)) for right in captions) / len(captions))
    return np.array(scores, np.float64)


def _measure(prediction: str, reference: str | Sequence[str]) -> Score:
    """The words alone: a score needs the references of all images."""
    return {"words": " ".join(words(prediction)), "reference_words": [" ".join(words(t)) for t in texts(reference)]}


def _summarize(scores: Sequence[Score]) -> Scores:
    said = [score["words"].split() for score in scores]
    each = cider(said, [[text.split() for text in score["reference_words"]] for score in scores])
    return Scores({"cider": float(each.mean())}, each)


CIDER = Metric("cider", _measure, _summarize)
