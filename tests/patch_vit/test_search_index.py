"""An index brought up to date is a fresh one, whatever happened to the folder and the run; damage is one line."""

import dataclasses
import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paligemma_jax.errors import DataError, ImageError, NumericsError
from paligemma_jax.patch_vit import index as files
from paligemma_jax.patch_vit import indexing
from tests.patch_vit.phrases_fake import FakeClip, FakeStudent

MODELS = {"student": "a", "clip": "b"}


class Killed(Exception):
    pass


class Counting:
    """The fakes' embeddings, counted; after so many batches the run is killed."""

    def __init__(self, batches: float = float("inf")):
        self.pictures, self.left = 0, batches
        real = indexing.of_models(FakeStudent(), FakeClip(), 4)

        def prepare(image):
            self.pictures += 1
            return real.prepare(image)

        def embed(*pixels):
            if self.left <= 0:
                raise Killed
            self.left -= 1
            return real.embed(*pixels)

        self.embedder = indexing.Embedder(prepare, embed, 4)


def draw(path, seed):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)).save(path)


def names(folder):
    return sorted(str(path) for path in folder.iterdir() if path.suffix == ".png")


def run(folder, old=None, counting=None, every=0.0, saved=None):
    counting = counting or Counting()
    saved = [] if saved is None else saved
    done = indexing.update(old, str(folder), names(folder), MODELS, counting.embedder, saved.append, every)
    assert saved[-1] is done.index
    return done


def same(first, second):
    assert first.entries == second.entries and first.failed == second.failed
    assert (first.source, first.models, first.is_complete) == (second.source, second.models, second.is_complete)
    np.testing.assert_array_equal(first.student, second.student)
    np.testing.assert_array_equal(first.teacher, second.teacher)


def change(folder, rng):
    """Pictures are added, copied, renamed, removed, damaged and drawn anew."""
    there = names(folder)
    path = rng.choice(there)
    match rng.randrange(6):
        case 0:
            draw(folder / f"new{rng.randrange(10**6)}.png", rng.randrange(10**6))
        case 1:
            with open(path, "rb") as file:
                (folder / f"copy{rng.randrange(10**6)}.png").write_bytes(file.read())
        case 2:
            os.rename(path, folder / f"renamed{rng.randrange(10**6)}.png")
        case 3 if len(there) > 3:
            os.remove(path)
        case 4 if len(there) > 3:
            os.truncate(path, rng.randrange(40))
        case _:
            draw(path, rng.randrange(10**6))


@given(seed=st.integers(0, 10**6), kill=st.integers(0, 4))
@settings(deadline=None, max_examples=25)
def test_an_update_after_changes_and_kills_is_a_fresh_index(seed, kill, tmp_path_factory):
    rng, folder = random.Random(seed), tmp_path_factory.mktemp("folder")
    for i in range(10):
        draw(folder / f"{i}.png", seed + i)
    index = run(folder).index
    for _ in range(rng.randrange(1, 7)):
        change(folder, rng)
    saved = [index]
    try:
        run(folder, index, Counting(kill), saved=saved)
    except Killed:
        assert not saved[-1].is_complete or saved[-1] is index
    same(run(folder, saved[-1]).index, run(folder).index)


def test_what_is_known_is_not_embedded_again(tmp_path):
    for i in range(9):
        draw(tmp_path / f"{i}.png", i)
    first = Counting()
    index = run(tmp_path, None, first).index
    assert first.pictures == 9
    (tmp_path / "0.png").rename(tmp_path / "moved.png")
    (tmp_path / "1.png").unlink()
    os.utime(tmp_path / "2.png", (1, 1))  # touched only
    (tmp_path / "copy.png").write_bytes((tmp_path / "3.png").read_bytes())
    draw(tmp_path / "new.png", 99)
    counting = Counting()
    done = run(tmp_path, index, counting)
    assert counting.pictures == 1 and (done.embedded, done.moved) == (1, 3)
    assert [os.path.basename(entry.path) for entry in done.index.entries] == [
        *(f"{i}.png" for i in range(2, 9)), "copy.png", "moved.png", "new.png",
    ]  # fmt: skip


def test_a_resumed_run_embeds_only_what_was_not_saved(tmp_path):
    for i in range(17):
        draw(tmp_path / f"{i:02}.png", i)
    saved = []
    with pytest.raises(Killed):
        run(tmp_path, None, Counting(2), saved=saved)
    assert [len(index.entries) for index in saved] == [4, 8] and not saved[-1].is_complete
    counting = Counting()
    done = run(tmp_path, saved[-1], counting, every=1e9)
    assert counting.pictures == 9 and done.embedded == 9
    same(done.index, run(tmp_path).index)


def test_ctrl_c_saves_what_there_is(tmp_path):
    for i in range(8):
        draw(tmp_path / f"{i}.png", i)
    counting, saved = Counting(), []

    def embed(*pixels):
        if counting.left < 0:
            raise KeyboardInterrupt
        counting.left = -1
        return indexing.of_models(FakeStudent(), FakeClip()).embed(*pixels)

    embedder = dataclasses.replace(counting.embedder, embed=embed)
    with pytest.raises(KeyboardInterrupt):
        indexing.update(None, "x", names(tmp_path), MODELS, embedder, saved.append, 1e9)
    assert [len(index.entries) for index in saved] == [4]


def test_corrupt_pictures_are_named_and_tried_again(tmp_path):
    draw(tmp_path / "a.png", 0)
    draw(tmp_path / "b.png", 1)
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:60])
    (tmp_path / "c.png").write_bytes(b"")
    index = run(tmp_path).index
    assert [os.path.basename(entry.path) for entry in index.failed] == ["b.png", "c.png"]
    assert "truncated" in index.failed[0].problem and "empty" in index.failed[1].problem
    assert not files.staleness(index, names(tmp_path))
    (tmp_path / "b.png").write_bytes(whole)
    assert str(files.staleness(index, names(tmp_path))) == "1 changed"
    assert len(run(tmp_path, index).index.entries) == 2


def test_a_folder_with_nothing_to_search_is_one_line(tmp_path):
    (tmp_path / "c.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"none of 1 pictures can be searched for: .*c.png is empty"):
        indexing.update(None, "folder", names(tmp_path), MODELS, Counting().embedder, lambda index: None)


def test_stale_says_what_happened(tmp_path):
    for i in range(5):
        draw(tmp_path / f"{i}.png", i)
    index = run(tmp_path).index
    assert not files.staleness(index, names(tmp_path))
    (tmp_path / "0.png").unlink()
    draw(tmp_path / "1.png", 77)
    draw(tmp_path / "8.png", 8)
    draw(tmp_path / "9.png", 9)
    stale = files.staleness(dataclasses.replace(index, is_complete=False), names(tmp_path))
    assert stale and str(stale) == "2 added, 1 changed, 1 removed, indexing was not finished"


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_embeddings_without_direction_are_one_line(value):
    with pytest.raises(NumericsError, match="zero or not finite"):
        files.unit(np.full((2, 3), value), "embeddings")


@pytest.fixture
def saved(tmp_path):
    for i in range(3):
        draw(tmp_path / f"{i}.png", i)
    (tmp_path / "bad.png").write_bytes(b"no")
    (tmp_path / "odd\udc80'\n.png").write_bytes((tmp_path / "0.png").read_bytes())
    index = run(tmp_path).index
    files.save(tmp_path / "sub" / "index.safetensors", index)
    return index, tmp_path / "sub" / "index.safetensors"


def test_an_index_is_one_file_that_holds_all(saved):
    index, path = saved
    same(files.load(path), index)
    assert len(index.failed) == 1 and len(index.entries) == 4
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    before = path.read_bytes()
    files.save(path, index)
    assert path.read_bytes() == before


def test_no_index_and_other_files_are_one_line(tmp_path, saved):
    path = saved[1]
    with pytest.raises(DataError, match=r"there is no index .*refresh=true"):
        files.load(tmp_path / "none")
    with pytest.raises(DataError, match="there is no index"):
        files.load(tmp_path)
    for contents in (
        b"",
        b"x" * 100,
        path.read_bytes()[:-5],
        path.read_bytes().replace(b"patch_vit_index", b"patch_vit_other"),
    ):
        (tmp_path / "other").write_bytes(contents)
        with pytest.raises(DataError, match="other") as caught:
            files.load(tmp_path / "other")
        assert "\n" not in str(caught.value)


@given(place=st.floats(0, 1), byte=st.integers(0, 255))
@settings(deadline=None, max_examples=80)
def test_a_damaged_index_is_read_or_refused_in_one_line(place, byte, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    draw(folder / "0.png", 0)
    files.save(folder / "index", run(folder).index)
    data = bytearray((folder / "index").read_bytes())
    data[int(place * (len(data) - 1))] = byte
    (folder / "index").write_bytes(bytes(data))
    try:
        files.load(folder / "index")
    except DataError as error:
        assert "\n" not in str(error)


def test_moved_pictures_whose_turn_had_not_come_are_still_known_after_a_kill(tmp_path):
    for i in range(6):
        draw(tmp_path / f"old{i}.png", i)
    index, saved = run(tmp_path).index, []
    for i in range(6):
        (tmp_path / f"old{i}.png").rename(tmp_path / f"z{i}.png")
        draw(tmp_path / f"new{i}.png", 50 + i)
    with pytest.raises(Killed):
        run(tmp_path, index, Counting(1), saved=saved)
    done = run(tmp_path, saved[-1])
    assert (done.embedded, done.moved) == (2, 6)
