"""Output heads: tied, listed and not there, or of their own; read, used, saved and quantized."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from paligemma_jax import checkpoints, ops
from paligemma_jax.checkpoints import big_vision, huggingface
from paligemma_jax.errors import CheckpointError
from paligemma_jax.models.gemma import Gemma
from paligemma_jax.runs.convert import main as convert

HEAD = "lm_head.weight"
EMBED = "language_model.model.embed_tokens.weight"
PATH = "language_model/lm_head/weight"


def state(directory: Path, **fields) -> Path:
    """Change fields of config.json; None removes one."""
    path = directory / "config.json"
    stated = {key: value for key, value in (json.loads(path.read_text()) | fields).items() if value is not None}
    path.write_text(json.dumps(stated))
    return directory


@pytest.fixture
def head() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((96, 20)).astype(np.float32)


@pytest.fixture
def untied(checkpoint, head):
    """untied(layout): a checkpoint whose head differs from its table."""
    names = {"A": "language_model.lm_head.weight", "B": HEAD, "C": HEAD}
    return lambda layout="C", **options: checkpoint(
        layout, edit=lambda tensors: tensors.update({names[layout]: head}), **options
    )


@pytest.mark.parametrize("layout", "ABC")
@pytest.mark.parametrize("stated", [True, False, None])
def test_a_head_that_differs_is_one_of_its_own_whatever_is_stated(
    untied, params, head, layout, stated, assert_same, capsys
):
    directory = state(untied(layout), tie_word_embeddings=stated)
    config, loaded = checkpoints.load(directory, dtype=None)
    assert not config.text.tied
    assert_same(loaded, params | {"language_model": params["language_model"] | {"lm_head": {"weight": head}}})
    assert ("is not the embedding table, though" in capsys.readouterr().err) == (stated is not False)


@pytest.mark.parametrize("stated", [True, False, None])
def test_a_head_that_is_the_table_is_tied(checkpoint, params, stated, assert_same, capsys):
    directory = checkpoint(edit=lambda tensors: tensors.update({HEAD: tensors[EMBED].copy()}))
    config, loaded = checkpoints.load(state(directory, tie_word_embeddings=stated), dtype=None)
    assert config.text.tied and not capsys.readouterr().err
    assert_same(loaded, params)


def test_a_head_that_is_not_there_can_be_tied_only(checkpoint, params, assert_same):
    """transformers draws one at random, after a warning."""
    directory = checkpoint()
    text = json.loads((directory / "config.json").read_text())["text_config"] | {"tie_word_embeddings": False}
    assert_same(checkpoints.load(state(directory, text_config=text), dtype=None)[1], params)
    with pytest.raises(CheckpointError, match=r"config\.json: tie_word_embeddings is false, but there is no lm_head"):
        checkpoints.load(state(directory, tie_word_embeddings=False))


def test_a_table_that_is_not_there_can_be_tied_only(checkpoint):
    directory = checkpoint(edit=lambda tensors: tensors.update({HEAD: tensors.pop(EMBED)}))
    with pytest.raises(CheckpointError, match=rf"1 missing: {EMBED}"):
        checkpoints.load(state(directory, tie_word_embeddings=False))


def test_a_head_of_another_size_is_named(untied, checkpoint, head):
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \[95, 20\] instead of \[96, 20\]"):
        checkpoints.load(checkpoint(edit=lambda tensors: tensors.update({HEAD: head[:95]})))


@pytest.mark.parametrize(
    "name", [HEAD, "language_model.lm_head.weight", "model.language_model.layers.0.self_attn.rotary_emb.inv_freq"]
)
@pytest.mark.parametrize("shard", [1, 2])
def test_an_index_may_list_what_is_tied_or_unused_and_not_there(checkpoint, params, assert_same, name, shard):
    directory = checkpoint(shards=2)
    path = directory / huggingface.INDEX
    index = json.loads(path.read_text())
    index["weight_map"][name] = f"model-0000{shard}-of-00002.safetensors"
    path.write_text(json.dumps(index))
    assert_same(checkpoints.load(directory, dtype=None)[1], params)


def test_an_index_that_lists_an_untied_head_without_a_shard_is_refused(checkpoint):
    directory = state(checkpoint(shards=2), tie_word_embeddings=False)
    path = directory / huggingface.INDEX
    index = json.loads(path.read_text())
    index["weight_map"][HEAD] = "model-00002-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="there is no lm_head"):
        checkpoints.scan(directory)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_head_is_written_as_every_version_of_transformers_reads_it(tmp_path, untied, head, assert_same, shards):
    config, params = checkpoints.load(untied(shards=shards), dtype=None, progress=False)
    checkpoints.save(tmp_path / "out", config, params)
    written = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(written["language_model.lm_head.weight"], head)
    stated = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stated["tie_word_embeddings"] is stated["text_config"]["tie_word_embeddings"] is False
    again, loaded = checkpoints.load(tmp_path / "out", dtype=None)
    assert again == config
    assert_same(loaded, params)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrapped_models_are_read(checkpoint, params, assert_same, prefix):
    def wrap(tensors):
        for key in list(tensors):
            tensors[prefix + key] = tensors.pop(key)

    assert_same(checkpoints.load(checkpoint("B", edit=wrap), dtype=None)[1], params)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_head_is_quantized_like_the_table(untied, tmp_path, name):
    assert convert([str(untied()), str(tmp_path / "few"), "--quantize", name]) == 0
    config, params = checkpoints.load(tmp_path / "few", progress=False)
    flat = flatten_dict(params, sep="/", is_leaf=lambda _, node: ops.is_weight(node))
    assert not config.text.tied
    assert flat[PATH].quantization == flat["language_model/embed_tokens/weight"].quantization == name
    shapes = checkpoints.abstract(checkpoints.scan(tmp_path / "few"), "bfloat16")
    assert jax.tree.structure(shapes) == jax.tree.structure(params)


def test_rows_are_dropped_of_the_head_too(untied, tmp_path, head):
    assert convert([str(untied()), str(tmp_path / "out"), "--rows", "90"]) == 0
    _, params = checkpoints.load(tmp_path / "out", dtype=None)
    np.testing.assert_array_equal(params["language_model"]["lm_head"]["weight"], head[:90])


def test_an_npz_has_no_place_for_a_head(untied, tmp_path, capsys):
    config, params = checkpoints.load(untied(), dtype=None, progress=False)
    with pytest.raises(CheckpointError, match="no place for an output head of its own"):
        big_vision.save(tmp_path / "model.npz", config, params)
    assert convert([str(tmp_path / "checkpoint"), str(tmp_path / "model.npz")]) == 1
    assert "an .npz has no place for an output head of its own: give a directory" in capsys.readouterr().err
    assert not (tmp_path / "model.npz").exists()


def test_the_head_scores_and_the_table_embeds(config, params, untied, head):
    """And the logit lens goes by the head."""
    untied_config, loaded = checkpoints.load(untied(), "float32", progress=False)
    hidden = np.random.default_rng(0).standard_normal((3, 20)).astype(np.float32)
    decoder = Gemma(untied_config.text)

    def apply(method, x):
        return np.asarray(decoder.apply({"params": loaded["language_model"]}, x, method=method))

    cap = config.text.final_softcap
    scores = hidden @ head.T
    expected = scores if cap is None else cap * np.tanh(scores / cap)
    np.testing.assert_allclose(apply("logits", hidden), expected, atol=1e-4)
    norm = 1 + params["language_model"]["norm"]["weight"]
    normed = hidden / np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + config.text.rms_norm_eps) * norm
    np.testing.assert_allclose(apply("lens", hidden), apply("logits", normed), atol=1e-4)
    table = params["language_model"]["embed_tokens"]["weight"]
    np.testing.assert_allclose(apply("embed", np.array([3, 7])), table[[3, 7]] * 20**0.5, rtol=1e-6)
