import sys

import numpy as np
from PIL import Image

from benchmarks import scene_sheet
from paligemma_jax.runs.evaluate import SOURCES


def test_a_sheet_shows_the_first_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scene_sheet.py", "wide", str(tmp_path / "sheet.png"), "--count=7", "--seed=3"])
    scene_sheet.main()
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (6 * 260 - 4, 2 * 260 - 4)
    last = SOURCES["wide"](3, 6).image
    last.thumbnail((256, 256))
    width, height = last.size
    np.testing.assert_array_equal(np.asarray(sheet)[260 : 260 + height, :width], np.asarray(last))
