import numpy as np
import pytest

from paligemma_jax.patch_vit import StudentConfig
from paligemma_jax.shapes_world.patch_evaluation import chance, evaluate, recall
from paligemma_jax.shapes_world.samples import Sample, scene_sample
from paligemma_jax.shapes_world.scenes import COLORS, SHAPES

KINDS = [f"{color} {shape}" for color in COLORS for shape in SHAPES]


class Knows:
    """A student and a CLIP at once that sees what is there: a dimension for each kind, patches as fine as `grid`."""

    def __init__(self, grid: int):
        self.config = StudentConfig(image_size=grid, patch_size=1, embed_dim=30, num_heads=1, num_layers=1, mlp_dim=1)
        self.samples: dict[int, Sample] = {}

    def preprocess(self, images):
        return images

    def embed_patches(self, images):
        grid = self.config.grid
        maps = []
        for image in images:
            sample = self.samples[id(image)]
            values = np.zeros((grid, grid, 30), np.float32)
            for kind, mask in zip(sample.kinds, sample.masks, strict=True):
                y, x = (((np.arange(grid) + 0.5) / grid * side).astype(int) for side in mask.shape)
                values[..., KINDS.index(" ".join(kind))] += mask[np.ix_(y, x)]
            maps.append(values.reshape(grid * grid, 30))
        return np.stack(maps)

    def embed(self, images):
        counts = [[self.samples[id(i)].kinds.count(tuple(k.split())) for k in KINDS] for i in images]
        return np.array(counts, np.float32), None

    def embed_image(self, images):
        return self.embed(images)[0]

    def embed_text(self, texts):
        rows = np.zeros((len(texts), 30), np.float32)
        for row, text in zip(rows, texts, strict=True):
            numbers = {"two": 2, "three": 3, "four": 4}
            for part in text.replace(" and ", ", ").split(", "):
                words = part.split()
                count = numbers.get(words[0], 1)
                row[KINDS.index(f"{words[-2]} {words[-1].removesuffix('s') if count > 1 else words[-1]}")] = count
        return rows * 20

    def cls_attention(self, images):
        return np.ones((len(images), 4), np.float32)

    def self_self_attention_patches(self, images):
        return np.ones((len(images), 4, 30), np.float32)


@pytest.fixture
def knows():
    return Knows(32)


def test_one_that_sees_all_has_full_marks(knows):
    held = []

    def source(seed, index):
        sample = scene_sample(seed, index)
        held.append(sample)  # so that no other picture gets its id
        knows.samples[id(sample.image)] = sample
        return sample

    found = evaluate(knows, knows, 12, 3, source)
    student, blind, by_chance = found["student"], found["training_free"], found["chance"]
    assert student["recall_1"] == student["pointing"] == 1.0 and found["teacher"]["recall_1"] == 1.0
    assert student["inside"] > 0.75 and student["iou"] > 0.6
    assert blind["iou"] == 0.0 and abs(blind["inside"] - by_chance["inside"]) < 0.02
    assert "recall_1" not in blind and found["counts"]["scenes"] == 12


def test_recall_counts_each_caption_once():
    images = np.eye(4, dtype=np.float32)
    captions = ["a", "a", "b", "c"]
    vectors = np.array([[0, 1, 0, 0], [0, 0.1, 0, 0.05], [1, 0.5, 0.2, 0.3]], np.float32)
    found = recall(vectors, ["a", "b", "c"], images, captions)
    assert found == {"recall_1": 1 / 3, "recall_5": 1.0, "recall_10": 1.0}


def test_chance_is_the_expected_recall_of_a_random_order():
    captions = ["a", "a", "b", "c", "d", "e"]
    found, rng = chance(sorted(set(captions)), captions), np.random.default_rng(0)
    drawn = [np.mean([text in set(rng.permutation(captions)[:1]) for text in "abcde"]) for _ in range(4000)]
    assert abs(found["recall_1"] - np.mean(drawn)) < 0.01 and found["recall_10"] == 1.0
