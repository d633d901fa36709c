"""output_dir: one run's results, which are the same however often the run was stopped, and never mixed or replaced."""

import json
import shutil
from pathlib import Path

import pytest

from paligemma_jax.errors import ConfigError, DataError
from paligemma_jax.processing.image import load_image
from paligemma_jax.runs.folder import Folder

BOX = "<loc0000><loc0000><loc1023><loc0512>"
MASK = "".join(f"<seg{i:03d}>" for i in range(16))
SETTINGS = {"prompts": ["caption en"], "image": "abc"}


def contents(folder: Path) -> dict[str, bytes]:
    """What is in a folder, but for how it came there."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".run" not in path.parts
    }


@pytest.fixture
def album(pictures, tmp_path) -> Path:
    """Seven pictures: two of one name, one that is broken, one in capitals."""
    folder = tmp_path / "album"
    (folder / "more").mkdir(parents=True)
    for name in ("a.png", "c.png", "d.png", "A.PNG", "more/a.png"):
        shutil.copy(pictures / "a.png", folder / name)
    shutil.copy(pictures / "b.jpg", folder / "b.jpg")
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return folder


@pytest.fixture
def detect(generate, album, answer_with):
    """detect(output_dir, KEY=VALUE, ...): a run with boxes, masks and exports over the album."""
    answer_with(lambda prompt: f"{BOX}{MASK} star ; {BOX} circle" if "star" in prompt else "")
    (album.parent / "prompts.txt").write_text("segment star ; circle\ndetect moon\n")

    def run(output_dir: Path, **keys: object) -> tuple[int, str, str]:
        defaults = {"image": album / "**" / "*.*", "prompts_file": album.parent / "prompts.txt", "batch_size": 4}
        return generate(**(defaults | {"export": "coco,yolo", "output_dir": output_dir} | keys))

    return run


@pytest.mark.parametrize("stops", [("c.png",), ("a.png",), ("bad.png", "d.png", "more/a.png"), ("A.PNG", "b.jpg")])
def test_a_run_that_was_stopped_and_goes_on_leaves_what_an_undisturbed_one_does(
    detect, album, tmp_path, monkeypatch, stops
):
    status, _, err = detect(tmp_path / "whole")
    assert status == 1 and "6 of 7 pictures, 1 failed" in err
    for stop in stops:

        def load(name, stop=stop):
            if name == str(album / stop):
                raise KeyboardInterrupt
            return load_image(name)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("paligemma_jax.runs.sources.load_image", load)
            detect(tmp_path / "stopped", resume=True)
    status, _, err = detect(tmp_path / "stopped", resume=True)
    assert status == 1 and "6 of 7 pictures, 1 failed" in err
    whole, stopped = contents(tmp_path / "whole"), contents(tmp_path / "stopped")
    assert {"coco_dataset.json", "classes.txt", "labels/a_2.txt", "a_2_drawn.png"} <= set(whole)
    for name in whole:
        renamed = whole[name].replace(b"/whole/", b"/stopped/")
        assert stopped.pop(name) == renamed, name
    assert not stopped


def test_records_come_as_answers_do(detect, album, tmp_path):
    detect(tmp_path / "out")
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert len(records) == 2 * 6 + 1
    [failed] = [record for record in records if "error" in record]
    assert failed["image"] == str(album / "bad.png") and "is not a picture" in failed["error"]
    assert all(
        set(record["files"]) <= {path.name for path in (tmp_path / "out").iterdir()}
        for record in records
        if "files" in record
    )


def test_a_finished_run_has_nothing_to_go_on_with(detect, tmp_path, monkeypatch):
    detect(tmp_path / "out")
    before = contents(tmp_path / "out")
    monkeypatch.setattr("paligemma_jax.load", lambda *args, **kw: pytest.fail("the model was loaded"))
    status, out, err = detect(tmp_path / "out", resume=True)
    assert (status, out) == (1, "") and "6 of 7 pictures, 1 failed\n" in err
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "has the results of this run, 7 of 7 pictures: add resume=True to go on"),
        (
            {"max_new_tokens": 7, "resume": True},
            "has the results of another run, which differs in max_new_tokens:",
        ),
        (
            {"prompts_file": "", "prompt": "detect cat"},
            "which differs in prompts: name another output_dir, or",
        ),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"resume": True, "save_embeddings": "x.npy"}, "save_embeddings='x.npy' is not possible"),
    ],
)
def test_results_are_not_replaced_unless_it_is_said(detect, tmp_path, keys, message):
    detect(tmp_path / "out")
    before = contents(tmp_path / "out")
    status, out, err = detect(tmp_path / "out", **keys)
    assert (status, out) == (1, "") and message in err and contents(tmp_path / "out") == before


def test_overwriting_leaves_nothing_of_the_other_run_and_all_that_is_not_its_own(detect, tmp_path):
    out = tmp_path / "out"
    detect(out)
    (out / "mine.txt").write_text("mine")
    assert detect(out, overwrite=True, prompts_file="", prompt="detect moon", export="")[0] == 1
    assert sorted(contents(out)) == ["mine.txt", "records.jsonl"]


@pytest.mark.parametrize("name", ["cat_drawn.png", "coco_results.json", "state"])
def test_results_of_something_else_are_not_mixed_with(detect, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("old")
    for keys in ({}, {"overwrite": True}, {"resume": True}):
        status, _, err = detect(tmp_path / "out", **keys)
        assert status == 1 and f"out has {name}, which is of no run that is known here: name another" in err
    assert contents(tmp_path / "out") == {name: b"old"} and not (tmp_path / "out" / ".run").exists()


def test_results_do_not_lie_among_their_pictures(detect, album, tmp_path, main):
    before = contents(album)
    for keys in ({}, {"overwrite": True}):
        assert "is the folder of the pictures" in detect(album, **keys)[2]
    for run in ("locate", "heatmap", "compare"):
        keys = (f"--config.image={album}", f"--config.output_dir={album}", f"--config.run={run}")
        assert "is the folder of the pictures" in main("--config=configs/patch_vit.py", *keys)[2]
    assert contents(album) == before


@pytest.mark.parametrize("run", ["generate", "chat", "inspect", "swap", "locate", "train"])
def test_a_file_is_no_folder(generate, main, tmp_path, run):
    (tmp_path / "out").write_text("mine")
    (tmp_path / "data.jsonl").write_text("{}")
    config = {"inspect": "inspect", "swap": "swap", "locate": "patch_vit", "train": "finetune"}.get(run, "tiny")
    keys = (f"--config.output_dir={tmp_path / 'out'}", f"--config.run={run}", "--config.compilation_cache=False")
    data = (f"--config.data={tmp_path / 'data.jsonl'}",) if run == "train" else ()
    status, _, err = main(f"--config=configs/{config}.py", *keys, *data)
    assert status == 1 and "output_dir=" in err and "name a folder" in err and (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("key", ["resume", "overwrite"])
def test_without_a_folder_there_is_nothing_to_go_on_with(refused, key):
    assert "there is no output_dir" in refused(**{key: True})


def test_chat_does_not_draw_into_the_folder_of_a_run(detect, tmp_path, refused):
    detect(tmp_path / "out")
    assert "has the results of a run" in refused(run="chat", output_dir=tmp_path / "out")


def begun(path: Path, resume: bool = False) -> Folder:
    folder = Folder(path, SETTINGS, 3, resume, False)
    folder.begin()
    return folder


def test_only_one_process_writes(tmp_path):
    folder = Folder(tmp_path, SETTINGS, 3, False, False)
    with pytest.raises(DataError, match="another process is writing"):
        Folder(tmp_path, SETTINGS, 3, False, False)
    folder.close()
    Folder(tmp_path, SETTINGS, 3, False, False).close()


@pytest.mark.parametrize("torn", [b'{"nam', b'{"names": 2, "bytes": 10000, "failed": 0}\n', b"\x00\x00"])
def test_what_was_not_finished_is_made_again(tmp_path, torn):
    folder = begun(tmp_path)
    folder.add({"image": "a"})
    folder.commit(1, folder.mark(), 0)
    folder.add({"image": "b"})
    folder.close()  # killed
    with (tmp_path / ".run" / "progress.jsonl").open("ab") as file:
        file.write(torn)
    again = begun(tmp_path, resume=True)
    assert again.done == 1 and list(again.records()) == [{"image": "a"}]
    again.add({"image": "b"})
    again.commit(2, again.mark(), 0)
    again.close()
    once_more = begun(tmp_path, resume=True)
    assert once_more.done == 2 and [record["image"] for record in once_more.records()] == ["a", "b"]
    once_more.close()


def test_a_run_that_did_nothing_is_in_nobodys_way(tmp_path):
    begun(tmp_path).close()
    other = Folder(tmp_path, SETTINGS | {"image": "other"}, 3, False, False)
    other.begin()
    other.close()
    assert json.loads((tmp_path / ".run" / "settings.json").read_text())["image"] == "other"
    with pytest.raises(ConfigError, match="exclude"):
        Folder(tmp_path, SETTINGS, 3, True, True)


def test_a_video_in_progress_is_not_thrown_away(tmp_path):
    """Its records are there, though it is not done."""
    folder = begun(tmp_path)
    folder.add({"image": "clip.mp4 @ 0.00 s"})
    folder.commit(0, 0, 0)
    folder.close()
    with pytest.raises(ConfigError, match="0 of 3 pictures: add resume=True"):
        Folder(tmp_path, SETTINGS, 3, False, False)
    assert (tmp_path / "records.jsonl").read_text()


@pytest.mark.parametrize(
    "keys", [{"load_embeddings": "/nowhere.npy"}, {"checkpoint": "/nowhere"}, {"image": "bad.png"}]
)
def test_overwriting_begins_when_nothing_else_can_be_wrong(detect, album, tmp_path, keys):
    detect(tmp_path / "out")
    before = contents(tmp_path / "out")
    if "image" in keys:
        keys = {"image": album / "bad.png"}
    assert detect(tmp_path / "out", overwrite=True, **keys)[0] == 1
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    "line", ['{"files": ["../victim.txt", "/abs"]}', "3", '["x"]', '{"files": null}', '{"files": "xy"}']
)
def test_nothing_outside_of_the_folder_is_removed(tmp_path, line):
    (tmp_path / "victim.txt").write_text("mine")
    folder = begun(tmp_path / "out")
    folder.add({"image": "a"})
    folder.commit(1, folder.mark(), 0)
    folder.close()
    with (tmp_path / "out" / "records.jsonl").open("a") as file:
        file.write(line + "\n")
    over = Folder(tmp_path / "out", SETTINGS, 3, False, True)
    over.begin()
    over.close()
    assert (tmp_path / "victim.txt").read_text() == "mine" and not (tmp_path / "out" / "records.jsonl").read_text()


def test_labels_of_others_and_exports_of_all_runs(detect, tmp_path):
    out = tmp_path / "out"
    detect(out, export="coco")
    detect(out, export="yolo", resume=True)
    (out / "labels" / "mine.txt").write_text("mine")
    assert detect(out, overwrite=True, export="", prompts_file="", prompt="detect moon")[0] == 1
    assert sorted(contents(out)) == ["labels/mine.txt", "records.jsonl"]
    (tmp_path / "other" / "labels").mkdir(parents=True)
    assert "other has labels, which is of no run" in detect(tmp_path / "other")[2]


def test_phrases_are_not_drawn_into_the_folder_of_a_run(detect, main, tmp_path):
    detect(tmp_path / "out")
    keys = (f"--config.output_dir={tmp_path / 'out'}", "--config.run=locate")
    status, _, err = main("--config=configs/patch_vit.py", *keys)
    assert status == 1 and "has the results of a run" in err
