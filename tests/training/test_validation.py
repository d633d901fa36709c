"""When held-out examples are measured, what is best, and what a resumed run knows of it."""

import signal

import jax
import numpy as np
import pytest

from paligemma_jax.errors import DataError, NumericsError
from paligemma_jax.training.checkpoints import open_checkpoints, saved_notes
from paligemma_jax.training.loop import fit
from paligemma_jax.training.validation import Validation
from tests.training.toy import STEP, Recorder, assert_same, batch_at, start


def measure(state, check):
    check()
    return {"val_loss": float(abs(state.params["w"] - 0.6).sum()), "val_even": float(int(state.step) % 8 == 0)}, ["one"]


def run(tmp_path, steps=30, rule=None, step=STEP, batches=batch_at, **options):
    """A run with a logger and what was kept as the best: (state, logger, kept)."""
    logged, kept = Recorder(), []
    rule = {"run": measure, "every": 4} | (rule or {})
    validation = Validation(keep=lambda state: kept.append(jax.device_get(state.params)), **rule)
    manager = open_checkpoints(tmp_path)
    try:
        state = fit(
            start(), step, batches, steps, checkpoints=manager, loggers=[logged], validation=validation, **options
        )
    except KeyboardInterrupt:
        state = None
    return state, logged, kept


def measured(logged):
    return [(step, values["val_loss"]) for step, values in logged.told if "val_loss" in values]


def test_it_measures_before_at_intervals_and_after(tmp_path, capsys):
    _, logged, kept = run(tmp_path, steps=10, name="toy")
    assert [step for step, _ in measured(logged)] == [0, 4, 8, 10]
    assert [step for step, _ in logged.shown] == [0, 4, 8, 10] and logged.shown[0][1] == ["one"]
    losses = [loss for _, loss in measured(logged)]
    best = [i for i, loss in enumerate(losses) if loss < min(losses[:i], default=np.inf)]
    assert len(kept) == len(best)
    said = capsys.readouterr().err
    assert said.count("best so far") == len(best) and f"toy: best was step {[0, 4, 8, 10][best[-1]]} of 10" in said


def records(*pairs):
    return [{"step": 4 * i, "val_loss": loss, "val_f1": score} for i, (loss, score) in enumerate(pairs)]


@pytest.mark.parametrize(
    "metric, pairs, best",
    [
        ("val_f1", [(3, 0.1), (2, 0.5), (1, 0.4)], 1),
        ("val_f1", [(3, 0.0), (1, 0.0), (2, 0.0)], 1),  # of equal ones the smallest loss
        ("val_f1", [(1, 0.5), (1, 0.5)], 0),  # of the same the first
        ("val_f1", [(1, float("nan")), (2, 0.0)], 1),
        ("", [(3, 0.9), (1, 0.1), (2, 0.5)], 1),
        ("", [(float("nan"), 0.9)], None),
    ],
)
def test_which_is_best(metric, pairs, best):
    rule, known = Validation(measure, 4, metric), records(*pairs)
    assert rule.best(known) == (None if best is None else known[best])
    for i, record in enumerate(known):
        assert rule.is_best(record, known[:i]) == (rule.best(known[: i + 1]) is record)


@pytest.mark.parametrize(
    "patience, scores, over",
    [(2, [0.1, 0.2, 0.2, 0.1], True), (2, [0.1, 0.2, 0.1], False), (0, [0.3, 0.2, 0.1, 0.0], False), (1, [], False)],
)
def test_patience(patience, scores, over):
    rule = Validation(measure, 4, "val_f1", patience)
    assert rule.is_over(records(*((1, score) for score in scores))) == over


def test_training_ends_early_and_stays_ended(tmp_path, capsys):
    rule = {"patience": 2, "metric": "val_even"}  # best at step 0 with a larger loss, then 8; then 16 with a smaller
    state, logged, _ = run(tmp_path, steps=100, rule=rule, save_every=1000)
    last = measured(logged)[-1][0]
    assert int(state.step) == last < 100 and "so training ended early; best was step" in capsys.readouterr().err
    again, more, _ = run(tmp_path, steps=100, rule=rule)
    assert_same(again, state)
    assert measured(more) == [] and more.started == [(last, True)]


def test_a_stopped_run_validates_the_same(tmp_path):
    whole, known, best = run(tmp_path / "whole", save_every=7)

    def stops(step):
        if step in (9, 17):
            stops.count += 1
            if stops.count < 3:
                raise KeyboardInterrupt
        return batch_at(step)

    stops.count = 0
    results = [run(tmp_path / "parts", batches=stops, save_every=7) for _ in range(3)]
    assert [state is None for state, _, _ in results] == [True, True, False]
    assert_same(results[-1][0], whole)
    assert [pair for _, logged, _ in results for pair in measured(logged)] == measured(known)
    assert_same([params for _, _, kept in results for params in kept], best)
    managers = [open_checkpoints(tmp_path / name) for name in ("whole", "parts")]
    assert saved_notes(managers[0]) == saved_notes(managers[1])


def test_a_signal_during_validation_saves_and_validation_is_made_up_for(tmp_path):
    whole, known, _ = run(tmp_path / "whole", steps=12)

    def interrupted(state, check):
        if int(state.step) == 8:
            signal.raise_signal(signal.SIGINT)
        return measure(state, check)

    state, first, _ = run(tmp_path / "parts", steps=12, rule={"run": interrupted})
    assert state is None and [step for step, _ in measured(first)] == [0, 4]
    assert open_checkpoints(tmp_path / "parts").latest_step() == 8
    state, second, _ = run(tmp_path / "parts", steps=12)
    assert second.started == [(8, False)]
    assert measured(first) + measured(second) == measured(known)
    assert_same(state, whole)


@pytest.mark.parametrize("error, saved", [(DataError, 4), (NumericsError, None)])
def test_an_error_of_validation(tmp_path, error, saved):
    def failing(state, check):
        if int(state.step):
            raise error("no")
        return measure(state, check)

    manager = open_checkpoints(tmp_path)
    with pytest.raises(error):
        fit(start(), STEP, batch_at, 12, checkpoints=manager, validation=Validation(failing, 4))
    assert manager.latest_step() == saved


def test_a_broken_state_is_not_validated(tmp_path):
    def poisoned(step):
        batch = batch_at(step)
        return {**batch, "y": batch["y"] * np.nan} if step == 2 else batch

    logged = Recorder()
    with pytest.raises(NumericsError, match="failed at step 3"):
        fit(start(), STEP, poisoned, 12, loggers=[logged], validation=Validation(measure, 4))
    assert [step for step, _ in measured(logged)] == [0]
