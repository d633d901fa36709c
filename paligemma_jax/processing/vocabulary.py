"""Where ids come from: a SentencePiece model, or the tokenizer.json of the `tokenizers` package, Gemma's kind of each.

Both give the ids of a text and the bytes of an id; `Tokenizer` is the same over either. They read no control token in
a text: "<bos>", "<eos>", "<pad>", "<unk>" and "<image>" in a prompt are letters. This is where ids differ, on purpose,
from those of transformers, which lets a prompt end itself, or bring an image of its own.

The two differ from each other in what hardly anybody writes: more than 31 spaces in a row, and U+2581, SentencePiece's
sign for a space, next to spaces.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import sentencepiece

from paligemma_jax.errors import TokenizerError, one_line
from paligemma_jax.files import read_json, read_text

LOC_TOKENS = tuple(f"<loc{i:04d}>" for i in range(1024))
SEG_TOKENS = tuple(f"<seg{i:03d}>" for i in range(128))
IMAGE = "<image>"
CONTROLS = ("<pad>", "<eos>", "<bos>", "<unk>", IMAGE)
MODEL_FILE, JSON_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"

_GEMMA_PIECES = 256000
_LIST = re.compile(r'"added_tokens"\s*:\s*(?=\[)')
_AFFIX = re.compile(r'("(?:continuing_subword_prefix|end_of_word_suffix)"\s*:\s*)"(?:[^"\\]|\\.)*"')  # Gemma has none
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"  # a space in a piece
_SAMPLE = "a é 漢\t\0"  # letters, spaces, and what has no token but those of its bytes


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that the JSON files add; it is read as one id wherever it stands, unless the flags say more.

    strips_left, strips_right: it takes the white space around it along.
    is_word: it is read between what is no letter only.
    """

    id_: int
    content: str
    strips_left: bool = False
    strips_right: bool = False
    is_word: bool = False

    def to_json(self) -> dict[str, Any]:
        """As tokenizer_config.json has it."""
        flags = {"lstrip": self.strips_left, "rstrip": self.strips_right, "single_word": self.is_word}
        return {"content": self.content, **flags, "normalized": False, "special": False}

    @property
    def pattern(self) -> str:
        """Of a regular expression."""
        left, right = r"\s*" * self.strips_left, r"\s*" * self.strips_right
        text = left + re.escape(self.content) + right
        return rf"(?<!\w){text}(?!\w)" if self.is_word else text


class Vocabulary(Protocol):
    """What a tokenizer needs.

    Attributes:
        size: the id of <image>, or the one that it would get: how many ids come before it.
        bos, eos: ids, None when there is no such token.
        file_name: of the file that holds it.
        added: tokens that are not in that file, by content.
    """

    file_name: str
    size: int
    added: Mapping[str, AddedToken]
    bos: int | None
    eos: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of a text that is valid Unicode."""

    def token_bytes(self, id_: int) -> bytes:
        """UTF-8 of one id, which may be a part of a character; nothing for a control token and what is no id."""

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name, None when there is none."""

    def names(self, id_: int) -> bool:
        """Whether there is a token with this id."""

    def content(self, id_: int) -> str | None:
        """The token of an id, control tokens too; None without."""

    def to_bytes(self) -> bytes:
        """The file to save."""


class PieceVocabulary:
    """A SentencePiece model, and tokens that were added to it.

    Args:
        model: whose control tokens are of that type, so that they are never read.
        added: by content; names and ids that the model has too are the model's.
    """

    file_name = MODEL_FILE

    def __init__(self, model: sentencepiece.SentencePieceProcessor, added: Mapping[str, AddedToken]):
        self._model = model
        self.bos, self.eos = (id_ if id_ >= 0 else None for id_ in (model.bos_id(), model.eos_id()))
        self.added = dict(added)
        self._contents = {token.id_: token.content for token in added.values()}
        # The longest first: a regular expression takes the first that fits.
        self._read = sorted((t for t in added.values() if t.content not in CONTROLS), key=lambda t: -len(t.content))
        self._pattern = re.compile(f"({'|'.join(token.pattern for token in self._read)})") if self._read else None
        markers = (added[token].id_ + 1 for token in (*LOC_TOKENS, *SEG_TOKENS) if token in added)
        self.size = max(model.vocab_size(), *markers, 0) if IMAGE not in added else added[IMAGE].id_

    @classmethod
    def read(cls, path: Path, added: Mapping[str, AddedToken]) -> "PieceVocabulary":
        """Of a `tokenizer.model`; TokenizerError when it is missing or damaged."""
        model = sentencepiece.SentencePieceProcessor()
        try:
            data = path.read_bytes()
            if not data:
                raise RuntimeError
            model.LoadFromSerializedProto(data)
            pieces = model.id_to_piece(list(range(model.vocab_size())))
        except FileNotFoundError:
            remedy = f"copy it, or {JSON_FILE}, from the checkpoint that the weights come from"
            raise TokenizerError(f"{path} is missing: {remedy}") from None
        except OSError as error:
            raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
        except (RuntimeError, UnicodeDecodeError):
            raise TokenizerError(f"{path} is not a SentencePiece model, or damaged: copy it again") from None
        size = len(pieces)
        new = {t.content: t for t in added.values() if t.id_ >= size or pieces[t.id_] != t.content}
        if size == _GEMMA_PIECES and LOC_TOKENS[0] not in new:  # Gemma's own: what comes next is known
            markers = (AddedToken(size + i, token) for i, token in enumerate(LOC_TOKENS + SEG_TOKENS))
            new |= {token.content: token for token in markers}
        return cls(model, new)

    def encode(self, text: str) -> list[int]:
        if self._pattern is None:
            return self._model.encode(text)
        ids: list[int] = []
        for is_added, part in zip(itertools.cycle((False, True)), self._pattern.split(text), strict=False):
            ids += [self._added_id(part)] if is_added else self._model.encode(part)
        return ids

    def _added_id(self, part: str) -> int:
        """Of what the pattern found, perhaps with the white space around it."""
        token = self.added.get(part) or next(token for token in self._read if token.content in part)
        return token.id_

    def token_bytes(self, id_: int) -> bytes:
        if (content := self._contents.get(id_)) is not None:
            return b"" if content in CONTROLS else content.encode()
        model = self._model
        if not 0 <= id_ < model.vocab_size() or model.is_control(id_) or model.is_unknown(id_):
            return b""
        piece = model.id_to_piece(id_)
        return bytes([int(piece[3:5], 16)]) if model.is_byte(id_) else piece.replace(_SPACE, " ").encode()

    def id_of(self, token: str) -> int | None:
        if token in self.added:
            return self.added[token].id_
        id_ = self._model.piece_to_id(token)
        return None if id_ == self._model.unk_id() and self._model.id_to_piece(id_) != token else id_

    def names(self, id_: int) -> bool:
        return 0 <= id_ < self._model.vocab_size() or id_ in self._contents

    def content(self, id_: int) -> str | None:
        is_piece = 0 <= id_ < self._model.vocab_size()
        return self._contents.get(id_) or (self._model.id_to_piece(id_) if is_piece else None)

    def to_bytes(self) -> bytes:
        return self._model.serialized_model_proto()


class JsonVocabulary:
    """A tokenizer.json, read as transformers reads one of a Gemma: byte-pair merges and added tokens are the file's.

    Normalization is Gemma's whatever the file says, as in transformers 5, and a length to cut or pad to is not read.
    """

    file_name = JSON_FILE
    added: Mapping[str, AddedToken] = MappingProxyType({})  # the file has them all

    def __init__(self, path: Path):
        import tokenizers  # takes a while, and most checkpoints have a SentencePiece model

        try:
            settings, *vocabulary = read_text(path).partition('"vocab"')
            text = "".join([_AFFIX.sub(r"\1null", settings), *vocabulary])
            self._file = tokenizers.Tokenizer.from_str(text)
        except OSError as error:
            raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
        except BaseException as error:  # `tokenizers` raises nothing more precise, and panics
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            problem = one_line(error)[:100]
            raise TokenizerError(f"{path} is no tokenizer, or damaged ({problem}): copy it again") from None
        model = self._file.model
        if not isinstance(model, tokenizers.models.BPE):
            kind = type(model).__name__
            raise TokenizerError(f"{path} is a {kind} tokenizer, not Gemma's BPE: use that of the model's checkpoint")
        model.dropout, model.byte_fallback, model.fuse_unk, model.ignore_merges = None, True, True, False
        # A second tokenizer over the same model reads the text: it has never heard of the control tokens.
        self._reader = tokenizers.Tokenizer(model)
        self._reader.normalizer = tokenizers.normalizers.Replace(" ", _SPACE)
        added = self._file.get_added_tokens_decoder()
        self._reader.add_tokens([added[id_] for id_ in sorted(added) if added[id_].content not in CONTROLS])
        # Without <image> those behind it have other ids there.
        contents = [token.content for token in added.values() if token.content not in CONTROLS]
        moved = {self._reader.token_to_id(content): self._file.token_to_id(content) for content in contents}
        self._moved = {id_: own for id_, own in moved.items() if id_ != own}
        ids = (self._file.token_to_id(token) for token in CONTROLS)
        self._controls = {id_ for id_ in ids if id_ is not None}
        self._never = self._controls - {self._file.token_to_id("<unk>")}
        image, self.bos, self.eos = map(self._file.token_to_id, (IMAGE, "<bos>", "<eos>"))
        self.size = max(self._file.get_vocab().values(), default=-1) + 1 if image is None else image

    def encode(self, text: str) -> list[int]:
        ids = self._encode(text)
        if self._never.isdisjoint(ids):
            return ids
        return [id_ for character in text for id_ in self._encode(character)]  # merges that spell a control token

    def _encode(self, text: str) -> list[int]:
        ids = self._reader.encode(text, add_special_tokens=False).ids
        return [self._moved.get(id_, id_) for id_ in ids] if self._moved else ids

    def token_bytes(self, id_: int) -> bytes:
        piece = self._file.id_to_token(id_) if id_ >= 0 else None
        if piece is None or id_ in self._controls:
            return b""
        byte = _BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode()

    def id_of(self, token: str) -> int | None:
        return self._file.token_to_id(token)

    def names(self, id_: int) -> bool:
        return id_ >= 0 and self._file.id_to_token(id_) is not None

    def content(self, id_: int) -> str | None:
        return self._file.id_to_token(id_)

    def to_bytes(self) -> bytes:
        return self._file.to_str().encode()


def check_sample(vocabulary: Vocabulary, path: Path) -> None:
    """TokenizerError unless a text comes back as it was, as Gemma's does: a damaged file may know no letters."""
    if b"".join(map(vocabulary.token_bytes, vocabulary.encode(_SAMPLE))) != _SAMPLE.encode():
        problem = "does not give back a text that it encodes, as Gemma's would"
        raise TokenizerError(f"{path} {problem}: use the tokenizer of the model's checkpoint")


def read_vocabulary(path: Path) -> Vocabulary:
    """Of a `tokenizer.model`, to which JSON files beside it may add tokens, or of a `tokenizer.json`.

    Where both are there and the JSON adds tokens, such as those of a fine-tune, it alone knows how they are read.

    Raises:
        TokenizerError, CheckpointError: a file is missing or damaged.
    """
    if path.suffix == ".json":
        return JsonVocabulary(path)
    added = _added_tokens(path.parent)
    vocabulary = PieceVocabulary.read(path, added)
    is_more = not {IMAGE, *LOC_TOKENS, *SEG_TOKENS}.issuperset(vocabulary.added)
    if is_more and (beside := path.with_name(JSON_FILE)).is_file():
        return JsonVocabulary(beside)
    return vocabulary


def _added_tokens(directory: Path) -> dict[str, AddedToken]:
    """All tokens that the JSON files of a directory add, by content; the last file that names one is right."""
    found: dict[str, AddedToken] = {}
    for name, read in _LISTS.items():
        if (file := directory / name).is_file():
            try:
                found |= {token.content: token for token in read(file)}
            except (AttributeError, KeyError, TypeError, ValueError):
                raise TokenizerError(f"{file} does not list tokens as expected: copy it again") from None
    names: dict[int, str] = {}
    for token in found.values():
        if (other := names.setdefault(token.id_, token.content)) != token.content:
            problem = f"both {other!r:.40} and {token.content!r:.40} have id {token.id_}"
            raise TokenizerError(f"{directory}: of the tokens that its JSON files add, {problem}: give each its own")
    return found


def _added(id_: Any, fields: Mapping[str, Any]) -> AddedToken:
    content, number = fields["content"], int(id_) if isinstance(id_, str) else id_
    if not content.encode() or type(number) is not int or number < 0:  # a lone surrogate is a ValueError too
        raise ValueError
    flags = (bool(fields.get(name, False)) for name in ("lstrip", "rstrip", "single_word"))
    return AddedToken(number, content, *flags)


def _from_added_tokens(file: Path) -> Iterable[AddedToken]:
    return [_added(id_, {"content": token}) for token, id_ in read_json(file).items()]


def _from_tokenizer_config(file: Path) -> Iterable[AddedToken]:
    return [_added(id_, token) for id_, token in read_json(file).get("added_tokens_decoder", {}).items()]


def _from_tokenizer(file: Path) -> Iterable[AddedToken]:
    """The list comes before the vocabulary, whose 30 MB need not be read for it."""
    try:
        text = read_text(file)
        tokens, _ = json.JSONDecoder().raw_decode(text, _LIST.search(text).end())
    except (AttributeError, ValueError, RecursionError):  # no such list, at least at first sight
        tokens = read_json(file).get("added_tokens") or []
    return [_added(token["id"], token) for token in tokens]


_LISTS = {  # files that may list added tokens
    "added_tokens.json": _from_added_tokens,
    CONFIG_FILE: _from_tokenizer_config,
    JSON_FILE: _from_tokenizer,
}
