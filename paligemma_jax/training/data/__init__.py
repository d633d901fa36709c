"""Data for training: examples, read and checked, and their batches in an order that depends on the step alone."""

from paligemma_jax.training.data.batches import Batches, make_batches, shuffled
from paligemma_jax.training.data.examples import Example, check_pictures, read_jsonl

__all__ = ["Batches", "Example", "check_pictures", "make_batches", "read_jsonl", "shuffled"]
