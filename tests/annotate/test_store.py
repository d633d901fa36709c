"""Rows on disk: whatever a kill leaves, the run goes on, and its rows are those of a run that was not disturbed."""

import contextlib
import json
import os
import random
from pathlib import Path

import pytest

from paligemma_jax.annotate import local, rows, store
from paligemma_jax.annotate.inputs import find
from paligemma_jax.annotate.store import Group, Layout, Store
from paligemma_jax.errors import DataError
from tests.annotate.conftest import PROMPTS, Fake, draw

PRINT = {"prompts": ["a"], "seed": 0}
BROKEN = (2, 3, 11, 19)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours runs after it but what unwinds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("pictures"), 23, BROKEN)


def annotate(directory: Path, folder: Path, form: str = "jsonl", retry: bool = False, **options) -> Fake:
    """A run of the local engine from wherever it is."""
    fake, pictures = Fake(), find(str(folder))
    with Store(directory, PRINT, Layout(len(pictures), 8, form), **options) as kept:
        if retry:
            kept.retry_failed()
        local.annotate(fake, pictures, kept.pending(3), 2, kept.add)
        assert kept.done == len(pictures)
    return fake


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("rows-*"))}


def all_rows(directory: Path) -> list[rows.Row]:
    return [row for path in sorted(directory.glob("rows-*")) for row in rows.read(path)]


@pytest.fixture(scope="module", params=rows.FORMATS)
def form(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory, form) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    annotate(directory, folder, form)
    return directory


def test_there_is_one_row_per_picture_and_prompt_in_order(undisturbed, folder):
    found = all_rows(undisturbed)
    assert [(Path(row["image"]).name, row["prompt"]) for row in found] == [
        (f"{i}.png", prompt) for i in range(23) for prompt in ("caption en", "detect star")
    ]
    assert {Path(row["image"]).stem for row in found if row["status"] == "failed"} == {str(i) for i in BROKEN}
    assert all((row["error"] is None) == (row["status"] == "ok") for row in found)
    assert len({row["key"] for row in found}) == len(found)
    assert [path.name for path in sorted(undisturbed.iterdir())][-1] == "state"
    assert sorted(path.suffix for path in (undisturbed / "state").iterdir()) == ["", ".done", ".done", ".done", ".json"]


def test_both_formats_hold_the_same_rows(folder, tmp_path):
    for form in rows.FORMATS:
        annotate(tmp_path / form, folder, form)
    assert all_rows(tmp_path / "jsonl") == all_rows(tmp_path / "parquet")
    assert list(all_rows(tmp_path / "jsonl")[0]) == list(all_rows(tmp_path / "parquet")[0])


def test_a_run_that_is_done_asks_nothing(undisturbed, folder, form):
    before = contents(undisturbed)
    assert annotate(undisturbed, folder, form).asked == []
    assert contents(undisturbed) == before


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_any_moment_nothing_is_lost_or_done_twice(undisturbed, folder, form, tmp_path, monkeypatch, seed):
    """Dies at random calls of what touches the disk, leaving half of what it was about to write."""
    rng = random.Random(seed)
    for name in ("replace", "fsync", "truncate"):
        monkeypatch.setattr(os, name, _deadly(getattr(os, name), rng))
    monkeypatch.setattr(Path, "unlink", _deadly(Path.unlink, rng))
    kills = 0
    while True:
        try:
            annotate(tmp_path, folder, form)
            break
        except Killed:
            kills += 1
            for journal in (tmp_path / "state").glob("*.journal"):
                if rng.random() < 0.5:
                    with journal.open("ab") as file:
                        file.write(b'{"items": [0, 1], "rows": [[{"key"')
    assert kills
    assert contents(tmp_path) == contents(undisturbed)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".journal", ".tmp")]


def _deadly(function, rng: random.Random):
    def call(*args, **options):
        if rng.random() < 0.08:
            raise Killed
        result = function(*args, **options)
        if rng.random() < 0.08:
            raise Killed
        return result

    return call


def _add_and_die(kept: Store, group: Group, made: list[list[rows.Row]]) -> None:
    kept.add(group, made)
    raise Killed


def test_groups_are_the_same_after_a_kill(folder, tmp_path):
    """So that batches are, and with them the last bits of an answer in bfloat16."""
    whole = sorted(annotate(tmp_path / "a", folder).asked)  # two are answered at once
    pictures, layout = find(str(folder)), Layout(23, 8, "jsonl")
    asked = []
    for _ in range(40):
        fake = Fake()
        with Store(tmp_path / "b", PRINT, layout) as kept, contextlib.suppress(Killed):
            local.annotate(fake, pictures, kept.pending(3), 1, lambda *pair, kept=kept: _add_and_die(kept, *pair))
        asked += fake.asked
    assert {tuple(names) for names in asked} == set(map(tuple, whole))


@pytest.mark.parametrize("damage", ["changed", "gone", "mark"])
def test_a_shard_that_is_not_as_it_was_written_is_made_again(undisturbed, folder, form, tmp_path, damage):
    annotate(tmp_path, folder, form)
    shard, told = tmp_path / f"rows-00001.{form}", []
    if damage == "changed":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "gone":
        shard.unlink()
    else:
        (tmp_path / "state" / "00001.done").unlink()
    assert len(annotate(tmp_path, folder, form, tell=told.append).names) == 8
    assert contents(tmp_path) == contents(undisturbed)
    assert [shard.name in line for line in told] == [True] * (damage != "mark")


def test_failed_pictures_are_tried_again_when_asked_for(folder, form, tmp_path):
    mended = draw(tmp_path / "pictures", 23, BROKEN)
    annotate(tmp_path / "out", mended, form)
    draw(mended, 23, BROKEN[2:])
    assert annotate(tmp_path / "out", mended, form).asked == []
    again = annotate(tmp_path / "out", mended, form, retry=True)
    assert sorted(int(Path(name).stem) for name in again.names) == list(BROKEN)  # two groups are answered at once
    annotate(tmp_path / "anew", mended, form)
    assert all_rows(tmp_path / "out") == all_rows(tmp_path / "anew")


def test_a_retry_that_is_killed_goes_on(folder, tmp_path):
    annotate(tmp_path, folder)
    whole = contents(tmp_path)
    with Store(tmp_path, PRINT, Layout(23, 8, "jsonl")) as kept:
        assert (kept.failed, kept.retry_failed(), kept.failed, kept.done) == (4, 4, 0, 19)
    with Store(tmp_path, PRINT, Layout(23, 8, "jsonl")) as kept:
        assert [group.items for group in kept.pending(3)] == [(2, 3), (11,), (19,)]
        assert kept.retry_failed() == 0
    assert len(annotate(tmp_path, folder).names) == 4
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"prompts": ["b"]}, {"image": "x"}, {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}]
)
def test_another_run_is_refused_with_the_choice(tmp_path, changed):
    with Store(tmp_path, PRINT, Layout(4, 2, "jsonl")) as kept:
        kept.add(Group(0, (0, 1)), [[_row()], [_row()]])
    with pytest.raises(DataError, match=r"another output_dir.*to go on.*overwrite=True") as caught:
        Store(tmp_path, PRINT | changed, Layout(4, 2, "jsonl"))
    assert all(name in str(caught.value) for name in list(changed)[:4]) and "\n" not in str(caught.value)
    assert (tmp_path / "rows-00000.jsonl").exists()
    with Store(tmp_path, PRINT | changed, Layout(4, 2, "jsonl"), overwrite=True) as kept:
        assert kept.done == 0
    assert not contents(tmp_path)


@pytest.mark.parametrize("layout, name", [((5, 2, "jsonl"), "pictures"), ((4, 3, "jsonl"), "shard_size")])
def test_another_layout_is_another_run(tmp_path, layout, name):
    Store(tmp_path, PRINT, Layout(4, 2, "jsonl")).close()
    with pytest.raises(DataError, match=name):
        Store(tmp_path, PRINT, Layout(*layout))


def test_rows_without_a_manifest_are_not_removed_unasked(tmp_path):
    (tmp_path / "rows-00000.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"manifest\.json is gone.*overwrite=True"):
        Store(tmp_path, PRINT, Layout(4, 2, "jsonl"))
    assert contents(tmp_path)


def test_only_one_process_writes_to_a_folder(tmp_path):
    """Nor two of one process, which the system treats alike."""
    layout = Layout(4, 2, "jsonl")
    with Store(tmp_path, PRINT, layout), pytest.raises(DataError, match="another process is writing"):
        Store(tmp_path, PRINT, layout)
    Store(tmp_path, PRINT, layout).close()


def test_an_empty_last_line_and_a_missing_line_end_are_torn(tmp_path):
    with Store(tmp_path, PRINT, Layout(4, 4, "jsonl")) as kept:
        kept.add(Group(0, (0,)), [[_row()]])
    journal = tmp_path / "state" / "00000.journal"
    good = journal.read_bytes()
    for torn in (b"", b"{", good[:-1], b"\0\0\0\n"):
        journal.write_bytes(good + torn)
        with Store(tmp_path, PRINT, Layout(4, 4, "jsonl")) as kept:
            assert kept.done == 1
        assert journal.read_bytes() == good


def test_names_that_are_no_utf8_are_stored(tmp_path):
    row = rows.failed("k", "a\udcff.png", None, PROMPTS[0], "bad \udcff")
    rows.write(tmp_path / "r.jsonl", [row], "jsonl")
    rows.write(tmp_path / "r.parquet", [row | {"model": "", "run_id": ""}], "parquet")
    assert json.loads((tmp_path / "r.jsonl").read_text())["image"] == "a?.png"
    assert rows.read(tmp_path / "r.parquet")[0]["error"] == "bad ?"


def _row(status: str = "ok") -> rows.Row:
    return {"status": status}


def test_the_store_knows_how_far_it_is(tmp_path):
    with Store(tmp_path, PRINT, Layout(5, 2, "jsonl")) as kept:
        for group in kept.pending(1):
            before = kept.done
            kept.add(group, [[_row("failed" if group.items == (3,) else "ok")]])
            assert kept.done == before + 1
        assert (kept.done, kept.failed) == (5, 1)
        assert [row["status"] for row in kept.rows()] == ["ok", "ok", "ok", "failed", "ok"]
    assert store.Layout(5, 2, "jsonl").shards == 3
