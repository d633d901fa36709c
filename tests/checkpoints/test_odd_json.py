"""JSON files with anything in them: a checkpoint that is read, or one line that says what is wrong."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paligemma_jax import checkpoints
from paligemma_jax.checkpoints import adapters
from paligemma_jax.errors import UserError

NAMES = ("config.json", "model.safetensors.index.json", "adapter_config.json")
ODD = (
    None,
    True,
    False,
    0,
    -1,
    2,
    3.5,
    float("inf"),
    float("nan"),
    10**30,
    10**400,
    "",
    "x",
    "../x",
    "a\nb",
    "\u2028",
    "1" * 400,
)
ODD += (
    [],
    [1],
    [[1]],
    {},
    {"a": 1},
    {"q_proj": 0},
    ["q_proj", 3],
    "lm_head.weight",
    "model-00001-of-00002.safetensors",
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value with each key of it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def mutated(text: bytes, rng: random.Random) -> bytes:
    """A file of which bytes, or some values or names in it, are others."""
    if rng.random() < 0.15:
        data = bytearray(text)
        for _ in range(rng.choice((1, 2, 5))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 2, 3))):
        container, key = rng.choice(list(places(value)) or [([0], 0)])
        what = rng.random()
        if what < 0.2:
            del container[key]
        elif what < 0.3 and isinstance(container, dict):
            container[str(rng.choice(ODD))] = container.pop(key)
        else:
            container[key] = copy.deepcopy(rng.choice(ODD))
    return json.dumps(value).encode()


def read(base: Path, adapter: Path) -> None:
    try:
        checkpoints.locate(adapter)
    finally:
        adapters.scan(adapter, checkpoints.scan(base))


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 60), *(pytest.param(seed, 1000, marks=pytest.mark.slow) for seed in range(1, 5))]
)
def test_odd_values_are_read_or_refused_in_one_line(checkpoint, adapter, monkeypatch, seed, count):
    monkeypatch.setattr("paligemma_jax.checkpoints.hub._fetch", lambda *hub: Path("nowhere"))
    base, directory = checkpoint(shards=2), adapter()
    files = {name: (directory if name.startswith("adapter") else base) / name for name in NAMES}
    sound = {name: path.read_bytes() for name, path in files.items()}
    rng, outcomes = random.Random(seed), []
    for _ in range(count):
        name = rng.choice(NAMES)
        files[name].write_bytes(mutated(sound[name], rng))
        try:
            read(base, directory)
            outcomes.append(True)
        except UserError as error:
            assert str(error).splitlines() == [str(error)]
            outcomes.append(False)
        files[name].write_bytes(sound[name])
    assert 0.1 < np.mean(outcomes) < 0.9
