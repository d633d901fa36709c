"""Data for training: examples, read and checked, and their batches in an order that depends on the step alone."""

from paligemma_jax.training.data.batches import Batches, make_batches, shuffled
from paligemma_jax.training.data.examples import Example, Examples, check_pictures
from paligemma_jax.training.data.sources import Data, fingerprint, open_data

__all__ = [
    "Batches",
    "Data",
    "Example",
    "Examples",
    "check_pictures",
    "fingerprint",
    "make_batches",
    "open_data",
    "shuffled",
]
