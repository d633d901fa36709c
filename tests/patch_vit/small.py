"""Small students and a small CLIP with random weights, and a vocabulary in CLIP's format."""

import dataclasses
import functools
import json

import numpy as np
import tokenizers
from flax.traverse_util import unflatten_dict
from tokenizers import models, pre_tokenizers, trainers

from paligemma_jax.patch_vit import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig, Student, StudentConfig, weights
from paligemma_jax.patch_vit.tokenizer import END, START, ClipTokenizer

_STUDENT = StudentConfig(image_size=20, patch_size=5, embed_dim=12, num_layers=2, mlp_dim=20, num_heads=3)
VARIANTS = {
    "masked": _STUDENT,
    "plain": dataclasses.replace(_STUDENT, masked=False, same_norm=False, has_scale=False),
}
_TEXTS = ["a red circle and a blue square", "two green stars ; one yellow diamond's", "purple triangle 12 é 漢字"]


def random_tree(shapes: dict, seed: int = 0) -> dict:
    """A parameter tree drawn at random, of numbers whose effect is seen in every output."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, shape in shapes.items():
        fan_in = np.prod(shape[1:]) if len(shape) > 1 else 4
        leaves[path] = (rng.normal(size=shape) * fan_in**-0.5).astype(np.float32)
    return unflatten_dict(leaves, sep="/")


def train_bpe(texts, vocab_size: int = 400) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary and merges of CLIP's kind."""
    tokenizer = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator((word for text in texts for word in text.lower().split()), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for letter in sorted(alphabet):
        vocabulary.setdefault(f"{letter}</w>", len(vocabulary))
    for token in (START, END):
        vocabulary[token] = len(vocabulary)
    return vocabulary, [tuple(pair) for pair in model["merges"]]


@functools.cache
def small_student(variant: str) -> Student:
    """One of `VARIANTS`, with a grid of 4."""
    config = VARIANTS[variant]
    return Student(config, random_tree(weights.student_shapes(config)))


@functools.cache
def small_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    return train_bpe(_TEXTS)


@functools.cache
def small_clip() -> Clip:
    """3 x 3 patches, sizes of the towers unlike."""
    tokenizer = ClipTokenizer(*small_vocabulary(), context=77)
    vision = ClipVisionConfig(24, 8, 16, 2, 24, 2, 1e-5)
    size, end = len(tokenizer.vocabulary), tokenizer.vocabulary[END]
    text = ClipTextConfig(size, 77, 24, 3, 40, 3, eos_token_id=end)
    config = ClipConfig(vision, text, 12)
    return Clip(config, random_tree(weights.clip_shapes(config)), tokenizer)
