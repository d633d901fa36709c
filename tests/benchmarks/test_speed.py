"""The command: rounds, what is kept of them, and what goes wrong; the processes are stood in for, but for one test."""

import json
import platform
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import speed

TINY = Path(__file__).parents[2] / "assets" / "tiny"


@pytest.fixture
def jobs(monkeypatch) -> list[tuple[str, dict, str]]:
    """The jobs that were started in place of processes: label, job, and the name of the cache directory."""
    started = []

    def run(self, label: str, job: dict, cache: Path | None = None) -> tuple[dict, str]:
        started.append((label, job, cache and cache.name))
        if cache:
            assert cache.is_absolute(), "JAX would not use it"
            cache.mkdir(parents=True, exist_ok=True)
        if job["job"] == "ceilings":
            return {"copy_gb_s": [9.0], "read_gb_s": [8.0], "matmul_tflop_s": [1.0], "device": ["abacus"]}, ""
        if job["job"] in ("rows", "captions"):
            return {f"{job['job']}/{job['rows']}": [1.0], "others_share": [0.5]}, ""
        if job["mode"] == "int8":
            return {}, "ConfigError: no such thing"
        return {"start_s": [float(len(started))], "others_share": [0.5]}, ""

    monkeypatch.setattr(speed.Workplace, "run", run)
    return started


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command(*arguments) -> (exit status, the JSON that was written)."""

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, model: tuple[str, ...] = ("--checkpoint", str(TINY))) -> tuple[int, dict]:
        status = speed.main([*model, "--work", "work", "--out", "out/cpu.v1", *arguments])
        samples = tmp_path / "out" / "cpu.v1.json"
        assert samples.exists() == samples.with_suffix(".md").exists()
        return status, json.loads(samples.read_text()) if samples.exists() else {}

    return run


@pytest.fixture
def with_torch(monkeypatch):
    monkeypatch.setattr(speed.machine, "their_versions", lambda python: {"torch": "2", "transformers": "5"})


def test_columns_take_turns_and_a_failed_one_is_left_out(jobs, command, with_torch):
    status, found = command("--modes=bf16,int8", "--repeats=2", "--batch=1")
    assert status == 0
    order = [(label, cache) for label, _, cache in jobs]
    # Each starts with nothing compiled, then with what the first start kept.
    ours, theirs = ([(label, "new"), (label, label.replace(" ", "_"))] for label in ("ours bf16", "theirs bf16"))
    ceilings = [("ceilings", None)]
    assert order == [*ceilings, *ours, *theirs, ("ours int8", "new"), *ceilings, *theirs, *ours]
    assert [job.get("only_start") for _, job, _ in jobs[:5]] == [None, True, False, True, False]
    entry, shares = found["tiny"], [0.5] * 4
    samples = {"start_cold_s": [2.0, 10.0], "start_s": [3.0, 11.0], "others_share": shares}
    assert entry["samples"]["ours bf16"] == samples
    samples = {"start_cold_s": [4.0, 8.0], "start_s": [5.0, 9.0], "others_share": shares}
    assert entry["samples"]["theirs bf16"] == samples
    assert entry["notes"] == {"ours int8": "not available: ConfigError: no such thing"}
    assert entry["ceilings"]["copy_gb_s"] == [9.0, 9.0]


def test_rows_that_run_at_once_have_a_process_for_them(jobs, command):
    _, found = command("--against=none", "--modes=bf16", "--repeats=2", "--batch=1,4,16", "--captions=8")
    rows = [(job["job"], job["rows"], cache) for _, job, cache in jobs if "rows" in job]
    assert rows == 2 * [("rows", 4, "ours_bf16"), ("rows", 16, "ours_bf16"), ("captions", 8, "ours_bf16")]
    samples = found["tiny"]["samples"]["ours bf16"]
    assert samples["others_share"] == [0.5] * 10
    assert samples["rows/4"] == samples["rows/16"] == samples["captions/8"] == [1.0, 1.0]


def test_programs_of_the_first_cold_start_are_kept_for_the_second(jobs, command, tmp_path):
    command("--against=none", "--modes=bf16", "--repeats=1")
    assert [path.name for path in (tmp_path / "work" / "tiny" / "cache").iterdir()] == ["ours_bf16"]


def test_a_model_that_is_measured_again_replaces_its_own_part_only(jobs, command, tmp_path):
    shutil.copytree(TINY, tmp_path / "copy")
    arguments, other = ("--against=none", "--modes=bf16"), ("--checkpoint", str(tmp_path / "copy"))
    command(*arguments, "--repeats=1")
    before = command(*arguments, "--repeats=1", model=other)[1]["tiny"]
    _, found = command(*arguments, "--repeats=2", model=other)
    assert list(found) == ["tiny", "copy"] and found["tiny"] == before
    assert len(found["copy"]["samples"]["ours bf16"]["start_s"]) == 2


def test_without_torch_there_is_nothing_to_compare_with(jobs, command, monkeypatch, capsys):
    monkeypatch.setattr(speed.machine, "their_versions", lambda python: {"torch": None, "transformers": "5"})
    _, found = command("--modes=bf16", "--repeats=1")
    assert list(found["tiny"]["samples"]) == ["ours bf16"]
    assert "torch missing: nothing to compare with" in capsys.readouterr().err


def test_their_interpreter_is_asked_for_its_versions(command, jobs, tmp_path, capsys):
    assert speed.machine.their_versions(sys.executable)["their_python"] == platform.python_version()
    assert command("--modes=bf16", f"--their-python={tmp_path / 'none'}") == (1, {})
    assert "--their-python" in capsys.readouterr().err


def test_a_variant_is_made_once(jobs, command, tmp_path, monkeypatch, capsys):
    made = []

    def make(command: list[str]):
        made.append(command)
        out = Path(command[command.index("--out") + 1])
        for path in TINY.iterdir():
            (out / path.name).symlink_to(path)
        return speed.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(speed.subprocess, "run", make)
    variant = ("--variant", "paligemma-3b-224", "--tokenizer", "tokenizer.model")
    for _ in range(2):
        status, found = command("--against=none", "--modes=bf16", "--repeats=1", model=variant)
        assert status == 0 and list(found) == ["paligemma-3b-224"]
    assert len(made) == 1 and made[0][made[0].index("--tokenizer") + 1] == "tokenizer.model"


def test_work_of_others_is_told_from_our_own(monkeypatch):
    times = iter([(0.0, 0.0, 100.0), (10.0, 4.0, 100.0 + 4.0 + 5.0)])
    monkeypatch.setattr(speed._OtherWork, "_now", lambda self: next(times))
    monkeypatch.setattr(speed.os, "cpu_count", lambda: 2)
    with speed._OtherWork() as others:
        pass
    assert others.share == 0.25


@pytest.mark.parametrize(
    "model, message",
    [
        (("--variant", "paligemma-7b-224"), "error: there is no variant 'paligemma-7b-224': give one of paligemma-3b"),
        (("--variant", "paligemma-3b-224"), "error: paligemma-3b-224 has to be made first: give --tokenizer"),
        (("--checkpoint", "/nowhere"), "error: /nowhere"),
        (("--variant", "paligemma-3b-224", "--tokenizer", "/nowhere"), "error: paligemma-3b-224 could not be made"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_results(command, capfd, model, message):
    assert command(model=model) == (1, {})
    assert capfd.readouterr().err.splitlines()[-1].startswith(message)


@pytest.mark.parametrize("option", ("--modes=int3", "--batch=0", "--repeats=0", "--new-tokens=1", "--batch=x"))
def test_bad_options_are_refused(command, option):
    with pytest.raises(SystemExit):
        command(option)


@pytest.mark.slow
def test_the_shipped_model(command, capsys, tmp_path):
    status, found = command("--against=none", "--modes=float32,bf16", "--batch=1,2", "--repeats=1", "--accuracy")
    assert status == 0
    entry = found["tiny"]
    assert entry["notes"] == {}
    for samples in entry["samples"].values():
        assert all(0 <= share <= 1 for share in samples.get("others_share", []))
        assert 0 < samples["imports_s"][0] < samples["start_s"][0]
        assert samples["weights_bytes"][0] < min(samples["peak_bytes/1"][0], samples["peak_bytes/2"][0])
        assert samples["load_s"][0] < samples["start_s"][0]
    assert list(entry["accuracy"]) == ["ours bf16"] and 0 < entry["accuracy"]["ours bf16"]["rms_error"] < 0.05
    for mode in ("float32", "bf16"):
        assert any((tmp_path / "work" / "tiny" / "cache" / f"ours_{mode}" / "paligemma_jax" / "compiled").iterdir())
    assert "| ours float32 | ours bf16 |" in capsys.readouterr().out
