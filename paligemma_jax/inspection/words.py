"""Texts of single tokens, and words and phrases as spans of tokens.

Axes: n tokens.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence

from paligemma_jax.errors import PromptError
from paligemma_jax.processing.tokenizer import StreamDecoder, Tokenizer

_MARKER = r"<loc\d{4}>|(?:<seg\d{3}>)+"  # the codes of a mask have a meaning only together
_WORD = re.compile(rf"{_MARKER}|(?:(?!{_MARKER})\S)+", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Word:
    """A word and its span of tokens `start` ... `stop - 1`, which may contain letters of a neighbour too."""

    text: str
    start: int
    stop: int


def pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """The text that each token completes; nothing for control tokens and for unfinished characters."""
    decoder = StreamDecoder(tokenizer)
    return [decoder.feed(id_) for id_ in ids]


def words(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Word]:
    """The words of some tokens [n] in order; a location is a word, and so are all codes of a mask together."""
    texts = pieces(tokenizer, ids)
    return [Word(found[0], *_tokens(tokenizer, ids, texts, found.span())) for found in _WORD.finditer("".join(texts))]


def find(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> Word:
    """The first occurrence of a word or phrase among tokens [n], whole words before parts of others.

    Raises:
      PromptError: it is not there.
    """
    texts = pieces(tokenizer, ids)
    whole, wanted = "".join(texts), re.escape(text.strip())
    found = re.search(rf"(?<!\w){wanted}(?!\w)", whole) or re.search(wanted, whole)
    if not found or not wanted:
        raise PromptError(f"{text!r} is not part of {whole.strip()!r}: give words of it")
    return Word(found[0], *_tokens(tokenizer, ids, texts, found.span()))


def _tokens(tokenizer: Tokenizer, ids: Sequence[int], texts: Sequence[str], span: tuple[int, int]) -> tuple[int, int]:
    """The span of tokens that covers a span of letters, from the first byte of its first letter on."""
    ends = list(itertools.accumulate(map(len, texts)))
    start = next(i for i, end in enumerate(ends) if end > span[0])
    stop = next(i for i, end in enumerate(ends) if end >= span[1]) + 1
    while start and not texts[start - 1] and tokenizer.token_bytes(ids[start - 1]):
        start -= 1
    return start, stop
