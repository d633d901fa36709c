import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from paligemma_jax.config import VisionConfig
from paligemma_jax.models.encoder import PatchEmbedding
from paligemma_jax.models.siglip import SigLIP
from paligemma_jax.patch_vit.clip import VisionTower
from paligemma_jax.patch_vit.weights import clip_shapes
from paligemma_jax.shapes_world import teacher_stage as stage
from tests.patch_vit.small import random_tree

SHAPE = np.array([[0, 3, -1, -1], [1, 1, 1, -1]], np.int8)
COLOR = np.array([[0, 4, -1, -1], [2, 2, 3, -1]], np.int8)


def test_captions_count_what_there_is():
    assert stage.captions(SHAPE, COLOR) == [
        "a red circle and a purple star",
        "two blue squares and a yellow square",
    ]


def test_phrases_are_true_of_what_they_name():
    names, truths = stage.phrases(), stage.phrase_truths(SHAPE, COLOR)
    assert truths.shape == (2, len(names)) and len(set(names)) == len(names)
    first, second = ({name for name, true in zip(names, row, strict=True) if true} for row in truths)
    assert first == {
        *("circle", "star", "red", "purple", "red circle", "purple star", "a red circle", "a purple star"),
    }
    assert {"square", "blue", "yellow square", "a blue square"} <= second and "red square" not in second


def test_kinds_are_counted_in_the_order_of_the_phrases():
    names, counts = stage.phrases()[-30:], stage.kind_counts(SHAPE, COLOR)
    found = [{name: int(n) for name, n in zip(names, row, strict=True) if n} for row in counts]
    assert found == [{"a red circle": 1, "a purple star": 1}, {"a blue square": 2, "a yellow square": 1}]


def test_sums_of_phrases_are_what_the_loss_draws_embeddings_to():
    """The cosine of a caption of one shape with the sum of its phrases is that with the mean of the two phrases."""
    tokenizer = stage.train_vocabulary(stage.phrases())
    model = stage.TeacherTraining(stage.geometry(tokenizer, VisionConfig(28, 14, 16, 6, 24, 2)))
    ids, texts = tokenizer(stage.phrases(), 8), tokenizer(["a red circle"])
    counts, hidden = np.eye(1, 30, dtype=np.float32), np.ones((1, 5, 16), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), hidden, texts, ids, counts)["params"]
    out = model.apply({"params": params}, hidden, texts, ids, counts)
    vectors = model.apply({"params": params}, ids, method=lambda m, x: m.clip.embed_text(x))
    units = np.asarray(vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True))
    one, two = (units[stage.phrases().index(name)] for name in ("red circle", "a red circle"))
    expected = two @ (one + two) / np.linalg.norm(one + two)
    np.testing.assert_allclose(out["caption_sum"], expected, rtol=1e-4)


def test_the_vocabulary_has_a_token_for_each_word_and_every_byte():
    tokenizer = stage.train_vocabulary([*stage.phrases(), "two red circles and a blue star, three green squares"])
    rows = tokenizer.encode(["a red circle", "xyz é 漢", ""])
    assert list(map(len, rows))[::2] == [5, 2] and len(rows[1]) > 8
    assert max(tokenizer.vocabulary.values()) == len(tokenizer.vocabulary) - 1
    config = stage.geometry(tokenizer, VisionConfig(28, 14, 16, 9, 24, 2))
    assert config.text.vocab_size == len(tokenizer.vocabulary) and config.projection_dim == stage.PROJECTION
    assert (config.vision.width, config.vision.num_layers) == (16, 5)


def test_the_image_tower_is_that_of_siglip_but_for_its_norm():
    """Tokens enter the layers as SigLIP's do, with one size: the class token sees nothing of itself."""
    vision = VisionConfig(28, 14, 16, 6, 24, 2)
    picture = jax.ShapeDtypeStruct((1, 28, 28, 3), np.float32)
    tree = jax.eval_shape(SigLIP(vision).init, jax.random.key(0), picture)["params"]
    tower = random_tree({path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()})
    tokenizer = stage.train_vocabulary(stage.phrases())
    config = stage.geometry(tokenizer, vision)
    params = stage.from_siglip(tower, random_tree(clip_shapes(config))["vision_model"])
    pixels = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)
    first = VisionTower(dataclasses.replace(config.vision, num_layers=1))
    found = first.apply({"params": params}, pixels, method="before_last")[:, 1:]
    patches = PatchEmbedding(16, 14).apply({"params": tower["patch_embedding"]}, pixels)
    expected = np.asarray(patches + tower["position_embedding"]["weight"][None])
    expected = (expected - expected.mean(-1, keepdims=True)) / expected.std(-1, keepdims=True) * 1.11
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_only_the_last_layer_of_the_tower_is_trained():
    tower = {"patch_embedding": jnp.ones(2), "layers_0": jnp.ones(2), "layers_4": jnp.ones(2)}
    params = {"clip": {"vision_model": tower, "text_model": {"x": jnp.ones(2)}}}
    optimizer = stage.only_trained(optax.sgd(1.0))
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    moved = {name: bool(np.any(value)) for name, value in updates["clip"]["vision_model"].items()}
    assert moved == {"patch_embedding": False, "layers_0": False, "layers_4": True}
    assert np.any(updates["clip"]["text_model"]["x"])


def test_batches_are_a_function_of_the_step():
    tokenizer, hidden = stage.train_vocabulary(stage.phrases()), np.arange(8 * 6, dtype=np.float16).reshape(8, 3, 2)
    pool = {"shape": np.tile(SHAPE, (4, 1)), "color": np.tile(COLOR, (4, 1))}
    batches = stage.CaptionBatches(pool, hidden, tokenizer, 4, 0)
    first, again, other = batches(3), batches(3), batches(4)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert (first["hidden"] != other["hidden"]).any()
    assert first["hidden"].shape == (4, 3, 2) and first["captions"].shape == (4, stage.TEXT.context)


def test_the_loss_counts_equal_captions_as_right():
    """Of a batch with a caption twice, exchanging the two changes nothing; other captions do."""
    tokenizer = stage.train_vocabulary(stage.phrases())
    model = stage.TeacherTraining(stage.geometry(tokenizer, VisionConfig(28, 14, 16, 6, 24, 2)))
    ids = tokenizer(stage.phrases(), 8)
    hidden = np.random.default_rng(0).normal(size=(4, 5, 16)).astype(np.float32)
    shape, color = SHAPE[[0, 1, 0, 1]], COLOR[[0, 1, 0, 1]]
    batch = {"hidden": hidden, "captions": tokenizer(stage.captions(shape, color))}
    batch |= {"phrases": stage.phrase_truths(shape, color), "counts": stage.kind_counts(shape, color)}
    params = jax.jit(model.init)(jax.random.key(0), hidden, ids[:1], ids, batch["counts"])["params"]
    loss = jax.jit(functools.partial(stage.teacher_loss, model, ids))
    value = float(loss(params, batch)[0])
    same = {name: values[[2, 1, 0, 3]] for name, values in batch.items()}
    wrong = batch | {"captions": batch["captions"][[1, 0, 2, 3]]}
    assert np.isclose(float(loss(params, same)[0]), value, rtol=1e-5)
    assert not np.isclose(float(loss(params, wrong)[0]), value, rtol=1e-5)
