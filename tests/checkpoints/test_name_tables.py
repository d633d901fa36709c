"""Every array of a real file at its place: names, axes, stacking and layers, laid out by hand for both formats.

Each array of a file holds numbers of its own, so that nothing that is swapped, transposed or shifted can pass. The
files are built from the format's description alone, not by our own writer.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from paligemma_jax import checkpoints
from paligemma_jax.checkpoints import config_json
from paligemma_jax.checkpoints.mask_vae import load_mask_vae, save_mask_vae
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.runs.convert import main as convert

Arrays = dict[str, np.ndarray]

LAYOUTS = {  # A, the hub's files; B, transformers 4.52 in memory; C, a transformers 5 save
    "A": ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.model."),
    "B": ("model.vision_tower.vision_model.", "model.multi_modal_projector.", "model.language_model."),
    "C": ("vision_tower.", "multi_modal_projector.", "language_model.model."),
}


@pytest.fixture
def numbered() -> Callable[..., np.ndarray]:
    """numbered(*shape): whole numbers that no other array and no other place has, exact in float32."""
    start = 0

    def make(*shape: int) -> np.ndarray:
        nonlocal start
        count = int(np.prod(shape))
        start += count
        return np.arange(start - count, start, dtype=np.float32).reshape(shape)

    return make


def big_vision_file(config: PaliGemmaConfig, numbered: Callable[..., np.ndarray]) -> Arrays:
    """The arrays of a big_vision .npz, with the shapes that its networks have."""
    v, t = config.vision, config.text
    J, E, F, A, B = v.num_layers, v.width, v.mlp_dim, v.num_heads, v.width // v.num_heads
    L, D, M, N, K, H = t.num_layers, t.width, t.mlp_dim, t.num_heads, t.num_kv_heads, t.head_dim
    block = "img/Transformer/encoderblock/"
    attention = block + "MultiHeadDotProductAttention_0/"
    arrays = {
        "img/embedding/kernel": numbered(v.patch_size, v.patch_size, 3, E),
        "img/embedding/bias": numbered(E),
        "img/pos_embedding": numbered(1, v.num_tokens, E),
        block + "LayerNorm_0/scale": numbered(J, E),
        block + "LayerNorm_0/bias": numbered(J, E),
        block + "LayerNorm_1/scale": numbered(J, E),
        block + "LayerNorm_1/bias": numbered(J, E),
        block + "MlpBlock_0/Dense_0/kernel": numbered(J, E, F),
        block + "MlpBlock_0/Dense_0/bias": numbered(J, F),
        block + "MlpBlock_0/Dense_1/kernel": numbered(J, F, E),
        block + "MlpBlock_0/Dense_1/bias": numbered(J, E),
        attention + "query/kernel": numbered(J, E, A, B),
        attention + "query/bias": numbered(J, A, B),
        attention + "key/kernel": numbered(J, E, A, B),
        attention + "key/bias": numbered(J, A, B),
        attention + "value/kernel": numbered(J, E, A, B),
        attention + "value/bias": numbered(J, A, B),
        attention + "out/kernel": numbered(J, A, B, E),
        attention + "out/bias": numbered(J, E),
        "img/Transformer/encoder_norm/scale": numbered(E),
        "img/Transformer/encoder_norm/bias": numbered(E),
        "img/head/kernel": numbered(E, D),
        "img/head/bias": numbered(D),
        "llm/embedder/input_embedding": numbered(t.vocab_size, D),
        "llm/layers/attn/q_einsum/w": numbered(L, N, D, H),
        "llm/layers/attn/kv_einsum/w": numbered(L, 2, K, D, H),
        "llm/layers/attn/attn_vec_einsum/w": numbered(L, N, H, D),
        "llm/layers/mlp/gating_einsum": numbered(L, 2, D, M),
        "llm/layers/mlp/linear": numbered(L, M, D),
        "llm/layers/pre_attention_norm/scale": numbered(L, D),
        "llm/layers/pre_ffw_norm/scale": numbered(L, D),
        "llm/final_norm/scale": numbered(D),
    }
    if config.version == 2:
        arrays["llm/layers/post_attention_norm/scale"] = numbered(L, D)
        arrays["llm/layers/post_ffw_norm/scale"] = numbered(L, D)
    return arrays


def parameters_of(arrays: Arrays, config: PaliGemmaConfig) -> Iterator[tuple[str, np.ndarray]]:
    """What each parameter is in terms of a big_vision file; a weight is [out, in], heads before their width."""
    E, D = config.vision.width, config.text.width
    block = "img/Transformer/encoderblock/"
    yield "vision_tower/patch_embedding/weight", np.einsum("hwce->echw", arrays["img/embedding/kernel"])
    yield "vision_tower/patch_embedding/bias", arrays["img/embedding/bias"]
    yield "vision_tower/position_embedding/weight", arrays["img/pos_embedding"][0]
    for i in range(config.vision.num_layers):
        layer = f"vision_tower/layers_{i}/"
        yield layer + "layer_norm1/weight", arrays[block + "LayerNorm_0/scale"][i]
        yield layer + "layer_norm1/bias", arrays[block + "LayerNorm_0/bias"][i]
        yield layer + "layer_norm2/weight", arrays[block + "LayerNorm_1/scale"][i]
        yield layer + "layer_norm2/bias", arrays[block + "LayerNorm_1/bias"][i]
        for ours, theirs in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            kernel = arrays[f"{block}MultiHeadDotProductAttention_0/{theirs}/kernel"][i]
            bias = arrays[f"{block}MultiHeadDotProductAttention_0/{theirs}/bias"][i]
            yield f"{layer}self_attn/{ours}/weight", kernel.reshape(E, E).T
            yield f"{layer}self_attn/{ours}/bias", bias.reshape(E)
        out = arrays[block + "MultiHeadDotProductAttention_0/out/kernel"][i]
        yield layer + "self_attn/out_proj/weight", out.reshape(E, E).T
        yield layer + "self_attn/out_proj/bias", arrays[block + "MultiHeadDotProductAttention_0/out/bias"][i]
        yield layer + "mlp/fc1/weight", arrays[block + "MlpBlock_0/Dense_0/kernel"][i].T
        yield layer + "mlp/fc1/bias", arrays[block + "MlpBlock_0/Dense_0/bias"][i]
        yield layer + "mlp/fc2/weight", arrays[block + "MlpBlock_0/Dense_1/kernel"][i].T
        yield layer + "mlp/fc2/bias", arrays[block + "MlpBlock_0/Dense_1/bias"][i]
    yield "vision_tower/post_layernorm/weight", arrays["img/Transformer/encoder_norm/scale"]
    yield "vision_tower/post_layernorm/bias", arrays["img/Transformer/encoder_norm/bias"]
    yield "multi_modal_projector/linear/weight", arrays["img/head/kernel"].T
    yield "multi_modal_projector/linear/bias", arrays["img/head/bias"]
    yield "language_model/embed_tokens/weight", arrays["llm/embedder/input_embedding"]
    for i in range(config.text.num_layers):
        layer = f"language_model/layers_{i}/"
        query, (key, value) = arrays["llm/layers/attn/q_einsum/w"][i], arrays["llm/layers/attn/kv_einsum/w"][i]
        gate, up = arrays["llm/layers/mlp/gating_einsum"][i]
        yield layer + "pre_attention_norm/weight", arrays["llm/layers/pre_attention_norm/scale"][i]
        yield layer + "self_attn/q_proj/weight", np.einsum("ndh->nhd", query).reshape(-1, D)
        yield layer + "self_attn/k_proj/weight", np.einsum("kdh->khd", key).reshape(-1, D)
        yield layer + "self_attn/v_proj/weight", np.einsum("kdh->khd", value).reshape(-1, D)
        out = arrays["llm/layers/attn/attn_vec_einsum/w"][i]
        yield layer + "self_attn/o_proj/weight", out.reshape(-1, D).T
        yield layer + "pre_ffw_norm/weight", arrays["llm/layers/pre_ffw_norm/scale"][i]
        yield layer + "mlp/gate_proj/weight", gate.T
        yield layer + "mlp/up_proj/weight", up.T
        yield layer + "mlp/down_proj/weight", arrays["llm/layers/mlp/linear"][i].T
        if config.version == 2:
            yield layer + "post_attention_norm/weight", arrays["llm/layers/post_attention_norm/scale"][i]
            yield layer + "post_ffw_norm/weight", arrays["llm/layers/post_ffw_norm/scale"][i]
    yield "language_model/norm/weight", arrays["llm/final_norm/scale"]


def hugging_face_file(parameters: Arrays, config: PaliGemmaConfig, layout: str) -> Arrays:
    """The tensors of a Hugging Face directory: its names spelled out, its axes those of torch."""
    vision, projector, text = LAYOUTS[layout]
    keys = {
        vision + "embeddings.patch_embedding.weight": "vision_tower/patch_embedding/weight",
        vision + "embeddings.patch_embedding.bias": "vision_tower/patch_embedding/bias",
        vision + "embeddings.position_embedding.weight": "vision_tower/position_embedding/weight",
        vision + "post_layernorm.weight": "vision_tower/post_layernorm/weight",
        vision + "post_layernorm.bias": "vision_tower/post_layernorm/bias",
        projector + "linear.weight": "multi_modal_projector/linear/weight",
        projector + "linear.bias": "multi_modal_projector/linear/bias",
        text + "embed_tokens.weight": "language_model/embed_tokens/weight",
        text + "norm.weight": "language_model/norm/weight",
    }
    for i in range(config.vision.num_layers):
        theirs, ours = f"{vision}encoder.layers.{i}.", f"vision_tower/layers_{i}/"
        for leaf in ("weight", "bias"):
            keys |= {
                f"{theirs}layer_norm1.{leaf}": f"{ours}layer_norm1/{leaf}",
                f"{theirs}layer_norm2.{leaf}": f"{ours}layer_norm2/{leaf}",
                f"{theirs}self_attn.q_proj.{leaf}": f"{ours}self_attn/q_proj/{leaf}",
                f"{theirs}self_attn.k_proj.{leaf}": f"{ours}self_attn/k_proj/{leaf}",
                f"{theirs}self_attn.v_proj.{leaf}": f"{ours}self_attn/v_proj/{leaf}",
                f"{theirs}self_attn.out_proj.{leaf}": f"{ours}self_attn/out_proj/{leaf}",
                f"{theirs}mlp.fc1.{leaf}": f"{ours}mlp/fc1/{leaf}",
                f"{theirs}mlp.fc2.{leaf}": f"{ours}mlp/fc2/{leaf}",
            }
    for i in range(config.text.num_layers):
        theirs, ours = f"{text}layers.{i}.", f"language_model/layers_{i}/"
        keys |= {
            f"{theirs}self_attn.q_proj.weight": f"{ours}self_attn/q_proj/weight",
            f"{theirs}self_attn.k_proj.weight": f"{ours}self_attn/k_proj/weight",
            f"{theirs}self_attn.v_proj.weight": f"{ours}self_attn/v_proj/weight",
            f"{theirs}self_attn.o_proj.weight": f"{ours}self_attn/o_proj/weight",
            f"{theirs}mlp.gate_proj.weight": f"{ours}mlp/gate_proj/weight",
            f"{theirs}mlp.up_proj.weight": f"{ours}mlp/up_proj/weight",
            f"{theirs}mlp.down_proj.weight": f"{ours}mlp/down_proj/weight",
            f"{theirs}input_layernorm.weight": f"{ours}pre_attention_norm/weight",
        }
        if config.version == 1:  # the name trap: here it is the norm before the MLP
            keys[f"{theirs}post_attention_layernorm.weight"] = f"{ours}pre_ffw_norm/weight"
        else:
            keys[f"{theirs}post_attention_layernorm.weight"] = f"{ours}post_attention_norm/weight"
            keys[f"{theirs}pre_feedforward_layernorm.weight"] = f"{ours}pre_ffw_norm/weight"
            keys[f"{theirs}post_feedforward_layernorm.weight"] = f"{ours}post_ffw_norm/weight"
    return {key: parameters[path] for key, path in keys.items()}


def assert_equal(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    wrong = [name for name, array in expected.items() if not np.array_equal(found[name], array)]
    assert not wrong


def load(path: Path, config: PaliGemmaConfig | None = None) -> Arrays:
    _, params = checkpoints.load(path, dtype=None, config=config)
    return {name: np.asarray(array) for name, array in flatten_dict(params, sep="/").items()}


@pytest.fixture
def arrays(config, numbered) -> Arrays:
    return big_vision_file(config, numbered)


@pytest.fixture
def parameters(arrays, config) -> Arrays:
    found = dict(parameters_of(arrays, config))
    assert found.keys() == checkpoints.expected_shapes(config).keys()
    return found


def test_every_array_of_a_big_vision_file_comes_to_its_place(tmp_path, config, arrays, parameters):
    np.savez(tmp_path / "model.npz", **{f"params/{key}": array for key, array in arrays.items()})
    assert_equal(load(tmp_path / "model.npz", config), parameters)


@pytest.fixture
def directory(tmp_path, config, parameters) -> Callable[[str], Path]:
    """directory(layout): a Hugging Face directory of numbered tensors."""

    def write(layout: str) -> Path:
        tensors = hugging_face_file(parameters, config, layout)
        save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config_json.to_json(config, "float32")))
        return tmp_path

    return write


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_of_a_hugging_face_file_comes_to_its_place(directory, parameters, layout):
    assert_equal(load(directory(layout)), parameters)


def test_an_npz_is_written_as_big_vision_reads_it(directory, tmp_path, arrays):
    assert convert([str(directory("A")), str(tmp_path / "model.npz")]) == 0
    with np.load(tmp_path / "model.npz", allow_pickle=False) as file:
        assert_equal({key.removeprefix("params/"): file[key] for key in file.files}, arrays)


def test_a_directory_is_written_as_transformers_reads_it(directory, tmp_path, config, parameters):
    source, out = directory("B"), tmp_path / "out"
    assert convert([str(source), str(out)]) == 0
    assert_equal(load_file(out / "model.safetensors"), hugging_face_file(parameters, config, "A"))


def test_the_geometries_here_tell_all_axes_apart(config):
    """A transposed array could pass where two axes are as long."""
    vision, text = config.vision, config.text
    assert len({vision.patch_size, 3, vision.width}) == len({vision.num_heads, vision.head_dim, vision.width}) == 3
    assert len({text.num_heads, text.num_kv_heads, text.head_dim, text.width, text.mlp_dim, 2}) >= 5


# The mask VQ-VAE: torch's names and axes, [out, in, height, width], of a transposed convolution [in, out, ...].
E0, E1, E2, E3, D0, D1, D2, D3, D4, WIDTH, CODES = 3, 5, 6, 8, 9, 7, 2, 4, 10, 11, 12
CONVOLUTIONS = {  # name in the file -> place in the tree, shape
    "encoder.0": ("encoder/down_0", (E0, 1, 4, 4)),
    "encoder.2": ("encoder/down_1", (E1, E0, 4, 4)),
    "encoder.4": ("encoder/down_2", (E2, E1, 4, 4)),
    "encoder.6": ("encoder/down_3", (E3, E2, 4, 4)),
    "encoder.8.net.0": ("encoder/res_0/conv_0", (E3, E3, 3, 3)),
    "encoder.8.net.2": ("encoder/res_0/conv_1", (E3, E3, 3, 3)),
    "encoder.8.net.4": ("encoder/res_0/conv_2", (E3, E3, 1, 1)),
    "encoder.9.net.0": ("encoder/res_1/conv_0", (E3, E3, 3, 3)),
    "encoder.9.net.2": ("encoder/res_1/conv_1", (E3, E3, 3, 3)),
    "encoder.9.net.4": ("encoder/res_1/conv_2", (E3, E3, 1, 1)),
    "encoder.10": ("encoder/exit", (WIDTH, E3, 1, 1)),
    "decoder.0": ("decoder/entry", (D0, WIDTH, 1, 1)),
    "decoder.2.net.0": ("decoder/res_0/conv_0", (D0, D0, 3, 3)),
    "decoder.2.net.2": ("decoder/res_0/conv_1", (D0, D0, 3, 3)),
    "decoder.2.net.4": ("decoder/res_0/conv_2", (D0, D0, 1, 1)),
    "decoder.3.net.0": ("decoder/res_1/conv_0", (D0, D0, 3, 3)),
    "decoder.3.net.2": ("decoder/res_1/conv_1", (D0, D0, 3, 3)),
    "decoder.3.net.4": ("decoder/res_1/conv_2", (D0, D0, 1, 1)),
    "decoder.4": ("decoder/up_0", (D0, D1, 4, 4)),
    "decoder.6": ("decoder/up_1", (D1, D2, 4, 4)),
    "decoder.8": ("decoder/up_2", (D2, D3, 4, 4)),
    "decoder.10": ("decoder/up_3", (D3, D4, 4, 4)),
    "decoder.12": ("decoder/exit", (1, D4, 1, 1)),
}


def test_every_array_of_a_mask_vq_vae_comes_to_its_place_and_back(tmp_path, numbered):
    """Both kinds of kernels are turned alike, to [height, width, in, out] and [height, width, out, in]."""
    arrays, expected = {"_vq_vae._embedding": numbered(CODES, WIDTH)}, {}
    expected["codebook"] = arrays["_vq_vae._embedding"]
    for name, (place, shape) in CONVOLUTIONS.items():
        outputs = shape[1] if "up_" in place else shape[0]
        arrays |= {f"{name}.weight": numbered(*shape), f"{name}.bias": numbered(outputs)}
        expected[f"{place}/kernel"] = np.einsum("abhw->hwba", arrays[f"{name}.weight"])
        expected[f"{place}/bias"] = arrays[f"{name}.bias"]
    np.savez(tmp_path / "vae.npz", **arrays)
    params = load_mask_vae(tmp_path / "vae.npz")
    assert_equal({path: np.asarray(array) for path, array in flatten_dict(params, sep="/").items()}, expected)
    save_mask_vae(tmp_path / "again.npz", params, np.float32)
    with np.load(tmp_path / "again.npz") as file:
        assert_equal(dict(file), arrays)
