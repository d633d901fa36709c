"""Several devices give what one gives: 8 parts of this CPU in a process of its own, and two processes on localhost."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
MESHES = ["", "data=8", "fsdp=8", "tensor=2", "tensor=4", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2"]

pytestmark = pytest.mark.slow
_PATIENCE_S = 400  # of a process: a hung one is killed


def start(job: str, num_devices: int = 8, **options) -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}"}
    command = [sys.executable, "-m", "tests.sharding.worker", job, json.dumps(options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def finish(process: subprocess.Popen) -> dict:
    try:
        output, errors = process.communicate(timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return json.loads(output.splitlines()[-1])


def run(job: str, **options) -> dict:
    return finish(start(job, **options))


def run_two(job: str, num_devices: int, **options) -> list:
    """What two processes say that are joined on localhost, each with so many devices."""
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        coordinator = f"localhost:{sock.getsockname()[1]}"
    options |= {"coordinator": coordinator, "num_processes": 2}
    processes = [start(job, num_devices, **options, process_id=i) for i in range(2)]
    try:
        return [finish(process) for process in processes]
    finally:
        for process in processes:  # one waits for the other for ever
            process.kill()


@pytest.fixture(scope="module")
def trained() -> dict:
    return run("losses", meshes=MESHES)


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_losses_are_those_of_one_device(trained, mesh):
    np.testing.assert_allclose(trained[mesh]["losses"], trained[""]["losses"], rtol=1e-5)
    np.testing.assert_allclose(trained[mesh]["norm"], trained[""]["norm"], rtol=1e-5)
    assert len(set(trained[""]["losses"])) == 3


def test_states_are_divided_and_stay_where_they_are(trained):
    assert all(trained[mesh]["kept"] for mesh in MESHES)
    assert trained["data=8"]["share"] == 1
    assert trained["fsdp=8"]["share"] < 0.25
    assert trained["data=2,fsdp=2,tensor=2"]["share"] < 0.4


def test_a_state_is_restored_on_fewer_devices(tmp_path):
    first, *others = run("restore", directory=str(tmp_path)).values()
    assert len(others) == 3
    for losses in others:
        np.testing.assert_allclose(losses, first, rtol=1e-5)


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "tensor=4,fsdp=2"])
def test_two_processes_are_one(trained, mesh):
    """Each with 4 devices, and each with its own rows of a batch, or with all where `tensor` goes across."""
    first, second = (found[mesh] for found in run_two("losses", 4, meshes=[mesh]))
    assert first["losses"] == second["losses"]
    np.testing.assert_allclose(first["losses"], trained[""]["losses"], rtol=1e-5)
    np.testing.assert_allclose(first["norm"], trained[""]["norm"], rtol=1e-5)


def test_two_processes_save_and_stop_together(tmp_path):
    """Though their clocks differ, and the signal comes to one: at the next step at which a line is due."""
    assert run_two("stop", 1, directory=str(tmp_path)) == [{"steps": [2, 4, 6], "signal": signal.SIGTERM}] * 2


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_answers_are_those_of_one_device(small_checkpoints, quantization):
    meshes = (
        ["", "tensor=2", "data=2,fsdp=2,tensor=2"] if quantization else ["", "data=4", "fsdp=8", "tensor=4", "auto"]
    )
    found = run("generate", checkpoint=str(small_checkpoints["gemma2"]), meshes=meshes, quantization=quantization)
    assert len({tuple(tokens) for tokens in found[""]["tokens"]}) > 1
    for mesh in meshes[1:]:
        assert found[mesh]["tokens"] == found[""]["tokens"], mesh
    assert found[meshes[-1]]["share"] < 0.6


def test_beams_and_drafts_on_a_mesh(small_checkpoints):
    options = {"checkpoint": str(small_checkpoints["gemma"]), "meshes": ["", "data=2,tensor=2"]}
    for more in ({"num_beams": 2}, {"speculate": True}):
        one, several = run("generate", **options, **more).values()
        assert several["tokens"] == one["tokens"]


def test_a_server_on_a_mesh(small_checkpoints):
    found = run("serve", checkpoint=str(small_checkpoints["gemma2"]), mesh="data=2,tensor=2")
    assert found["served"] == found["one"]


@pytest.fixture(scope="module")
def options(small_checkpoints, tmp_path_factory) -> dict[str, str]:
    """Keys of a fine-tuning on eight examples."""
    folder, lines = tmp_path_factory.mktemp("data"), []
    for i in range(8):
        Image.new("RGB", (30, 20), (30 * i,) * 3).save(folder / f"{i}.png")
        suffix = "a red circle" if i % 2 else "no"
        lines.append(json.dumps({"image": f"{i}.png", "prefix": "caption en", "suffix": suffix}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return {"checkpoint": str(small_checkpoints["gemma2"]), "data": str(folder / "data.jsonl")}


def assert_close(first: Path, second: Path) -> None:
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    for name, weight in one.items():
        np.testing.assert_allclose(other[name], weight, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("keys", [{"method": "full"}, {"method": "lora", "accumulate": 2}, {"method": "qlora"}])
def test_fine_tuning_on_a_mesh_writes_the_same_model(options, small_checkpoints, tmp_path, keys):
    meshes = ["", "data=2,fsdp=2,tensor=2"]
    assert run("finetune", directory=str(tmp_path), meshes=meshes, **options, **keys) == [0, 0]
    assert_close(tmp_path / "0", tmp_path / "1")
    before = load_file(next(small_checkpoints["gemma2"].glob("*.safetensors")))
    after = load_file(tmp_path / "0" / "model.safetensors")
    assert any(not np.array_equal(after[name], weight) for name, weight in before.items() if name in after)


@pytest.mark.parametrize("keys", [{"method": "lora", "accumulate": 2}, {"method": "lora", "use_dora": True}])
def test_fine_tuning_by_two_processes_writes_the_same_model(options, tmp_path, keys):
    options = options | keys
    assert run("finetune", directory=str(tmp_path / "one"), meshes=[""], **options) == [0]
    found = run_two("finetune", 2, directory=str(tmp_path / "two"), meshes=["data=2,fsdp=2"], **options)
    assert found == [[0], [0]]
    assert_close(tmp_path / "one" / "0", tmp_path / "two" / "0")
