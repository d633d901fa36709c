"""config.run=chat, with prompts from a pipe."""

import re

import pytest

import paligemma_jax as pj
from paligemma_jax.runs import line_editor
from paligemma_jax.tasks.prompts import read_prompt

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
    status, out, err = chat(f"/image {other}", "caption en", dtype="float32")
    assert (status, out) == (0, generate(image=other, dtype="float32")[1])
    assert f"picture: {other}, 20 x 30" in err


@pytest.mark.slow
def test_a_profile_is_written_when_it_ends(chat, tmp_path):
    status, _, err = chat("caption en", profile=tmp_path)
    [trace] = tmp_path.glob("plugins/profile/*/*.trace.json.gz")
    assert status == 0 and f"wrote {trace}" in err


def test_an_error_does_not_end_it(chat, answer_with):
    answer_with("a circle")
    status, out, err = chat("/image /nowhere.png", "caption en")
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
    assert "error: out of memory: try a smaller" in err and "allocating" not in err and "/image PATH" in err


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


@pytest.mark.parametrize("word", ("exit", " quit ", "/quit", "/exit"))
def test_exit_ends_it(chat, answer_with, word):
    answer_with("a circle")
    assert chat("caption en", word, "caption en")[:2] == (0, "a circle\n")


def interrupt(model, *args, **kw):
    raise KeyboardInterrupt


def test_ctrl_c_ends_a_pipe(chat, monkeypatch):
    monkeypatch.setattr("paligemma_jax.PaliGemma.stream", interrupt)
    with pytest.raises(KeyboardInterrupt):  # main.py ends with 130
        chat("caption en", "caption en")


@pytest.fixture
def terminal(generate, monkeypatch, tmp_path):
    """terminal(*lines): a chat on a terminal; an exception among the lines is raised when it is read."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def talk(*typed: str | BaseException, **keys: object) -> tuple[int, str, str]:
        remaining = iter([*typed, EOFError()])

        def read(prompt: str) -> str:
            if isinstance(line := next(remaining), BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        for stream in ("stdin", "stdout"):
            monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)
        return generate(run="chat", **keys)

    return talk


def test_ctrl_c_stops_an_answer_and_clears_a_line_on_a_terminal(terminal, answer_with, monkeypatch):
    answer_with("a circle")
    stream, calls = pj.PaliGemma.stream, iter([interrupt, None])
    monkeypatch.setattr("paligemma_jax.PaliGemma.stream", lambda *args, **kw: (next(calls) or stream)(*args, **kw))
    status, out, err = terminal("caption en", KeyboardInterrupt(), "caption en")
    assert (status, out) == (0, "a circle\n")
    assert err.count("stopped") == 1 and err.count("Ctrl-D or /quit leaves") == 1


def test_a_setting_holds_for_the_answers_that_follow(chat, answer_with):
    calls = answer_with("a circle")
    status, _, err = chat(
        "/set temperature 0.7", "caption en", "/set temperature=0", "/set constrain on", "/detect cat"
    )
    assert status == 0 and "error" not in err
    asked = [(call["options"].sampling.temperature, call["options"].constrain) for call in calls]
    assert asked == [(0.7, False), (0.0, True)]
    assert read_prompt(calls[1]["prompt"]).text == "detect cat"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temperature hot", "temperature='hot' is not possible: give a number"),
        ("/set temperature -1", "temperature=-1.0 is not possible"),
        ("/set max_new_tokens 2.5", "max_new_tokens='2.5' is not possible: give an integer"),
        ("/set constrain maybe", "constrain='maybe' is not possible: give on or off"),
        ("/set temprature 1", "there is no setting 'temprature': did you mean temperature?"),
        ("/imge a.png", "there is no command /imge: did you mean /image?"),
        ("/set min_score 7", "min_score=7.0 is not possible"),
    ],
)
def test_what_cannot_be_changes_nothing(chat, answer_with, line, message):
    calls = answer_with("a circle")
    status, out, err = chat("/set temperature 0.5", line, "caption en")
    assert (status, out) == (0, "a circle\n") and f"error: {message}" in err and err.count("error: ") == 1
    assert calls[0]["options"].sampling.temperature == 0.5


def test_settings_and_the_picture_are_shown(chat, pictures):
    status, _, err = chat("/set", "/image")
    assert status == 0 and re.search(r"temperature +0\.0\n", err)
    assert err.count(f"picture: {pictures / 'a.png'}, 30 x 20") == 2


@pytest.mark.parametrize(
    "line", ["/image '{}'", '/image "{}"', "/image {escaped}", "/image {}", "{}", "'{}'", "{escaped} "]
)
def test_paths_may_be_quoted_escaped_or_alone(chat, pictures, tmp_path, line):
    path = tmp_path / "my own picture's.jpg" if "'" not in line else tmp_path / "my own picture.jpg"
    path.write_bytes((pictures / "b.jpg").read_bytes())
    status, _, err = chat(line.format(path, escaped=line_editor.escaped(str(path))))
    assert status == 0 and f"picture: {path}, 20 x 30" in err


def test_drawings_never_share_a_name_after_a_setting(chat, answer_with, tmp_path):
    answer_with(f"{BOX} circle")
    lines = (
        "detect circle",
        "/set min_score 0.1",
        "detect circle",
        f"/set output_dir {tmp_path / 'two'}",
        "detect circle",
    )
    assert chat(*lines, output_dir=tmp_path / "one")[0] == 0
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["a_2_drawn.png", "a_drawn.png"]
    assert [p.name for p in (tmp_path / "two").iterdir()] == ["a_drawn.png"]


def test_help_lists_the_commands(chat):
    status, out, err = chat("help")
    assert (status, out) == (0, "") and "/image PATH" in err and "/quit" in err


def test_boxes_are_drawn(chat, answer_with, tmp_path):
    answer_with(f"{BOX} circle")
    status, _, err = chat("detect circle", "detect circle", output_dir=tmp_path / "out")
    assert status == 0
    for name in ("a_drawn.png", "a_2_drawn.png"):
        assert f"wrote {tmp_path / 'out' / name}" in err and (tmp_path / "out" / name).is_file()
