"""Files to a model that is ready to run."""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from paligemma_jax import checkpoints, ops
from paligemma_jax.api import MASK_VAE_VARIABLE, PaliGemma
from paligemma_jax.checkpoints import companions
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.engine.generate import programs
from paligemma_jax.engine.runner import Runner
from paligemma_jax.engine.steps import most_at_once
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.files import expanded
from paligemma_jax.processing.image import ImageSettings
from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.request import Request
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.sharding import Layout, make_mesh


def load(
    path: str | Path,
    dtype: str = "bfloat16",
    quantization: str | None = None,
    mask_vae: str | Path | None = None,
    batch_size: int = 1,
    warm_up: Sequence[Request] = (),
    target: ops.Target | None = None,
    prepare: bool = True,
    adapter: str | Path | None = None,
    compilation_cache: bool = True,
    mesh: str | jax.sharding.Mesh | None = None,
) -> PaliGemma:
    """Load a model.

    Args:
      path: Hugging Face directory, hub id ("org/name" or "org/name@revision"), or big_vision .npz with tokenizer.model
        or tokenizer.json beside it; or the directory of a PEFT adapter, which names its base; or "tiny", the model that
        is shipped.
      dtype: "bfloat16", "float16" or "float32", of the parameters and activations.
      quantization: "int8" or "int4" rounds the decoder's weights as they are read, and the image encoder's to 8 bits;
        None takes them as they are. A checkpoint that was written quantized needs nothing here.
      mask_vae: file of the mask VQ-VAE; by default vae-oid.npz beside the model, else $PALIGEMMA_MASK_VAE.
      batch_size: rows that will be answered at once, a row for each beam. Kernels are chosen and weights laid out for
        so many.
      warm_up: requests like the first ones to come: the programs that answer them together are compiled while the
        weights are read. Their images are not.
      target: what to prepare and compile for; by default the machine's own platform.
      prepare: choose kernels and layouts of weights for the target; False leaves plain arrays under the names of
        `checkpoints.expected_shapes`, as training needs them.
      adapter: directory or hub id of a PEFT adapter, which is merged into the weights of `path` while they are read.
      compilation_cache: keep compiled programs on disk for the next process, see `keep_compiled`.
      mesh: several devices to divide the model and rows over, as text ("data=2,tensor=4", "auto", see
        `sharding.parse_mesh`) or a mesh with these axes. Each device gets its shards of a parameter as it is read.

    Raises:
      ConfigError, CheckpointError, TokenizerError, PromptError: see the message.
    """
    start = time.perf_counter()
    if compilation_cache:
        keep_compiled()
    source = checkpoints.locate(path, adapter)
    contents = checkpoints.scan(source)  # first: weights of another format have no tokenizer beside them either
    tokenizer = read_tokenizer(source)
    tokenizer.check(contents.config)
    config = dataclasses.replace(contents.config, added_ids=tokenizer.added_ids(contents.config))
    processor = Processor(config, tokenizer, read_image_settings(source, config))
    masks = find_mask_vae(source, mask_vae)
    num_rows = min(batch_size, most_at_once(config.vision.num_tokens))
    layout = lay_out(mesh, config)
    target = target or ops.Target.detect(num_rows)
    if dtype == "float16" and target.platform == "tpu":
        raise ConfigError("dtype 'float16' is not supported on TPU: use bfloat16")
    fuse = layout is None or layout.num_tensor == 1
    shapes = checkpoints.abstract(contents, dtype, quantization, fuse)
    prepare = prepare and layout is None  # kernels and fused projections are made for one device
    table = ops.tune(shapes, target) if prepare else ops.Table()  # measured now, while nothing else runs
    runner = Runner(target, table, layout)
    for note in layout.notes(shapes) if layout else ():
        print(f"note: {note}", file=sys.stderr)
    with ThreadPoolExecutor(1) as pool:
        compiling = None
        if warm_up:
            abstract = ops.prepare(shapes, target, table) if prepare else shapes
            compiling = pool.submit(lambda: runner.compile(programs(runner, abstract, processor, warm_up, batch_size)))

        def place(path: str, leaf: ops.Weight) -> ops.Weight:
            leaf = checkpoints.on_device(path, leaf) if layout is None else layout.place(path, leaf)
            return ops.prepare_leaf(path, leaf, target, table) if prepare else leaf

        _, params = checkpoints.load(contents, dtype, quantization=quantization, place=place, fuse=fuse)
        if prepare:
            params = ops.prepare(params, target, table)  # what takes several weights: fusing them
        jax.block_until_ready(params)
        load_s = time.perf_counter() - start
        if compiling:
            compiling.result()
    waited_s = time.perf_counter() - start - load_s
    return PaliGemma(config, params, processor, masks, source.directories, runner, load_s, waited_s)


def lay_out(mesh: str | jax.sharding.Mesh | None, config: PaliGemmaConfig) -> Layout | None:
    """How a model to generate with lies on a mesh; None without one. ConfigError as of `sharding.make_mesh`."""
    if not mesh:
        return None
    return Layout(make_mesh(mesh, config.text) if isinstance(mesh, str) else mesh, config)


def keep_compiled() -> None:
    """Keep compiled programs on disk, for the next process, unless JAX was told a place, or not to.

    They are in `$XDG_CACHE_HOME/paligemma_jax/compiled`, `~/.cache` by default; a user without a home has no cache.
    This is a setting of the process: programs of others are kept there too.
    """
    if jax.config.jax_compilation_cache_dir is None and jax.config.jax_enable_compilation_cache:
        root = os.environ.get("XDG_CACHE_HOME", "")
        root = Path(root) if os.path.isabs(root) else expanded("~/.cache")
        if root.is_absolute():
            jax.config.update("jax_compilation_cache_dir", str(root / "paligemma_jax" / "compiled"))
            if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs add up


def read_tokenizer(source: checkpoints.Source) -> Tokenizer:
    """The tokenizer of a checkpoint: an adapter's own, or its base's; TokenizerError as of `Tokenizer.from_dir`."""
    return Tokenizer.from_dir(companions.tokenizer_dir(source.directories))


def read_image_settings(source: checkpoints.Source, config: PaliGemmaConfig) -> ImageSettings:
    """How a checkpoint wants its pictures; ConfigError as of `ImageSettings.from_dir`."""
    return ImageSettings.from_dir(companions.image_settings_dir(source.directories), config.vision.image_size)


def find_mask_vae(source: checkpoints.Source, given: str | Path | None = None) -> Path | None:
    """The mask VQ-VAE that is given, lies beside the weights, or is named by the environment."""
    if given is None and (beside := companions.mask_vae_beside(source.directories)):
        return beside
    named, by = (given, "mask_vae") if given else (os.environ.get(MASK_VAE_VARIABLE), f"${MASK_VAE_VARIABLE}")
    if named and not Path(named).is_file():
        raise CheckpointError(f"{named} is missing: name the file of the mask VQ-VAE with {by}, or leave it out")
    return Path(named) if named else None
