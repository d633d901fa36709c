"""Text to ids and back: a vocabulary of Gemma's, with 1024 location and 128 segmentation tokens.

The two token ranges are pieces of the SentencePiece model itself, or tokens that JSON files add to it or to the 256000
pieces of a bare Gemma. A fine-tune may add more, behind the id of <image>. Ids are those of transformers, but control
tokens are never read from text: "<bos>" in a prompt is five letters (`vocabulary`).
"""

import codecs
import os
from collections.abc import Iterable
from pathlib import Path

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import PromptError, TokenizerError
from paligemma_jax.files import read_json, replacing, write_json
from paligemma_jax.processing.vocabulary import (
    CONFIG_FILE,
    IMAGE,
    JSON_FILE,
    LOC_TOKENS,
    MODEL_FILE,
    SEG_TOKENS,
    Vocabulary,
    check_sample,
    read_vocabulary,
)

TOKENIZER_FILES = (MODEL_FILE, JSON_FILE)  # either will do


class Tokenizer:
    """A vocabulary and where its loc and seg tokens lie.

    Attributes:
        vocab_size: number of ids before that of <image>; they are 0..vocab_size - 1.
        bos_id, eos_id: what begins a prefix and ends a suffix.
        loc_start: id of <loc0000>; the other 1023 follow.
        seg_start: id of <seg000>; the other 127 follow.
        newline_id: id of the line break that ends every prefix.
    """

    def __init__(self, vocabulary: Vocabulary, bos_id: int, eos_id: int, path: Path):
        """`path` is that of the vocabulary, for messages; TokenizerError when it is not of the right kind."""
        self._vocabulary = vocabulary
        self.vocab_size = vocabulary.size
        self.bos_id, self.eos_id = bos_id, eos_id
        self.loc_start = _first_id(vocabulary, LOC_TOKENS, path)
        self.seg_start = _first_id(vocabulary, SEG_TOKENS, path)
        newline = vocabulary.encode("\n")
        if len(newline) != 1 or self.token_bytes(newline[0]) != b"\n":
            raise TokenizerError(
                "the tokenizer has no token for a line break alone: train it with '\\n' as a user defined symbol, "
                "the identity normalization and no dummy prefix"
            )
        self.newline_id: int = newline[0]
        check_sample(vocabulary, path)

    @classmethod
    def from_dir(cls, directory: str | os.PathLike[str]) -> "Tokenizer":
        """Load `tokenizer.model` of a checkpoint directory, or else its `tokenizer.json`."""
        names = [name for name in TOKENIZER_FILES if (Path(directory) / name).exists()]
        return cls.from_file(Path(directory) / (*names, MODEL_FILE)[0])

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Load a SentencePiece model or a tokenizer.json; the JSON files beside it are taken into account.

        Raises:
            TokenizerError, CheckpointError: when a file is missing or damaged, or no loc and seg tokens are found.
        """
        path = Path(path)
        vocabulary = read_vocabulary(path)
        ids = {"bos": vocabulary.bos, "eos": vocabulary.eos} | _named_ids(path.with_name(CONFIG_FILE), vocabulary)
        for name, id_ in ids.items():
            if id_ is None:
                raise TokenizerError(f"{path} has no <{name}> token: it is not the tokenizer of a PaliGemma")
        return cls(vocabulary, ids["bos"], ids["eos"], path)

    @property
    def file_name(self) -> str:
        """What `from_dir` looks for."""
        return self._vocabulary.file_name

    def to_bytes(self) -> bytes:
        """The vocabulary, as that file holds it."""
        return self._vocabulary.to_bytes()

    def save(self, directory: Path) -> None:
        """Write the vocabulary, and a tokenizer_config.json for what is not in its file: added tokens, bos and eos."""
        with replacing(directory / self.file_name) as temporary:
            temporary.write_bytes(self.to_bytes())
        vocabulary = self._vocabulary
        special = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        fields = {"tokenizer_class": "GemmaTokenizer", **{name: vocabulary.content(i) for name, i in special.items()}}
        if vocabulary.added:
            fields["added_tokens_decoder"] = {str(t.id_): t.to_json() for t in vocabulary.added.values()}
        write_json(directory / CONFIG_FILE, fields)

    def check(self, config: PaliGemmaConfig) -> None:
        """Raise TokenizerError unless the ids are those of the model that `config` describes."""
        remedy = "use the tokenizer of the model's own checkpoint"
        if self.bos_id != config.bos_token_id:
            raise TokenizerError(
                f"the tokenizer's bos id is {self.bos_id}, the model's is {config.bos_token_id}: {remedy}"
            )
        if self.vocab_size != config.image_token_id:
            raise TokenizerError(
                f"the tokenizer has {self.vocab_size} ids, the model expects {config.image_token_id} "
                f"(its image token comes next): {remedy}"
            )

        if (name := self._vocabulary.content(config.image_token_id)) not in (None, IMAGE):
            raise TokenizerError(f"id {config.image_token_id} is {name!r:.40}, and the model's image token: {remedy}")

    def added_ids(self, config: PaliGemmaConfig) -> tuple[tuple[int, int], ...]:
        """Ranges [first, end) of the ids behind the image token that have a name, as far as the model has rows."""
        behind = range(config.image_token_id + 1, config.text.vocab_size)
        named = [id_ for id_ in behind if self._vocabulary.names(id_)]
        firsts, ends = set(named).difference(id_ + 1 for id_ in named), {id_ + 1 for id_ in named}.difference(named)
        return tuple(zip(sorted(firsts), sorted(ends), strict=True))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos and eos; each `<loc0123>` and `<seg045>` written in it is one id."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise PromptError(f"the text {text!r} is not valid Unicode: remove the lone surrogates") from None
        return self._vocabulary.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of some ids; control, image and unused ids are skipped, broken UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, id_: int) -> bytes:
        """UTF-8 of one id, which may be a part of a character; nothing for an id without text."""
        return self._vocabulary.token_bytes(int(id_))

    def name(self, id_: int) -> str:
        """An id's token as the vocabulary writes it, control tokens too; nothing for what is no id."""
        return self._vocabulary.content(int(id_)) or ""


class StreamDecoder:
    """Decodes ids one at a time into whole characters; all results joined equal `Tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id_: int) -> str:
        """The text that `id_` completes: nothing while the bytes of a character are still missing."""
        return self._utf8.decode(self._tokenizer.token_bytes(id_))

    def finish(self) -> str:
        """U+FFFD for a character that was left incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)


def _first_id(vocabulary: Vocabulary, tokens: tuple[str, ...], path: Path) -> int:
    """Id of the first of `tokens`, which must lie in a row."""
    first = vocabulary.id_of(tokens[0])
    if first is None and tokens is LOC_TOKENS:
        raise TokenizerError(f"{path} has no <loc....> and <seg...> tokens: it is not the tokenizer of a PaliGemma")
    for i, token in enumerate(tokens):
        if first is None or vocabulary.id_of(token) != first + i:
            raise TokenizerError(f"{path}: {token} is missing or out of order: use the tokenizer of a PaliGemma")
    return first


def _named_ids(file: Path, vocabulary: Vocabulary) -> dict[str, int]:
    """Ids of bos and eos where a tokenizer_config.json names their tokens."""
    found = {}
    for name in ("bos", "eos") if file.is_file() else ():
        token = read_json(file).get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            is_text = isinstance(token, str) and token.isprintable()
            id_ = vocabulary.id_of(token) if is_text else None
            if id_ is None:
                raise TokenizerError(f"{file} has {name}_token {token!r:.40}, which is no token: give one that is")
            found[name] = id_
    return found
