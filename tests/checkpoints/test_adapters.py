"""PEFT adapters: merged by formulas of their own, found by every name, and refused by what is wrong with them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from paligemma_jax import checkpoints
from paligemma_jax.checkpoints import big_vision
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.runs.convert import main as convert

Q = "model.language_model.layers.{i}.self_attn.q_proj"
TEXT_Q = "language_model/layers_{i}/self_attn/q_proj/weight"
FC1 = "model.vision_tower.encoder.layers.2.mlp.fc1"
TABLE, HEAD = "language_model/embed_tokens/weight", "language_model/lm_head/weight"


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def low_rank(module: str, outputs: int, inputs: int, rank: int = 2) -> dict[str, np.ndarray]:
    return {f"{module}.lora_A.weight": drawn(rank, inputs), f"{module}.lora_B.weight": drawn(outputs, rank, seed=1)}


def queries() -> dict[str, np.ndarray]:
    """A and B of the queries of all three layers of the decoder."""
    return {name: value for i in range(3) for name, value in low_rank(Q.format(i=i), 24, 20).items()}


def load(path: Path, dtype: str | None = None) -> dict[str, np.ndarray]:
    _, params = checkpoints.load(path, dtype, progress=False)
    return {name: np.asarray(value) for name, value in flatten_dict(params, sep="/").items()}


def changed(found: dict[str, np.ndarray], params: dict) -> set[str]:
    before = flatten_dict(params, sep="/")
    return {name for name, value in found.items() if name not in before or not np.array_equal(value, before[name])}


@pytest.mark.parametrize(
    "fields, factor",
    [
        ({}, 6 / 2),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"lora_alpha": 5, "fan_in_fan_out": True}, 5 / 2),  # PEFT turns it off for layers like these
        ({"alpha_pattern": {"q_proj": 9}}, 9 / 2),
        ({"alpha_pattern": {"proj": 9, r".*\.q_proj": 1}}, 1 / 2),
        ({"r": 8, "rank_pattern": {r"layers\.\d+\.self_attn.q_proj": 2}}, 6 / 2),
    ],
)
def test_scale_times_b_times_a_is_added(checkpoint, params, adapter, fields, factor):
    checkpoint()
    found = load(adapter(queries(), **fields))
    assert changed(found, params) == {TEXT_Q.format(i=i) for i in range(3)}
    for i in range(3):
        base = params["language_model"][f"layers_{i}"]["self_attn"]["q_proj"]["weight"]
        product = np.einsum("fr,rd->fd", drawn(24, 2, seed=1), drawn(2, 20), dtype=np.float64)
        np.testing.assert_allclose(found[TEXT_Q.format(i=i)], base + factor * product, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "form",
    [
        "base_model.model.model.language_model.layers.{i}.",  # transformers 4.52 and later
        "base_model.model.language_model.model.layers.{i}.",  # before
        "base_model.model.language_model.layers.{i}.",  # of the model without its head
        "model.language_model.layers.{i}.",
    ],
)
@pytest.mark.parametrize("infix", ["", ".default"])
def test_names_of_every_version_are_the_same_layers(checkpoint, params, adapter, form, infix):
    checkpoint()
    old, tensors = "model.language_model.layers.{i}.", {}
    for i in range(3):
        for name, value in low_rank(Q.format(i=i), 24, 20).items():
            name = name.replace(old.format(i=i), form.format(i=i)).replace(".weight", infix + ".weight")
            tensors[name] = value
    assert changed(load(adapter(tensors, prefix="")), params) == {TEXT_Q.format(i=i) for i in range(3)}


@pytest.mark.parametrize(
    "form",
    ["model.vision_tower.encoder", "model.vision_tower.vision_model.encoder", "vision_tower.vision_model.encoder"],
)
def test_layers_of_the_encoder_are_found_by_old_and_new_names(checkpoint, params, adapter, form):
    checkpoint()
    tensors = low_rank(FC1.replace("model.vision_tower.encoder", form), 20, 24)
    found = load(adapter(tensors, layers_to_transform=[2]))
    assert changed(found, params) == {"vision_tower/layers_2/mlp/fc1/weight"}


@pytest.mark.parametrize("form", [".lora_magnitude_vector", ".lora_magnitude_vector.weight"])
def test_magnitudes_are_the_norms_of_rows(checkpoint, params, adapter, form):
    """DoRA."""
    checkpoint()
    magnitude = np.abs(drawn(20, seed=2)) + 1
    found = load(adapter(low_rank(FC1, 20, 24) | {FC1 + form: magnitude}, use_dora=True, layers_to_transform=[2]))
    weight = found["vision_tower/layers_2/mlp/fc1/weight"]
    np.testing.assert_allclose(np.linalg.norm(weight, axis=1), magnitude, rtol=1e-5)
    before = params["vision_tower"]["layers_2"]["mlp"]["fc1"]["weight"]
    direction = before + 3 * drawn(20, 2, seed=1) @ drawn(2, 24)
    np.testing.assert_allclose(
        weight / magnitude[:, None], direction / np.linalg.norm(direction, axis=1)[:, None], atol=1e-5
    )


def test_an_embedding_adapter_leaves_the_head_behind(checkpoint, params, adapter, config):
    """The base's head is tied; PEFT's embedding is not the head's any more, unless it is told so."""
    checkpoint()
    module = "model.language_model.embed_tokens."
    tensors = {f"{module}lora_embedding_A": drawn(2, 96), f"{module}lora_embedding_B": drawn(20, 2, seed=1)}
    table = params["language_model"]["embed_tokens"]["weight"]
    expected = table + 3 * np.einsum("rv,dr->vd", drawn(2, 96), drawn(20, 2, seed=1))
    found = load(adapter(tensors))
    np.testing.assert_allclose(found[TABLE], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[HEAD], table)
    assert not checkpoints.scan(checkpoints.locate(adapter(tensors))).config.text.tied
    tied = load(adapter(tensors, ensure_weight_tying=True))
    assert HEAD not in tied
    np.testing.assert_allclose(tied[TABLE], expected, rtol=1e-5, atol=1e-5)


def test_saved_modules_and_biases_replace_those_of_the_base(checkpoint, params, adapter):
    checkpoint()
    linear = {"model.multi_modal_projector.linear.weight": drawn(20, 24), "lm_head.weight": drawn(96, 20)}
    linear |= {"model.multi_modal_projector.linear.bias": drawn(20), f"{FC1}.base_layer.bias": drawn(20, seed=3)}
    found = load(adapter(queries() | linear, modules_to_save=["multi_modal_projector", "lm_head"], bias="lora_only"))
    np.testing.assert_array_equal(found["multi_modal_projector/linear/weight"], drawn(20, 24))
    np.testing.assert_array_equal(found["multi_modal_projector/linear/bias"], drawn(20))
    np.testing.assert_array_equal(found["vision_tower/layers_2/mlp/fc1/bias"], drawn(20, seed=3))
    np.testing.assert_array_equal(found[HEAD], drawn(96, 20))
    np.testing.assert_array_equal(found[TABLE], params["language_model"]["embed_tokens"]["weight"])


def test_rows_that_were_added_are_in_table_and_head(checkpoint, adapter):
    """As PEFT writes the whole table where it was resized: it is the base's own, and tied."""
    checkpoint()
    table = drawn(101, 20)
    for extra in ({}, {"lm_head.weight": table}):
        directory = adapter(queries() | {"model.language_model.embed_tokens.weight": table} | extra)
        config, _ = checkpoints.load(directory, progress=False)
        assert config.text.vocab_size == 101 and config.text.tied
        np.testing.assert_array_equal(load(directory)[TABLE], table)
    with pytest.raises(CheckpointError, match="lm_head/weight has 96 rows, not 101"):
        load(adapter({"model.language_model.embed_tokens.weight": table}, modules_to_save=["embed_tokens"]))


def test_a_bias_of_b_is_scaled(checkpoint, params, adapter):
    checkpoint()
    tensors = low_rank(FC1, 20, 24) | {f"{FC1}.lora_B.bias": drawn(20, seed=4)}
    found = load(adapter(tensors, lora_bias=True, layers_to_transform=[2]))
    before = params["vision_tower"]["layers_2"]["mlp"]["fc1"]["bias"]
    np.testing.assert_allclose(found["vision_tower/layers_2/mlp/fc1/bias"], before + 3 * drawn(20, seed=4), rtol=1e-6)


def test_a_bias_of_b_that_is_promised_must_be_there(checkpoint, adapter):
    checkpoint()
    message = refusal(adapter(low_rank(FC1, 20, 24), lora_bias=True))
    assert "lora_bias is True, but it lacks vision_tower/layers_2/mlp/fc1/bias" in message


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_the_sum_is_float32_and_rounded_once(checkpoint, params, adapter, stored, dtype):
    checkpoint("A", stored)
    found = load(adapter(queries()), dtype)
    base = params["language_model"]["layers_1"]["self_attn"]["q_proj"]["weight"].astype(stored).astype(np.float32)
    expected = (base + (drawn(24, 2, seed=1) @ drawn(2, 20)) * np.float32(3)).astype(dtype or stored)
    assert {value.dtype.name for value in found.values()} == {dtype or stored}
    np.testing.assert_array_equal(found[TEXT_Q.format(i=1)], expected)


def test_over_an_npz(checkpoint, config, params, adapter, tmp_path, monkeypatch):
    big_vision.save(tmp_path / "base.npz", config, params)
    scan = big_vision.scan
    monkeypatch.setattr(big_vision, "scan", lambda path, _: scan(path, config))  # no released sizes
    found = load(adapter(queries(), base_model_name_or_path="../base.npz"))
    checkpoint()
    expected = load(adapter(queries()))
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_piece_at_a_time_is_the_same(checkpoint, adapter, monkeypatch):
    checkpoint()
    module = "model.language_model.embed_tokens."
    tensors = {f"{module}lora_embedding_A": drawn(2, 96), f"{module}lora_embedding_B": drawn(20, 2, seed=1)}
    tensors |= queries() | {f"{module}lora_magnitude_vector": drawn(20)}
    tensors |= {Q.format(i=i) + ".lora_magnitude_vector": drawn(24) for i in range(3)}
    whole = load(adapter(tensors, use_dora=True))
    monkeypatch.setattr("paligemma_jax.checkpoints.low_rank._CHUNK_ELEMENTS", 70)
    for name, value in load(adapter(tensors, use_dora=True)).items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-6)


# Refusals


def refusal(path: Path) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        checkpoints.load(path, place=lambda name, _: pytest.fail("a tensor was read"))
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', expected 'LORA': merge it in PEFT"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_qalora": True}, "use_qalora is True, which is not supported: merge it in PEFT"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices is [3, 4], which is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"some_new_method": {"k": 1}}, "some_new_method is {'k': 1}, which is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', expected one that leaves"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"r": 0}, "r is 0, expected a positive integer"),
        ({"r": 4}, "has rank 2, adapter_config.json says 4"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', expected a number"),
        ({"lora_alpha": 10**400}, "expected a number"),
        ({"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern"),
        ({"r": 10**400}, "expected a positive integer"),
        ({"rank_pattern": {"(?i)q_proj": 2}}, "rank_pattern"),
        ({"target_modules": "("}, "target_modules is '(', expected a pattern that `re` understands"),
        ({"target_modules": {"q_proj": 1}}, "target_modules"),
        ({"exclude_modules": [1]}, "exclude_modules is [1], expected a pattern, or a list of names"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform is ['1'], expected numbers of layers"),
        ({"layers_pattern": "x{99999999999}"}, "layers_pattern"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern"),
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', expected a list of names"),
        ({"modules_to_save": ["lm_head"]}, "it lacks lm_head, which modules_to_save names"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
    ],
)
def test_settings_that_are_not_honoured_are_named(checkpoint, adapter, fields, named):
    checkpoint()
    assert named in refusal(adapter(queries(), **fields))


def without(name: str) -> Callable[[dict], None]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    "spoil, named",
    [
        (
            lambda t: t.update({"model.language_model.layers.7.mlp.up_proj.lora_A.weight": drawn(2, 20)}),
            "1 tensors fit no",
        ),
        (
            lambda t: t.update({"transformer.h.0.attn.lora_A.weight": drawn(2, 20)}),
            "transformer.h.0.attn.lora_A.weight",
        ),
        (lambda t: t.update({"extra": drawn(3)}), "extra"),
        (
            lambda t: t.update(
                {"model.language_model.embed_tokens.token_adapter.trainable_tokens_delta": drawn(2, 20)}
            ),
            "trainable_tokens_delta",
        ),
        (without(f"{Q.format(i=1)}.lora_B.weight"), "layers.1.self_attn.q_proj.lora_A.weight has no lora_B beside it"),
        (without(f"{Q.format(i=1)}.lora_A.weight"), "layers.1.self_attn.q_proj.lora_B.weight has no lora_A beside it"),
        (
            lambda t: [t.pop(f"{Q.format(i=2)}.lora_{part}.weight") for part in "AB"],
            "it lacks language_model/layers_2/self_attn/q_proj/weight",
        ),
        (lambda t: t.update({f"{Q.format(i=0)}.lora_A.weight": drawn(2, 21)}), "is [2, 21] instead of [2, 20]"),
        (lambda t: t.update({f"{Q.format(i=0)}.lora_B.weight": drawn(20, 2)}), "is [20, 2] instead of [24, 2]"),
        (lambda t: t.update({"model.language_model.norm.weight": drawn(21)}), "is [21] instead of [20]"),
        (lambda t: t.update({f"{Q.format(i=0)}.lora_B.bias": drawn(24)}), "q_proj.lora_B.bias"),
        (lambda t: t.update({"model.language_model.norm.weight": np.zeros(20, np.int8)}), "is I8, only F32"),
        (lambda t: t.clear(), "it holds no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_named(checkpoint, adapter, spoil, named):
    checkpoint()
    tensors = queries()
    spoil(tensors)
    assert named in refusal(adapter(tensors, target_modules=r".*language_model.*q_proj"))


@pytest.mark.parametrize("rows", [1, 50, 89])
def test_a_table_with_fewer_rows_than_ids_is_refused(checkpoint, adapter, rows):
    checkpoint()
    tables = {"model.language_model.embed_tokens.weight": drawn(rows, 20)}
    assert f"embed_tokens.weight has {rows} rows, the tokenizer 90 ids" in refusal(adapter(queries() | tables))


def test_layers_that_were_left_out_on_purpose_may_lack(checkpoint, params, adapter):
    checkpoint()
    one, decoder = low_rank(Q.format(i=1), 24, 20), {"exclude_modules": ".*vision_tower.*"}
    for fields in (
        {"target_modules": ["q_proj"], "layers_to_transform": [1]} | decoder,
        {"target_modules": r".*language_model\.layers\.1\..*q_proj"},
        {"target_modules": ["1.self_attn.q_proj"]} | decoder,
        {"target_modules": ["q_proj"], "exclude_modules": r".*(vision_tower|layers\.[02]).*"},
    ):
        assert changed(load(adapter(one, **fields)), params) == {TEXT_Q.format(i=1)}


def test_files_that_are_missing_pickled_or_damaged_are_named(checkpoint, adapter):
    checkpoint()
    directory = adapter(queries())
    file = directory / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-5])
    assert "truncated" in refusal(directory)
    file.unlink()
    assert "expected adapter_model.safetensors" in refusal(directory)
    (directory / "adapter_model.bin").write_bytes(b"")
    assert "adapter_model.bin is pickled and not read: load it in PEFT" in refusal(directory)
    (directory / "adapter_config.json").write_text("{")
    assert "adapter_config.json is not valid JSON" in refusal(directory)


def test_a_quantized_base_is_refused(checkpoint, adapter, tmp_path):
    assert convert([str(checkpoint()), str(tmp_path / "few"), "--quantize", "int8"]) == 0
    message = refusal(adapter(queries(), base_model_name_or_path=str(tmp_path / "few")))
    assert "cannot go over int8 weights: merge it into the original weights first" in message
