"""Arguments to a config, and errors to one line."""

import importlib
import os
import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest

from configs import patch_vit
from paligemma_jax.errors import ImageError, Stopped
from paligemma_jax.loading import keep_compiled
from paligemma_jax.runs import base, command_line

ROOT = Path(__file__).resolve().parents[2]
PHRASE_RUNS = ("heatmap", "compare", "search", "locate")
CONFIGS = ["mix224", "mix448", "pt224", "pt448", "pt896"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.promt=x"], "error: unknown key --config.promt: did you mean prompt?\n"),
        (["--config.prompt.x=1"], "error: unknown key --config.prompt.x: did you mean prompt?"),
        (["--config.max_new_tokens=ten"], "error: --config.max_new_tokens=ten is not possible: give an integer\n"),
        (["--config.top_k=0.5"], "error: --config.top_k=0.5 is not possible: give an integer\n"),
        (["--config.temperature=hot"], "error: --config.temperature=hot is not possible: give a number\n"),
        (["--config.stream=maybe"], "error: --config.stream=maybe is not possible: give true or false\n"),
        (["--prompt=caption"], "error: unknown option --prompt: did you mean --config.prompt?\n"),
        (["--confg=configs/tiny.py"], "error: unknown option --confg: did you mean --config?\n"),
        (["cat.png"], "error: unexpected 'cat.png'"),
        (["--config.prompt"], "error: Missing value for flag --config.prompt"),
        (
            ["--config=configs/tinny.py"],
            "error: there is no config file 'configs/tinny.py': did you mean configs/tiny.py?\n",
        ),
        (["--config"], "error: there is no config file ''"),
        (["--config=configs/mix224.py:llama"], "error: there is no model 'llama': give one of paligemma-3b, "),
        (["--config.run=generat"], "error: run='generat' is not possible: give generate, "),
        (["--config.platform=cuda"], "error: platform='cuda' is not possible: give auto, cpu, gpu, tpu\n"),
    ],
)
def test_bad_arguments_are_one_line(main, arguments, message):
    status, out, err = main(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith(message) and err.count("\n") == 1


def test_overrides_may_come_before_the_config(main, monkeypatch):
    seen = []
    monkeypatch.setattr("paligemma_jax.runs.generate.run", lambda config: seen.append(config) or 0)
    overrides = ["--config.top_k=3", "--config.stream", "--config.compilation_cache=false"]
    assert main(*overrides, "--config=configs/mix224.py") == (0, "", "")
    assert (seen[0].top_k, seen[0].stream, seen[0].hub_id) == (3, True, "google/paligemma-3b-mix-224")


def test_config_files_are_found_from_any_folder(main, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, out, _ = main("--config=configs/mix224.py", "--help")
    assert status == 0 and "keys of mix224.py" in out
    assert f"--config.image={ROOT / 'assets'}" in out


@pytest.mark.parametrize("file", [*CONFIGS, "tiny", "finetune"])
def test_help_explains_every_key(main, file):
    status, out, err = main(f"--config=configs/{file}.py", "--help")
    assert (status, err) == (0, "")
    keys = [line for line in out.splitlines() if line.startswith("  --config.") and "--config.run=" not in line]
    assert len(keys) > 15
    assert all(len(line.strip().split("  ", 1)) == 2 for line in keys), keys
    for run in command_line.RUNS:
        assert f"--config.run={run}" in out
    for name in CONFIGS:
        assert f"--config=configs/{name}.py" in out


@pytest.mark.parametrize("file", CONFIGS)
@pytest.mark.parametrize("family", ("paligemma-3b", "paligemma2-3b", "paligemma2-10b", "paligemma2-28b"))
def test_published_models_say_how_to_get_them(main, monkeypatch, tmp_path, file, family):
    monkeypatch.chdir(tmp_path)
    status, out, err = main(f"--config=configs/{file}.py:{family}", "--config.compilation_cache=false")
    assert (status, out) == (1, "")
    kind, size = file[:-3], file[-3:]
    assert f"--config.checkpoint=google/{family}-{kind}-{size}" in err
    assert "licence" in err and "python main.py --config=configs/tiny.py" in err
    assert err.count("\n") <= 8


def test_a_local_copy_of_a_published_model_is_used(generate, checkpoint, tmp_path, monkeypatch, answer_with):
    answer_with("a circle")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "paligemma2-3b-mix-224").symlink_to(checkpoint)
    keys = {"checkpoint": "checkpoints/paligemma2-3b-mix-224", "hub_id": "google/paligemma2-3b-mix-224"}
    assert generate(**keys)[:2] == (0, "a circle\n")


def test_a_config_for_another_run_is_one_line(main):
    status, out, err = main("--config=configs/finetune.py", "--config.run=generate", "--config.compilation_cache=false")
    assert (status, out) == (1, "")
    assert "lacks the key" in err and "run=generate" in err and err.count("\n") == 1


def test_debug_shows_where_it_went_wrong(generate):
    with pytest.raises(ImageError, match="nowhere"):
        generate("--debug", image="/nowhere.png")


def test_out_of_memory_is_one_line(main, monkeypatch):
    def exhaust(config):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr("paligemma_jax.runs.generate.run", exhaust)
    status, _, err = main("--config.compilation_cache=false")
    assert status == 1 and err.startswith("error: out of memory") and err.count("\n") == 1


@pytest.mark.parametrize("platform, package", [("gpu", "jax[cuda13]"), ("tpu", "jax[tpu]")])
def test_an_absent_accelerator_says_what_to_install(refused, monkeypatch, platform, package):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(jax.config, "update", lambda *args: None)
    assert package in refused(platform=platform)


def test_every_run_has_its_module():
    for name in command_line.RUNS:
        spec = importlib.util.find_spec(f"paligemma_jax.runs.{name}")
        assert spec is not None, name


def _start(*arguments: str, **variables: str) -> subprocess.Popen:
    """A process of its own, whose programs are compiled as those of the tests are: fast."""
    command = [sys.executable, ROOT / "main.py", *arguments]
    environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | os.environ | {"JAX_PLATFORMS": "cpu"} | variables
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background shell ignores it, and children inherit that
    try:
        return subprocess.Popen(command, env=environment, text=True, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_process_prints_the_answer_and_keeps_its_programs(checkpoint, pictures, tmp_path, generate):
    keys = (f"--config.checkpoint={checkpoint}", f"--config.image={pictures / 'a.png'}", "--config.max_new_tokens=4")
    with _start(*keys, "--config.platform=cpu", "--config.dtype=float32", XDG_CACHE_HOME=str(tmp_path)) as process:
        out, err = process.communicate()
    assert (process.returncode, out) == (0, generate(dtype="float32")[1])
    assert all(line.startswith(("note: ", "  object: ")) for line in err.splitlines())
    assert any((tmp_path / "paligemma_jax" / "compiled").iterdir())


def test_a_reader_that_leaves_is_no_error():
    with _start("--help") as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_ctrl_c_is_quiet(checkpoint, pictures):
    with _start("--config.run=chat", f"--config.checkpoint={checkpoint}", f"--config.image={pictures}") as chat:
        while (line := chat.stderr.readline()) != "type a prompt, or /help\n":
            assert line
        chat.send_signal(signal.SIGINT)  # while it waits for a prompt
        assert (chat.stdout.read(), chat.stderr.read()) == ("", "")
    assert chat.returncode == 130


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), 130), (Stopped(signal.SIGTERM), 143)])
def test_signals_are_128_and_their_number(monkeypatch, error, status):
    def interrupt(*args):
        raise error

    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(command_line, "main", interrupt)
    program = runpy.run_path(str(ROOT / "main.py"))
    with warnings.catch_warnings():
        assert program["main"]() == status


@pytest.mark.parametrize("run", [run for run in command_line.UNUSED if run not in (*PHRASE_RUNS, "check")])
def test_a_key_that_changes_nothing_is_told(generate, monkeypatch, run):
    """Only where it is set; other keys are those of tests/runs/test_every_key.py."""
    monkeypatch.setattr(f"paligemma_jax.runs.{run}.run", lambda config: 0)
    config = f"--config=configs/{run if run in ('inspect', 'swap') else 'tiny'}.py"
    assert "scenes_seed" not in generate(config, run=run)[2]
    _, _, err = generate(config, run=run, **({"temperature": 0.5} if run == "evaluate" else {"scenes_seed": 3}))
    assert f"note: run={run} does not use " in err and ("temperature" if run == "evaluate" else "scenes_seed") in err
    assert set(command_line.UNUSED[run]) <= set(base.get_config())


@pytest.mark.parametrize("run", PHRASE_RUNS)
def test_a_key_that_changes_nothing_for_phrases_is_told(main, monkeypatch, run):
    monkeypatch.setattr(f"paligemma_jax.runs.{run}.run", lambda config: 0)
    arguments = ("--config=configs/patch_vit.py", f"--config.run={run}", "--config.compilation_cache=false")
    assert main(*arguments) == (0, "", "")
    assert main(*arguments, "--config.seed=1", "--config.student=x")[2] == f"note: run={run} does not use seed\n"
    assert set(command_line.UNUSED[run]) <= set(patch_vit.get_config())


@pytest.mark.parametrize("home, expected", [("/home/me", "/home/me/.cache/paligemma_jax/compiled"), (None, None)])
def test_compiled_programs_are_kept_where_there_is_a_home(monkeypatch, home, expected):
    """A container may run as a user without one."""
    told = {"jax_compilation_cache_dir": jax.config.jax_compilation_cache_dir}
    told |= {"jax_persistent_cache_min_compile_time_secs": jax.config.jax_persistent_cache_min_compile_time_secs}
    told |= {"jax_enable_compilation_cache": jax.config.jax_enable_compilation_cache}
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", home) if home else path)
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update("jax_enable_compilation_cache", True)
        keep_compiled()
        assert jax.config.jax_compilation_cache_dir == expected
    finally:
        for name, value in told.items():
            jax.config.update(name, value)
