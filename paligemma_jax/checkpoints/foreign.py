"""Weights in formats of others, recognized by name so that the message can say what to do instead.

What a file holds is told by its suffix or its first bytes, a directory by its files, config.json and tensor names.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paligemma_jax.checkpoints.companions import MASK_VAE_NAME
from paligemma_jax.errors import CheckpointError

_ORIGINAL = "give the original checkpoint in safetensors, which --config.quantization=int8 or int4 makes as small"
_TORCH = "load it in transformers and write safetensors with save_pretrained(DIR)"
_EXPORTED = "an exported network has no weights that can be told apart: give the checkpoint that it was made from"
_KERAS = "get the transformers or big_vision (.npz) version of the same model"
_JAX = "export its parameters as a big_vision .npz, or get the safetensors of the model"

_FORMATS = {  # name -> (what matches a file's name, how the file begins, what to do instead)
    "a GGUF file (llama.cpp, Ollama)": (r"\.gguf$", b"GGUF", _ORIGINAL),
    "a GGML file (llama.cpp)": (r"(^ggml.*\.bin|\.ggml)$", b"lmgg", _ORIGINAL),
    "an ONNX network": (r"\.onnx(_data)?$", None, _EXPORTED),
    "a TensorFlow Lite or LiteRT network": (r"\.(tflite|litertlm|task)$", None, _EXPORTED),
    "a Core ML network": (r"\.(mlmodel|mlpackage|mlmodelc)$", None, _EXPORTED),
    "an OpenVINO network": (r"^openvino_.*\.(xml|bin)$", None, _EXPORTED),
    "a TensorFlow SavedModel": (r"^saved_model\.pb$", None, _EXPORTED),
    "a Keras file": (r"\.(keras|h5|hdf5)$", b"\x89HDF\r\n", _KERAS),
    "a TensorFlow checkpoint": (r"\.(ckpt\.index|ckpt\.data-.*)$", None, _KERAS),
    "Flax weights (msgpack)": (r"\.msgpack$", None, _JAX),
    "an Orbax checkpoint (JAX)": (r"^(manifest\.ocdbt|_CHECKPOINT_METADATA|checkpoint\.orbax)$", None, _JAX),
    "pickled PyTorch weights": (r"\.(bin|pt|pth|ckpt|pkl|pickle)$", None, f"pickles are not read, {_TORCH}"),
    "an archive": (r"\.(zip|tar|gz|tgz|xz|bz2|7z|zst)$", b"\x1f\x8b", "unpack it and give what was in it"),
}
_PICKLED_IN_ZIP = b"/data.pkl"
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state|scaler)")  # what trainers leave beside them
_QUANTIZERS = {
    "bitsandbytes": "bitsandbytes",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "compressed-tensors": "compressed-tensors (llm-compressor)",
    "fp8": "FP8",
    "fbgemm_fp8": "FBGEMM FP8",
    "hqq": "HQQ",
    "quanto": "Quanto",
    "torchao": "torchao",
    "aqlm": "AQLM",
    "eetq": "EETQ",
}
_QUANTIZED_TENSORS = {  # what names of tensors end with
    "bitsandbytes": r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|quant_state\.\w+)$",
    "MLX": r"\.(scales|biases)$",
    "GPTQ or AWQ": r"\.(qweight|qzeros|g_idx)$",
}
_FAMILIES = {  # model_type in config.json -> what that is
    "colpali": "ColPali, a retriever: PaliGemma with a projection of its own",
    "pi0": "pi0, a robot policy over PaliGemma",
    "gemma3": "Gemma 3",
    "gemma3n": "Gemma 3n",
    "siglip": "SigLIP alone",
    "gemma": "Gemma alone, without an image encoder",
    "gemma2": "Gemma 2 alone, without an image encoder",
}
_RETRIEVER = re.compile(r"(^|\.)(custom_text_proj|embedding_proj_layer)\.")


def recognize(path: Path) -> str | None:
    """One line on a file, or a directory without safetensors, of another format; None where nothing is known."""
    if path.is_file():
        found = _of_file(path)
        return found and _message(path, *found)
    if any(path.glob("*.safetensors")) or not path.is_dir():
        return None
    files = sorted((item for item in path.iterdir() if not _NO_WEIGHTS.match(item.name)), key=lambda item: item.name)
    if arrays := [item.name for item in files if item.suffix == ".npz" and item.name != MASK_VAE_NAME]:
        return f"{path} holds no safetensors: give its file {path / arrays[0]}"
    for name, (pattern, _, remedy) in _FORMATS.items():
        for item in files:
            if re.search(pattern, item.name):
                return _message(path, f"{name}, {item.name}", remedy, "holds")
    if any((path / name).exists() for name in ("_METADATA", "_sharding", "array_metadatas", "ocdbt.process_0")):
        return _message(path, "an Orbax checkpoint (JAX)", _JAX)
    return None


def _message(path: Path, name: str, remedy: str, verb: str = "is") -> str:
    return f"{path} {verb} {name}, which is not read: {remedy}"


def _of_file(path: Path) -> tuple[str, str] | None:
    """The format of a file and what to do instead."""
    with path.open("rb") as file:
        head = file.read(4096)
    for name, (pattern, magic, remedy) in _FORMATS.items():
        if re.search(pattern, path.name) or (magic and head.startswith(magic)):
            return name, remedy
    if path.suffix != ".npz" and head.startswith(b"PK") and _PICKLED_IN_ZIP in head:
        name = "pickled PyTorch weights"
        return name, _FORMATS[name][2]
    return None


def checked_config(value: dict[str, Any], path: Path) -> dict[str, Any]:
    """A parsed config.json as it is; CheckpointError when it is of another model or another quantizer."""
    kind = value.get("model_type")
    if isinstance(kind, str) and kind in _FAMILIES:
        raise CheckpointError(f"{path.parent} is {_FAMILIES[kind]}, not PaliGemma: give a PaliGemma checkpoint")
    for section in (value, value.get("text_config"), value.get("vision_config")):
        stated = section.get("quantization_config") if isinstance(section, dict) else None
        if isinstance(stated, dict) and stated.get("quant_method") != "paligemma_jax":
            method = str(stated.get("quant_method", ""))
            bits = any(key in stated for key in ("load_in_4bit", "load_in_8bit"))
            name = _QUANTIZERS.get(method, "bitsandbytes" if bits else method or "another program")
            raise CheckpointError(f"{path}: quantization_config says that {name} quantized the weights: {_ORIGINAL}")
    if isinstance(value.get("quantization"), dict):
        raise CheckpointError(f"{path}: quantization says that MLX quantized the weights: {_ORIGINAL}")
    return value


def check_tensors(names: Iterable[str], directory: Path) -> None:
    """CheckpointError when the names of tensors are those of another quantizer or of a retriever."""
    for name in names:
        for quantizer, pattern in _QUANTIZED_TENSORS.items():
            if re.search(pattern, name):
                raise CheckpointError(f"{directory} was quantized by {quantizer} ({name}): {_ORIGINAL}")
        if _RETRIEVER.search(name):
            raise CheckpointError(f"{directory} is {_FAMILIES['colpali']} ({name}): give a PaliGemma checkpoint")
