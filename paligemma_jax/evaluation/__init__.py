"""Metrics of the field, and the tasks of the paper that they measure."""

from paligemma_jax.evaluation.metrics import METRICS, Metric, Scores

__all__ = ["METRICS", "Metric", "Scores"]
