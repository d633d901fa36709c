"""Drawings and arrays in a folder: those of other settings are replaced only if it is said, and then all of them."""

import pytest
from ml_collections import ConfigDict

from paligemma_jax.errors import ConfigError
from paligemma_jax.runs.drawings import claim


def config(**keys: object) -> ConfigDict:
    defaults = {"run": "heatmap", "prompt": "star", "windows": "auto", "batch_size": 4, "overwrite": False}
    return ConfigDict(defaults | keys)


def draw(folder, names, **keys):
    """A run that writes some files."""
    drawings = claim(config(**keys), folder)
    drawings.begin()
    for file in drawings.own(folder / name for name in names):
        file.write_text(str(keys))
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_the_same_run_again_replaces_its_own(tmp_path):
    assert draw(tmp_path, ["a.png", "b.png"]) == draw(tmp_path, ["a.png", "b.png"], batch_size=1)
    assert draw(tmp_path, ["a.png"]) == ["a.png", "b.png"]


@pytest.mark.parametrize("keys", [{"prompt": "circle"}, {"windows": "2"}, {"prompt": "circle", "windows": "off"}])
def test_another_one_is_refused_and_overwrite_leaves_nothing_of_it(tmp_path, keys):
    draw(tmp_path, ["a.png", "b.png"])
    (tmp_path / "mine.png").write_text("of the user")
    with pytest.raises(ConfigError, match=f"another {', '.join(keys)}: name another output_dir"):
        claim(config(**keys), tmp_path)
    assert (tmp_path / "a.png").read_text() == "{}"
    assert draw(tmp_path, ["a.png"], overwrite=True, **keys) == ["a.png", "mine.png"]


def test_labels_go_with_the_run(tmp_path):
    drawings = claim(config(run="locate"), tmp_path)
    drawings.begin()
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("")
    drawings.own([tmp_path / "labels"])
    claim(config(run="locate", prompt="circle", overwrite=True), tmp_path).begin()
    assert not list((tmp_path / "labels").iterdir())


def test_nothing_goes_before_a_run_begins(tmp_path):
    draw(tmp_path, ["a.png"])
    claim(config(prompt="circle", overwrite=True), tmp_path)
    assert (tmp_path / "a.png").exists()


def test_other_runs_are_not_in_the_way(tmp_path):
    draw(tmp_path, ["a_strip.png"])
    assert draw(tmp_path, ["a_compare.png"], run="compare", prompt="circle") == ["a_compare.png", "a_strip.png"]


def test_files_that_were_removed_are_not_in_the_way(tmp_path):
    draw(tmp_path, ["a.png"])
    (tmp_path / "a.png").unlink()
    assert draw(tmp_path, ["b.png"], prompt="circle") == ["b.png"]


@pytest.mark.parametrize(
    "run, name", [("heatmap", "x_film.gif"), ("locate", "x_drawn.png"), ("inspect", "report.html")]
)
def test_files_that_no_run_has_written_stay(tmp_path, run, name):
    (tmp_path / name).write_text("of the user")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=f"has {name}, which no run says"):
            claim(config(run=run, overwrite=overwrite), tmp_path)


def test_nothing_outside_of_the_folder_is_removed(tmp_path):
    (tmp_path / "kept.png").write_text("")
    folder = tmp_path / "out"
    draw(folder, ["a.png"])
    marker = folder / ".run" / "heatmap.json"
    marker.write_text(marker.read_text().replace("a.png", "../kept.png"))
    draw(folder, ["a.png"], prompt="circle", overwrite=True)
    assert (tmp_path / "kept.png").exists()
