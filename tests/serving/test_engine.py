"""The engine: each answer is the one that `generate` gives alone, whatever else runs, fails, ends or is taken back."""

import dataclasses
import functools
import threading

import jax
import numpy as np
import pytest

import paligemma_jax as pj
from paligemma_jax import errors
from paligemma_jax.processing.image import load_image
from paligemma_jax.serving import programs
from paligemma_jax.serving.engine import Engine, EngineSettings
from paligemma_jax.serving.events import Finished, Piece
from paligemma_jax.serving.pictures import digest
from tests.serving.conftest import SETTINGS, assert_same


def test_each_answer_is_that_of_generate_alone(engine, requests, expected):
    order = np.random.default_rng(1).permutation(2 * len(requests))[: SETTINGS.max_waiting] // 2  # some of them twice
    answers = [(i, engine.submit(requests[i], client=str(i % 3))) for i in order]
    for i, answer in answers:
        assert_same(answer.result(), expected[i])
    stats = engine.stats()
    assert stats.compiles_while_serving == 0 and stats.images_cached == 4
    assert stats.free_slots == 2 and not stats.running and not stats.waiting
    assert 0 < stats.prompt_tokens <= stats.padded_tokens and sum(stats.finished.values()) >= len(requests)


def test_generate_says_the_same(engine, model, requests):
    request = requests[3]
    [alone] = model.generate([list(request.images)], [request.prompt], options=request.options)
    assert_same(engine.submit(request).result(), alone)


def test_pieces_are_the_answer(engine, requests, expected):
    *pieces, last = engine.submit(requests[1])
    assert len(pieces) > 1 and all(isinstance(piece, Piece) for piece in pieces)
    assert "".join(piece.text for piece in pieces) == last.output.text == expected[1].text
    np.testing.assert_array_equal(np.concatenate([piece.tokens for piece in pieces]), last.output.tokens)
    np.testing.assert_array_equal(np.concatenate([piece.logprobs for piece in pieces]), last.output.logprobs)


def test_an_image_is_embedded_once(engine, requests):
    first = engine.submit(requests[0])
    first.result()
    before = engine.stats()
    engine.submit(requests[0]).result()
    after = engine.stats()
    assert after.images_embedded == before.images_embedded and after.images_reused == before.images_reused + 1


@pytest.mark.parametrize("start, size", [(3, 2), (0, 1), (10, 6)])
def test_an_answer_ends_before_a_stop_string(engine, requests, expected, start, size):
    text = expected[8].text
    stop = text[start : start + size]
    *pieces, last = engine.submit(requests[8], stop=["never there", stop])
    assert last.reason == last.output.finish_reason == "stop"
    assert last.output.text == text[: text.index(stop)] == "".join(piece.text for piece in pieces)
    count = len(last.output.tokens)
    assert last.output.tokens.tolist() == expected[8].tokens[:count].tolist()
    assert stop in engine.model.processor.tokenizer.decode(last.output.tokens)


def test_a_stop_string_that_does_not_come_changes_nothing(engine, requests, expected):
    assert_same(engine.submit(requests[8], stop=expected[8].text[-1:] + "!").result(), expected[8])


def test_who_leaves_frees_the_slot_and_others_stay(engine, requests, expected):
    leaving = [engine.submit(requests[8]) for _ in range(6)]
    staying = engine.submit(requests[1], client="other")
    next(iter(leaving[0]))
    for answer in leaving:
        answer.cancel()
    for answer in leaving:
        with pytest.raises(errors.Cancelled):
            answer.result()
    assert_same(staying.result(), expected[1])
    leaving[0].cancel()  # once more does no harm
    assert engine.stats().free_slots == 2


def test_time_is_over_waiting_or_running(engine, requests, expected):
    late = [engine.submit(requests[8], timeout_s=1e-4) for _ in range(3)]
    in_time = engine.submit(requests[0], timeout_s=60)
    for answer in late:
        with pytest.raises(errors.Expired):
            answer.result()
    assert_same(in_time.result(), expected[0])


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"sampling": pj.Sampling(num_beams=2)}, errors.SamplingError, "num_beams=2"),
        ({"max_new_tokens": 41}, errors.SamplingError, "max_new_tokens=41"),
        ({"prompt": "a " * 50}, errors.PromptError, "at most 32"),
        ({"prompt": "a " * 300}, errors.PromptError, "do not fit"),
        ({"image": [np.zeros((2, 2, 3), np.uint8)] * 3}, errors.ImageError, "3 images"),
        ({"image": []}, errors.PromptError, "empty list"),
        ({"image": "missing.png"}, errors.ImageError, "missing.png"),
        ({"image": np.zeros((2, 2, 3))}, errors.ImageError, "uint8"),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(engine, change, error, words):
    given = {"image": np.zeros((4, 4, 3), np.uint8), "prompt": "caption en", "max_new_tokens": 4} | change
    with pytest.raises(error, match=words):
        engine.submit(pj.Request.of(**given))


@pytest.mark.parametrize(
    "options",
    [
        *({"stop": [""]}, {"stop": [3]}, {"timeout_s": 0}, {"timeout_s": -1.0}, {"timeout_s": float("nan")}),
        *({"top_logprobs": 21}, {"top_logprobs": -1}, {"top_logprobs": 1.5}),
    ],
)
def test_options_without_meaning_are_refused(engine, requests, options):
    with pytest.raises(errors.SamplingError):
        engine.submit(requests[0], **options)


def test_as_many_wait_as_may(engine, requests):
    answers = []
    with pytest.raises(errors.Busy):
        for _ in range(100):
            answers.append(engine.submit(requests[8]))
    assert len(answers) >= SETTINGS.max_waiting
    for answer in answers:
        answer.cancel()
    for answer in answers[-5:]:
        with pytest.raises(errors.Cancelled):
            answer.result()


def test_a_program_that_fails_ends_what_runs_and_nothing_else(engine, requests, expected, monkeypatch):
    decode, calls = engine._programs.decode, []

    def failing(*args):
        if not calls and engine.stats().running == 2:  # both, whenever they came
            calls.append(args)
            raise RuntimeError("out of\nmemory")
        return decode(*args)

    monkeypatch.setattr(engine._programs, "decode", failing)
    answers = [engine.submit(requests[8]) for _ in range(2)]
    waiting = engine.submit(requests[1])
    for answer in answers:
        with pytest.raises(errors.EngineFailed, match="out of memory"):
            answer.result()
    assert_same(waiting.result(), expected[1])


def test_a_request_that_fails_ends_alone(engine, requests, expected, monkeypatch):
    embed = engine._programs.embed

    def failing(pixels):
        if any((image == -1).all() for image in pixels):
            raise RuntimeError("no such image")
        return embed(pixels)

    monkeypatch.setattr(engine._programs, "embed", failing)
    running = engine.submit(requests[8])
    next(iter(running))
    black = pj.Request.of(np.zeros((4, 4, 3), np.uint8), "caption en", max_new_tokens=8)
    with pytest.raises(errors.EngineFailed, match="no such image"):
        engine.submit(black).result()
    assert_same(running.result(), expected[8])
    white = pj.Request.of(np.full((4, 4, 3), 255, np.uint8), "caption en", max_new_tokens=8)
    for _ in range(4):  # whoever joins together with it
        broken, whole = engine.submit(black), engine.submit(white)
        assert whole.result().reason in ("eos", "length")
        with pytest.raises(errors.EngineFailed):
            broken.result()


def test_an_answer_that_is_nan_ends_alone(engine, requests, expected):
    black = pj.Request.of(np.zeros((4, 4, 3), np.uint8), "caption en", max_new_tokens=8)
    key = digest(engine.model.processor.image_settings.to_pixels(load_image(black.images[0])))
    engine._images.put(key, jax.numpy.full((4, 32), np.nan, np.float32))
    broken, whole = engine.submit(black), engine.submit(requests[1])
    with pytest.raises(errors.NumericsError, match="NaN"):
        broken.result()
    assert_same(whole.result(), expected[1])
    after = [engine.submit(requests[i]) for i in (0, 1, 3)]  # in the slot that held NaN too
    for i, answer in zip((0, 1, 3), after, strict=True):
        assert_same(answer.result(), expected[i])


def test_listeners_hear_events_in_the_thread_of_the_engine(engine, requests):
    heard, names = [], set()
    answer = engine.submit(requests[8])
    answer.on_event(lambda event: (heard.append(event), names.add(threading.current_thread().name)))
    last = answer.result()
    assert heard[-1] is last and heard == list(answer)
    assert "paligemma-engine" in names


@pytest.fixture
def small_engine(model, engine):
    """One with the programs of the other, that may be closed."""
    small = Engine(model, SETTINGS)
    small._programs = engine._programs
    return small


def test_a_program_that_is_compiled_while_serving_is_counted(small_engine, requests):
    small_engine.start()
    small_engine.wait_ready()
    answer = small_engine.submit(requests[8])
    next(iter(answer))
    answer.on_event(lambda event: isinstance(event, Finished) and jax.jit(lambda x: x + 5)(np.ones(7)))
    jax.jit(lambda x: x + 6)(np.ones(7))  # in another thread: nobody waits for it
    answer.result()
    small_engine.close()
    assert small_engine.stats().compiles_while_serving == 1


def test_an_early_engine_answers_usual_requests_first_and_all_of_them(model, engine, requests, expected, monkeypatch):
    early, done = Engine(model, SETTINGS), engine._programs
    go_on, names = threading.Event(), []

    def compiled(name, *key):
        names.append(name)
        if (name, *key) not in early._programs._first():
            assert go_on.wait(60)
        return done._get(name, *key)

    monkeypatch.setattr(early, "_programs", programs.Programs(model, SETTINGS))
    early._programs.__dict__.update({k: v for k, v in done.__dict__.items() if k not in ("_lock", "_compiled")})
    for name in {name for name, *_ in done._all()}:
        monkeypatch.setattr(early._programs, f"_compile_{name}", functools.partial(compiled, name))
    early.start(early=True)
    early.wait_ready(60)
    answers = [early.submit(requests[i]) for i in (0, 1)]
    assert "resize" not in names  # the last of the rest
    assert_same(answers[0].result(), expected[0])
    answers.append(early.submit(requests[8]))  # outgrows the usual state
    go_on.set()
    for i, answer in zip((0, 1, 8), answers, strict=True):
        assert_same(answer.result(), expected[i])
    early.close()
    assert len(names) == len(set(done._all()))
    assert early.stats().compiles_while_serving == 0


def test_closing_finishes_what_runs_in_time_and_refuses_what_is_new(small_engine, requests, expected):
    small_engine.start()
    answers = [small_engine.submit(requests[i]) for i in (0, 1, 6)]
    small_engine.close(drain_s=60)
    for i, answer in zip((0, 1, 6), answers, strict=True):
        assert answer.ended
        assert_same(answer.result(), expected[i])
    with pytest.raises(errors.Closed):
        small_engine.submit(requests[0])


def test_closing_at_once_cancels(small_engine, requests):
    small_engine.start()
    answers = [small_engine.submit(requests[8]) for _ in range(5)]
    small_engine.close()
    assert all(answer.ended for answer in answers)
    with pytest.raises(errors.Cancelled):
        answers[-1].result()


def test_an_engine_that_never_started_can_be_closed(small_engine, requests):
    answer = small_engine.submit(requests[0])
    assert not small_engine.ready
    with pytest.raises(errors.EngineFailed, match="not ready"):
        small_engine.wait_ready(0.01)
    small_engine.close()
    with pytest.raises(errors.Cancelled):
        answer.result()


def test_programs_that_cannot_be_compiled_are_an_error_for_all(model, requests, monkeypatch):
    engine = Engine(model, SETTINGS)

    def warm(is_wanted, only_first):
        raise MemoryError("no room")

    monkeypatch.setattr(engine._programs, "warm", warm)
    waiting = engine.submit(requests[0])
    engine.start()
    with pytest.raises(errors.EngineFailed, match="no room"):
        engine.wait_ready(10)
    with pytest.raises(errors.EngineFailed, match="no room"):
        waiting.result()
    with pytest.raises(errors.EngineFailed, match="no room"):
        engine.submit(requests[0])


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(EngineSettings)])
@pytest.mark.parametrize("value", [-1, 1.5, "many"])
def test_settings_without_meaning_are_refused(field, value):
    with pytest.raises(errors.SamplingError, match=field):
        EngineSettings(**{field: value})
