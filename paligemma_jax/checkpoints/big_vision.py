"""big_vision checkpoints: one .npz whose arrays stack all layers, bf16 stored as two void bytes.

The file is read and written as the zip archive that it is, one layer at a time, so that no stacked array is ever whole
in memory, but for those in Fortran order, whose layers do not lie together. Parameters are under "params/", in old
training checkpoints under "opt/target/", or at the top; what lies beside them, such as the optimizer's state, is not
read. An .npz states no geometry: sizes come from the shapes, the rest from the released decoder of those sizes.

Axes of the encoder: J layers, P patch size, C colours, I image tokens, E width, F mlp width, A heads, B head width; of
the decoder: L layers, D width, M mlp width, N query heads, K key/value heads, H head width, V table rows; 1 and 2 are
themselves.
Source: big_vision, models/vit.py, models/ppp/gemma.py and models/proj/paligemma/paligemma.py.
"""

import ast
import dataclasses
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from paligemma_jax import files, ops
from paligemma_jax.checkpoints import companions, foreign, fusion, shapes
from paligemma_jax.checkpoints.arrays import DTYPES, cast_into, dtype_named, empty_aligned
from paligemma_jax.config import PaliGemmaConfig, TextConfig, VisionConfig, find_decoder
from paligemma_jax.errors import CheckpointError, ConfigError

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_PREFIX = "params/"
_PREFIXES = (_PREFIX, "opt/target/", "")  # where parameters are: under the first that a file has
_UNUSED = re.compile(r"(img/)?MAPHead_0/.*|t|b")  # SigLIP's pooling head, temperature and bias
_ROWS = (257152, 257216)  # embedding rows of the released models: big_vision's and Hugging Face's


class _Array(NamedTuple):
    """One array of the file. `stored` are its axes without the layer axis, `ours` the same letters in our order."""

    key: str
    paths: tuple[str, ...]  # two paths: two parameters stacked on a leading axis
    stored: str
    ours: str

    @property
    def stacked(self) -> bool:
        return "{i}" in self.paths[0]

    @property
    def layers(self) -> str:
        """The letter of the layer count, "" for an array outside the layers."""
        return "" if not self.stacked else "L" if self.key.startswith("llm/") else "J"

    @property
    def axes(self) -> str:
        """Axes of the array in the file."""
        return self.layers + ("2" if len(self.paths) == 2 else "") + self.stored


def _table() -> tuple[_Array, ...]:
    img, block = "vision_tower/", "img/Transformer/encoderblock/"
    layer, attention = img + "layers_{i}/", block + "MultiHeadDotProductAttention_0/"
    llm, decoder = "language_model/layers_{i}/", "llm/layers/"

    def one(key: str, path: str, stored: str, ours: str | None = None) -> _Array:
        return _Array(key, (path,), stored, ours or stored)

    def affine(key: str, path: str, stored: str, ours: str, bias: str) -> list[_Array]:
        return [one(f"{key}/kernel", f"{path}/weight", stored, ours), one(f"{key}/bias", f"{path}/bias", bias)]

    def norm(key: str, path: str) -> list[_Array]:
        return [one(f"{key}/scale", f"{path}/weight", "E"), one(f"{key}/bias", f"{path}/bias", "E")]

    return (
        *affine("img/embedding", img + "patch_embedding", "PPCE", "ECPP", "E"),
        one("img/pos_embedding", img + "position_embedding/weight", "1IE", "1IE"),
        *norm(block + "LayerNorm_0", layer + "layer_norm1"),
        *affine(attention + "query", layer + "self_attn/q_proj", "EAB", "ABE", "AB"),
        *affine(attention + "key", layer + "self_attn/k_proj", "EAB", "ABE", "AB"),
        *affine(attention + "value", layer + "self_attn/v_proj", "EAB", "ABE", "AB"),
        *affine(attention + "out", layer + "self_attn/out_proj", "ABE", "EAB", "E"),
        *norm(block + "LayerNorm_1", layer + "layer_norm2"),
        *affine(block + "MlpBlock_0/Dense_0", layer + "mlp/fc1", "EF", "FE", "F"),
        *affine(block + "MlpBlock_0/Dense_1", layer + "mlp/fc2", "FE", "EF", "E"),
        *norm("img/Transformer/encoder_norm", img + "post_layernorm"),
        *affine("img/head", "multi_modal_projector/linear", "ED", "DE", "D"),
        one("llm/embedder/input_embedding", "language_model/embed_tokens/weight", "VD"),
        one(decoder + "pre_attention_norm/scale", llm + "pre_attention_norm/weight", "D"),
        one(decoder + "attn/q_einsum/w", llm + "self_attn/q_proj/weight", "NDH", "NHD"),
        _Array(
            decoder + "attn/kv_einsum/w",
            (llm + "self_attn/k_proj/weight", llm + "self_attn/v_proj/weight"),
            "KDH",
            "KHD",
        ),
        one(decoder + "attn/attn_vec_einsum/w", llm + "self_attn/o_proj/weight", "NHD", "DNH"),
        one(decoder + "post_attention_norm/scale", llm + "post_attention_norm/weight", "D"),
        one(decoder + "pre_ffw_norm/scale", llm + "pre_ffw_norm/weight", "D"),
        _Array(decoder + "mlp/gating_einsum", (llm + "mlp/gate_proj/weight", llm + "mlp/up_proj/weight"), "DM", "MD"),
        one(decoder + "mlp/linear", llm + "mlp/down_proj/weight", "MD", "DM"),
        one(decoder + "post_ffw_norm/scale", llm + "post_ffw_norm/weight", "D"),
        one("llm/final_norm/scale", "language_model/norm/weight", "D"),
    )


_ARRAYS = {array.key: array for array in _table()}
_GEMMA2_ONLY = {key for key in _ARRAYS if key.startswith("llm/layers/post_")}


class _Member(NamedTuple):
    """Header of one array in the archive."""

    name: str
    shape: tuple[int, ...]
    stored: np.dtype  # as it lies in the file: of either byte order, perhaps float64
    fortran: bool = False  # the first axis varies fastest

    @property
    def dtype(self) -> np.dtype:
        """Of the parameter: in this machine's byte order, float32 for float64."""
        native = self.stored.newbyteorder("=")
        return np.dtype(np.float32) if native == np.float64 else native


@dataclasses.dataclass(frozen=True)
class Contents:
    """A verified .npz of which no array was read yet."""

    path: Path
    config: PaliGemmaConfig
    members: dict[str, _Member]  # key without "params/" -> header
    notes: tuple[str, ...] = ()  # what a user should know of it

    @property
    def dtypes(self) -> dict[str, int]:
        """How many arrays have each dtype ("bfloat16")."""
        names = [member.stored.name for member in self.members.values()]
        return {name: names.count(name) for name in dict.fromkeys(names)}

    @property
    def weight_files(self) -> tuple[Path, ...]:
        return (self.path,)

    @property
    def quantization(self) -> None:
        """This format holds no quantized weights."""
        return None


def _sizes(config: PaliGemmaConfig) -> dict[str, int]:
    """Letter of an axis -> its size."""
    vision, text = config.vision, config.text
    return {
        **{"1": 1, "2": 2, "C": 3, "P": vision.patch_size, "I": vision.num_tokens, "J": vision.num_layers},
        **{"E": vision.width, "F": vision.mlp_dim, "A": vision.num_heads, "B": vision.head_dim},
        **{"L": text.num_layers, "D": text.width, "M": text.mlp_dim, "V": text.vocab_size},
        **{"N": text.num_heads, "K": text.num_kv_heads, "H": text.head_dim},
    }


def _arrays_of(version: int) -> dict[str, _Array]:
    return {key: array for key, array in _ARRAYS.items() if version == 2 or key not in _GEMMA2_ONLY}


def scan(path: Path, config: PaliGemmaConfig | None = None) -> Contents:
    """Verify an .npz from the headers of its arrays; `config` overrides what the shapes suggest.

    Raises:
      CheckpointError: damaged, or not the arrays of the geometry.
      ConfigError: the geometry cannot be told from the shapes alone.
    """
    try:
        members = _read_members(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except Exception as error:  # zip, deflate and numpy headers each fail in their own way
        if named := foreign.recognize(path):
            raise CheckpointError(named) from None
        hint = ": for safetensors give their directory" if path.suffix == ".safetensors" else f" ({error})"
        raise CheckpointError(f"{path} is no .npz file, or is damaged or truncated{hint}") from None
    unused = [key for key in members if _UNUSED.fullmatch(key)]
    members = {key: member for key, member in members.items() if key not in unused}
    notes = (f"{path} holds what the model does not use: {', '.join(unused)}",) if unused else ()
    if config is None:
        config = companions.with_generation(_infer_config(path, members), path.parent)
    if not config.text.tied:
        raise ConfigError(f"{path}: an .npz has no output head of its own: tie_word_embeddings must be true")
    sizes = _sizes(config)
    expected = {key: tuple(sizes[a] for a in array.axes) for key, array in _arrays_of(config.version).items()}
    problems = shapes.differences({key: member.shape for key, member in members.items()}, expected)
    if problems:
        raise CheckpointError(f"{path}: the arrays are not those of PaliGemma {config.version}: {problems}")
    odd = [f"{key} is {m.dtype}" for key, m in members.items() if m.dtype not in DTYPES]
    if odd:
        raise CheckpointError(f"{path}: only float32, float16 and bfloat16 arrays are read: {', '.join(odd)}")
    return Contents(path, config, members, notes)


def _read_members(path: Path) -> dict[str, _Member]:
    members = {}
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        prefix = next(prefix for prefix in _PREFIXES if not names or any(name.startswith(prefix) for name in names))
        for name in (name for name in names if name.startswith(prefix)):
            with archive.open(name) as stream:
                members[name.removesuffix(".npy").removeprefix(prefix)] = _read_array_header(stream, name)
    return members


def _read_array_header(stream: IO[bytes], name: str) -> _Member:
    """The header at the start of a .npy stream, which is left at the first element."""
    major, _ = np.lib.format.read_magic(stream)
    length = int.from_bytes(stream.read(2 if major == 1 else 4), "little")
    header = ast.literal_eval(stream.read(length).decode("latin1"))
    dtype = np.dtype(header["descr"])
    fortran = bool(header["fortran_order"]) and len(header["shape"]) > 1
    return _Member(name, header["shape"], _BFLOAT16 if dtype == np.dtype("V2") else dtype, fortran)


def _infer_config(path: Path, members: Mapping[str, _Member]) -> PaliGemmaConfig:
    """Geometry from shapes; softcaps, window and query scalar are those of the released decoder of these sizes."""
    size: dict[str, int] = {}
    for key, array in _ARRAYS.items():
        if key in members and len(members[key].shape) == len(array.axes):
            for axis, n in zip(array.axes, members[key].shape, strict=True):
                size.setdefault(axis, n)
    lacking = [key for key, array in _arrays_of(1).items() if not set(array.axes) <= size.keys()]
    if lacking:
        raise CheckpointError(f"{path} is no PaliGemma: missing or mis-shaped {', '.join(lacking)}")
    side = math.isqrt(size["I"])
    vision = VisionConfig(side * size["P"], size["P"], size["E"], size["J"], size["F"], size["A"])
    sizes = {"width": size["D"], "num_layers": size["L"], "mlp_dim": size["M"], "head_dim": size["H"]}
    version = 2 if _GEMMA2_ONLY & members.keys() else 1
    text = TextConfig(version=version, num_heads=size["N"], num_kv_heads=size["K"], **sizes)
    decoder = find_decoder(text)
    if decoder is None or size["V"] not in _ROWS:
        raise ConfigError(
            f"{path} has the sizes of no released model, an .npz does not say enough: make a directory of it with "
            "`paligemma-jax-convert SRC DST --config config.json`"
        )
    return PaliGemmaConfig(vision, dataclasses.replace(decoder, vocab_size=size["V"]))


def read(contents: Contents, dtype: np.dtype | None, progress: bool, emit: Callable[[str, Any], None]) -> None:
    """Read an .npz that `scan` has verified; arguments as for `huggingface.read`.

    Every row of the embedding table is kept, so that a round trip through this format changes no bit.
    """
    path = contents.path
    sizes = _sizes(contents.config)
    expected = shapes.expected_shapes(contents.config)
    total = sum(math.prod(member.shape) * member.stored.itemsize for member in contents.members.values())
    with files.progress(f"loading {path.name}", total, progress) as advance, zipfile.ZipFile(path) as archive:
        for key, array in _arrays_of(contents.config.version).items():
            member = contents.members[key]
            shape = tuple(sizes[axis] for axis in array.stored)
            with archive.open(member.name) as stream:
                _read_array_header(stream, member.name)
                names = _paths(array, sizes)
                whole = _read_fortran(member, stream, path) if member.fortran else None
                for i, name in enumerate(names):
                    out = empty_aligned(expected[name], dtype or member.dtype)
                    as_stored = array.stored == array.ours and out.dtype == member.stored and whole is None
                    if whole is None:
                        piece = out.reshape(shape) if as_stored else np.empty(shape, member.stored)
                        _fill(piece, stream, path)
                    else:
                        piece = whole.reshape(-1, *shape)[i]
                    if not as_stored:
                        ours = piece.transpose(_order(array.stored, array.ours))
                        cast_into(out.reshape(ours.shape), ours, name)
                    advance(piece.nbytes)
                    emit(name, out)


def _read_fortran(member: _Member, stream: IO[bytes], path: Path) -> np.ndarray:
    """A whole array in Fortran order, as one in C order."""
    reverse = np.empty(member.shape[::-1], member.stored)
    _fill(reverse, stream, path)
    return np.ascontiguousarray(reverse.transpose())


def _fill(array: np.ndarray, stream: IO[bytes], path: Path) -> None:
    """Read a contiguous array's bytes from a stream of the file `path`; CheckpointError when they are damaged."""
    view = memoryview(array.reshape(-1).view(np.uint8))
    try:
        while view:
            count = stream.readinto(view)
            if not count:
                raise EOFError("too few bytes")
            view = view[count:]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error})") from None


def _paths(array: _Array, sizes: Mapping[str, int]) -> list[str]:
    """The parameters of one array in the order of its elements."""
    layers = range(sizes[array.layers]) if array.stacked else range(1)
    return [path.format(i=i) for i in layers for path in array.paths]


def _order(source: str, target: str) -> tuple[int, ...]:
    """Permutation that takes axes `source` to `target`; of equal letters the first stays first."""
    taken: list[int] = []
    for axis in target:
        taken.append(next(i for i, letter in enumerate(source) if letter == axis and i not in taken))
    return tuple(taken)


def save(path: Path, config: PaliGemmaConfig, params: Mapping[str, Any], dtype: str | None = None) -> None:
    """Write an .npz, whole or not at all; `dtype` None keeps each array's own (of its first layer)."""
    if not config.text.tied:
        remedy = "write a directory, or leave the untied head out of the model"
        raise CheckpointError(f"{path}: an .npz has no place for an output head of its own: {remedy}")
    target = dtype_named(dtype) if dtype else None
    leaves = {path: ops.unprepare(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    if any(hasattr(leaf, "quantization") for leaf in leaves.values()):
        raise CheckpointError(f"{path}: an .npz holds no quantized weights: write a directory")
    found, expected = {path: leaf.shape for path, leaf in leaves.items()}, shapes.expected_shapes(config)
    shapes.require(found, fusion.fused_shapes(config, found.__contains__))
    flat = {name: fusion.take(leaves, name, expected) for name in expected}
    sizes = _sizes(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for key, array in _arrays_of(config.version).items():
            names = _paths(array, sizes)
            kind = np.dtype(target or flat[names[0]].dtype)
            descr = "|V2" if kind == _BFLOAT16 else np.lib.format.dtype_to_descr(kind)
            header = {"descr": descr, "fortran_order": False, "shape": tuple(sizes[axis] for axis in array.axes)}
            with archive.open(f"{_PREFIX}{key}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array_header_1_0(stream, header)
                for name in names:
                    ours = np.asarray(flat[name]).reshape([sizes[axis] for axis in array.ours])
                    piece = ours.transpose(_order(array.ours, array.stored))
                    if piece.dtype != kind:
                        source, piece = piece, np.empty(piece.shape, kind)
                        cast_into(piece, source, name)
                    stream.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
