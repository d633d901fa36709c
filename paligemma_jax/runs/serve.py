"""config.run=serve: a model behind HTTP."""

import contextlib
import importlib
import re
from pathlib import Path

from ml_collections import ConfigDict

from paligemma_jax.errors import ConfigError
from paligemma_jax.runs import model as models
from paligemma_jax.runs import settings
from paligemma_jax.runs.notes import note
from paligemma_jax.serving.engine import Engine, EngineSettings

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.npz)(@[\w./-]+)?")


def run(config: ConfigDict) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except ImportError:
            raise ConfigError(f'run=serve needs {name}: pip install -e ".[serve]"') from None
    from paligemma_jax.serving.http.security import read_keys
    from paligemma_jax.serving.http.server import listen, serve
    from paligemma_jax.serving.http.service import Service
    from paligemma_jax.serving.http.settings import HttpSettings

    engine_settings = EngineSettings(
        num_slots=config.num_slots,
        max_waiting=config.max_waiting,
        max_new_tokens=config.max_new_tokens,
        max_prompt_tokens=config.max_prompt_tokens,
        max_images=config.max_images,
        cache_bytes=config.cache_bytes,
        num_steps=config.num_steps or None,
    )
    http_settings = HttpSettings(
        model_name=config.model_name or _name_of(config.checkpoint),
        keys=read_keys(config.api_key, config.api_key_file),
        image_hosts=_names(config.image_hosts),
        cors_origins=_names(config.cors_origins),
        loc_scale=settings.loc_scale(config),
        **{
            name: config[name]
            for name in (
                *("host", "port", "trusted_proxies", "max_body_bytes", "body_timeout_s", "request_timeout_s"),
                *("max_pixels", "max_images", "max_new_tokens", "max_n", "requests_per_minute", "drain_s", "seed"),
            )
        },
    )
    models.check_weights(config)
    with contextlib.closing(listen(http_settings)) as sock:  # before the long part: the port may be taken
        model = models.load(config, batch_size=config.num_slots)
        engine = Engine(model, engine_settings)
        engine.start()
        host, port = sock.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        note(f"serving {http_settings.model_name} at {address}: /ready says when, {address}/docs how")
        try:
            service = Service(engine, model, http_settings)
            service.warm_up()
            serve(service, sock)
        finally:
            engine.close()
    return 0


def _name_of(checkpoint: str) -> str:
    """What clients call a model that has no other name: its hub id, or the last part of its path."""
    is_hub_id = HUB_ID.fullmatch(checkpoint) and not Path(checkpoint).exists()
    return checkpoint if is_hub_id else Path(checkpoint).name


def _names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(name for part in text.split(",") if (name := part.strip()))
