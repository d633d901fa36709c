"""Pictures and prompts to a `Batch`: one right-padded prefix-LM sequence per row.

A row is [image tokens] [bos] [prefix] ["\\n"] [suffix] [eos] [pad ...]; the last two parts only when a suffix is given.
Axes: I distinct pictures, S side in pixels, N soft tokens of a picture, B batch, T tokens.
"""

import dataclasses
import os
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from paligemma_jax import buckets
from paligemma_jax.config import PADDING_ID, PaliGemmaConfig
from paligemma_jax.errors import ImageError, PromptError
from paligemma_jax.processing.image import ImageSettings, ImageSource, load_image
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.tasks.prompts import Prompt, plain

Images = ImageSource | Sequence[ImageSource | Sequence[ImageSource]]
Prompts = str | Prompt | Sequence[str | Prompt]
Suffixes = str | Sequence[str]


@dataclasses.dataclass(frozen=True)
class Batch:
    """What the networks take; a prompt's own padding is known from `length` alone."""

    pixels: np.ndarray  # f32 [I, S, S, 3], each distinct picture once; I = 0 when its soft tokens are known already
    tokens: np.ndarray  # i32 [B, T], image slots hold image_token_id, padding PADDING_ID
    image_slots: np.ndarray  # i32 [B, T], index into the flattened soft tokens [I*N, D] at image slots, else -1
    prefix_length: np.ndarray  # i32 [B], image tokens + bos + prefix + "\n"
    length: np.ndarray  # i32 [B], the same plus suffix and eos


@dataclasses.dataclass(frozen=True)
class Processor:
    """Makes batches for one model."""

    config: PaliGemmaConfig
    tokenizer: Tokenizer
    image_settings: ImageSettings

    def __call__(
        self,
        images: Images,
        prompts: Prompts,
        suffixes: Suffixes | None = None,
        *,
        pad_to: int | None = None,
    ) -> Batch:
        """Load the pictures and lay out the sequences.

        Each argument is one value, used for every row, or a list with one per row.

        Args:
            images: a picture (see `load_image`), or a list; an item may itself be a list of pictures seen together. A
                picture that is named twice, by the same object or path, is loaded once.
            prompts: the prefix; what `tasks.prompts.plain` takes off makes no difference.
            suffixes: the answer, for scoring and training.
            pad_to: T; by default the longest row's, see `buckets.sequence`.

        Raises:
            ImageError: a picture cannot be read.
            PromptError: lists of different lengths, a row without pictures or with fewer than its prompt has
                `<image>`, or one longer than `pad_to`.
        """
        rows = list(images) if isinstance(images, list | tuple) else [images]
        groups = [list(row) if isinstance(row, list | tuple) else [row] for row in rows]
        sources = {identity(source): source for group in groups for source in group}
        index = {identity: i for i, identity in enumerate(sources)}
        image_groups = [[index[identity(source)] for source in group] for group in groups]
        if not isinstance(images, list | tuple):
            image_groups *= _common_length(prompts=prompts, suffixes=suffixes) or 1
        batch = self.layout(image_groups, prompts, suffixes, pad_to=pad_to)  # first: text errors are found sooner
        pixels = np.stack([self.image_settings.to_pixels(load_image(source)) for source in sources.values()])
        return dataclasses.replace(batch, pixels=pixels)

    def layout(
        self,
        image_groups: Sequence[Sequence[int]],
        prompts: Prompts,
        suffixes: Suffixes | None = None,
        *,
        pad_to: int | None = None,
    ) -> Batch:
        """Lay out the sequences of pictures that are known by number only; the batch has no pixels.

        Args:
            image_groups: for each row, which pictures it sees: their rows in the soft tokens [I, N, D].
            prompts, suffixes, pad_to: as in `__call__`.
        """
        num_rows = _common_length(images=image_groups, prompts=prompts, suffixes=suffixes)
        if not num_rows:
            raise PromptError("no pictures and prompts are given: give at least one of each")
        soft_tokens = [self._image_slots(group) for group in image_groups]
        sizes = map(len, image_groups)
        prefixes = [self._prefix(prompt, n) for prompt, n in zip(per_row(prompts, num_rows), sizes, strict=False)]
        answers = [self._suffix(suffix) for suffix in per_row(suffixes, num_rows)]

        prefix_length = np.array([len(s) + len(p) for s, p in zip(soft_tokens, prefixes, strict=True)], np.int32)
        length = prefix_length + np.array([len(answer) for answer in answers], np.int32)
        longest = int(length.max())
        if pad_to is not None and longest > pad_to:
            raise PromptError(f"a prompt with its pictures has {longest} tokens, more than {pad_to}: shorten it")
        shape = num_rows, pad_to or buckets.sequence(longest)
        tokens = np.full(shape, PADDING_ID, np.int32)
        image_slots = np.full(shape, -1, np.int32)
        for row, (slots, prefix, answer) in enumerate(zip(soft_tokens, prefixes, answers, strict=True)):
            tokens[row, : len(slots)] = self.config.image_token_id
            tokens[row, len(slots) : length[row]] = prefix + answer
            image_slots[row, : len(slots)] = slots
        size = self.image_settings.size
        return Batch(np.zeros((0, size, size, 3), np.float32), tokens, image_slots, prefix_length, length)

    def count_prefix(self, prompt: str | Prompt, num_images: int = 1) -> int:
        """Number of tokens of bos, prompt and line break; PromptError as of `__call__`."""
        return len(self._prefix(prompt, num_images))

    def count_suffix(self, suffix: str | None) -> int:
        """Number of tokens of an answer and eos; PromptError as of `__call__`."""
        return len(self._suffix(suffix))

    def _image_slots(self, group: Sequence[int]) -> np.ndarray:
        if not len(group):
            raise PromptError("a prompt has an empty list of pictures: give at least one for each prompt")
        num_tokens = self.config.vision.num_tokens
        return (np.asarray(group)[:, None] * num_tokens + np.arange(num_tokens)).reshape(-1)

    def _prefix(self, prompt: str | Prompt, num_images: int) -> list[int]:
        # The line break is encoded apart, so that it is the token that models know, whatever stands before it.
        text = plain(prompt.text if isinstance(prompt, Prompt) else prompt, num_images)
        return [self.config.bos_token_id, *self._encode(text), self.tokenizer.newline_id]

    def _suffix(self, suffix: str | None) -> list[int]:
        if not isinstance(suffix, str | None):
            raise PromptError(f"an answer is a text, not {type(suffix).__name__}: {suffix!r:.80}")
        return [] if suffix is None else [*self._encode(suffix), self.tokenizer.eos_id]

    def _encode(self, text: str) -> list[int]:
        ids, rows = self.tokenizer.encode(text), self.config.text.vocab_size
        if (strange := max(ids, default=0)) >= rows:
            name = self.tokenizer.decode([strange])
            raise PromptError(f"{name} is id {strange} of the tokenizer, but the model has {rows} rows: leave it out")
        return ids


def image_groups(images: Images | None, prompts: Prompts, count: int) -> list[list[int]]:
    """Which of `count` given embeddings each row sees, numbered in the order of `images`."""
    if images is None:
        groups = [[i] for i in range(count)]
    else:
        rows = images if isinstance(images, list | tuple) else [images]
        sizes = [len(row) if isinstance(row, list | tuple) else 1 for row in rows]
        if sum(sizes) != count:
            raise ImageError(f"image_embeddings hold {count} pictures, images {sum(sizes)}: give as many")
        ends = np.cumsum(sizes)
        groups = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    shared = len(groups) == 1 and not isinstance(images, list | tuple) and isinstance(prompts, list | tuple)
    return groups * len(prompts) if shared else groups


def identity(source: ImageSource) -> Hashable:
    """What tells images apart: a path by its text, anything else by being another object."""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else id(source)


def _common_length(**arguments: object) -> int | None:
    """Length of those arguments that are lists; None when none is."""
    lengths = {name: len(value) for name, value in arguments.items() if isinstance(value, list | tuple)}
    if len(set(lengths.values())) > 1:
        found = " and ".join(f"{length} {name}" for name, length in lengths.items())
        raise PromptError(f"{found} do not match: give one for all, or lists of the same length")
    return next(iter(lengths.values()), None)


def per_row(value: Any, num_rows: int) -> Sequence[Any]:
    """A list as it is, any other value once per row."""
    return value if isinstance(value, list | tuple) else [value] * num_rows
