"""The real command, killed while it trains, saves and evaluates: at last all is as in a run that was not disturbed.

With more kills: TRAINING_KILLS=10 python -m pytest -n 0 -m slow tests/training/test_finetune_kill.py
"""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.files import recover_folder
from paligemma_jax.training.checkpoints import open_checkpoints, saved_notes
from tests import kills

KILLS = int(os.environ.get("TRAINING_KILLS", "3"))
STEPS, EXAMPLES = 24, 12
TIMES = ("steps_per_second", "examples_per_second", "data_wait_ms", "data_wait_share")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    lines = []
    for i in range(EXAMPLES):
        Image.new("RGB", (30, 20), (20 * i,) * 3).save(folder / f"{i}.png")
        lines.append({"image": f"{i}.png", "prefix": "caption en", "suffix": ["a red star", "two blue circles"][i % 2]})
    for name, some in (("train", lines[:8]), ("val", lines[8:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    return folder


@pytest.fixture(scope="module")
def start(checkpoint, folder):
    """start(output_dir): a process that trains into it, with all that a resumed run has to know."""

    def run(output: Path) -> subprocess.Popen:
        keys = {"checkpoint": checkpoint, "data": folder / "train.jsonl", "val_data": folder / "val.jsonl"}
        keys |= {"output_dir": output, "epochs": STEPS // 4, "batch_size": 2, "text_length": 24}
        keys |= {"learning_rate": 0.003, "dropout": 0.1, "ema": 0.8, "save_every": 2, "val_every": 3, "log_every": 5}
        keys |= {"log": "tensorboard"}
        return kills.start("finetune", folder / "cache", **keys)

    return run


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    process = start(output)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return output


def told(output: Path) -> list[dict]:
    """The lines of metrics.jsonl without times; one that is being written is none."""
    lines = []
    for line in (output / "metrics.jsonl").read_text().splitlines() if (output / "metrics.jsonl").exists() else ():
        try:
            lines.append({name: value for name, value in json.loads(line).items() if name not in TIMES})
        except ValueError:
            break
    return lines


def progress(output: Path) -> int:
    return max((int(path.name) for path in (output / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def is_saving(output: Path) -> bool:
    return any("tmp" in path.name for path in (output / "checkpoints").glob("*"))


def is_keeping(output: Path) -> bool:
    return any(output.glob(".best.*"))


def check_whole(output: Path, had_best: bool) -> None:
    """What was saved before a kill can be read after it."""
    recover_folder(output / "best")
    assert (output / "best").exists() or not had_best
    if (output / "best").exists():
        pj.load(output / "best", dtype="float32", compilation_cache=False)


def test_killed_at_random_moments(start, undisturbed, tmp_path):
    rng, output, killed = random.Random(0), tmp_path / "out", []
    for number, share in enumerate(sorted(rng.uniform(0.0, 0.9) for _ in range(KILLS))):
        doing, longest, had_best = (None, is_saving, is_keeping)[number % 3], rng.uniform(0, 1), []

        def reached(share=share, doing=doing, longest=longest, since=[], had_best=had_best):  # noqa: B006
            """Some steps are saved; and then what is waited for is done, or a random time over."""
            if not since and progress(output) >= share * STEPS:
                since.append(time.monotonic())
            had_best[:] = [(output / "best").exists()]
            return bool(since) and (time.monotonic() - since[0] > longest or (doing is not None and doing(output)))

        if kills.kill_when(start(output), reached):
            killed.append(progress(output))
        check_whole(output, any(had_best))
    assert len(killed) >= KILLS - 1 and killed == sorted(killed)
    process = start(output)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_same(output, undisturbed)


def test_sigterm_saves_and_says_so(start, undisturbed, tmp_path):
    output = tmp_path / "out"
    process = start(output)
    while process.poll() is None and progress(output) < 4:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "stopping after this step" in err, err
    assert not (output / "model.safetensors").exists()
    process = start(output)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "finetune goes on from step " in err, err
    assert_same(output, undisturbed)


def assert_same(output: Path, undisturbed: Path) -> None:
    """Weights, what was told, sample pages, and all that a checkpoint knows."""
    for name in ("model.safetensors", "best/model.safetensors"):
        assert (output / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert told(output) == told(undisturbed)
    pages = [sorted(path.name for path in (folder / "samples").iterdir()) for folder in (output, undisturbed)]
    assert pages[0] == pages[1] and len(pages[0]) == STEPS // 3 + 1
    for name in pages[0]:
        assert (output / "samples" / name).read_bytes() == (undisturbed / "samples" / name).read_bytes()
    managers = [open_checkpoints(folder / "checkpoints") for folder in (output, undisturbed)]
    notes, expected = map(saved_notes, managers)
    assert notes == expected and [record["step"] for record in notes["validations"]][-1] == STEPS
    jax.tree.map(np.testing.assert_array_equal, *(manager.restore(STEPS) for manager in managers))
