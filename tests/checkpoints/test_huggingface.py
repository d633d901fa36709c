"""Hugging Face directories: layouts, dtypes and shards read, bad files refused by name, saves read back."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from paligemma_jax import checkpoints
from paligemma_jax.checkpoints import companions, config_json, huggingface
from paligemma_jax.errors import CheckpointError, ConfigError

HEAD = "lm_head.weight"
EMBED = "language_model.model.embed_tokens.weight"


def refusal(directory: Path, error: type[Exception] = CheckpointError) -> str:
    """The one-line message with which a checkpoint is refused before any tensor is read."""
    with pytest.raises(error) as caught:
        checkpoints.load(directory, place=lambda path, array: pytest.fail("a tensor was read"))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("shards", (1, 3))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("layout", "ABC")
def test_reads_every_layout_dtype_and_sharding(checkpoint, config, params, assert_same, layout, dtype, shards):
    found, loaded = checkpoints.load(checkpoint(layout, dtype, shards), dtype=None)
    assert found == config
    assert_same(loaded, jax.tree.map(lambda a: a.astype(dtype), params))


def test_casts_on_reading(checkpoint, params, assert_same):
    _, loaded = checkpoints.load(checkpoint(), dtype="bfloat16")
    assert_same(loaded, jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), params))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))


def test_layout_is_told_from_the_names(checkpoint):
    assert [huggingface.scan(checkpoint(layout)).layout for layout in "ABC"] == ["A", "B", "C"]


def test_jax_on_cpu_adopts_the_memory_that_was_read(checkpoint):
    def place(path, array):
        placed = jax.device_put(array, jax.devices("cpu")[0])
        assert placed.unsafe_buffer_pointer() == array.ctypes.data
        return placed

    checkpoints.load(checkpoint(), dtype="bfloat16", place=place)


@pytest.mark.parametrize("head", (HEAD, "language_model.lm_head.weight"))
def test_output_head_alone_is_the_embedding_table(checkpoint, params, assert_same, head):
    def rename(tensors):
        tensors[head] = tensors.pop(EMBED)

    assert_same(checkpoints.load(checkpoint(edit=rename), dtype=None)[1], params)


def test_two_names_of_one_parameter_must_agree(checkpoint, params, assert_same):
    other = "model.language_model.norm.weight"
    norm = "language_model.model.norm.weight"
    directory = checkpoint(edit=lambda tensors: tensors.update({other: tensors[norm].copy()}))
    assert_same(checkpoints.load(directory, dtype=None)[1], params)
    message = refusal(checkpoint(edit=lambda tensors: tensors.update({other: tensors[norm] * 2})))
    assert other in message
    assert norm in message


def test_unused_pooling_head_and_buffers_are_passed_over(checkpoint, params, assert_same):
    extra = {
        "vision_tower.vision_model.head.probe": np.zeros((1, 1, 24), np.float32),
        "vision_tower.vision_model.embeddings.position_ids": np.arange(16)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32),
    }
    assert_same(checkpoints.load(checkpoint(edit=lambda tensors: tensors.update(extra)), dtype=None)[1], params)


def test_error_names_every_missing_unexpected_and_misshaped_key(checkpoint):
    def spoil(tensors):
        for i in range(3):
            del tensors[f"language_model.model.layers.{i}.mlp.up_proj.weight"]
        del tensors["vision_tower.vision_model.post_layernorm.bias"]
        tensors["adapter.weight"] = np.zeros(2, np.float32)
        tensors["multi_modal_projector.linear.bias"] = np.zeros(7, np.float32)

    message = refusal(checkpoint(edit=spoil))
    assert "4 missing" in message
    assert "language_model.model.layers.{0-2}.mlp.up_proj.weight" in message
    assert "vision_tower.vision_model.post_layernorm.bias" in message
    assert "1 unexpected: adapter.weight" in message
    assert "1 mis-shaped: multi_modal_projector.linear.bias is [7] instead of [20]" in message


@pytest.mark.parametrize("rows", (90, 100))
def test_rows_of_the_embedding_table_must_match(checkpoint, rows):
    message = refusal(checkpoint(edit=lambda tensors: tensors.update({EMBED: np.zeros((rows, 20), np.float32)})))
    assert f"{EMBED} is [{rows}, 20] instead of [96, 20]" in message


def test_weights_of_the_other_version_are_recognised(checkpoint, config):
    directory = checkpoint()
    stated = json.loads((directory / "config.json").read_text())
    text = stated["text_config"]
    text["model_type"] = "gemma" if config.version == 2 else "gemma2"
    for name in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "layer_types"):
        text.pop(name, None)
    (directory / "config.json").write_text(json.dumps(stated))
    message = refusal(directory)
    assert f"these are weights of '{'gemma2' if config.version == 2 else 'gemma'}'" in message
    assert "feedforward_layernorm" in message


@pytest.mark.parametrize("kept", (0, 5, 40, 0.3, 0.999))
def test_truncated_file_is_refused(checkpoint, kept):
    file = checkpoint() / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[: kept if isinstance(kept, int) else int(len(raw) * kept)])
    message = refusal(file.parent)
    assert str(file) in message
    assert "truncated" in message


def test_bytes_beyond_the_end_are_refused(checkpoint):
    file = checkpoint() / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    assert str(file) in refusal(file.parent)


def rewrite_header(file: Path, change) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = change(raw[8 : 8 + length])
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


@pytest.mark.parametrize(
    "change",
    (
        lambda header: header[: len(header) // 2],
        lambda header: b"[]",
        lambda header: b"\xff" * len(header),
        lambda header: header.replace(b'"F32"', b'"F16"', 1),
        lambda header: re.sub(rb'"shape":\[(\d+)', rb'"shape":[-\1', header, count=1),
        lambda header: re.sub(rb'"data_offsets":\[\d+', rb'"data_offsets":[8', header, count=1),
        lambda header: header.replace(b'"dtype"', b'"kind"', 1),
    ),
    ids=("cut", "array", "binary", "dtype", "shape", "offset", "field"),
)
def test_corrupt_header_is_refused(checkpoint, change):
    file = checkpoint() / "model.safetensors"
    rewrite_header(file, change)
    message = refusal(file.parent)
    assert str(file) in message
    assert "corrupt header" in message


def test_git_lfs_pointer_is_recognised(checkpoint):
    file = checkpoint() / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refusal(file.parent)


def test_integer_weights_are_refused(checkpoint):
    norm = "language_model.model.norm.weight"
    message = refusal(checkpoint(edit=lambda tensors: tensors.update({norm: tensors[norm].astype(np.int8)})))
    assert norm in message
    assert "I8" in message


def test_missing_shard_is_named(checkpoint):
    directory = checkpoint(shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert "lacks 1 of 3 shards: model-00002-of-00003.safetensors" in refusal(directory)


def test_index_that_names_the_wrong_shard_is_refused(checkpoint):
    directory = checkpoint(shards=2)
    path = directory / huggingface.INDEX
    index = json.loads(path.read_text())
    name = index["weight_map"][EMBED]
    other = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} - {name}
    index["weight_map"][EMBED] = other.pop()
    path.write_text(json.dumps(index))
    message = refusal(directory)
    assert f"{index['weight_map'][EMBED]} lacks {EMBED}" in message


@pytest.mark.parametrize("text", ("", "{", "[]", '{"weight_map": {"a": "../b.safetensors"}}', "{}"))
def test_bad_index_is_refused(checkpoint, text):
    directory = checkpoint(shards=2)
    (directory / huggingface.INDEX).write_text(text)
    assert huggingface.INDEX in refusal(directory)


def test_missing_files_are_named(checkpoint):
    directory = checkpoint()
    (directory / "model.safetensors").unlink()
    assert "expected model.safetensors" in refusal(directory)
    (directory / "pytorch_model.bin").write_bytes(b"")
    assert "safetensors" in refusal(directory)
    (directory / "pytorch_model.bin").unlink()
    (directory / "config.json").unlink()
    assert "config.json is missing" in refusal(directory)


def test_unreadable_config_is_refused(checkpoint):
    directory = checkpoint()
    (directory / "config.json").write_text('{"model_type": "paligemma",')
    assert "config.json is not valid JSON" in refusal(directory)
    (directory / "config.json").write_text('{"model_type": "paligemma"}')
    assert "config.json: vision_config is missing" in refusal(directory, ConfigError)


def test_unknown_dtype_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="int3"):
        checkpoints.load(checkpoint(), dtype="int3")


def test_values_beyond_float16_are_refused(checkpoint):
    norm = "language_model.model.norm.weight"
    directory = checkpoint(edit=lambda tensors: tensors.update({norm: tensors[norm] * 1e9}))
    with pytest.raises(CheckpointError, match=r"language_model.model.norm.weight .*float16"):
        checkpoints.load(directory, dtype="float16")


@pytest.mark.parametrize("max_shard_bytes", (2_000_000_000, 10_000))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_save_and_load_keep_every_bit(tmp_path, config, params, assert_same, dtype, max_shard_bytes):
    params = jax.tree.map(lambda a: a.astype(dtype), params)
    huggingface.save(tmp_path, config, params, max_shard_bytes=max_shard_bytes)
    found, loaded = checkpoints.load(tmp_path, dtype=None)
    assert found == config
    assert_same(loaded, params)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
    assert not list(tmp_path.glob(".*"))


def test_saved_names_are_layout_a(tmp_path, config, params, tensors):
    huggingface.save(tmp_path, config, params)
    found, expected = load_file(tmp_path / "model.safetensors"), tensors("A")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_save_casts_and_takes_jax_arrays(tmp_path, config, params, assert_same):
    checkpoints.save(tmp_path, config, jax.tree.map(jax.numpy.asarray, params), dtype="bfloat16")
    _, loaded = checkpoints.load(tmp_path, dtype=None)
    assert_same(loaded, jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), params))


def test_second_save_leaves_nothing_of_the_first(tmp_path, config, params, assert_same):
    for limit in (10_000, 20_000, 1_000_000, 10_000):
        huggingface.save(tmp_path, config, params, max_shard_bytes=limit)
        assert_same(checkpoints.load(tmp_path, dtype=None)[1], params)
        weights = {path.name for path in tmp_path.glob("*.safetensors")}
        assert weights == {path.name for path in huggingface.scan(tmp_path).weight_files}


def test_failed_save_leaves_the_old_file(tmp_path, config, params, assert_same):
    huggingface.save(tmp_path, config, params)
    broken = jax.tree.map(lambda a: a * 1e9, params)
    with pytest.raises(CheckpointError, match="float16"):
        huggingface.save(tmp_path, config, broken, dtype="float16")
    assert_same(checkpoints.load(tmp_path, dtype=None)[1], params)
    assert not list(tmp_path.glob(".*"))


def test_save_refuses_parameters_of_another_geometry(tmp_path, config, params):
    del params["vision_tower"]["layers_1"]["mlp"]["fc1"]["bias"]
    with pytest.raises(CheckpointError, match="1 missing: vision_tower/layers_1/mlp/fc1/bias"):
        huggingface.save(tmp_path / "out", config, params)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "names",
    [
        ["tokenizer.model"],
        ["tokenizer.json", "tokenizer_config.json"],
        ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"],
    ],
)
def test_processor_files_are_copied_along(tmp_path, config, params, names):
    """And replace those of another tokenizer, of which nothing stays."""
    source, out = tmp_path / "source", tmp_path / "out"
    for directory, files in ((source, [*names, "README.md"]), (out, ["tokenizer.model", "added_tokens.json"])):
        directory.mkdir()
        for name in files:
            (directory / name).write_text(f"{name} of {directory.name}")
    huggingface.save(out, config, params, processor_from=(source,))
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", *names}
    assert all((out / name).read_text() == f"{name} of source" for name in names)


def test_a_tokenizer_stays_where_none_comes(tmp_path, config, params):
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "tokenizer.model").write_text("there before")
    huggingface.save(tmp_path, config, params, processor_from=(source,))
    assert (tmp_path / "tokenizer.model").exists()


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_generation_config_says_what_ends_an_answer(tmp_path, config, params, mark):
    huggingface.save(tmp_path, config, params)
    assert huggingface.scan(tmp_path).config.eos_token_ids == (1,)
    file = tmp_path / "generation_config.json"
    file.write_text(mark + '{"eos_token_id": [7, 1, 7], "pad_token_id": -1}', encoding="utf-8")
    assert huggingface.scan(tmp_path).config == dataclasses.replace(config, eos_token_id=7, more_eos_ids=(1,))
    for bad, problem in (
        ("{", "not valid JSON"),
        ('{"eos_token_id": [96]}', "outside"),
        ('{"eos_token_id": 0.5}', "one"),
    ):
        file.write_text(bad)
        with pytest.raises((CheckpointError, ConfigError), match=rf"generation_config\.json.* {problem}"):
            huggingface.scan(tmp_path)


def _torch_config(transformers, config):
    stated = config_json.to_json(config, "float32")
    return transformers.PaliGemmaConfig.from_dict(stated)


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
def test_reads_what_transformers_saves(tmp_path, config):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    model = transformers.PaliGemmaForConditionalGeneration(_torch_config(transformers, config))
    model.save_pretrained(tmp_path)
    found, loaded = checkpoints.load(tmp_path, dtype=None)
    assert found == config
    flat = flatten_dict(loaded, sep="/")
    decoder, encoder = model.model.language_model, model.model.vision_tower
    norm = (
        decoder.layers[1].post_attention_layernorm
        if config.version == 1
        else decoder.layers[1].pre_feedforward_layernorm
    )
    pairs = {
        "language_model/layers_1/pre_ffw_norm/weight": norm.weight,
        "language_model/layers_2/self_attn/k_proj/weight": decoder.layers[2].self_attn.k_proj.weight,
        "language_model/embed_tokens/weight": model.lm_head.weight,
        "vision_tower/patch_embedding/weight": encoder.embeddings.patch_embedding.weight,
        "vision_tower/layers_2/mlp/fc2/bias": encoder.encoder.layers[2].mlp.fc2.bias,
    }
    for path, tensor in pairs.items():
        assert np.array_equal(flat[path], tensor.detach().numpy()), path


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("max_shard_bytes", (2_000_000_000, 20_000))
def test_transformers_reads_what_is_saved(tmp_path, config, params, tensors, max_shard_bytes):
    transformers = pytest.importorskip("transformers")
    huggingface.save(tmp_path, config, params, max_shard_bytes=max_shard_bytes)
    model, info = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert config_json.from_json(model.config.to_dict()) == config
    assert model.dtype == pytest.importorskip("torch").float32
    model.save_pretrained(tmp_path / "again")
    again, expected = (
        load_file(tmp_path / "again" / "model.safetensors"),
        tensors("A"),
    )  # it keeps the layout that it read
    assert again.keys() == expected.keys()
    assert all(np.array_equal(again[key], expected[key]) for key in expected)


def test_what_ends_an_answer_is_that_of_the_model_that_is_saved(tmp_path, config, params):
    """Whatever a generation_config.json of before, or of another directory, says: the rest of it stays."""
    other = tmp_path / "other"
    other.mkdir()
    for directory in (other, tmp_path):
        (directory / "generation_config.json").write_text('{"eos_token_id": [7, 8], "max_length": 20}')
    for eos, more, sources in ((1, (), ()), (5, (6,), (other,)), (6, (), (other,))):
        saved = dataclasses.replace(config, eos_token_id=eos, more_eos_ids=more)
        huggingface.save(tmp_path, saved, params, processor_from=sources)
        assert huggingface.scan(tmp_path).config == saved
        assert json.loads((tmp_path / "generation_config.json").read_text())["max_length"] == 20


@pytest.mark.parametrize("before", [None, {}, {"max_length": 20}, {"eos_token_id": 7}])
def test_a_file_that_says_nothing_of_the_end_says_it_afterwards(tmp_path, config, before):
    """Beside an .npz nothing else does."""
    if before is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(before))
    ended = dataclasses.replace(config, eos_token_id=5, more_eos_ids=(6,))
    companions.write_eos(tmp_path, ended)
    assert companions.with_generation(config, tmp_path) == ended
