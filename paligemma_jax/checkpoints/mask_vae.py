"""The mask VQ-VAE's file: an .npz with the torch names of big_vision's vae-oid.npz.

Torch keeps kernels [out, in, height, width] (transposed ones [in, out, height, width]); Flax [height, width, in, out].
One permutation serves both, as the network applies its transposed convolutions with `transpose_kernel`.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.checkpoints.shapes import Shape, differences
from paligemma_jax.errors import CheckpointError, one_line
from paligemma_jax.files import replacing
from paligemma_jax.models.mask_vae import MaskVAEConfig, Params, init_params

_CODEBOOK = "_vq_vae._embedding"
_UNUSED = "_vq_vae._ema"  # running averages that only training needs

_LAYERS = {  # torch name -> path in the parameter tree
    **{f"encoder.{2 * i}": ("encoder", f"down_{i}") for i in range(4)},
    **{f"encoder.{8 + r}.net.{2 * i}": ("encoder", f"res_{r}", f"conv_{i}") for r in range(2) for i in range(3)},
    "encoder.10": ("encoder", "exit"),
    "decoder.0": ("decoder", "entry"),
    **{f"decoder.{2 + r}.net.{2 * i}": ("decoder", f"res_{r}", f"conv_{i}") for r in range(2) for i in range(3)},
    **{f"decoder.{4 + 2 * i}": ("decoder", f"up_{i}") for i in range(4)},
    "decoder.12": ("decoder", "exit"),
}


def load_mask_vae(path: str | Path) -> Params:
    """Reads a mask VQ-VAE of any widths, stored in half or single precision.

    Returns:
      The parameters of `models.mask_vae`, float32.

    Raises:
      CheckpointError: the file is missing, damaged, or lacks parts of the network; every such part is named.
    """
    arrays = _read(Path(path))
    shapes = {name: value.shape for name, value in arrays.items()}
    if problems := differences(shapes, _expected_shapes(shapes)):
        raise CheckpointError(
            f"{path} is not a mask VQ-VAE: {problems}; use big_vision's vae-oid.npz or one trained here"
        )
    if bad := [name for name, value in arrays.items() if value.dtype.kind != "f" or not np.isfinite(value).all()]:
        raise CheckpointError(f"{path} is damaged: no finite numbers in {', '.join(bad)}; get the file again")

    params: dict = {"codebook": jnp.asarray(arrays[_CODEBOOK], jnp.float32)}
    for name, layer_path in _LAYERS.items():
        layer = params
        for key in layer_path:
            layer = layer.setdefault(key, {})
        layer["kernel"] = jnp.asarray(arrays[f"{name}.weight"].transpose(2, 3, 1, 0), jnp.float32)
        layer["bias"] = jnp.asarray(arrays[f"{name}.bias"], jnp.float32)
    return params


def save_mask_vae(path: str | Path, params: Params | Path, dtype: np.typing.DTypeLike = np.float16) -> None:
    """Writes the parameters, whole or not at all; float16 halves the file to about 4 MB. A file is copied as it is."""
    if isinstance(params, Path):
        with replacing(Path(path)) as temporary:
            shutil.copyfile(params, temporary)
        return
    arrays = {_CODEBOOK: np.asarray(params["codebook"], dtype)}
    for name, layer_path in _LAYERS.items():
        layer = _follow(params, layer_path)
        arrays[f"{name}.weight"] = np.asarray(layer["kernel"], dtype).transpose(3, 2, 0, 1)
        arrays[f"{name}.bias"] = np.asarray(layer["bias"], dtype)
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise ValueError("a single array")
            return {name: np.asarray(file[name]) for name in file.files if not name.startswith(_UNUSED)}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: give big_vision's vae-oid.npz with mask_vae") from None
    except Exception as error:  # zip, deflate and numpy headers each fail in their own way
        raise CheckpointError(f"{path} is not a readable .npz file ({one_line(error)}); get the file again") from None


def _expected_shapes(found: Mapping[str, Shape]) -> dict[str, Shape]:
    """Torch name -> shape of a complete file with the widths that this one's biases state."""
    standard = MaskVAEConfig()

    def width(name: str, default: int) -> int:
        shape = found.get(f"{name}.bias", ())
        return shape[0] if len(shape) == 1 and shape[0] > 0 else default

    encoder = tuple(width(f"encoder.{2 * i}", w) for i, w in enumerate(standard.encoder_widths))
    names = ("decoder.0", *(f"decoder.{4 + 2 * i}" for i in range(4)))
    decoder = tuple(width(name, w) for name, w in zip(names, standard.decoder_widths, strict=True))
    codebook = found.get(_CODEBOOK, ())
    num_codes = codebook[0] if len(codebook) == 2 and codebook[0] > 0 else standard.num_codes
    config = MaskVAEConfig(encoder, decoder, width("encoder.10", standard.code_width), num_codes)

    tree = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    expected = {_CODEBOOK: tree["codebook"].shape}
    for name, layer_path in _LAYERS.items():
        layer = _follow(tree, layer_path)
        height, breadth, inputs, outputs = layer["kernel"].shape
        expected |= {f"{name}.weight": (outputs, inputs, height, breadth), f"{name}.bias": layer["bias"].shape}
    return expected


def _follow(tree: Params, path: tuple[str, ...]) -> Params:
    for key in path:
        tree = tree[key]
    return tree
