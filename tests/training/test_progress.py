"""What a run tells of itself."""

import contextlib
import re
import time

import numpy as np
import pytest

from paligemma_jax.training import progress
from paligemma_jax.training.checkpoints import open_checkpoints
from paligemma_jax.training.loop import fit
from tests.training.toy import STEP, Recorder, batch_at, start


def test_loss_falls_and_is_reported(capsys):
    logged = Recorder()
    state = fit(start(), STEP, batch_at, 130, log_every=50, name="toy", loggers=[logged])
    assert int(state.step) == 130 and [step for step, _ in logged.told] == [50, 100, 130]
    first, second, third = logged.losses()
    assert third < second < first
    times = {"steps_per_second", "data_wait_ms", "data_wait_share"}
    assert set(logged.told[0][1]) == times | {"loss", "off", "grad_norm"}
    assert logged.started == [(0, False)] and logged.closed == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("toy: ") and re.search(r"s a step, about \d+ s for all", lines[0])
    assert len(lines) == 4 and lines[1].startswith(f"toy 50/130  loss {first:.4g}  grad_norm ")


def test_a_line_tells_speed_and_time_left(monkeypatch, capsys):
    """By a clock of its own: 4 seconds a step are 0.25 steps/s, and 90 steps of them 6 minutes."""
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def step(state, batch):
        nonlocal now
        now += 4.0
        return state, {"loss": 2.0 + batch % 2, "grad_norm": 0.5}

    logged = Recorder()
    fit(start(), step, lambda number: number, 110, log_every=20, name="toy", loggers=[logged])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("toy:")]
    assert lines[0] == "toy 20/110  loss 2.5  grad_norm 0.5  0.25 steps/s  data wait 0 ms (0%)  6 min left"
    assert lines[-1] == "toy 110/110  loss 2.5  grad_norm 0.5  0.25 steps/s  data wait 0 ms (0%)  0 s left"
    times = {"steps_per_second": 0.25, "data_wait_ms": 0.0, "data_wait_share": 0.0}
    assert logged.told[1] == (40, times | {"loss": 2.5, "grad_norm": 0.5})
    fit(
        *(start(), step, lambda number: number, 4),
        **{"log_every": 2, "num_examples": 8, "learning_rate": lambda step: step / 10},
    )
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[1] == "train 4/4  loss 2.5  grad_norm 0.5  learning_rate 0.3  2 examples/s  data wait 0 ms (0%)  0 s left"
    )


def test_waiting_for_data_is_told_apart(monkeypatch):
    """Of 10 seconds the device waits 2 for the first batch, then 0 and 3; the clock is our own.

    A batch that is ready late is waited for only from when it was asked for: not while something else was done.
    """
    now = 0.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    monkeypatch.setattr(progress, "_when_done", lambda metrics: metrics["done"])
    logged = Recorder()
    history = progress.History("toy", 0, 3, [logged], lambda step: "")
    for asked, ready, done in ((0.0, 2.0, 4.0), (2.0, 3.0, 5.0), (4.0, 8.0, 10.0)):
        history.add({"loss": 1.0, "grad_norm": 1.0, "done": done}, asked, ready)
    now = 17.0
    with history.aside():  # 5 seconds of validation are not the steps'
        now = 22.0
    now = 15.0
    history.report()
    history.close()
    [(step, values)] = logged.told
    assert step == 3 and values["data_wait_ms"] == pytest.approx(5000 / 3)
    assert values["data_wait_share"] == pytest.approx(0.5) and values["steps_per_second"] == pytest.approx(0.3)
    history = progress.History("toy", 0, 3, [logged], lambda step: "")
    for asked, ready, done in ((18.0, 17.0, 19.0), (24.0, 25.0, 26.0)):
        history.add({"loss": 1.0, "grad_norm": 1.0, "done": done}, asked, ready)
    now = 26.0
    history.report()
    history.close()
    assert logged.told[1][1]["data_wait_ms"] == pytest.approx(500)


def test_a_loader_that_is_slow_is_seen():
    """Batches that take far longer than steps: nearly all time is waiting."""
    logged = Recorder()
    fit(start(), STEP, lambda step: time.sleep(0.02) or batch_at(step), 12, log_every=6, loggers=[logged])
    assert logged.told[1][1]["data_wait_share"] > 0.3 and logged.told[1][1]["data_wait_ms"] > 5


def test_means_are_over_the_steps_since_the_last_line():
    each, mean = Recorder(), Recorder()
    fit(start(), STEP, batch_at, 7, log_every=1, loggers=[each])
    fit(start(), STEP, batch_at, 7, log_every=3, loggers=[mean])
    losses = each.losses()
    np.testing.assert_allclose(mean.losses(), [np.mean(losses[:3]), np.mean(losses[3:6]), losses[6]], rtol=1e-6)


def test_a_resumed_run_tells_the_same_numbers(tmp_path):
    """Also of the steps that were done, and not told, when it stopped."""
    whole, parts = Recorder(), Recorder()
    fit(start(), STEP, batch_at, 12, log_every=5, loggers=[whole])
    for steps in (7, 12):
        with contextlib.suppress(KeyboardInterrupt):
            checkpoints = open_checkpoints(tmp_path)
            fit(
                start(),
                STEP,
                stopping(steps) if steps < 12 else batch_at,
                12,
                log_every=5,
                loggers=[parts],
                checkpoints=checkpoints,
            )
    assert whole.losses() == parts.losses() and parts.started == [(0, False), (7, False)]


def stopping(at):
    def batch(step):
        if step == at:
            raise KeyboardInterrupt
        return batch_at(step)

    return batch
