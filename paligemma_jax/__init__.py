"""PaliGemma 1 and 2 in JAX: caption, answer, read, detect and segment."""

from paligemma_jax.config import VARIANTS, PaliGemmaConfig, TextConfig, VisionConfig
from paligemma_jax.errors import UserError
from paligemma_jax.generation.clock import Timing
from paligemma_jax.generation.output import Output, TextStream
from paligemma_jax.generation.sampling import Sampling
from paligemma_jax.loading import load
from paligemma_jax.pipeline import PaliGemma
from paligemma_jax.tasks.detection import Detection, parse

__all__ = [
    "VARIANTS",
    "Detection",
    "Output",
    "PaliGemma",
    "PaliGemmaConfig",
    "Sampling",
    "TextConfig",
    "TextStream",
    "Timing",
    "UserError",
    "VisionConfig",
    "load",
    "parse",
]
