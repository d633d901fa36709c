"""The process around a run: platform, compilation cache, silence, profile, and what a lack of memory means."""

import contextlib
import gc
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import absl.logging
import jax
from ml_collections import ConfigDict

from paligemma_jax.errors import ConfigError
from paligemma_jax.files import expanded
from paligemma_jax.runs.notes import note
from paligemma_jax.runs.settings import one_of
from paligemma_jax.training.parallel import connect

_OBJECTS = 100_000  # that are new when Python looks for cycles among them
_INSTALL = {"gpu": 'pip install -U "jax[cuda13]"', "tpu": 'pip install -U "jax[tpu]"', "cpu": "pip install -U jax"}


def out_of_memory(error: RuntimeError) -> str:
    """What to tell the user of JAX's error for a lack of memory; another error is raised again."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return "out of memory: try a smaller batch_size or max_new_tokens, or dtype=bfloat16"


def quiet() -> None:
    """Keep what libraries log away from the user, errors excepted."""
    absl.logging.set_verbosity(absl.logging.ERROR)
    logging.getLogger("jax").setLevel(logging.ERROR)


def select_platform(config: ConfigDict) -> None:
    """Make config.platform the one that arrays live on, and join the processes of a run that has several.

    Raises:
      ConfigError: it is not there, the message says what to install; or as of `parallel.connect`.
    """
    name = one_of(config, "platform", ("auto", "cpu", "gpu", "tpu"))
    if name != "auto":
        jax.config.update("jax_platforms", "cpu" if name == "cpu" else "")  # "": whatever is there, the fastest first
    if "coordinator" in config:  # before anything asks for devices: afterwards there are those of this process only
        connect(config.coordinator, config.num_processes, config.process_id)
    if name == "auto":
        return
    if (found := jax.default_backend()) != name:
        remedy = f"`{_INSTALL[name]}` on a machine that has one, or platform=auto"
        raise ConfigError(f"platform={name} is not available, JAX found {found} only: {remedy}")


def collect_garbage_seldom() -> None:
    """Let Python look for cycles seldom: tracing a network makes many objects that live on."""
    gc.set_threshold(_OBJECTS)


def profiled(config: ConfigDict) -> contextlib.AbstractContextManager[None]:
    """A block whose work is traced into the folder config.profile; nothing happens when that is empty.

    Call this before the model is loaded: a folder that cannot be written to is an OSError at once.
    """
    if not config.profile:
        return contextlib.nullcontext()
    directory = expanded(config.profile)
    directory.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=directory).close()
    return _traced(directory)


@contextlib.contextmanager
def _traced(directory: Path) -> Iterator[None]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every Python call would be most of the file
    try:
        with jax.profiler.trace(directory, profiler_options=options):
            yield
    finally:
        traces = directory.glob("plugins/profile/*/*.trace.json.gz")
        newest = max(traces, key=lambda path: path.stat().st_mtime, default=directory)
        note(f"wrote {newest}: open it at https://ui.perfetto.dev, or: pip install xprof && xprof {directory}")
