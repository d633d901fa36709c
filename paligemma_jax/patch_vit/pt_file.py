"""Tensors out of the `.pt` files that torch writes, without torch and without running anything that is in them.

Such a file is a zip archive: a pickle that says how tensors lie in storages, and one uncompressed entry per storage. A
pickle is a program. The one here may build dictionaries, lists, tuples, numbers and texts, name tensors of the kinds in
`_STORAGES`, and make members of the enum of `_types`, which become plain `EnumMember`s. Whatever else it names is
refused before anything of it is called.
"""

import collections
import dataclasses
import io
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from paligemma_jax.errors import CheckpointError, one_line, printable

_STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_ENUM_MODULE = "_types"
_MOST_PICKLE_BYTES = 1 << 26
_REMEDY = "open it with torch where you trust it, and save the weights as safetensors"


class _Sealed:
    """What no pickle can give another state: the opcode BUILD calls this, or would write attributes."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a pickle changes what it did not make")


class _Name(_Sealed):
    """A name in a pickle: what it stands for, or what is called in its place."""

    __slots__ = ("meaning",)

    def __init__(self, meaning: Any):
        self.meaning = meaning

    def __call__(self, *arguments: Any) -> Any:
        if not callable(self.meaning):
            raise ValueError("a pickle calls what is no function")
        return self.meaning(*arguments)


@dataclasses.dataclass(frozen=True)
class EnumMember(_Sealed):
    """What stands for a member of the enum: its value, or its name."""

    value: Any


@dataclasses.dataclass(frozen=True)
class _Storage(_Sealed):
    """Numbers of one dtype in an entry of the archive; not read yet."""

    dtype: np.dtype
    key: str
    size: int


@dataclasses.dataclass(frozen=True)
class StoredTensor(_Sealed):
    """A tensor that was not read yet; strides and offset count numbers."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype


class PtFile:
    """A file of `torch.save`: `content` is what was saved, with a `StoredTensor` for each tensor.

    Raises:
      CheckpointError: it is no such file, is damaged, or holds more than tensors and plain values.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                head = file.read(4)
            if head[:2] != b"PK":
                kind = "is in the format of torch before 1.6" if head[:1] == b"\x80" else "is no file of torch.save"
                raise CheckpointError(f"{path} {kind}: save it with a newer torch, or give a safetensors directory")
            self._archive = zipfile.ZipFile(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {one_line(error.strerror or error)}") from None
        except CheckpointError:
            raise
        except Exception as error:  # a damaged directory of the archive can fail anywhere
            raise self._damaged(error) from None
        names = [name for name in self._archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(names) != 1:
            raise CheckpointError(f"{path} holds no data.pkl, it is no file of torch.save: give another")
        self._root = names[0].removesuffix("data.pkl")
        if f"{self._root}byteorder" in self._archive.namelist() and self._read("byteorder") != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine, which is not read: {_REMEDY}")
        if self._entry("data.pkl").file_size > _MOST_PICKLE_BYTES:
            raise CheckpointError(f"{path} has a data.pkl that is too large to be one of weights: {_REMEDY}")
        self.content = self._unpickled(self._read("data.pkl"))

    def read(self, tensor: StoredTensor) -> np.ndarray:
        """The numbers of a tensor, a new array.

        Raises:
          CheckpointError: the archive is damaged, or does not hold them.
        """
        raw = self._read(f"data/{tensor.storage.key}")
        size = tensor.storage.size
        if len(raw) < size * tensor.dtype.itemsize:
            raise self._damaged(f"storage {printable(tensor.storage.key)[:20]} is too short")
        numbers = np.frombuffer(raw, tensor.dtype, size)[tensor.offset :]
        strides = tuple(stride * tensor.dtype.itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(numbers, tensor.shape, strides, writeable=False).copy()

    def _unpickled(self, data: bytes) -> Any:
        unpickler = _Unpickler(data, self.path)
        try:
            return unpickler.load()
        except CheckpointError:
            raise
        except Exception as error:  # a damaged pickle can fail anywhere
            raise self._damaged(error) from None

    def _entry(self, name: str) -> zipfile.ZipInfo:
        try:
            entry = self._archive.getinfo(self._root + name)
        except KeyError as error:
            raise self._damaged(error) from None
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self.path} is compressed, as torch.save writes no file: {_REMEDY}")
        return entry

    def _read(self, name: str) -> bytes:
        entry = self._entry(name)
        try:
            return self._archive.read(entry)
        except Exception as error:  # a wrong checksum, a header that contradicts the directory, an end too soon
            raise self._damaged(error) from None

    def _damaged(self, error: object) -> CheckpointError:
        return CheckpointError(f"{self.path} is truncated or damaged ({one_line(error)[:80]}): download it again")


class _Unpickler(pickle.Unpickler):
    """Knows the names in `find_class` and no others."""

    def __init__(self, data: bytes, path: Path):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._path = path
        self._enum: str | None = None

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _Name(_STORAGES[name])
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Name(_rebuild_tensor)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _Name(_rebuild_parameter)
        if module == _ENUM_MODULE and name.isidentifier() and self._enum in (None, name):
            self._enum = name
            return _Name(EnumMember)
        if (module, name) in (("builtins", "getattr"), ("__builtin__", "getattr")):  # how Python 3.11 pickles enums
            return _Name(_enum_member)
        named = printable(f"{module}.{name}")[:60]
        raise CheckpointError(f"{self._path} is no plain checkpoint, its pickle asks for {named}: {_REMEDY}")

    def persistent_load(self, reference: Any) -> _Storage:
        kind, named, key, _device, size = reference
        dtype = named.meaning if isinstance(named, _Name) else None
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str) or not _is_count(size):
            raise ValueError("a reference is no storage")
        return _Storage(dtype, key, size)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    """A tensor within its storage, of no more numbers than that has."""
    counts = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides) or not all(map(_is_count, counts)):
        raise ValueError("a tensor is not described as one")
    count = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if count else offset - 1
    if count > storage.size or last >= storage.size:
        raise ValueError("a tensor is larger than its storage")
    return StoredTensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: Any, *_: Any) -> StoredTensor:
    if not isinstance(tensor, StoredTensor):
        raise ValueError("a parameter is no tensor")
    return tensor


def _enum_member(kind: Callable[..., Any], name: Any) -> EnumMember:
    """In place of getattr, which would reach everything: a member of the enum by name."""
    if not isinstance(kind, _Name) or kind.meaning is not EnumMember or not isinstance(name, str):
        raise ValueError("getattr of something else than the enum")
    return EnumMember(name)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48
