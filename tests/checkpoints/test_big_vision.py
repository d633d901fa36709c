"""big_vision .npz: values at the right places by an independent formula, round trips, bad files."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from paligemma_jax import checkpoints
from paligemma_jax.checkpoints import big_vision, huggingface
from paligemma_jax.config import VARIANTS, variant_name
from paligemma_jax.errors import CheckpointError, ConfigError


@pytest.fixture
def npz(tmp_path, config, params):
    path = tmp_path / "model.npz"
    big_vision.save(path, config, params)
    return path


def rewrite(path, change):
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    change(arrays)
    np.savez(path, **arrays)


def test_file_holds_what_big_vision_expects(npz, config, params):
    vision, decoder = params["vision_tower"], params["language_model"]
    text = config.text
    D, H, N, K = text.width, text.head_dim, text.num_heads, text.num_kv_heads
    with np.load(npz, allow_pickle=False) as file:
        arrays = {key.removeprefix("params/"): file[key] for key in file.files}
        assert all(key.startswith("params/") for key in file.files)
    rng = np.random.default_rng(1)

    image = rng.standard_normal((7, 7, 3))  # one patch: convolution is a sum over the kernel
    ours = np.einsum("dchw,hwc->d", vision["patch_embedding"]["weight"], image)
    assert np.allclose(ours, np.einsum("hwcd,hwc->d", arrays["img/embedding/kernel"], image))
    assert np.array_equal(arrays["img/pos_embedding"][0], vision["position_embedding"]["weight"])

    block = "img/Transformer/encoderblock/"
    x, attention = rng.standard_normal(24), vision["layers_2"]["self_attn"]
    query = np.einsum("d,dnh->nh", x, arrays[block + "MultiHeadDotProductAttention_0/query/kernel"][2])
    query += arrays[block + "MultiHeadDotProductAttention_0/query/bias"][2]
    assert np.allclose(query.reshape(-1), attention["q_proj"]["weight"] @ x + attention["q_proj"]["bias"])
    out = np.einsum("nh,nhd->d", query, arrays[block + "MultiHeadDotProductAttention_0/out/kernel"][2])
    assert np.allclose(out, attention["out_proj"]["weight"] @ query.reshape(-1))
    assert np.allclose(
        x @ arrays[block + "MlpBlock_0/Dense_0/kernel"][1], vision["layers_1"]["mlp"]["fc1"]["weight"] @ x
    )
    projector = params["multi_modal_projector"]["linear"]["weight"]
    assert np.allclose(x @ arrays["img/head/kernel"], projector @ x)

    y, layer = rng.standard_normal(D), decoder["layers_1"]
    query = np.einsum("d,ndh->nh", y, arrays["llm/layers/attn/q_einsum/w"][1])
    assert np.allclose(query.reshape(-1), layer["self_attn"]["q_proj"]["weight"] @ y)
    keys_values = np.einsum("d,ckdh->ckh", y, arrays["llm/layers/attn/kv_einsum/w"][1])
    assert keys_values.shape == (2, K, H)
    assert np.allclose(keys_values[0].reshape(-1), layer["self_attn"]["k_proj"]["weight"] @ y)
    assert np.allclose(keys_values[1].reshape(-1), layer["self_attn"]["v_proj"]["weight"] @ y)
    heads = rng.standard_normal((N, H))
    out = np.einsum("nh,nhd->d", heads, arrays["llm/layers/attn/attn_vec_einsum/w"][1])
    assert np.allclose(out, layer["self_attn"]["o_proj"]["weight"] @ heads.reshape(-1))
    gate, up = np.einsum("d,cdm->cm", y, arrays["llm/layers/mlp/gating_einsum"][1])
    assert np.allclose(gate, layer["mlp"]["gate_proj"]["weight"] @ y)
    assert np.allclose(up, layer["mlp"]["up_proj"]["weight"] @ y)
    hidden = rng.standard_normal(text.mlp_dim)
    assert np.allclose(hidden @ arrays["llm/layers/mlp/linear"][1], layer["mlp"]["down_proj"]["weight"] @ hidden)
    assert np.array_equal(arrays["llm/layers/pre_ffw_norm/scale"][2], decoder["layers_2"]["pre_ffw_norm"]["weight"])
    assert ("llm/layers/post_ffw_norm/scale" in arrays) == (config.version == 2)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_hugging_face_to_npz_and_back_keeps_every_bit(tmp_path, config, params, dtype, assert_same):
    first, npz, second = tmp_path / "first", tmp_path / "model.npz", tmp_path / "second"
    huggingface.save(first, config, params, dtype)
    big_vision.save(npz, *checkpoints.load(first, dtype=None))
    huggingface.save(second, *checkpoints.load(npz, dtype=None, config=config))
    for name in ("config.json", "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_bfloat16_is_stored_as_two_void_bytes(tmp_path, config, params, assert_same):
    path = tmp_path / "model.npz"
    big_vision.save(path, config, params, "bfloat16")
    with np.load(path, allow_pickle=False) as file:
        assert {file[key].dtype for key in file.files} == {np.dtype("V2")}
    assert_same(checkpoints.load(path, config=config)[1], jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), params))


def test_files_of_numpy_are_read_compressed_or_without_prefix(npz, config, params, assert_same):
    with np.load(npz, allow_pickle=False) as file:
        arrays = {key.removeprefix("params/"): file[key] for key in file.files}
    np.savez_compressed(npz, **arrays)
    assert_same(checkpoints.load(npz, dtype=None, config=config)[1], params)


@pytest.mark.parametrize("name", VARIANTS)
def test_released_geometry_is_told_from_the_shapes(tmp_path, name):
    config = VARIANTS[name]
    text = dataclasses.replace(config.text, vocab_size=257152)
    config = dataclasses.replace(config, text=text)
    sizes = big_vision._sizes(config)
    members = {
        key: big_vision._Member(key, tuple(sizes[axis] for axis in array.axes), np.dtype(np.float32))
        for key, array in big_vision._arrays_of(config.version).items()
    }
    found = big_vision._infer_config(tmp_path, members)
    assert found == config
    assert variant_name(found) == name


def test_unknown_geometry_needs_its_config(npz):
    with pytest.raises(ConfigError, match=r"model\.npz .*config\.json"):
        big_vision.scan(npz)


def test_wrong_config_is_refused(npz, config):
    vision = dataclasses.replace(config.vision, num_heads=2)
    with pytest.raises(CheckpointError, match=r"value/kernel are \[3, 24, 4, 6\] instead of \[3, 24, 2, 12\]"):
        big_vision.scan(npz, dataclasses.replace(config, vision=vision))


def test_error_names_every_missing_and_unexpected_array(npz, config):
    def spoil(arrays):
        del arrays["params/llm/final_norm/scale"]
        arrays["params/llm/extra"] = np.zeros(2, np.float32)
        arrays["params/img/head/bias"] = np.zeros(3, np.float32)

    rewrite(npz, spoil)
    with pytest.raises(CheckpointError) as caught:
        big_vision.scan(npz, config)
    for part in ("missing: llm/final_norm/scale", "unexpected: llm/extra", "img/head/bias is [3] instead of [20]"):
        assert part in str(caught.value)


def test_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(CheckpointError, match=r"other\.npz is no PaliGemma"):
        big_vision.scan(path)


@pytest.mark.parametrize("kept", (0.0, 0.5, 0.999))
def test_truncated_file_is_refused(npz, config, kept):
    raw = npz.read_bytes()
    npz.write_bytes(raw[: int(len(raw) * kept)])
    with pytest.raises(CheckpointError, match=r"model\.npz is no \.npz file, or is damaged"):
        checkpoints.load(npz, config=config)


def test_flipped_byte_is_noticed(npz, config):
    raw = bytearray(npz.read_bytes())
    raw[len(raw) // 2] ^= 1
    npz.write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.load(npz, config=config)


@pytest.mark.parametrize("prefix", ["params/", "opt/target/"])
def test_what_lies_beside_the_parameters_is_not_read(npz, config, params, assert_same, prefix, capsys):
    """The state of an optimizer and of a chronometer, whose names may be those of parameters, and of any dtype."""

    def train(arrays):
        for key in list(arrays):
            arrays[key.replace("params/", prefix)] = arrays.pop(key)
            arrays[f"opt/1/0/mu/{key.removeprefix('params/')}"] = np.zeros(2)
        arrays |= {
            "chrono/accum_train_time": np.float64(3),
            "chrono/note": np.array("text"),
            "opt/state": np.zeros(1, "i4"),
        }

    rewrite(npz, train)
    assert_same(checkpoints.load(npz, dtype=None, config=config)[1], params)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "unused",
    [
        {"t": np.float32(2.3), "b": np.float32(-10)},
        {"img/MAPHead_0/probe": np.zeros((1, 1, 24), np.float32), "img/MAPHead_0/LayerNorm_0/scale": np.ones(24)},
        {"MAPHead_0/probe": np.zeros(3, np.float32), "t": np.zeros(1), "b": np.zeros(1)},
    ],
)
def test_what_siglip_has_and_the_model_does_not_use_is_noted(npz, config, params, assert_same, unused, capsys):
    rewrite(npz, lambda arrays: arrays.update({f"params/{key}": value for key, value in unused.items()}))
    assert_same(checkpoints.load(npz, dtype=None, config=config)[1], params)
    [note] = capsys.readouterr().err.splitlines()
    assert note == f"note: {npz} holds what the model does not use: {', '.join(unused)}"


@pytest.mark.parametrize(
    "change",
    [
        np.asfortranarray,
        lambda array: array.astype(">f4"),
        lambda array: array.astype("<f8"),
        lambda array: np.asfortranarray(array.astype(">f8")),
    ],
    ids=["fortran", "big endian", "float64", "all"],
)
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_other_layouts_in_memory_are_the_same_numbers(npz, config, params, assert_same, change, dtype):
    def alter(arrays):
        for key in arrays:
            arrays[key] = change(arrays[key])

    rewrite(npz, alter)
    with np.load(npz, allow_pickle=False) as file:
        kernel = file["params/llm/layers/attn/q_einsum/w"]
    altered = not kernel.flags.c_contiguous or kernel.dtype != np.dtype(np.float32)
    assert altered
    expected = jax.tree.map(lambda a: a.astype(dtype or "float32"), params)
    assert_same(checkpoints.load(npz, dtype=dtype, config=config)[1], expected)


def test_bfloat16_in_fortran_order_is_read(tmp_path, config, params, assert_same):
    path = tmp_path / "model.npz"
    big_vision.save(path, config, params, "bfloat16")
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: np.asfortranarray(file[key]) for key in file.files}
    np.savez(path, **arrays)
    expected = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), params)
    assert_same(checkpoints.load(path, dtype=None, config=config)[1], expected)


def test_float64_is_called_so_by_verify(npz, config):
    rewrite(npz, lambda arrays: arrays.update({key: array.astype(np.float64) for key, array in arrays.items()}))
    assert set(big_vision.scan(npz, config).dtypes) == {"float64"}


def test_pickled_and_integer_arrays_are_refused(npz, config):
    rewrite(npz, lambda arrays: arrays.update({"params/llm/final_norm/scale": np.zeros(20, np.int32)}))
    with pytest.raises(CheckpointError, match="llm/final_norm/scale is int32"):
        big_vision.scan(npz, config)
    rewrite(npz, lambda arrays: arrays.update({"params/llm/final_norm/scale": np.array([None] * 20)}))
    with pytest.raises(CheckpointError, match="llm/final_norm/scale is object"):
        big_vision.scan(npz, config)
