"""What the tests run in a process of its own, with several devices that are parts of the CPU: JOB JSON, to JSON.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.sharding.worker losses '{"meshes": ["fsdp=8"]}'
"""

import functools
import json
import sys
from typing import Any

from paligemma_jax.training import parallel


def setup(mesh: str, num_devices: int | None = None) -> tuple[Any, Any, Any]:
    """Layout, state and step of a small model; an empty mesh is one device, without a layout."""
    import jax

    from paligemma_jax.models.paligemma import PaliGemma
    from paligemma_jax.sharding import Layout, make_mesh
    from paligemma_jax.training.loss import suffix_loss
    from paligemma_jax.training.optimizer import Recipe, make_optimizer
    from paligemma_jax.training.step import init_state, make_step
    from tests.conftest import _CONFIGS, _random_params

    config = _CONFIGS["gemma2"]
    layout = Layout(make_mesh(mesh, devices=jax.devices()[:num_devices]), config) if mesh else None
    params = jax.tree.map(jax.numpy.copy, _random_params(config))
    if layout is not None:
        host = jax.device_get(params)
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: layout.place(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), host
        )
    optimizer = make_optimizer(Recipe(learning_rate=1e-2, warmup_fraction=0.0), 10)
    loss = functools.partial(suffix_loss, PaliGemma(config), 0.0, 4)
    state = parallel.shard_state(layout, functools.partial(init_state, optimizer=optimizer), params)
    return layout, state, make_step(loss, optimizer, out_shardings=parallel.step_shardings(layout, state))


def batch_at(step: int, index: int = 0, count: int = 1, num_rows: int = 8) -> dict[str, Any]:
    """The rows of a step that a process has, of 8: four soft tokens, a text and an answer."""
    import numpy as np

    rng = np.random.default_rng(step)
    prefix_length = rng.integers(6, 9, num_rows).astype(np.int32)
    slots = np.full((num_rows, 12), -1, np.int32)
    own = num_rows // count
    slots[:, :4] = np.arange(num_rows)[:, None] % own * 4 + np.arange(4)[None]
    whole = {
        "pixels": rng.normal(size=(num_rows, 28, 28, 3)).astype(np.float32),
        "tokens": rng.integers(3, 90, (num_rows, 12)).astype(np.int32),
        "image_slots": slots,
        "prefix_length": prefix_length,
        "length": (prefix_length + rng.integers(1, 4, num_rows)).astype(np.int32),
    }
    return {name: rows[index * own : (index + 1) * own] for name, rows in whole.items()}


def train(layout: Any, state: Any, step_fn: Any, num_steps: int) -> tuple[Any, list[float]]:
    """The state some steps later, and their losses."""
    losses, (index, count) = [], parallel.host_rows(layout, 8)
    for _ in range(num_steps):
        batch = batch_at(int(state.step), index, count)
        state, metrics = step_fn(state, parallel.shard_batch(layout, batch, index, count))
        losses.append(float(metrics["loss"]))
    return state, losses


def losses(meshes: list[str]) -> dict[str, Any]:
    """Of three steps on each mesh; whether states stayed where they were, and the size of the largest share."""
    import jax

    found = {}
    for mesh in meshes:
        layout, state, step_fn = setup(mesh)
        before = jax.tree.map(lambda x: x.sharding, state)
        whole = sum(x.nbytes for x in jax.tree.leaves(state))
        shard = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
        state, each = train(layout, state, step_fn, 3)
        same = jax.tree.map(lambda x, old: x.sharding.is_equivalent_to(old, x.ndim), state, before)
        norm = float(jax.jit(lambda tree: sum(jax.numpy.sum(x * x) for x in jax.tree.leaves(tree)))(state.params))
        found[mesh] = {"losses": each, "kept": all(jax.tree.leaves(same)), "share": shard / whole, "norm": norm}
    return found


def restore(directory: str) -> dict[str, list[float]]:
    """Losses of steps 3 and 4 after going on, and after the state of step 2 was restored on fewer devices."""
    import orbax.checkpoint as ocp

    from paligemma_jax.training.checkpoints import open_checkpoints
    from paligemma_jax.training.checkpoints import restore as restored

    layout, state, step_fn = setup("data=2,fsdp=2,tensor=2")
    state, _ = train(layout, state, step_fn, 2)
    with open_checkpoints(directory) as manager:
        manager.save(2, args=ocp.args.StandardSave(state))
    found = {"8": train(layout, state, step_fn, 2)[1]}
    for mesh, count in (("fsdp=2", 2), ("", 1), ("tensor=2,data=4", 8)):
        layout, state, step_fn = setup(mesh, count)
        with open_checkpoints(directory) as manager:
            state = restored(manager, state)
        found[f"{mesh}/{count}"] = train(layout, state, step_fn, 2)[1]
    return found


def generate(checkpoint: str, meshes: list[str], quantization: str | None = None, **options: Any) -> dict[str, Any]:
    """Tokens of answers on each mesh, "" being one device, and the largest share of the weights that a device has."""
    import jax
    import numpy as np

    import paligemma_jax as pj

    picture = np.random.default_rng(0).integers(0, 255, (30, 30, 3), np.uint8)
    prompts = ["caption en", "detect the red circle", "answer en how many", "what color is the circle"]
    sampling = pj.Sampling(num_beams=options.pop("num_beams", 1))
    found = {}
    for mesh in meshes:
        model = pj.load(checkpoint, "float32", quantization, mesh=mesh or None, compilation_cache=False)
        answers = model.generate(picture, prompts, 12, sampling, **options)
        leaves = jax.tree.leaves(model.params)
        share = sum(x.addressable_shards[0].data.nbytes for x in leaves) / sum(x.nbytes for x in leaves)
        found[mesh] = {"tokens": [answer.tokens.tolist() for answer in answers], "share": share}
    return found


def serve(checkpoint: str, mesh: str) -> dict[str, Any]:
    """Tokens of a server's answers and of `generate` on one device."""
    import numpy as np

    import paligemma_jax as pj
    from paligemma_jax.serving.engine import Engine, EngineSettings

    picture = np.random.default_rng(0).integers(0, 255, (30, 30, 3), np.uint8)
    found = {}
    requests = [pj.Request((picture,), text, pj.GenerateOptions(8)) for text in ("caption en", "what color")]
    one = pj.load(checkpoint, "float32", compilation_cache=False)
    found["one"] = [answer.tokens.tolist() for answer in one.answer(requests)]
    model = pj.load(checkpoint, "float32", mesh=mesh, compilation_cache=False)
    engine = Engine(model, EngineSettings(num_slots=4, max_new_tokens=8, max_prompt_tokens=16, max_images=1))
    engine.start()
    try:
        jobs = [engine.submit(request) for request in requests]
        found["served"] = [job.result().output.tokens.tolist() for job in jobs]
    finally:
        engine.close()
    return found


def finetune(checkpoint: str, directory: str, meshes: list[str], **keys: Any) -> list[int]:
    """Runs the command on each mesh, into DIRECTORY/0, 1, ...; gives their exit statuses."""
    import warnings

    from paligemma_jax.runs import command_line

    warnings.simplefilter("ignore")
    common = {"checkpoint": checkpoint, "compilation_cache": False, "batch_size": 4, "epochs": 2, "learning_rate": 1e-3}
    statuses = []
    for i, mesh in enumerate(meshes):
        given = common | keys | {"mesh": mesh, "output_dir": f"{directory}/{i}"}
        arguments = [f"--config.{key}={value}" for key, value in given.items()]
        statuses.append(command_line.main(["--config=configs/finetune.py", *arguments]))
    return statuses


def stop(directory: str) -> dict[str, Any]:
    """Steps saved in a training of which the second process is told to stop; only the first one's time is up."""
    import signal

    import jax

    from paligemma_jax.errors import Stopped
    from paligemma_jax.training.checkpoints import open_checkpoints
    from paligemma_jax.training.loop import fit

    layout, state, step_fn = setup("data=2")
    index, count = parallel.host_rows(layout, 8)
    is_second = jax.process_index() == 1

    def step(state: Any, batch: Any) -> Any:
        if is_second and int(state.step) == 4:
            signal.raise_signal(signal.SIGTERM)
        return step_fn(state, batch)

    def batches(step: int) -> Any:
        return parallel.shard_batch(layout, batch_at(step, index, count), index, count)

    manager = open_checkpoints(directory, keep=20)
    minutes = 1e9 if is_second else 1e-9
    try:
        fit(state, step, batches, 20, checkpoints=manager, save_minutes=minutes, log_every=2)
    except Stopped as stopped:
        return {"steps": list(manager.all_steps()), "signal": stopped.signal}
    return {}


def main() -> None:
    job, options = sys.argv[1], json.loads(sys.argv[2])
    if "coordinator" in options:
        parallel.connect(*(options.pop(name) for name in ("coordinator", "num_processes", "process_id")))
    print(json.dumps(globals()[job](**options)))


if __name__ == "__main__":
    main()
