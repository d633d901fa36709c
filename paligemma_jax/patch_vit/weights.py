"""Names and shapes of the parameters in files: the student's as its original has them, CLIP's as transformers.

Paths are those of the parameter trees: "layers_0/mlp/fc1/weight".
"""

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from paligemma_jax.checkpoints import huggingface, shapes, tensor_files
from paligemma_jax.checkpoints.arrays import dtype_named
from paligemma_jax.errors import CheckpointError, one_line
from paligemma_jax.files import write_json
from paligemma_jax.patch_vit.clip import ClipModel
from paligemma_jax.patch_vit.config import ClipConfig, StudentConfig
from paligemma_jax.patch_vit.pt_file import PtFile, StoredTensor
from paligemma_jax.patch_vit.student import PatchViT

_STUDENT = (  # path -> key; every rule that matches applies, in this order
    (r"/", "."),
    (r"^patch_embedding\.", "conv1."),
    (r"^position_embedding\.weight", "positional_embedding"),
    (r"^layers_(\d+)\.", r"transformer.resblocks.\1."),
    (r"\.self_attn\.in_proj\.(\w+)", r".attn.in_proj_\1"),
    (r"\.self_attn\.", ".attn."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.fc1\.", ".c_fc."),
    (r"\.fc2\.", ".c_proj."),
)
_CLIP = (
    (r"/", "."),
    (r"layers_(\d+)", r"encoder.layers.\1"),
    (r"^(\w+_model)\.((?:\w+_)embedding)", r"\1.embeddings.\2"),
    (r"token_embedding$", "token_embedding.weight"),
    (r"pre_layernorm", "pre_layrnorm"),  # transformers' spelling
)


def _renamed(path: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        path = re.sub(pattern, replacement, path)
    return path


def student_key(path: str) -> str:
    """The original's name: "layers_0/self_attn/in_proj/weight" -> "transformer.resblocks.0.attn.in_proj_weight"."""
    return _renamed(path, _STUDENT)


def clip_key(path: str) -> str:
    """transformers' name: "vision_model/layers_0/mlp/fc1/weight" -> "vision_model.encoder.layers.0.mlp.fc1.weight"."""
    return _renamed(path, _CLIP)


@functools.cache
def student_shapes(config: StudentConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter."""
    pixels = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    return _shapes(PatchViT(config), pixels)


@functools.cache
def clip_shapes(config: ClipConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter."""
    side = config.vision.image_size
    pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return _shapes(ClipModel(config), pixels, jax.ShapeDtypeStruct((1, config.text.context), jnp.int32))


def _shapes(model: nn.Module, *inputs: jax.ShapeDtypeStruct) -> dict[str, tuple[int, ...]]:
    tree = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def read_directory(
    directory: Path, expected: Mapping[str, tuple[int, ...]], key_of: Callable[[str], str]
) -> dict[str, Any]:
    """The parameter tree of a directory with safetensors, as float32.

    Raises:
      CheckpointError: the weights are missing or damaged, or not those that are expected.
    """
    headers = {key: t for key, t in huggingface.read_headers(directory).items() if not huggingface.UNUSED.search(key)}
    tensors = _matched(headers, expected, key_of, directory)
    if odd := sorted({tensor.dtype for tensor in tensors.values()} - set(tensor_files.FLOATS)):
        raise CheckpointError(f"{directory}: only F32, F16 and BF16 weights are read, not {', '.join(odd)}")
    return _tree({path: tensor_files.read(tensor, np.dtype(np.float32)) for path, tensor in tensors.items()})


def read_pt(path: Path) -> tuple[StudentConfig, dict[str, Any]]:
    """Geometry and parameters, as float32, of a `.pt` of the original; without `scale` it is the plain variant.

    Raises:
      CheckpointError: see `PtFile`; or it lacks keys.
    """
    file = PtFile(path)
    state = file.content.get("model_state_dict") if isinstance(file.content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(t, StoredTensor) for t in state.values()):
        raise CheckpointError(f"{path} has no model_state_dict of tensors: give a checkpoint of the patch ViT")
    try:
        config = _geometry({key: tensor.shape for key, tensor in state.items()})
        expected = student_shapes(config)
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} is no checkpoint of the patch ViT: {one_line(error)[:80]}") from None
    tensors = _matched(state, expected, student_key, path)
    return config, _tree({name: file.read(tensor).astype(np.float32) for name, tensor in tensors.items()})


def _geometry(found: Mapping[str, tuple[int, ...]]) -> StudentConfig:
    """What the shapes of a state dictionary say."""
    for key in ("conv1.weight", "positional_embedding", "ln_post.weight", "transformer.resblocks.0.mlp.c_fc.weight"):
        if key not in found:
            raise KeyError(f"{key} is missing")
    width, _, _, patch = found["conv1.weight"]
    grid = round(found["positional_embedding"][0] ** 0.5)
    layers = [int(match[1]) for key in found if (match := re.match(r"transformer\.resblocks\.(\d{1,3})\.", key))]
    has_scale = "scale" in found
    return StudentConfig(
        image_size=grid * patch,
        patch_size=patch,
        embed_dim=found["ln_post.weight"][0],
        num_layers=max(layers) + 1,
        mlp_dim=found["transformer.resblocks.0.mlp.c_fc.weight"][0],
        num_heads=width - found["ln_post.weight"][0],
        masked=has_scale,
        same_norm=has_scale,
        has_scale=has_scale,
    )


def write_directory(
    directory: Path,
    params: Mapping[str, Any],
    config: Mapping[str, Any],
    key_of: Callable[[str], str],
    dtype: str | None,
) -> None:
    """Write model.safetensors and then config.json, each whole or not at all; `dtype` None keeps each tensor's own.

    Raises:
      CheckpointError: the directory or a file cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} cannot be made ({one_line(error)}): name another directory") from None
    tensors = {key_of(path): leaf for path, leaf in flatten_dict(params, sep="/").items()}
    tensor_files.write(directory / huggingface.SINGLE, tensors, dtype_named(dtype) if dtype else None)
    write_json(directory / huggingface.CONFIG, dict(config))


def _matched(
    found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], key_of: Callable[[str], str], where: Path
) -> dict[str, Any]:
    """Path -> tensor; CheckpointError when names or shapes are not those that are expected."""
    keys = {key_of(path): path for path in expected}
    named = {key: expected[path] for key, path in keys.items()}
    if problems := shapes.differences({key: tuple(tensor.shape) for key, tensor in found.items()}, named):
        raise CheckpointError(f"{where}: the weights do not fit the geometry: {problems}")
    return {path: found[key] for key, path in keys.items()}


def _tree(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return unflatten_dict({path: jnp.asarray(array) for path, array in sorted(arrays.items())}, sep="/")
