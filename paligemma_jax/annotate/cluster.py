"""The engine of many machines: Ray Data gives groups of pictures to actors, each of which has a device and the model.

The plan, the rows on disk and the going on after a kill are those of the local engine: actors only make rows, which the
process that was started keeps. So a run can go on with the other engine. Ray's own checkpoints are not used: they would
be a second account of what is done.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

from paligemma_jax.annotate import local
from paligemma_jax.annotate.rows import Row
from paligemma_jax.annotate.sources import Source
from paligemma_jax.annotate.store import Group
from paligemma_jax.errors import ConfigError, UserError

_TOGETHER = 8  # groups that an actor is given at once, so that it can read ahead


def annotate(
    make: Callable[[], local.Annotates],
    sources: Sequence[Source],
    groups: Iterable[Group],
    threads: int,
    workers: int,
    keep: local.Keep,
) -> None:
    """Make the rows of each group, which are kept in the order in which they are done.

    Args:
      make: makes what answers, in a process of its own on a machine of the cluster; files must have the same paths
        there.
      threads: that read pictures, for each actor.
      workers: actors; 0 for one for each GPU of the cluster, or for each machine where there is none.

    Raises:
      ConfigError: Ray is not installed.
      UserError: an actor cannot load the model, or go on.
    """
    ray = require()
    if not ray.is_initialized():
        ray.init(log_to_driver=False, configure_logging=False)  # a cluster that is there, or one on this machine
    gpus = int(ray.cluster_resources().get("GPU", 0))
    count = workers or gpus or len([node for node in ray.nodes() if node["Alive"]])
    waiting = [{"shard": group.shard, "items": json.dumps(group.items)} for group in groups]
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False  # the run has its own
    context.execution_options.preserve_order = False
    blocks = max(1, -(-len(waiting) // _TOGETHER))
    dataset = ray.data.from_items(waiting, override_num_blocks=blocks).map_batches(
        _Actor,
        fn_constructor_args=(make, ray.put(list(sources)), threads),
        compute=ray.data.ActorPoolStrategy(size=min(count, blocks)),
        batch_size=_TOGETHER,
        num_gpus=1 if gpus else None,
        num_cpus=None if gpus else 1,
    )
    for record in dataset.iter_rows():
        if record["error"]:
            raise UserError(record["error"])
        keep(_group(record["shard"], record["items"]), json.loads(record["rows"]))


class _Actor:
    """A process with a model. Groups and rows travel as JSON."""

    def __init__(self, make: Callable[[], local.Annotates], sources: Any, threads: int):
        self._error, self._threads = "", threads
        self._sources = require().get(sources)
        try:
            self._annotator = make()
        except UserError as error:  # Ray would wrap it in pages
            self._error = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        groups = [_group(*pair) for pair in zip(batch["shard"], batch["items"], strict=True)]
        done: list[tuple[Group, list[list[Row]]]] = []
        try:
            if not self._error:
                local.annotate(self._annotator, self._sources, groups, self._threads, lambda *pair: done.append(pair))
        except UserError as error:
            self._error = str(error)
        if self._error:
            done = [(groups[0], [])]
        return {
            "shard": [group.shard for group, _ in done],
            "items": [json.dumps(group.items) for group, _ in done],
            "rows": [json.dumps(rows) for _, rows in done],
            "error": [self._error] * len(done),
        }


def _group(shard: int, items: str) -> Group:
    return Group(int(shard), tuple(json.loads(items)))


def require() -> ModuleType:
    """Ray with Ray Data; ConfigError when it is not installed."""
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError('engine=ray needs Ray: pip install -e ".[ray]"') from None
    return ray
