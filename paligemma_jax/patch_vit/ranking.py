"""The best of many vectors for a query: exactly, by a dot product with each, or by faiss where there are millions.

Axes: N vectors, D width, Q queries, k results.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from paligemma_jax.errors import ConfigError

KINDS = ("exact", "flat", "ivf")
_PROBES = 32  # lists that an ivf search looks into
_SAMPLE = 64  # vectors for each list to find its centre by

Ranker = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def ranker(vectors: np.ndarray, kind: str = "exact", lists: int = 0, probes: int = _PROBES) -> Ranker:
    """A function of queries f32 [Q, D] and k to scores f32 [Q, k] and rows i64 [Q, k], the highest dot products first.

    Args:
      vectors: f32 [N, D].
      kind: exact; flat, the same by faiss; or ivf, faiss's inverted lists, which misses some.
      lists: of ivf; 0 takes the square root of N.
      probes: lists that a search looks into: more find more and take longer.

    Raises:
      ConfigError: another kind, or faiss is not installed.
    """
    if kind not in KINDS:
        raise ConfigError(f"ranking={kind!r} is not possible: give {', '.join(KINDS)}")
    if kind == "exact":
        return lambda queries, k: top_k(vectors, queries, k)
    index = to_faiss(vectors, kind, lists, probes)

    def search(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return index.search(np.ascontiguousarray(queries, np.float32), min(k, len(vectors)))

    return search


def top_k(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k highest dot products of each query: scores f32 [Q, k] and rows i64 [Q, k]; of equal ones the first rows.

    There are N results where that is fewer than k.
    """
    k = min(k, len(vectors))
    scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    for i, query in enumerate(np.asarray(queries, np.float32)):
        products = np.vecdot(vectors, query)  # as fast as `@`, whose threads wait for each other on a busy machine
        least = np.partition(products, len(products) - k)[len(products) - k]
        candidates = np.flatnonzero(products >= least)
        rows[i] = candidates[np.argsort(-products[candidates], kind="stable")[:k]]
        scores[i] = products[rows[i]]
    return scores, rows


def to_faiss(vectors: np.ndarray, kind: str, lists: int = 0, probes: int = _PROBES) -> Any:
    """A faiss index of inner products over vectors f32 [N, D]: flat, or ivf with so many lists; see `ranker`."""
    try:
        import faiss
    except ImportError:
        raise ConfigError(f'ranking={kind} needs faiss: pip install -e ".[search]"') from None
    vectors = np.ascontiguousarray(vectors, np.float32)
    count, width = vectors.shape
    if kind == "flat":
        index = faiss.IndexFlatIP(width)
    else:
        lists = lists or max(round(count**0.5), 1)
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.max_points_per_centroid, index.cp.min_points_per_centroid = _SAMPLE, 1
        index.train(vectors)
        index.nprobe = min(probes, lists)
    index.add(vectors)
    return index
