"""Files to a model that is ready to run."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from paligemma_jax import checkpoints
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.generation import engine
from paligemma_jax.models import layers
from paligemma_jax.pipeline import MASK_VAE_NAME, MASK_VAE_VARIABLE, PaliGemma
from paligemma_jax.processing.image import ImageSettings
from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.tokenizer import Tokenizer


def load(
    path: str | Path,
    dtype: str = "bfloat16",
    quantization: str | None = None,
    mask_vae: str | Path | None = None,
    prepare: Callable[[PaliGemma], None] | None = None,
    batch_size: int = 1,
    num_beams: int = 1,
) -> PaliGemma:
    """Load a model.

    Args:
      path: Hugging Face directory, hub id, or big_vision .npz with tokenizer.model beside it.
      dtype: "bfloat16", "float16" or "float32", of the parameters and activations.
      quantization: "int8" or "int4" rounds the decoder's weights as they are read, and the image encoder's to 8 bits;
        None takes them as they are. A checkpoint that was written quantized needs nothing here.
      mask_vae: file of the mask VQ-VAE; by default vae-oid.npz beside the model, else $PALIGEMMA_MASK_VAE.
      prepare: called with the model, whose parameters are only shapes yet, while the weights are read:
        `lambda model: model.compile(...)` for what will be asked first.
      batch_size: prompts that will be answered at once. For 5 to 16 of them, a CPU multiplies 16-bit weights of some
        widths up to 1.6 times as fast if they are laid out for that, which takes a second or two: they are copied
        instead of staying in the pages of their file.
      num_beams: of the `Sampling` to come; each is a row like another prompt.

    Raises:
      ConfigError, CheckpointError, TokenizerError: see the message.
    """
    start = time.perf_counter()
    if dtype == "float16" and jax.default_backend() == "tpu":
        raise ConfigError("dtype 'float16' is not supported on TPU: use bfloat16")
    found = checkpoints.resolve(path)
    directory = found if found.is_dir() else found.parent
    tokenizer = Tokenizer.from_dir(directory)
    contents = checkpoints.scan(found)  # all small files are looked at before the long part
    config = contents.config
    tokenizer.check(config)
    processor = Processor(config, tokenizer, ImageSettings.from_dir(directory, config.vision.image_size))
    masks = _find_mask_vae(directory, mask_vae)
    num_rows = min(batch_size, engine.most_at_once(config.vision.num_tokens)) * num_beams
    shapes = checkpoints.abstract(contents, dtype, quantization, num_rows)
    model = PaliGemma(config, shapes, processor, masks, directory)
    layers.measure(model.params["language_model"], num_rows)
    with ThreadPoolExecutor(1) as pool:
        prepared = pool.submit(prepare, model) if prepare else None
        _, params = checkpoints.load(contents, dtype, quantization=quantization, num_rows=num_rows)
        jax.block_until_ready(params)
        load_s = time.perf_counter() - start
        if prepared:
            prepared.result()
    model.params, model.load_s = params, load_s
    model.compile_s = time.perf_counter() - start - load_s
    return model


def _find_mask_vae(directory: Path, given: str | Path | None) -> Path | None:
    if given is None and (beside := directory / MASK_VAE_NAME).is_file():
        return beside
    named, by = (given, "mask_vae") if given else (os.environ.get(MASK_VAE_VARIABLE), f"${MASK_VAE_VARIABLE}")
    if named and not Path(named).is_file():
        raise CheckpointError(f"{named} is missing: name the file of the mask VQ-VAE with {by}, or leave it out")
    return Path(named) if named else None
