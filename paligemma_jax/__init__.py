"""PaliGemma 1 and 2 in JAX: caption, answer, read, detect and segment."""

from paligemma_jax.api import PaliGemma
from paligemma_jax.config import VARIANTS, PaliGemmaConfig, TextConfig, VisionConfig
from paligemma_jax.errors import UserError
from paligemma_jax.loading import load
from paligemma_jax.processing.request import GenerateOptions, Request, Sampling
from paligemma_jax.tasks.detection import Detection, parse
from paligemma_jax.tasks.detections import Detections
from paligemma_jax.tasks.output import Output, TextStream, Timing

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "Detection",
    "Detections",
    "GenerateOptions",
    "Output",
    "PaliGemma",
    "PaliGemmaConfig",
    "Request",
    "Sampling",
    "TextConfig",
    "TextStream",
    "Timing",
    "UserError",
    "VisionConfig",
    "load",
    "parse",
]
