"""Weights of other tools, recognized by name, with what to do instead."""

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import paligemma_jax as pj
from paligemma_jax import checkpoints
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.runs.convert import main as convert

FILES = [
    ("model-q4_0.gguf", b"GGUF\x03\x00", "a GGUF file (llama.cpp, Ollama), which is not read: give the original"),
    ("renamed.npz", b"GGUF\x03\x00", "a GGUF file"),
    ("ggml-model.bin", b"lmgg", "a GGML file"),
    ("decoder.onnx", b"\x08\x07", "an ONNX network, which is not read: an exported network"),
    ("model.onnx_data", b"", "an ONNX network"),
    ("paligemma.tflite", b"", "a TensorFlow Lite or LiteRT network"),
    ("paligemma.task", b"", "a TensorFlow Lite or LiteRT network"),
    ("model.mlmodel", b"", "a Core ML network"),
    ("openvino_language_model.bin", b"", "an OpenVINO network"),
    ("saved_model.pb", b"", "a TensorFlow SavedModel"),
    ("model.weights.h5", b"\x89HDF\r\n\x1a\n", "a Keras file, which is not read: get the transformers or big_vision"),
    ("weights", b"\x89HDF\r\n\x1a\n", "a Keras file"),
    ("pali.keras", b"PK", "a Keras file"),
    ("model.ckpt.index", b"", "a TensorFlow checkpoint"),
    ("flax_model.msgpack", b"", "Flax weights (msgpack)"),
    ("manifest.ocdbt", b"", "an Orbax checkpoint (JAX)"),
    ("pytorch_model.bin", b"\x80\x02", "pickled PyTorch weights, which is not read: pickles are not read, load it in"),
    ("last.ckpt", b"", "pickled PyTorch weights"),
    ("consolidated.00.pth", b"PK", "pickled PyTorch weights"),
    ("model.pt", b"", "pickled PyTorch weights"),
    ("paligemma-jax-paligemma-3b-mix-224-v1.tar.gz", b"\x1f\x8b\x08", "an archive, which is not read: unpack it"),
]


def refusal(path: Path, error: type[Exception] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        checkpoints.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "data", "said"), FILES, ids=[name for name, _, _ in FILES])
def test_files_are_recognized_alone_and_in_a_directory(tmp_path, name, data, said, capsys):
    (tmp_path / name).write_bytes(data)
    assert f"{name} is {said}" in refusal(tmp_path / name)
    assert convert(["--verify", str(tmp_path / name)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[0] and all(line.startswith("error: ") for line in lines)
    with pytest.raises(CheckpointError, match=re.escape(said)):  # and not that a tokenizer is missing
        pj.load(tmp_path / name)
    if name not in ("renamed.npz", "weights"):  # what it is, its contents say alone
        assert said.partition(",")[0] in refusal(tmp_path)


def test_a_zip_of_torch_is_told_by_what_is_in_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.weights", "w") as archive:
        archive.writestr("model/data.pkl", b"")
    assert "pickled PyTorch weights" in refusal(tmp_path / "model.weights")


@pytest.mark.parametrize("name", ["_METADATA", "ocdbt.process_0/", "array_metadatas/"])
def test_orbax_directories_are_recognized(tmp_path, name):
    (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    assert "an Orbax checkpoint (JAX)" in refusal(tmp_path)


def test_an_npz_in_a_directory_is_pointed_at(tmp_path):
    np.savez(tmp_path / "pt_224.npz", x=np.zeros(1))
    assert f"give its file {tmp_path / 'pt_224.npz'}" in refusal(tmp_path)


def test_a_single_safetensors_file_is_of_its_directory(checkpoint):
    assert "give their directory" in refusal(checkpoint() / "model.safetensors")


def test_what_trainers_leave_beside_weights_is_not_taken_for_them(tmp_path):
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth"):
        (tmp_path / name).touch()
    assert "config.json is missing" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "says that bitsandbytes quan",
        ),
        ({"quantization_config": {"load_in_8bit": True}}, "says that bitsandbytes quantized"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "says that AWQ quantized the weights: give the"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "says that GPTQ quantized"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "llm-compressor"),
        ({"quantization_config": {"quant_method": "brand-new"}}, "says that brand-new quantized"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "says that GPTQ quantized"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "says that MLX quantized"),
        ({"model_type": "colpali"}, "is ColPali, a retriever"),
        ({"model_type": "gemma3"}, "is Gemma 3, not PaliGemma"),
        ({"model_type": "gemma2"}, "is Gemma 2 alone, without an image encoder"),
    ],
)
def test_other_models_and_quantizers_are_told_from_the_config(checkpoint, fields, said):
    path = checkpoint() / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert said in refusal(path.parent)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight.absmax", "was quantized by bitsandbytes"),
        ("language_model.model.layers.0.mlp.up_proj.weight.quant_map", "was quantized by bitsandbytes"),
        ("language_model.model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "by bitsandbytes"),
        ("language_model.model.layers.0.mlp.up_proj.SCB", "was quantized by bitsandbytes"),
        ("language_model.model.layers.0.mlp.up_proj.scales", "was quantized by MLX"),
        ("language_model.model.layers.0.mlp.up_proj.qweight", "was quantized by GPTQ or AWQ"),
        ("custom_text_proj.weight", "is ColPali, a retriever"),
        ("embedding_proj_layer.bias", "is ColPali, a retriever"),
    ],
)
def test_other_models_and_quantizers_are_told_from_the_tensors(checkpoint, name, said):
    directory = checkpoint(edit=lambda tensors: tensors.update({name: np.zeros(3, np.float32)}))
    message = refusal(directory)
    assert said in message and name in message


def test_the_axes_of_mlx_are_recognized(checkpoint):
    name = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    turned = checkpoint(
        edit=lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name].transpose(0, 2, 3, 1))})
    )
    assert "instead of [24, 3, 7, 7] (the axes are MLX's: give the original checkpoint)" in refusal(turned)


def test_an_adapter_of_a_retriever_is_recognized(checkpoint, adapter):
    checkpoint()
    directory = adapter({"custom_text_proj.lora_A.weight": np.zeros((2, 20), np.float32)})
    assert "is ColPali, a retriever" in refusal(directory)


def test_another_model_is_still_named_by_its_type(checkpoint: Callable):
    path = checkpoint() / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llava"}))
    assert "model_type is 'llava', but only 'paligemma' is supported" in refusal(path.parent, ConfigError)
