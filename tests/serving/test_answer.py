"""An answer as its listeners hear it."""

import threading

import numpy as np
import pytest

from paligemma_jax.errors import Cancelled, EngineFailed
from paligemma_jax.serving.answer import Answer
from paligemma_jax.serving.events import Finished, Piece
from paligemma_jax.serving.pictures import SoftTokenCache, digest

PIECES = [Piece(text, np.zeros(1, np.int32), np.zeros(1, np.float32)) for text in "ab"]
FINISHED = Finished(None, "eos", 0.0, 0.0, 0.0)


def test_every_listener_hears_everything_whenever_it_comes():
    answer, heard, early = Answer(lambda: None), [], []
    answer.on_event(early.append)
    thread = threading.Thread(target=lambda: heard.extend(answer))
    thread.start()
    answer.put(PIECES[0])
    late = []
    answer.on_event(late.append)
    answer.put(PIECES[1])
    assert not answer.ended
    answer.put(FINISHED)
    thread.join(5)
    assert heard == early == late == list(answer) == [*PIECES, FINISHED]
    assert answer.result() is FINISHED and answer.ended


@pytest.mark.parametrize("error", [Cancelled("gone"), EngineFailed("broken")])
def test_what_went_wrong_is_raised_after_what_was_said(error):
    answer, heard = Answer(lambda: None), []
    for event in (PIECES[0], error, FINISHED):  # nothing follows an error
        answer.put(event)
    answer.on_event(heard.append)
    assert heard == [PIECES[0], error]
    with pytest.raises(type(error)):
        answer.result()


def test_a_listener_that_raises_is_left_alone_and_cancels():
    cancelled, heard = [], []
    answer = Answer(lambda: cancelled.append(True))

    def gone(event):
        heard.append(event)
        raise RuntimeError("Event loop is closed")

    answer.on_event(gone)
    answer.put(PIECES[0])
    answer.put(FINISHED)
    assert heard == PIECES[:1] and cancelled == [True]
    assert answer.result() is FINISHED


def test_soft_tokens_that_were_used_longest_ago_go_first():
    arrays = [np.zeros((4, 2), np.float32) + i for i in range(4)]  # 32 bytes each
    cache = SoftTokenCache(100)
    for i in range(3):
        cache.put(bytes([i]), arrays[i])
    assert len(cache) == 3 and cache.num_bytes == 96
    assert cache.get(b"\0") is arrays[0]
    cache.put(b"\3", arrays[3])
    assert cache.get(b"\1") is None and cache.get(b"\0") is arrays[0] and cache.num_bytes == 96
    cache.put(b"\4", np.zeros(1000))  # larger than all there is
    assert len(cache) == 3
    none = SoftTokenCache(0)
    none.put(b"\0", arrays[0])
    assert len(none) == 0


def test_images_are_told_apart_by_every_pixel():
    image = np.zeros((8, 8, 3), np.float32)
    other = image.copy()
    other[7, 7, 2] = 1e-3
    assert digest(image) == digest(image.copy()) != digest(other)
