"""Replacing a file whole, and progress that speaks only when it has something to say."""

import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from paligemma_jax import files
from paligemma_jax.errors import CheckpointError


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds): so much later; it stands still otherwise."""
    now = 1000.0

    def later(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now)
    return later


def test_a_slow_load_tells_gigabytes_and_seconds(clock, capsys):
    """Not before two seconds, and into a file every ten at most."""
    with files.progress("loading model", 6_000_000_000) as advance:
        for seconds in (1, 4, 10, 4, 6):
            clock(seconds)
            advance(1_200_000_000)
    lines = ["loading model: 3.6 of 6.0 GB, 15 s", "loading model: 6.0 of 6.0 GB, 25 s"]
    assert capsys.readouterr().err.splitlines() == lines


def test_a_terminal_sees_it_live_to_the_end(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with files.progress("loading model", 2_000_000_000) as advance:
        clock(3)
        advance(500_000_000)
        clock(0.1)
        advance(1_500_000_000)
    assert capsys.readouterr().err == "\rloading model: 0.5 of 2.0 GB, 3 s\rloading model: 2.0 of 2.0 GB, 3 s\n"


@pytest.mark.parametrize("enabled, seconds", [(False, 60), (True, 1)])
def test_what_is_fast_or_not_asked_for_tells_nothing(clock, capsys, enabled, seconds):
    with files.progress("loading model", 2_000_000_000, enabled) as advance:
        clock(seconds)
        advance(2_000_000_000)
    assert capsys.readouterr().err == ""


def test_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with files.replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_progress_is_silent_when_quick_or_unwanted(capsys, monkeypatch):
    with files.progress("loading x", 4_000_000_000) as advance:
        advance(1_000_000_000)
    monkeypatch.setattr(files, "_FIRST_REPORT_S", 0.0)
    monkeypatch.setattr(files, "_LOG_EVERY_S", 0.0)
    with files.progress("loading x", 4_000_000_000, enabled=False) as advance:
        advance(1_000_000_000)
    assert capsys.readouterr() == ("", "")
    with files.progress("loading x", 4_000_000_000) as advance:
        advance(1_000_000_000)
        advance(2_000_000_000)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["loading x: 1.0 of 4.0 GB, 0 s", "loading x: 3.0 of 4.0 GB, 0 s"]


_ODD = "a\u2028b\u2029c\x85d\x0ce\x0bf\x1cg\rh"  # what Python's str.splitlines would split


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\n\r\ntwo\n", ["one", "", "two"]),
        (b"\n", [""]),
        (f"{_ODD}\n{_ODD}\r\n".encode(), [_ODD, _ODD]),
        ("\ufeffone\n\ufefftwo\n".encode(), ["one", "\ufefftwo"]),
    ],
)
def test_lines_end_with_line_breaks_alone(tmp_path, data, lines):
    (tmp_path / "x").write_bytes(data)
    assert files.read_lines(tmp_path / "x") == lines


@pytest.mark.parametrize("text", ["{}", '{"a": "b\u2028c"}', '{\r\n"a": 1}'])
def test_json_may_begin_with_a_byte_order_mark(tmp_path, text):
    for name, mark in (("plain", ""), ("marked", "\ufeff")):
        (tmp_path / name).write_text(mark + text, encoding="utf-8")
    assert files.read_json(tmp_path / "marked") == files.read_json(tmp_path / "plain")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("~", "/home/me"),
        ("~/a b.png", "/home/me/a b.png"),
        (Path("~/a"), "/home/me/a"),
        ("~nobodyx/a", "~nobodyx/a"),
        ("~$a.png", "~$a.png"),
        ("~a\0", "~a\0"),
        ("~\ud800", "~\ud800"),
        ("a/~", "a/~"),
        ("", "."),
    ],
)
def test_a_tilde_is_the_home_directory_or_stays(monkeypatch, name, path):
    monkeypatch.setenv("HOME", "/home/me")
    assert files.expanded(name) == Path(path)


def test_only_one_place_knows_of_tildes():
    """Path.expanduser raises RuntimeError for a user that is not there."""
    package = Path(files.__file__).parent
    assert not [path for path in package.rglob("*.py") if re.search(r"\)\.expanduser\(", path.read_text("utf-8"))]


def test_stems_are_new_whatever_the_case_and_soon_found():
    stems = files.Stems()
    assert [stems.new(stem) for stem in ("a", "A", "a_2", "a", "b")] == ["a", "A_2", "a_2_2", "a_3", "b"]
    assert len({stems.new("same") for _ in range(20_000)}) == 20_000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_keeps_nobody_waiting(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read \(not a regular file\)"):
        files.read_json(tmp_path / "config.json")


def test_arrays_and_texts_are_read_back_without_pickles(tmp_path):
    files.write_arrays(tmp_path / "x.npz", {"a": np.arange(3), "names": np.array(["red", "grün"])})
    with np.load(tmp_path / "x.npz", allow_pickle=False) as found:
        assert found["a"].tolist() == [0, 1, 2] and found["names"].tolist() == ["red", "grün"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_a_digest_is_of_the_contents(tmp_path):
    for name, data in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).write_bytes(data)
    a, b, c = (files.digest(tmp_path / name) for name in "abc")
    assert a == b != c and len(a) == 32


def test_leftovers_of_killed_processes_go_when_they_are_old(tmp_path):
    names = (".x[1].npz.12.tmp", ".x[1].npz.13.tmp", ".x1.npz.12.tmp", "x[1].npz")
    for name in names:
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (1, 1))
    os.utime(tmp_path / names[1])  # of a process that writes now
    files.remove_leftovers(tmp_path / "x[1].npz")
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])
