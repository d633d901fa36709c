"""What the rows of a run depend on, as a few short values: a run goes on only where all of them are the same."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import paligemma_jax as pj
from paligemma_jax import checkpoints, loading
from paligemma_jax.annotate import rows
from paligemma_jax.files import digest as digest_of
from paligemma_jax.processing.request import GenerateOptions
from paligemma_jax.tasks.prompts import Prompt

_SUFFIXES = (".safetensors", ".json", ".model", ".npz")  # of the files that an answer depends on

Fingerprint = dict[str, Any]


def of_inputs(names: Iterable[str]) -> str:
    """Of the names of pictures in their order."""
    digest = hashlib.sha256()
    for name in names:
        data = name.encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def of_weights(checkpoint: str, adapter: str = "", mask_vae: str = "") -> str:
    """Of the contents of a checkpoint, its tokenizer and settings, wherever they lie.

    Of files above 64 MiB the size and a part of the contents count, see `files.digest`.

    Raises:
      CheckpointError: as for `checkpoints.locate` and `loading.find_mask_vae`.
    """
    source = checkpoints.locate(checkpoint, adapter or None)
    files = [file for folder in source.directories for file in sorted(folder.iterdir()) if file.suffix in _SUFFIXES]
    if source.base.is_file():  # others beside it are other models
        files = [source.base, *(file for file in files if file.suffix in (".json", ".model"))]
    masks = loading.find_mask_vae(source, mask_vae or None)
    digest = hashlib.sha256()
    for file in (*files, *([masks] if masks else ())):
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + digest_of(file))
    return digest.hexdigest()


def of_answers(
    weights: str, prompts: Sequence[Prompt], options: GenerateOptions, others: Mapping[str, Any]
) -> Fingerprint:
    """Of all that decides about the answers to a picture; `others` are settings by their names."""
    sampling = dataclasses.asdict(options.sampling)
    return {
        "rows": rows.VERSION,
        "version": pj.__version__,
        "weights": weights,
        "prompts": [prompt.text for prompt in prompts],
        "max_new_tokens": options.max_new_tokens,
        "constrain": options.constrain,
        **sampling,
        **others,
    }


def run_id(fingerprint: Mapping[str, Any]) -> str:
    """A short name of a fingerprint: rows with the same one were made in the same way."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of what is not the same."""
    names = dict.fromkeys([*now, *before])
    return [name for name in names if before.get(name) != now.get(name)]


def named(changed: Sequence[str]) -> str:
    """What `differences` found, in words."""
    return f"{', '.join(changed[:4])}{' and more' * (len(changed) > 4)}"
