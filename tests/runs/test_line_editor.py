"""Words as a shell writes them, completion, and a history for the next session."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_jax.runs import chat_commands, line_editor


@given(st.text())
def test_what_is_escaped_is_read_back(text):
    text = text.strip(" \t")
    if not (len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"):
        assert line_editor.unescaped(line_editor.escaped(text)) == text


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("'a b'", "a b"),
        ('"it\'s"', "it's"),
        (r"a\ b", "a b"),
        (r"C:\pictures\cat.png", r"C:\pictures\cat.png"),
        ("it's", "it's"),
    ],
)
def test_quotes_and_backslashes_as_in_a_shell(typed, read):
    assert line_editor.unescaped(typed) == read


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my pictures").mkdir()
    for name in ("a.png", "ab.png", "my pictures/cat.png", ".hidden"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("/im", ["/image "]),
        ("/image a", ["/image a.png", "/image ab.png"]),
        ("/image my", [r"/image my\ pictures/"]),
        (r"/image my\ pictures/", [r"/image my\ pictures/cat.png"]),
        ("ab", ["ab.png"]),
        ("/set min", ["/set min_p ", "/set min_score "]),
        ("/set output_dir m", [r"/set output_dir my\ pictures/"]),
        ("/image nowhere/", []),
        ("/image .h", ["/image .hidden"]),
        ("/set temperature ", []),
    ],
)
def test_tab_offers_commands_settings_and_paths(folder, line, offered):
    assert chat_commands.completions(line) == offered


def test_absolute_paths_are_offered_too(folder):
    assert chat_commands.completions(f"{folder}/a.") == [f"{folder}/a.png"]
    assert chat_commands.completions(f"/image {folder}/a.") == [f"/image {folder}/a.png"]


def test_lines_are_kept_for_the_next_session(tmp_path, monkeypatch):
    readline = pytest.importorskip("readline")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    before = [readline.get_history_item(i + 1) for i in range(readline.get_current_history_length())]
    readline.clear_history()

    def typed(prompt: str) -> str:
        readline.add_history("detect cat")
        raise EOFError

    monkeypatch.setattr("builtins.input", typed)
    assert list(line_editor.lines("> ", chat_commands.completions)) == []
    file = line_editor.history_file()
    assert file.read_text().splitlines()[-1] == "detect cat" and file.stat().st_mode & 0o777 == 0o600
    readline.clear_history()
    assert list(line_editor.lines("> ", chat_commands.completions)) == []
    assert file.read_text().splitlines()[-2:] == ["detect cat", "detect cat"]
    readline.clear_history()
    for line in before:
        readline.add_history(line)


def test_a_history_that_cannot_be_kept_is_no_reason_to_stop(tmp_path, monkeypatch):
    (tmp_path / "paligemma_jax").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    answers = iter(["caption en"])

    def typed(prompt: str) -> str:
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    assert list(line_editor.lines("> ", chat_commands.completions)) == ["caption en"]
