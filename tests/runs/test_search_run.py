"""run=search: an index is made, kept up to date and refused where it does not fit; the best pictures are shown."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.patch_vit import index as indexes
from tests.patch_vit.phrases_fake import FakeClip, FakeStudent

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture
def folder(tmp_path):
    """A plain picture of each colour, and a damaged one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, color in COLORS.items():
        Image.new("RGB", (20, 30), color).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def search(main, monkeypatch, tmp_path, folder):
    """search(KEY=VALUE ...) -> status, stdout, stderr, with models that know colours."""
    for kind in ("student", "clip"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "model.safetensors").write_bytes(kind.encode())
    monkeypatch.setattr("paligemma_jax.patch_vit.load", lambda path, same_norm=None: FakeStudent())
    monkeypatch.setattr("paligemma_jax.patch_vit.load_clip", lambda path: FakeClip())

    def run(**keys):
        defaults = {"run": "search", "image": folder, "output_dir": tmp_path / "out", "compilation_cache": False}
        defaults |= {"student": tmp_path / "student", "clip": tmp_path / "clip", "index": tmp_path / "index"}
        defaults |= {"prompt": "red ; something blue"}
        return main("--config=configs/patch_vit.py", *(f"--config.{k}={v}" for k, v in (defaults | keys).items()))

    return run


def best(out):
    """For each query, the names that the student and the teacher rank first."""
    records = [json.loads(line) for line in out.splitlines()]
    return [[os.path.basename(record[name][0]["image"]) for name in ("student", "teacher")] for record in records]


def test_phrases_and_pictures_find_what_they_name(search, tmp_path, folder):
    query = tmp_path / "query.png"
    Image.new("RGB", (9, 9), (10, 220, 10)).save(query)
    status, out, err = search(format="json", query_image=query, top=2)
    assert status == 0 and "3 pictures in" in err and "3 embedded" in err
    assert best(out) == [["red.png"] * 2, ["blue.png"] * 2, ["green.png"] * 2]
    record = json.loads(out.splitlines()[0])
    assert set(record) == {"query", "student", "teacher", "file", "timing"} and len(record["student"]) == 2
    with Image.open(record["file"]) as grid:
        assert grid.size == (2 * 224, 20 + 2 * (224 + 40))
    assert json.loads(out.splitlines()[2])["student"][0]["score"] > 0.9  # a cosine


def test_scores_are_those_of_brute_force(search, folder, tmp_path):
    _, out, _ = search(format="json", top=10)
    index = indexes.load(tmp_path / "index")
    for line, text in zip(out.splitlines(), FakeClip().embed_text(["red", "blue"]), strict=True):
        for name, vectors in (("student", index.student), ("teacher", index.teacher)):
            scores = vectors @ text
            order = np.argsort(-scores, kind="stable")
            found = json.loads(line)[name]
            assert [item["image"] for item in found] == [index.entries[i].path for i in order]
            np.testing.assert_allclose([item["score"] for item in found], scores[order], atol=1e-4)


def test_a_text_says_names_and_scores(search):
    _, out, _ = search(top=1, prompt="red")
    assert out.startswith("red:\n  student: red.png ") and "\n  teacher: red.png " in out and out.count("wrote ") == 1


def test_an_index_follows_its_folder_and_says_so(search, folder, tmp_path):
    search()
    assert "3 pictures in" in (err := search()[2]) and "none is new" in err
    os.rename(folder / "red.png", folder / "rot.png")
    Image.new("RGB", (5, 5), (200, 0, 200)).save(folder / "pink.png")
    status, out, err = search(refresh=False, format="json")
    assert status == 0 and "is stale (2 added, 1 removed): set refresh=true" in err
    assert best(out)[0] == ["red.png"] * 2 and "red.png does not exist" in err  # an empty panel
    _, out, err = search(format="json")
    assert "1 embedded, 1 known by their contents, stale before: 2 added, 1 removed" in err
    assert best(out)[0] == ["rot.png"] * 2
    assert search(refresh=False)[2] == ""


def test_unreadable_pictures_are_named_and_the_status_tells(search, folder):
    (folder / "bad.png").write_bytes(b"no picture")
    for _ in range(2):
        status, out, err = search()
        assert status == 1 and out.count("wrote") == 2
        assert "bad.png is not a picture" in err and "pictures that could not be read: 1" in err


@pytest.mark.parametrize("kind", ["student", "clip"])
def test_an_index_of_other_models_is_refused_until_it_may_be_made_again(search, tmp_path, kind):
    search()
    before = (tmp_path / "index").read_bytes()
    (tmp_path / kind / "model.safetensors").write_bytes(b"other")
    status, out, err = search()
    assert (status, out) == (1, "") and f"was made with another {kind}: give the one" in err and err.count("\n") == 1
    assert (tmp_path / "index").read_bytes() == before
    assert "3 embedded" in search(overwrite=True)[2] and search()[0] == 0
    assert "another same_norm" in search(same_norm="off")[2]


def test_an_index_of_another_folder_is_refused_until_it_may_become_one(search, folder, tmp_path):
    search()
    moved = tmp_path / "moved"
    folder.rename(moved)
    err = search(image=moved)[2]
    assert (
        err.startswith("error: the index")
        and "moved: name another file" in err
        and "overwrite=true" in err
        and err.count("\n") == 1
    )
    assert "0 embedded, 3 known by their contents" in search(image=moved, overwrite=True)[2]


def test_a_damaged_index_is_refused_until_it_may_be_made_again(search, tmp_path):
    search()
    (tmp_path / "index").write_bytes((tmp_path / "index").read_bytes()[:-3])
    status, out, err = search()
    assert (status, out) == (1, "") and "overwrite=true" in err and err.count("\n") == 1
    assert search(overwrite=True)[0] == 0


def test_faiss_ranks_alike(search):
    pytest.importorskip("faiss")
    exact = best(search(format="json")[1])
    for kind in ("flat", "ivf"):
        status, out, err = search(format="json", ranking=kind)
        assert status == 0 and best(out) == exact and "faiss took" in err


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"prompt": ""}, "there is nothing to search for"),
        ({"top": 0}, "top=0 is not possible"),
        ({"ranking": "fast"}, "ranking='fast' is not possible"),
        ({"save_every_s": -1.0}, "save_every_s=-1.0 is not possible"),
        ({"index": ""}, "index is empty"),
        ({"refresh": False}, "there is no index"),
        ({"refresh": False, "overwrite": True}, "leave out one of them"),
        ({"image": "https://example.org/a.png"}, "is a URL"),
        ({"query_image": "nowhere.png"}, "'nowhere.png' does not exist"),
        ({"student": "./nowhere"}, "./nowhere does not exist"),
    ],
)
def test_what_cannot_be_is_one_line(search, tmp_path, keys, words):
    status, out, err = search(**keys)
    assert (status, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not (tmp_path / "index").exists()


def test_saving_as_often_as_told(search, monkeypatch):
    saved = []
    monkeypatch.setattr(indexes, "save", lambda path, index: saved.append(index.is_complete))
    search(save_every_s=0.0, batch_size=1)
    assert saved == [False, False, False, True]
