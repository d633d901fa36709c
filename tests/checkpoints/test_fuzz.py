"""Damaged files of small checkpoints: each ends in a model that is read right, or in one clear line."""

from pathlib import Path

import jax
import numpy as np
import pytest

import paligemma_jax as pj
from tests.checkpoints.mutate import FILES, damaged_copy, read

TEXT = "detect a red circle ; <loc0012><seg003> é\n"


def check(
    small_checkpoints: dict[str, Path], saved_models: dict[str, pj.PaliGemma], tmp_path: Path, seeds: range
) -> int:
    """How many of these seeds end in a model; each that does has the parameters of the whole one."""
    loaded = 0
    for seed in seeds:
        generation = ("gemma", "gemma2")[seed % 2]
        what = damaged_copy(small_checkpoints[generation], tmp_path / "copy", seed)
        try:
            result = read(tmp_path / "copy")
        except BaseException as error:
            raise AssertionError(f"{what} ended in {type(error).__name__}: {error}") from error
        if isinstance(result, str):
            assert "\n" not in result and 20 < len(result) < 300 and "Traceback" not in result, f"{what}: {result}"
            continue
        loaded += 1
        whole = saved_models[generation]
        if "safetensors" not in what.partition(":")[2]:
            assert jax.tree.structure(result.params) == jax.tree.structure(whole.params), what
            for ours, theirs in zip(jax.tree.leaves(result.params), jax.tree.leaves(whole.params), strict=True):
                np.testing.assert_array_equal(ours, theirs, err_msg=what)
        tokenizer = result.processor.tokenizer
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT, what
        pixels = result.processor(np.zeros((5, 7, 3), np.uint8), "caption en").pixels
        assert pixels.shape[1] == result.config.vision.image_size and np.isfinite(pixels).all(), what
    return loaded


def test_every_file_of_the_whole_checkpoint_is_read(small_checkpoints):
    for directory in small_checkpoints.values():
        assert sorted(name for name in FILES if (directory / name).exists()) == sorted(FILES)
        assert isinstance(read(directory), pj.PaliGemma)


def test_damage_ends_in_a_model_or_in_one_line(small_checkpoints, saved_models, tmp_path):
    assert 10 < check(small_checkpoints, saved_models, tmp_path, range(150)) < 140


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_ten_thousand_damages_end_in_a_model_or_in_one_line(small_checkpoints, saved_models, tmp_path, part):
    first = 1000 + 2500 * part
    assert 250 < check(small_checkpoints, saved_models, tmp_path, range(first, first + 2500)) < 2400
