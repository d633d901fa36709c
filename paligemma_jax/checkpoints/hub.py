"""From what a user calls a checkpoint to a path on this machine, by way of the Hugging Face hub when it is a hub id."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from paligemma_jax.checkpoints import adapter_config
from paligemma_jax.checkpoints.companions import MASK_VAE_NAME
from paligemma_jax.errors import CheckpointError, one_line, printable
from paligemma_jax.files import data_folder, expanded
from paligemma_jax.processing.vocabulary import MODEL_FILE

_HUB_ID = re.compile(r"([\w][\w.-]*/[\w][\w.-]*)(?:@([\w][\w./-]*))?")  # a repository, and perhaps a revision of it
_SHIPPED = "tiny"
_PATTERNS = ["*.safetensors", "*.json", MODEL_FILE, MASK_VAE_NAME]


class Source(NamedTuple):
    """What weights are read from: a checkpoint, and the directory of an adapter over it."""

    base: Path
    adapter: Path | None = None

    @property
    def directories(self) -> tuple[Path, ...]:
        """Where the files beside the weights are looked for, in this order."""
        directory = self.base if self.base.is_dir() else self.base.parent
        return (self.adapter, directory) if self.adapter else (directory,)


def locate(checkpoint: str | Path, adapter: str | Path | None = None) -> Source:
    """The paths of a checkpoint and of an adapter over it, both as for `resolve`.

    A checkpoint that is an adapter itself names its base: a path, from here or from the adapter's directory, or a hub
    id.

    Raises:
      CheckpointError: see `resolve`; or a directory that is no adapter, or two adapters.
    """
    found = resolve(checkpoint)
    if adapter is not None:
        directory = resolve(adapter)
        if not _is_adapter(directory):
            expected = f"expected a directory with {adapter_config.NAME}, as PEFT writes it"
            raise CheckpointError(f"{directory} is no adapter: {expected}")
        if _is_adapter(found) and found != directory:
            raise CheckpointError(f"{found} is an adapter itself: merge it first, paligemma-jax-convert {found} OUT")
    else:
        directory = found
    if not _is_adapter(found):
        return Source(found, directory if adapter is not None else None)
    return Source(_base_of(directory), directory)


def _is_adapter(path: Path) -> bool:
    return (path / adapter_config.NAME).is_file()


def _base_of(adapter: Path) -> Path:
    """The base that an adapter names."""
    config, remedy = adapter_config.read_config(adapter), f"name it, as checkpoint=BASE adapter={adapter}"
    if config.base is None:
        raise CheckpointError(f"{adapter} does not say what its base is (base_model_name_or_path): {remedy}")
    for path in (expanded(config.base), adapter / config.base):
        if not os.path.exists(path):
            continue
        if _is_adapter(path) and not path.samefile(adapter):
            raise CheckpointError(f"the base of {adapter}, {printable(path)}, is an adapter itself: merge it first")
        return path
    try:
        return resolve(f"{config.base}@{config.revision}" if config.revision else config.base)
    except CheckpointError as error:
        raise CheckpointError(f"the base of the adapter {adapter} is not there: {error}; or {remedy}") from None


def resolve(path_or_hub_id: str | Path) -> Path:
    """An existing path as it is; "org/name" fetched from the hub, or taken from its cache, as a directory.

    "org/name@revision" is a branch, tag or commit of the repository ("google/paligemma-3b-pt-224@bfloat16").
    "tiny" is the shipped model, where there is no such path.

    Raises:
      CheckpointError: no such path, or the hub refuses; the message says what to do.
    """
    if not isinstance(path_or_hub_id, str | os.PathLike) or not str(path_or_hub_id).strip():
        raise CheckpointError(
            f"checkpoint {path_or_hub_id!r:.80} is no name: give a directory, an .npz file or a hub id such as org/name"
        )
    path = expanded(path_or_hub_id)
    if os.path.exists(path):  # false of impossible names too
        return path
    name = str(path_or_hub_id)
    if name == _SHIPPED:
        return data_folder("assets") / name
    match = _HUB_ID.fullmatch(name)
    if isinstance(path_or_hub_id, Path) or not match:
        raise CheckpointError(
            f"{printable(name)} does not exist; give a directory, an .npz file or a hub id such as org/name"
        )
    if (folder := Path(match[1]).parent).is_dir():  # a mistyped path rather than an organisation of the same name
        raise CheckpointError(f"{name} does not exist, though {folder}/ does: check the path")
    return _fetch(match[1], match[2])


def _fetch(hub_id: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        remedy = "to fetch it as a hub id: pip install huggingface_hub"
        raise CheckpointError(f"{hub_id} is no directory here; {remedy}") from None
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_PATTERNS))
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{hub_id}"
        remedy = f"accept its licence at {page}, then run `hf auth login` or set HF_TOKEN"
        raise CheckpointError(f"{hub_id} is gated: {remedy}") from None
    except errors.RepositoryNotFoundError:
        remedy = "check the name; a private one needs `hf auth login` or HF_TOKEN"
        raise CheckpointError(f"{hub_id} is neither a path here nor a repository on the hub: {remedy}") from None
    except errors.RevisionNotFoundError:
        remedy = f"leave @{revision} out, or take a branch that https://huggingface.co/{hub_id}/tree/main lists"
        raise CheckpointError(f"{hub_id} has no revision {revision}: {remedy}") from None
    except errors.LocalEntryNotFoundError:
        remedy = "connect to the network, unset HF_HUB_OFFLINE, or give a directory"
        name = f"{hub_id}@{revision}" if revision else hub_id
        raise CheckpointError(f"{name} is not in the hub's cache and the hub cannot be reached: {remedy}") from None
    except Exception as error:  # whatever the HTTP library of this version raises
        raise CheckpointError(f"{hub_id} could not be fetched from the hub: {one_line(error)}") from None
