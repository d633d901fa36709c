"""How sure a number is: a bootstrap over the examples it was measured on."""

import numpy as np

from paligemma_jax.evaluation.metrics import Scores

RESAMPLES, CONFIDENCE = 1000, 0.95


def interval(
    scores: Scores, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile interval of the main number under resampling of examples (Efron 1979); None where it is no mean.

    CIDEr's document frequencies stay those of all references.
    """
    count = len(scores.per_example)
    if not count:
        return None
    weights = np.ones(count) if scores.weights is None else scores.weights
    rng, found = np.random.default_rng(seed), np.empty(resamples)
    for i in range(resamples):
        drawn = rng.integers(0, count, count)
        total = weights[drawn].sum()
        found[i] = (weights[drawn] * scores.per_example[drawn]).sum() / total if total else np.nan
    edges = 50 * (1 - confidence), 50 * (1 + confidence)
    low, high = np.nanpercentile(found, edges) if np.isfinite(found).any() else (np.nan, np.nan)
    return float(low), float(high)
