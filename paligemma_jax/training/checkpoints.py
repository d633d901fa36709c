"""Training states on disk, by Orbax."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from paligemma_jax.errors import CheckpointError
from paligemma_jax.training.step import TrainState


def open_checkpoints(directory: str | Path, *, keep: int = 2) -> ocp.CheckpointManager:
    """Orbax checkpoints of a run in a directory, made if it is not there."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    handler = ocp.StandardCheckpointHandler()
    return ocp.CheckpointManager(Path(directory).absolute(), options=options, item_handlers=handler)


def save(manager: ocp.CheckpointManager, step: int, state: TrainState, notes: dict[str, Any]) -> None:
    """Write a state and, in the same checkpoint, `notes` that JSON can hold: both are there, or neither."""
    manager.save(step, args=ocp.args.StandardSave(state), custom_metadata=notes)


def saved_notes(manager: ocp.CheckpointManager) -> dict[str, Any]:
    """The notes beside the newest saved state; none when nothing was saved yet."""
    step = manager.latest_step()
    return {} if step is None else manager.metadata(step).custom_metadata or {}


def restore(manager: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """The newest saved state, or the given one when nothing was saved yet.

    Raises:
      CheckpointError: the saved state has other parameters or another optimizer than `state`.
    """
    step = manager.latest_step()
    if step is None:
        return state
    # Looked at first: a restore that fails half way leaves reads behind that nobody waits for.
    saved = {leaf.name: tuple(leaf.shape) for leaf in jax.tree.leaves(manager.item_metadata(step).tree)}
    leaves = jax.tree_util.tree_leaves_with_path(state)
    if saved != {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}:
        raise CheckpointError(
            f"{manager.directory} holds a training state of another model: give another output_dir, or remove it"
        )
    return manager.restore(step, args=ocp.args.StandardRestore(jax.tree.map(_abstract, state)))


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
