"""Metrics by name, each checked against hand-worked cases or its reference implementation."""

from paligemma_jax.evaluation.metrics.boxes import DETECTION_AP, DETECTION_F1
from paligemma_jax.evaluation.metrics.cider import CIDER
from paligemma_jax.evaluation.metrics.edits import ANLS, ANLS_BIG_VISION, READING
from paligemma_jax.evaluation.metrics.masks import REFCOCO, SEGMENTATION_IOU
from paligemma_jax.evaluation.metrics.metric import Metric, Scores
from paligemma_jax.evaluation.metrics.text import EXACT, POPE, RELAXED, SCIENCE_QA
from paligemma_jax.evaluation.metrics.vqa import VQA

_TEXTS = (EXACT, VQA, ANLS, ANLS_BIG_VISION, RELAXED, SCIENCE_QA, POPE, CIDER, READING)
_OBJECTS = (DETECTION_F1, DETECTION_AP, SEGMENTATION_IOU, REFCOCO)
METRICS: dict[str, Metric] = {metric.name: metric for metric in (*_TEXTS, *_OBJECTS)}

__all__ = ["METRICS", "Metric", "Scores"]
