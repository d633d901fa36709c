"""config.run=ui: a web page."""

import contextlib
import functools
import importlib.util
import os
import socket
import tempfile
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

import paligemma_jax as pj
from paligemma_jax import checkpoints
from paligemma_jax.errors import ConfigError
from paligemma_jax.files import expanded
from paligemma_jax.runs import model as models
from paligemma_jax.runs import pair, settings
from paligemma_jax.runs.notes import note
from paligemma_jax.runs.serve import HUB_ID
from paligemma_jax.serving.engine import EngineSettings
from paligemma_jax.serving.http import warming
from paligemma_jax.serving.http.settings import is_loopback
from paligemma_jax.serving.web.backend import Backend
from paligemma_jax.serving.web.local import Local
from paligemma_jax.serving.web.remote import Remote
from paligemma_jax.serving.web.snippets import Source

_MOST_CONNECTIONS = 1000


def run(config: ConfigDict) -> int:
    """Serve the page until SIGTERM or Ctrl-C: it is there while the model is loaded."""
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError('run=ui needs gradio: pip install -e ".[ui]"')
    example = expanded(config.image)
    if not example.is_file():  # the page may read this file and no other
        raise ConfigError(f"image={config.image!r} is not possible: give the file of a picture")
    config = config.copy_and_resolve_references()
    config.image = str(example)
    if config.share and not is_loopback(config.host):
        raise ConfigError(f"share leads to this machine alone, and host={config.host} is elsewhere: leave out one")
    engine_settings = EngineSettings(
        num_slots=config.num_slots,
        max_waiting=config.max_waiting,
        max_new_tokens=config.max_new_tokens,
        max_prompt_tokens=config.max_prompt_tokens,
        max_images=1,
        cache_bytes=config.cache_bytes,
        num_steps=config.num_steps or None,
    )
    with contextlib.closing(_listen(config.host, config.port)) as sock, tempfile.TemporaryDirectory() as directory:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = directory  # uploads, gone with this process
        backend = _backend(config, engine_settings)
        try:
            _serve(config, sock, backend)
        finally:
            has_ended = backend.close()
    if not has_ended:  # Python would crash as it ends, in a thread that reads or compiles a model
        os._exit(0)
    return 0


def _serve(config: ConfigDict, sock: socket.socket, backend: Backend) -> None:
    host, port = sock.getsockname()[:2]
    note(f"the page is at http://{f'[{host}]' if ':' in host else host}:{port}")
    from paligemma_jax.serving.web import page, server, simple  # seconds, while the model is loaded

    asked = backend, config.image, config.max_new_tokens, config.seed
    blocks = simple.make(*asked) if config.simple else page.make(*asked, load_pair=_pair(config))
    if config.share:
        note(f"and, for whoever knows it, at {server.share(port)}")
    server.serve(server.make_app(blocks, config.image, is_loopback(config.host) and not config.share), sock)


def _pair(config: ConfigDict) -> Callable[[], Any] | None:
    """What reads the patch ViT and its teacher, once; None without any."""
    if not (config.student and config.clip):
        return None
    named = ConfigDict({"student": config.student, "clip": config.clip, "same_norm": "auto"})
    return functools.cache(lambda: pair.load(named))


def _backend(config: ConfigDict, engine_settings: EngineSettings) -> Backend:
    """Who answers, in the making."""
    loc_scale = settings.loc_scale(config)
    if config.server:
        return Remote(config.server, config.api_key, loc_scale)
    models.check_weights(config)
    _check_files(config.checkpoint)
    names = ("dtype", "quantization", "adapter", "resample", "mask_vae")
    source = Source(config.checkpoint, **{name: config[name] for name in names}, loc_scale=loc_scale)

    def load(chosen: Source) -> pj.PaliGemma:
        values = {"checkpoint": chosen.checkpoint, **{name: getattr(chosen, name) for name in names}}
        return models.load(ConfigDict(config.to_dict() | values), batch_size=engine_settings.num_slots)

    can_load = is_loopback(config.host) and not config.share
    backend = Local(load, engine_settings, can_load, warming.warm_up, lambda line: note(f"error: {line}"))
    backend.load(source)
    return backend


def _check_files(checkpoint: str) -> None:
    """CheckpointError now, before the page is there, for a path of this machine that cannot be a model."""
    if (path := expanded(checkpoint)).exists():
        checkpoints.scan(checkpoints.locate(path))
    elif not HUB_ID.fullmatch(checkpoint):
        checkpoints.locate(checkpoint)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound; ConfigError when the address is taken or not this machine's."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port={port} is not possible: give a number from 0 to 65535")
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host.strip("[]"), port))
        sock.listen(_MOST_CONNECTIONS)
    except OSError as error:
        sock.close()
        remedy = "give another host or port"
        raise ConfigError(
            f"host={host} with port={port} is not possible: {error.strerror or error}; {remedy}"
        ) from None
    return sock
