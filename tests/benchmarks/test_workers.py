"""What a measured process does, in this one."""

from pathlib import Path

import numpy as np
import pytest

import paligemma_jax as pj
from benchmarks import speed, workers

TINY = Path(__file__).parents[2] / "assets" / "tiny"


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> dict:
    workplace = speed.Workplace(tmp_path_factory.mktemp("work"), TINY, "cpu")
    workplace.write_inputs(2)
    inputs = str(workplace.folder / "inputs.npz")
    return {"checkpoint": str(TINY), "platform": "cpu", "mode": "float32", "inputs": inputs, "only_start": False}


@pytest.fixture
def ours(job, monkeypatch) -> workers.Ours:
    return workers.Ours(job, lambda *args: None)


def test_the_first_run_is_dropped_and_long_ones_are_not_repeated(monkeypatch):
    clock = iter(range(0, 100, 4))
    monkeypatch.setattr(workers.time, "perf_counter", lambda: next(clock))
    runs = iter(range(9))
    assert workers.repeated(lambda: next(runs)) == [1, 2]  # the third would start after 8 s
    monkeypatch.setattr(workers.time, "perf_counter", lambda: 0.0)
    runs = iter(range(9))
    assert workers.repeated(lambda: next(runs)) == [1, 2, 3, 4, 5]


def test_rows_that_take_turns_make_a_longer_step(ours, monkeypatch):
    def generate(pictures, prompt, batch_size, options):
        assert (len(pictures), batch_size) == (2, 2)
        assert options == pj.GenerateOptions(9, min_new_tokens=9)
        nothing = np.zeros(options.max_new_tokens)
        timing = pj.Timing(0.0, 1.0, 7.0, 9)
        return [pj.Output("", nothing, nothing, "length", timing, nothing, nothing)] * 2

    monkeypatch.setattr(ours._model, "generate", generate)
    assert ours.answer(2, 9)[1] == 7.0
    monkeypatch.setattr(ours._steps, "most_at_once", lambda num_tokens: 1)
    assert ours.answer(2, 9)[1] == 14.0


@pytest.mark.slow
def test_logits_are_those_of_the_networks_and_follow_given_tokens(ours, job):
    logits, tokens = ours.logits(None, 4)
    assert logits.shape == (len(speed.PROMPTS), 4, ours._model.config.text.vocab_size)
    model, inputs = pj.load(TINY, dtype="float32"), np.load(job["inputs"])
    outputs = model.generate(list(inputs["pictures"][: len(tokens)]), list(speed.PROMPTS), 4)
    for row, output in zip(tokens, outputs, strict=True):
        np.testing.assert_array_equal(row[: len(output.tokens)], output.tokens)
    other = tokens.copy()
    other[:, 1] += 1  # seen from position 2 on
    changed, followed = ours.logits(other, 4)
    np.testing.assert_array_equal(followed, other)
    np.testing.assert_allclose(changed[:, :2], logits[:, :2], atol=1e-5)
    assert np.abs(changed[:, 2:] - logits[:, 2:]).max() > 0.1


def test_what_is_measured_has_a_name_for_each_batch_size(job, monkeypatch):
    monkeypatch.setattr(workers, "_LONG_S", 0.0)
    found = {}
    settings = job | {"side": "ours", "new_tokens": 20}  # it says less

    def report(name: str, values: list[float] | None = None) -> None:
        assert name not in found
        found[name] = values

    workers.measure(settings, report)
    for name in ("rows", "captions"):
        workers.JOBS[name](settings | {"rows": 2}, report)
    plain = ("load_s", "first_token_ms", "vision_ms", "weights_bytes", "decoder_bytes", "captions_per_s/2")
    of_batches = ("decode_ms", "tokens_per_s", "answer_s", "peak_bytes")
    names = {*plain, *(f"{name}/{size}" for name in of_batches for size in (1, 2))}
    assert set(found) == {*names, "imports_s", "start_s"}
    assert all(min(found[name]) > 0 for name in names)
    assert found["imports_s"] is found["start_s"] is None  # the parent stops their time
    assert found["tokens_per_s/2"][0] * found["decode_ms/2"][0] == pytest.approx(2000)
    assert found["decoder_bytes"] < found["weights_bytes"]
    assert list(found)[:3] == ["imports_s", "load_s", "start_s"]


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
def test_both_sides_do_the_same_work(ours, job):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    theirs = workers.Theirs(job, lambda *args: None)
    logits, tokens = ours.logits(None, 6)
    np.testing.assert_allclose(theirs.logits(tokens, 6)[0], logits, atol=1e-3)
    assert (theirs.weights_bytes, theirs.decoder_bytes) == (ours.weights_bytes, ours.decoder_bytes)
    seconds, step_ms = theirs.answer(2, 5)
    assert 0 < 4e-3 * step_ms < seconds
    assert theirs.answer(1, 1)[1] is None
    theirs.see()
