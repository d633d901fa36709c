"""Numbers of tokens of all examples, of which as few as possible are tokenized: a byte is at least a token's worth."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from paligemma_jax.errors import DataError, PromptError
from paligemma_jax.processing.processor import Processor
from paligemma_jax.training.data.examples import Example, Examples, text_bounds

_OTHERS = 3  # bos, line break and eos


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The largest of each.

    num_pictures: in one example.
    num_answers: tokens of a suffix, its end included.
    """

    num_pictures: int
    num_answers: int


def measure(
    examples: Sequence[Example],
    processor: Processor,
    text_length: int,
    mirrored: Callable[[str], str] | None = None,
) -> Lengths:
    """Check that no example is too long.

    Args:
      text_length: the most tokens of bos, prefix, line break, suffix and eos together.
      mirrored: what augmentation may make of a text; both have to fit.

    Raises:
      DataError: an example is too long, or has a token that the model does not; the first one is named.
    """
    at = examples.draft if isinstance(examples, Examples) else examples.__getitem__

    @functools.lru_cache(4096)
    def prefix_tokens(prefix: str) -> int:
        return max(processor.count_prefix(one) for one in _forms(prefix, mirrored))

    def suffix_tokens(suffix: str) -> int:
        return max(processor.count_suffix(one) for one in _forms(suffix, mirrored))

    def tokens(example: Example) -> tuple[int, int]:
        place = f"{example.where}: " if example.where else ""
        try:
            counts = prefix_tokens(example.prefix), suffix_tokens(example.suffix)
        except PromptError as error:
            raise DataError(f"{place}{error}") from None
        if (count := sum(counts)) > text_length:
            raise DataError(
                f"{place}{example.prefix!r:.60} with its suffix has {count} tokens, more than "
                f"text_length={text_length}: raise text_length or shorten it"
            )
        return counts

    bounds = examples.bounds() if isinstance(examples, Examples) else text_bounds(examples)
    if mirrored is not None:
        bounds[:, 1:] = bounds[:, 1:] * 5 // 4 + 1  # "right" for "left"
    doubtful = bounds[:, 1] + bounds[:, 2] + _OTHERS > text_length
    if processor.tokenizer.name(processor.config.text.vocab_size):
        doubtful[:] = True  # any text may have a token for which the model has no row
    for index in np.flatnonzero(doubtful).tolist():
        tokens(at(index))
    num_answers = 0
    for index in np.argsort(-bounds[:, 2], kind="stable").tolist():
        if bounds[index, 2] + 1 <= num_answers:
            break  # all others are shorter still
        num_answers = max(num_answers, tokens(at(index))[1])
    return Lengths(int(bounds[:, 0].max()), num_answers)


def _forms(text: str, mirrored: Callable[[str], str] | None) -> tuple[str, ...]:
    return (text,) if mirrored is None else tuple({text, mirrored(text)})
