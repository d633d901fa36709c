"""Training on several devices and processes: where states and batches lie, and how processes find each other.

Every process runs the same program on the same files; JAX joins their devices into one mesh. Without a layout, which is
one device, these functions change nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from paligemma_jax.errors import ConfigError
from paligemma_jax.sharding import Layout, path_name

Tree = Any


def connect(coordinator: str, num_processes: int, process_id: int) -> None:
    """Join the processes of a run; to be called before anything else asks JAX for its devices.

    Args:
      coordinator: "host:port" of process 0, the same for all; "auto" where the cluster says all three (Slurm, Open MPI,
        Cloud TPU, Kubernetes); "" is a single process.
      num_processes, process_id: how many there are, and which this one is, from 0.

    Raises:
      ConfigError: the numbers contradict each other, or the others cannot be reached.
    """
    if not coordinator:
        if num_processes > 1:
            raise ConfigError(f"num_processes={num_processes} needs coordinator=HOST:PORT, the address of process 0")
        return
    given = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    if coordinator != "auto" and not (":" in coordinator and 0 <= process_id < num_processes):
        raise ConfigError(
            f"coordinator={coordinator!r}, num_processes={num_processes}, process_id={process_id} is not possible: "
            "give HOST:PORT, how many processes there are, and which this one is, counted from 0"
        )
    try:
        jax.distributed.initialize(**({} if coordinator == "auto" else given))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the processes cannot be joined (coordinator={coordinator!r}): {error}") from None


def is_first() -> bool:
    """Whether this process is the one that writes files that are not divided."""
    return jax.process_index() == 0


def largest(number: int) -> int:
    """The largest of the numbers of all processes, each of which has to ask after the same step."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def host_rows(layout: Layout | None, batch_size: int) -> tuple[int, int]:
    """Which equal part of a batch's rows the devices of this process hold: (index, count).

    Several processes may hold the same rows, where `tensor` goes across them.

    Raises:
      ConfigError: they are not one part, as on a mesh whose devices are in another order than processes.
    """
    if layout is None:
        return 0, 1
    rows = layout.sharding("tokens", (batch_size,)).addressable_devices_indices_map((batch_size,)).values()
    bounds = [index[0].indices(batch_size) for index in rows]
    start, stop = min(bound[0] for bound in bounds), max(bound[1] for bound in bounds)
    if sum(last - first for first, last, _ in set(bounds)) != stop - start or batch_size % (stop - start):
        raise ConfigError(f"a batch of {batch_size} rows cannot be divided over processes on this mesh: change mesh")
    return start // (stop - start), batch_size // (stop - start)


def shard_batch(
    layout: Layout | None, batch: dict[str, Any], index: int = 0, count: int = 1, micro: bool = False
) -> dict[str, Any]:
    """A batch of host arrays, rows first, divided over the devices of the mesh.

    Args:
      batch: as of `Batches`; all of it, or the part of `host_rows`, whose `image_slots` count its own pictures.
      index, count: of that part.
      micro: whether micro-batches come before rows, as the first axis.
    """
    if layout is None:
        return batch
    first = int(micro)
    if "image_slots" in batch and index:
        pictures = batch["pixels"].shape[first] * layout.config.vision.num_tokens
        slots = batch["image_slots"]
        batch = {**batch, "image_slots": np.where(slots >= 0, slots + index * pictures, slots)}
    return {name: _global(layout, name, np.asarray(rows), index, count, first) for name, rows in batch.items()}


def _global(layout: Layout, name: str, rows: np.ndarray, index: int, count: int, first: int) -> jax.Array:
    shape = (*rows.shape[:first], rows.shape[first] * count, *rows.shape[first + 1 :])
    of_rows = layout.sharding(name, shape[first:])
    sharding = NamedSharding(layout.mesh, PartitionSpec(*(None,) * first, *of_rows.spec))
    if count == 1:
        return jax.make_array_from_callback(shape, sharding, lambda region: rows[region])
    if sharding.is_fully_replicated:
        raise ConfigError(f"{shape[first]} rows of a batch cannot be divided over {count} processes: change batch_size")
    return jax.make_array_from_process_local_data(sharding, rows, shape)


def shard_state(layout: Layout | None, init: Callable[[Tree], Tree], params: Tree) -> Tree:
    """init(params), made where it lies: no device ever holds more than its part.

    Args:
      init: from parameters to a training state, whose optimizer state follows the parameters.
      params: on the mesh, or small enough to be brought there; given up (donated), for the state holds them.
    """
    if layout is None:
        return init(params)

    def placed(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        on_mesh = leaf.sharding.device_set == layout.replicated.device_set
        return leaf if on_mesh else layout.place(path_name(path), leaf)

    params = jax.tree_util.tree_map_with_path(placed, params)
    shardings = layout.shardings(jax.eval_shape(init, params))
    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)


def step_shardings(layout: Layout | None, state: Tree) -> tuple[Tree, Any] | None:
    """Of what a step returns, the state as it lies and metrics on every device: `out_shardings` of `jax.jit`."""
    return None if layout is None else (layout.shardings(state), layout.replicated)


def to_host(tree: Tree) -> Tree:
    """A tree that every process can read whole, to be written: arrays divided over processes come to each of them."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), tree)
