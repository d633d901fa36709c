"""The benchmarks of search and of locate measure what they say."""

import numpy as np
import pytest

from benchmarks import patch_vit_locate, patch_vit_search
from paligemma_jax.patch_vit.activation import PhraseMaps
from paligemma_jax.shapes_world.pointing import coverage
from paligemma_jax.shapes_world.samples import scene_sample


def test_every_ranking_has_a_line_and_exact_ones_find_all():
    pytest.importorskip("faiss")
    notes = []
    lines = list(patch_vit_search.rows(600, 5, False, [1, 8, 1000], notes.append))
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [row[2] for row in cells] == ["exact", "flat", "ivf, 1 of 24 lists", "ivf, 8 of 24 lists"]
    assert [row[-1] for row in cells[:2]] == ["1.000"] * 2 and float(cells[2][-1]) <= float(cells[3][-1]) <= 1
    assert len(notes) == 1 and notes[0].startswith("An index of 600 pictures has ")


def test_recall_is_a_share():
    assert patch_vit_search.recall(np.array([[1, 2], [3, 4]]), np.array([[2, 1], [3, 5]])) == 0.75


def test_maps_that_are_the_shapes_find_them_and_nothing_else():
    samples = [scene_sample(3, index) for index in range(6)]
    maps = []
    for sample in samples:
        phrases = patch_vit_locate.asked(sample, 2, np.random.default_rng(0))
        kinds = [" ".join(kind) for kind in sample.kinds]
        grids = [
            sum((coverage(mask, 576) for mask, kind in zip(sample.masks, kinds, strict=True) if kind == phrase), 0.0)
            - 0.01 * (phrase not in kinds) * np.arange(576) / 576
            for phrase in phrases
        ]
        logits = np.stack(grids).reshape(len(phrases), 24, 24).astype(np.float32)
        maps.append(PhraseMaps(tuple(phrases), logits, np.ones(len(phrases), np.float32)))
    (none, some, all_) = patch_vit_locate.measure(samples, maps, 0.5, [0.0, 0.5, 1.1])
    assert some[1] > 0.6 and some[2] > 0.6 and some[3] == 0
    assert none[3] > 0 and all_[1:] == (0, 0, 0)
