"""CLIP's byte-pair encoding, from a checkpoint's own files: the ids of transformers' CLIPTokenizer.

Axes: B texts, T tokens.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors

from paligemma_jax.errors import TokenizerError, one_line
from paligemma_jax.files import read_json, read_lines, write_json

START, END = "<|startoftext|>", "<|endoftext|>"
JSON_FILE, VOCABULARY_FILE, MERGES_FILE = "tokenizer.json", "vocab.json", "merges.txt"
_CONFIG_FILE, _SPECIAL_FILE = "tokenizer_config.json", "special_tokens_map.json"
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class ClipTokenizer:
    """Texts to ids; `context` tokens at most, start and end included."""

    def __init__(self, vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], context: int, pad: str = END):
        """
        Raises:
          TokenizerError: the vocabulary and the merges contradict each other, or lack start, end or padding.
        """
        for token in (START, END, pad):
            if token not in vocabulary:
                raise TokenizerError(f"the vocabulary lacks {token!r}: give CLIP's own tokenizer.json or vocab.json")
        try:
            bpe = models.BPE(vocabulary, list(merges), unk_token=END, end_of_word_suffix="</w>", fuse_unk=False)
        except Exception as error:  # the package raises plain exceptions
            raise TokenizerError(f"vocabulary and merges do not fit: {one_line(error)}") from None
        self.vocabulary, self.context, self.pad_token = vocabulary, context, pad
        self._tokenizer = tokenizers.Tokenizer(bpe)
        self._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self._tokenizer.add_special_tokens(list(dict.fromkeys([START, END, pad])))
        self._tokenizer.post_processor = processors.RobertaProcessing(
            (END, vocabulary[END]), (START, vocabulary[START]), trim_offsets=False, add_prefix_space=False
        )
        self._tokenizer.enable_truncation(context)

    def __call__(self, texts: Sequence[str], pad_to: int | None = None) -> np.ndarray:
        """Ids i32 [B, T], padded to T = `pad_to` or `context`; longer texts lose their end, not the end token.

        Raises:
          TokenizerError: a text is none, or has half a surrogate pair, which stands for no character.
        """
        return self.pad(self.encode(texts), pad_to or self.context)

    def pad(self, rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
        """Ids of several texts as one array i32 [B, length]."""
        ids = np.full((len(rows), length), self.vocabulary[self.pad_token], np.int32)
        for row, found in zip(ids, rows, strict=True):
            row[: len(found)] = found
        return ids

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, start and end included, without padding; errors as of a call."""
        try:
            return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        except (TypeError, UnicodeEncodeError) as error:
            raise TokenizerError(f"a text cannot be read: {one_line(error)}") from None

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers reads too."""
        tokenizer = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.no_truncation()
        write_json(directory / JSON_FILE, json.loads(tokenizer.to_str()))
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": self.pad_token}
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.context}
        write_json(directory / _CONFIG_FILE, settings | special)

    @classmethod
    def from_dir(cls, directory: Path, context: int) -> "ClipTokenizer":
        """The tokenizer of a checkpoint; tokenizer.json comes before vocab.json with merges.txt.

        Raises:
          TokenizerError: a file is missing or damaged.
        """
        whole = directory / JSON_FILE
        vocabulary, merges = _from_json(whole) if whole.is_file() else _from_pair(directory)
        try:
            return cls(vocabulary, merges, context, _padding(directory))
        except TokenizerError as error:
            raise TokenizerError(f"{directory}: {error}") from None


def _from_json(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = read_json(path).get("model")
    if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
        raise TokenizerError(f"{path} holds no byte-pair encoding: give CLIP's own tokenizer.json")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return _checked_vocabulary(model.get("vocab"), path), _checked_merges(pairs, path)


def _from_pair(directory: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocabulary, merges = directory / VOCABULARY_FILE, directory / MERGES_FILE
    if missing := [path.name for path in (vocabulary, merges) if not path.is_file()]:
        raise TokenizerError(
            f"{directory} lacks {missing[0]}: give {JSON_FILE}, or {VOCABULARY_FILE} and {MERGES_FILE}"
        )
    try:
        lines = read_lines(merges)
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{merges} cannot be read: {one_line(error)}") from None
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return _checked_vocabulary(read_json(vocabulary), vocabulary), _checked_merges(pairs, merges)


def _checked_vocabulary(vocabulary: Any, path: Path) -> dict[str, int]:
    is_one = isinstance(vocabulary, dict) and all(type(id_) is int and 0 <= id_ < 2**31 for id_ in vocabulary.values())
    if not is_one:
        raise TokenizerError(f"{path} is no vocabulary: expected an object of tokens with their ids")
    return vocabulary


def _checked_merges(pairs: list[Any], path: Path) -> list[tuple[str, str]]:
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise TokenizerError(f"{path}: merge {number} is {pair!r:.60}, expected two parts")
    return [(first, second) for first, second in pairs]


def _padding(directory: Path) -> str:
    """The padding token that a checkpoint names, the end of a text by default."""
    for name in (_CONFIG_FILE, _SPECIAL_FILE):
        if (path := directory / name).is_file():
            pad = read_json(path).get("pad_token")
            pad = pad.get("content") if isinstance(pad, dict) else pad
            if isinstance(pad, str):
                return pad
    return END
