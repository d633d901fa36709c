"""Embeddings that a run saves or is given, and config.run=swap."""

import inspect
import json

import numpy as np
import pytest

import paligemma_jax as pj
from paligemma_jax import api


@pytest.mark.parametrize("stage, width", [("projected", 32), ("features", 16)])
def test_what_was_saved_stands_for_its_picture(generate, pictures, tmp_path, stage, width, monkeypatch):
    file = tmp_path / "new" / "a.npy"
    _, plain, _ = generate()
    status, out, err = generate(save_embeddings=file, embeddings=stage)
    assert (status, out) == (0, plain) and f"saved {file}" in err and f"(1, 4, {width})" in err
    monkeypatch.setattr(api, "embed_images", None)
    status, out, _ = generate(load_embeddings=file, embeddings=stage, image=pictures / "b.jpg")
    assert (status, out) == (0, plain)
    status, streamed, _ = generate(load_embeddings=file, embeddings=stage, stream=True)
    assert (status, streamed) == (0, plain)


def test_saved_is_what_the_pictures_gave_and_answered_what_was_loaded(generate, pictures, tmp_path):
    file, other = tmp_path / "a.npy", tmp_path / "both.npy"
    generate(save_embeddings=file)
    generate(save_embeddings=other, image=pictures, batch_size=1)
    both = np.load(other, allow_pickle=False)
    assert both.shape == (2, 4, 32) and both.dtype == np.float32
    np.testing.assert_allclose(both[0], np.load(file)[0], atol=1e-5)
    np.save(other, both[::-1])
    _, first, _ = generate(image=pictures, prompt="caption en")
    _, swapped, _ = generate(image=pictures, load_embeddings=other, save_embeddings=other, batch_size=1)
    assert swapped.splitlines()[1] == first.splitlines()[3] and swapped.splitlines()[3] == first.splitlines()[1]
    np.testing.assert_allclose(np.load(other), both, atol=1e-5)  # the pictures' own again


def test_bad_embeddings_are_refused(refused, pictures, tmp_path):
    np.save(tmp_path / "two.npy", np.zeros((2, 4, 32), np.float32))
    message = refused(load_embeddings=tmp_path / "two.npy")
    assert "(2, 4, 32)" in message and "image names 1" in message
    np.save(tmp_path / "wide.npy", np.zeros((4, 33), np.float32))
    message = refused(load_embeddings=tmp_path / "wide.npy")
    assert "(1, 4, 33)" in message and "(images, 4, 32)" in message
    assert "does not exist" in refused(load_embeddings=tmp_path / "none.npy")
    assert ".npy" in refused(save_embeddings=tmp_path / "a.txt")
    assert "give projected, features" in refused(embeddings="pixels")


@pytest.fixture
def swap(main, checkpoint, pictures, tmp_path):
    def run(**keys):
        defaults = {"checkpoint": checkpoint, "image": pictures / "a.png", "other_image": pictures / "b.jpg"}
        defaults |= {"compilation_cache": False, "max_new_tokens": 4, "output_dir": tmp_path / "swap"}
        defaults |= {"overwrite": True}
        return main("--config=configs/swap.py", *(f"--config.{k}={v}" for k, v in (defaults | keys).items()))

    return run


@pytest.mark.parametrize("stage", ["projected", "features"])
def test_four_runs_and_their_variations(swap, tmp_path, stage, monkeypatch):
    """Own and other_image's embeddings, a box of them, and what they are when mix and bits change them.

    The answer is the mean of the embeddings: a random model would say the same of both.
    """
    signature = inspect.signature(pj.PaliGemma.generate)

    def generate(*args, **options):
        asked = signature.bind(*args, **options).arguments
        assert asked["images"] is None and len(asked["prompts"]) == len(asked["image_embeddings"])
        return [pj.Output(f"{x.mean():.5f}", *[None] * 6) for x in np.asarray(asked["image_embeddings"])]

    load, told = pj.load, []
    monkeypatch.setattr(pj, "load", lambda *args, **kw: told.append(kw["batch_size"]) or load(*args, **kw))
    monkeypatch.setattr(pj.PaliGemma, "generate", generate)
    status, out, err = swap(box="0,0,0.5,1", mix="1,0,0.5", bits="16", format="json", embeddings=stage)
    assert status == 0 and err.count("saved") == 2
    records = [json.loads(line) for line in out.splitlines()]
    texts = [record["text"] for record in records]
    names = [record["embeddings"] for record in records]
    assert len(texts) == 4 + 1 + 3 + 1 and names[0] == "A, a.png" and "2 of 4 patches" in names[4]
    assert texts[0] == texts[1] == texts[5] and texts[2] == texts[3] == texts[6] and texts[0] != texts[2]
    assert np.load(tmp_path / "swap" / "b.npy", allow_pickle=False).shape[:2] == (1, 4)
    _, table, _ = swap(mix="", bits="", embeddings=stage)
    assert [line.rpartition("  ")[2] for line in table.splitlines()] == texts[:4]
    assert told == [9, 4]


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"box": "0,0,1"}, "x0,y0,x1,y1"),
        ({"box": "0,0,2,1"}, "shares of the picture"),
        ({"bits": "3"}, "bits=3"),
        ({"mix": "half"}, "numbers with commas"),
        ({"mix": "1.5"}, "between 0 and 1"),
        ({"other_image": "none.png"}, "none.png"),
    ],
)
def test_bad_values_are_one_line(swap, keys, message):
    status, out, err = swap(**keys)
    assert (status, out) == (1, "") and message in err and err.count("\n") == 1
