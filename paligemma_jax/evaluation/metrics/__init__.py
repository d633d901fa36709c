"""Metrics by name, each checked against hand-worked cases or its reference implementation."""

from paligemma_jax.evaluation.metrics.edits import ANLS, ANLS_BIG_VISION, READING
from paligemma_jax.evaluation.metrics.metric import Metric, Scores
from paligemma_jax.evaluation.metrics.text import EXACT, POPE, RELAXED, SCIENCE_QA
from paligemma_jax.evaluation.metrics.vqa import VQA

METRICS: dict[str, Metric] = {
    metric.name: metric for metric in (EXACT, VQA, ANLS, ANLS_BIG_VISION, RELAXED, SCIENCE_QA, POPE, READING)
}

__all__ = ["METRICS", "Metric", "Scores"]
