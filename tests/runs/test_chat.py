"""config.run=chat, with prompts from a pipe."""

import re

import pytest

BOX = "<loc0000><loc0000><loc1023><loc0512>"


@pytest.fixture
def chat(generate, type_lines):
    def talk(*lines: str, **keys: object) -> tuple[int, str, str]:
        type_lines(*lines)
        return generate(run="chat", **keys)

    return talk


def test_each_prompt_is_answered_on_its_own(chat, generate, pictures):
    alone = generate(dtype="float32")[1]
    status, out, err = chat("caption en", "", "caption en", dtype="float32")
    assert (status, out) == (0, alone * 2)
    speed = r"4 tokens, [\d.]+ tokens/s \(decode\), prefill \d+ ms"
    assert len(re.findall(speed, err)) == 2


def test_the_picture_can_be_changed(chat, generate, pictures):
    other = str(pictures / "b.jpg")
    status, out, err = chat(f"image {other}", "caption en", dtype="float32")
    assert (status, out) == (0, generate(image=other, dtype="float32")[1])
    assert f"picture: {other}, 20 x 30" in err


@pytest.mark.slow
def test_a_profile_is_written_when_it_ends(chat, tmp_path):
    status, _, err = chat("caption en", profile=tmp_path)
    [trace] = tmp_path.glob("plugins/profile/*/*.trace.json.gz")
    assert status == 0 and f"wrote {trace}" in err


def test_an_error_does_not_end_it(chat, answer_with):
    answer_with("a circle")
    status, out, err = chat("image /nowhere.png", "caption en")
    assert (status, out) == (0, "a circle\n")
    assert "error: '/nowhere.png' does not exist" in err


def test_a_prompt_that_is_too_long_does_not_end_it(chat):
    status, out, err = chat("a " * 300, "caption en")
    assert status == 0 and out.count("\n") == 1
    assert err.count("error: ") == 1 and "do not fit" in err


def test_a_lack_of_memory_does_not_end_it(chat, monkeypatch):
    def exhaust(model, *args, **kw):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 1 bytes")

    monkeypatch.setattr("paligemma_jax.PaliGemma.stream", exhaust)
    status, out, err = chat("caption en", "help")
    assert (status, out) == (0, "")
    assert "error: out of memory: try a smaller" in err and "allocating" not in err and "image PATH" in err


def test_another_runtime_error_is_not_hidden(chat, monkeypatch):
    def fail(model, *args, **kw):
        raise RuntimeError("a bug")

    monkeypatch.setattr("paligemma_jax.PaliGemma.stream", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        chat("caption en")


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"image": "/nowhere.png"}, "'/nowhere.png' does not exist"), ({"format": "json"}, "format=text")],
)
def test_what_cannot_be_is_known_before_the_model_is_loaded(refused, monkeypatch, keys, message):
    monkeypatch.setattr("paligemma_jax.load", lambda *args, **kw: pytest.fail("the model was loaded"))
    assert message in refused(run="chat", **keys)


@pytest.mark.parametrize("word", ("exit", " quit "))
def test_exit_ends_it(chat, answer_with, word):
    answer_with("a circle")
    assert chat("caption en", word, "caption en")[:2] == (0, "a circle\n")


def test_ctrl_c_ends_it(chat, monkeypatch):
    def interrupt(model, *args, **kw):
        raise KeyboardInterrupt

    monkeypatch.setattr("paligemma_jax.PaliGemma.stream", interrupt)
    status, out, err = chat("caption en", "caption en")
    assert (status, out) == (0, "") and "error" not in err


def test_help_lists_the_commands(chat):
    status, out, err = chat("help")
    assert (status, out) == (0, "") and "image PATH" in err and "exit" in err


def test_boxes_are_drawn(chat, answer_with, tmp_path):
    answer_with(f"{BOX} circle")
    status, _, err = chat("detect circle", "detect circle", output_dir=tmp_path / "out")
    assert status == 0
    for name in ("a_drawn.png", "a_2_drawn.png"):
        assert f"wrote {tmp_path / 'out' / name}" in err and (tmp_path / "out" / name).is_file()
