import itertools
import signal
import threading

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paligemma_jax.errors import CheckpointError, ImageError, NumericsError, Stopped
from paligemma_jax.training.checkpoints import open_checkpoints, restore
from paligemma_jax.training.loop import fit
from paligemma_jax.training.step import init_state
from tests.training.toy import OPTIMIZER, STEP, assert_same, batch_at, start


@pytest.fixture(scope="module")
def whole():
    """A run of 30 steps without a stop."""
    return fit(start(), STEP, batch_at, 30)


def test_how_often_it_saves_is_how_often_it_is_told(tmp_path):
    for every, kept in ((4, [8, 10]), (3, [9, 10]), (100, [10])):
        manager = open_checkpoints(tmp_path / str(every))
        fit(start(), STEP, batch_at, 10, checkpoints=manager, save_every=every)
        assert manager.all_steps() == kept


def test_it_saves_when_time_has_passed_too(tmp_path, monkeypatch):
    clock = itertools.count(0, 7)  # seconds
    monkeypatch.setattr("paligemma_jax.training.loop.time.monotonic", lambda: next(clock))
    manager = open_checkpoints(tmp_path, keep=20)
    fit(start(), STEP, batch_at, 10, checkpoints=manager, save_every=100, save_minutes=0.3)
    assert len(manager.all_steps()) > 2 and manager.latest_step() == 10


def test_every_batch_is_used_once_in_order():
    asked, used = [], []
    state = fit(
        start(),
        lambda state, batch: used.append(batch) or (state, {"loss": 0.0, "grad_norm": 0.0}),
        lambda step: asked.append(step) or step,
        5,
    )
    assert asked == used == [0, 1, 2, 3, 4] and int(state.step) == 0


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, whole, capsys):
    fit(start(), STEP, batch_at, 12, checkpoints=open_checkpoints(tmp_path), save_every=5)
    asked = []
    state = fit(start(), STEP, lambda s: asked.append(s) or batch_at(s), 30, checkpoints=open_checkpoints(tmp_path))
    assert_same(state, whole)
    assert asked[0] == 12 and "goes on from step 12 of 30" in capsys.readouterr().err
    again = fit(start(), None, None, 30, checkpoints=open_checkpoints(tmp_path))  # nothing is left to do
    assert_same(again, whole)


def test_old_checkpoints_are_dropped(tmp_path):
    manager = open_checkpoints(tmp_path, keep=2)
    fit(start(), STEP, batch_at, 12, checkpoints=manager, save_every=5)
    assert manager.all_steps() == [10, 12]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ImageError])
def test_what_stops_the_batches_saves(tmp_path, whole, error):
    def broken(step):
        if step == 7:
            raise error
        return batch_at(step)

    manager = open_checkpoints(tmp_path)
    with pytest.raises(error):
        fit(start(), STEP, broken, 30, checkpoints=manager)
    assert manager.latest_step() == 7
    assert_same(fit(start(), STEP, batch_at, 30, checkpoints=manager), whole)


def interrupting(at, times=1, number=signal.SIGINT):
    """A step that a signal comes in the middle of."""
    count = iter(range(1000))

    def step(state, batch):
        if next(count) == at:
            for _ in range(times):
                signal.raise_signal(number)
        return STEP(state, batch)

    return step


def test_ctrl_c_ends_the_step_and_saves(tmp_path, whole, capsys):
    manager, before = open_checkpoints(tmp_path), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(start(), interrupting(at=3), batch_at, 30, checkpoints=manager)
    told = capsys.readouterr().err
    assert manager.latest_step() == 4 and "Ctrl-C again to stop at once" in told
    assert told.endswith("train stopped at step 4 of 30; its state is saved\n")
    assert signal.getsignal(signal.SIGINT) is before
    assert_same(fit(start(), STEP, batch_at, 30, checkpoints=manager), whole)


def test_sigterm_ends_the_step_and_saves_too(tmp_path, whole):
    manager, before = open_checkpoints(tmp_path), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as caught:
        fit(start(), interrupting(at=3, number=signal.SIGTERM), batch_at, 30, checkpoints=manager)
    assert caught.value.signal == signal.SIGTERM and manager.latest_step() == 4
    assert signal.getsignal(signal.SIGTERM) is before
    assert_same(fit(start(), STEP, batch_at, 30, checkpoints=manager), whole)


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    manager, before = open_checkpoints(tmp_path), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(start(), interrupting(at=3, times=2), batch_at, 30, checkpoints=manager)
    assert manager.latest_step() is None and signal.getsignal(signal.SIGINT) is before


def test_a_thread_can_train(whole):
    states = []
    thread = threading.Thread(target=lambda: states.append(fit(start(), STEP, batch_at, 30)))
    thread.start()
    thread.join()
    assert_same(states[0], whole)


@pytest.mark.parametrize("log_every, save_every", [(1, 100), (100, 8), (100, 100)])
def test_a_broken_state_stops_the_run_and_is_not_saved(tmp_path, log_every, save_every):
    def poisoned(step):
        batch = batch_at(step)
        return {**batch, "y": batch["y"] * np.nan} if step == 6 else batch

    manager = open_checkpoints(tmp_path)
    with pytest.raises(NumericsError, match=r"toy failed at step 7: loss nan.* lower learning_rate"):
        intervals = {"log_every": log_every, "save_every": save_every}
        fit(start(), STEP, poisoned, 12, checkpoints=manager, name="toy", **intervals)
    assert manager.latest_step() is None


def test_ctrl_c_does_not_save_a_broken_state(tmp_path):
    def poisoned(step):
        if step == 9:
            raise KeyboardInterrupt
        return {"x": np.full((16, 4), np.inf, np.float32), "y": np.zeros(16, np.float32)}

    manager = open_checkpoints(tmp_path)
    with pytest.raises(NumericsError, match="failed at step 1:"):
        fit(start(), STEP, poisoned, 12, checkpoints=manager)
    assert manager.latest_step() is None


@pytest.mark.parametrize(
    "other", [start(5), start(optimizer=optax.sgd(0.1)), init_state({"w": jnp.zeros(4)}, OPTIMIZER)]
)
def test_the_state_of_another_model_is_a_clear_error(tmp_path, other):
    fit(start(), STEP, batch_at, 2, checkpoints=open_checkpoints(tmp_path))
    with pytest.raises(CheckpointError, match=f"{tmp_path} holds a training state of another model") as caught:
        restore(open_checkpoints(tmp_path), other)
    assert "\n" not in str(caught.value)


def test_nothing_to_restore_changes_nothing(tmp_path):
    state = start()
    assert restore(open_checkpoints(tmp_path / "new"), state) is state
