"""Files damaged at random, as other tools, editors, downloads and disks damage them."""

import copy
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

import paligemma_jax as pj
from paligemma_jax.errors import UserError, error_line

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
)
FILES = (*JSON_FILES, "tokenizer.model", "model-00001-of-00002.safetensors")
MOST_SECONDS = 20  # far more than a load takes

_VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 16, 224, 448, 2**31, 10**400, 0.5, -0.0, 1e-30, 1e300, float("nan"),
    float("inf"), "", "x", "224", "gemma", "bfloat16", "../x", "é\u2028", [], [1], [2, 3], [None], ["x"], {}, {"x": 1},
    {"height": 28, "width": 28},
]  # fmt: skip


def mutated(data: bytes, is_json: bool, rng: random.Random) -> bytes:
    """A file with one to three changes: of the structure that JSON has, or of its bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = _mutated_json(data, rng) if is_json and rng.random() < 0.8 else _mutated_bytes(data, is_json, rng)
    return data


def _mutated_bytes(data: bytes, is_json: bool, rng: random.Random) -> bytes:
    at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    ways = [
        data[:at],
        data[:at] + data[to:],
        data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
        data[:at] + rng.randbytes(4) + data[at:],
        data[:at] + data[at:to] + data[at:],
        b"",
        b"\0" * len(data),
    ]
    if is_json:
        ways += [
            b"\xef\xbb\xbf" + data,
            data.replace(b"\n", b"\r\n"),
            data.replace(b"1", b"1" * 5000, 1),
            data.replace(b"1", b"1e999", 1),
            b"[" * 20_000 + data,
            data.decode("utf-8", "replace").encode("utf-16"),
            data.replace(b":", b": \xe9", 1),
            b"[" + data + b"]",
            rng.choice([b"null", b"[]", b"{}", b"0", b'"x"']),
        ]
    return rng.choice(ways)


def _mutated_json(data: bytes, rng: random.Random) -> bytes:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places = list(_places(tree))
    if not places:
        return data
    holder, key = rng.choice(places)
    way = rng.randrange(8)
    if way == 0:
        del holder[key]
    elif way == 1:
        other, where = rng.choice(places)
        holder[key], other[where] = copy.deepcopy(other[where]), copy.deepcopy(holder[key])
    elif way == 2 and isinstance(holder, dict):
        holder[rng.choice([key.upper(), f"{key}_", f" {key}", ""])] = holder.pop(key)
    elif way == 3 and isinstance(holder[key], int | float):
        holder[key] = rng.choice([-holder[key], holder[key] + 1, holder[key] - 1, holder[key] * 2, str(holder[key])])
    elif way == 4 and isinstance(holder[key], list) and holder[key]:
        holder[key] = rng.choice([holder[key] * 2, holder[key][1:], holder[key][::-1], [holder[key]]])
    else:
        holder[key] = copy.deepcopy(rng.choice(_VALUES))
    return json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def _places(tree: Any) -> Any:
    """Every (object or list, key or index) of a tree; a long list is represented by its ends."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys if len(keys) < 50 else [*keys[:20], *keys[-20:]]:
        yield tree, key
        yield from _places(tree[key])


def shard(directory: Path) -> None:
    """Two files and an index in place of model.safetensors."""
    tensors = load_file(directory / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_checkpoint(model: pj.PaliGemma, directory: Path, write_tokenizer_json: Callable[[Path], None]) -> None:
    """A directory that has every file which some tool writes, in shards."""
    model.save(directory)
    shard(directory)
    write_tokenizer_json(directory)
    config = json.loads((directory / "config.json").read_text())
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files = {
        "generation_config.json": {"_from_model_config": True, **ids},
        "processor_config.json": {"processor_class": "PaliGemmaProcessor", "image_processor": settings},
        "tokenizer_config.json": {"bos_token": "<bos>", "eos_token": "<eos>", "tokenizer_class": "GemmaTokenizer"},
        "added_tokens.json": {"<image>": config["image_token_index"]},
    }
    for name, value in files.items():
        if not (directory / name).exists():
            (directory / name).write_text(json.dumps(value))


class _Hang(BaseException):
    """Not an Exception: nothing may catch it on its way."""


def read(directory: Path) -> pj.PaliGemma | str:
    """The model, or the line that a user would see."""

    def stop(signum: int, frame: object) -> None:
        raise _Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(MOST_SECONDS)
    try:
        return pj.load(directory, dtype="float32", prepare=False)
    except UserError as error:
        return error_line(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damaged_copy(source: Path, directory: Path, seed: int) -> str:
    """A copy of a checkpoint with one file damaged, and sometimes another one gone; says which."""
    rng = random.Random(seed)
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(source, directory, copy_function=os.link)
    present = [name for name in FILES if (directory / name).exists()]
    name = rng.choice(present)
    data = (directory / name).read_bytes()
    (directory / name).unlink()  # what it is a link to stays as it is
    (directory / name).write_bytes(mutated(data, name in JSON_FILES, rng))
    gone = rng.choice(present) if rng.random() < 0.2 else None
    if gone:
        (directory / gone).unlink()
    return f"seed {seed}, {source.name}: {name}" + f", without {gone}" * bool(gone)
