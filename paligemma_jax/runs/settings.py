"""Values of a run config, checked."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any, TypeVar

from ml_collections import ConfigDict

from paligemma_jax.annotate.exports import EXPORTS
from paligemma_jax.errors import ConfigError, PromptError, SamplingError
from paligemma_jax.files import expanded, read_lines
from paligemma_jax.processing.request import GenerateOptions, Sampling
from paligemma_jax.tasks.prompts import FORM

_DEFAULTS = {"prompt_form": FORM}  # of keys that are not empty by default

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: the closest known one, or all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1) or [k for k in known if k.rpartition(".")[2] == name]
    if close:
        return f": did you mean {prefix}{close[0]}?"
    return f": there are {', '.join(prefix + k for k in known)}" if len(known) <= 12 else ": --help lists what there is"


def one_of(config: ConfigDict, key: str, allowed: Iterable[Any]) -> Any:
    """The value of a key that knows a few values only."""
    allowed, value = list(allowed), getattr(config, key)
    if value not in allowed:
        close = difflib.get_close_matches(str(value), map(str, allowed), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"{key}={value!r} is not possible: give {', '.join(map(str, allowed))}{hint}")
    return value


def from_config(kind: type[T], config: ConfigDict) -> T:
    """A dataclass whose fields are keys of a config."""
    return kind(**{field.name: config[field.name] for field in dataclasses.fields(kind)})


def refuse(config: ConfigDict, names: Iterable[str], why: str) -> None:
    """ConfigError when one of the keys is set, which this run could not do."""
    for name in names:
        if config[name] and config[name] != _DEFAULTS.get(name):
            raise ConfigError(f"{name}={config[name]!r} is not possible, {why}: leave it out")


def generate_options(config: ConfigDict, stream: bool = False) -> GenerateOptions:
    """How answers are generated, those that are printed while they are made or others."""
    names = ("temperature", "top_k", "top_p", "min_p", "num_beams", "seed")
    sampling = Sampling(**{name: getattr(config, name) for name in names})
    if stream and sampling.num_beams > 1:
        raise SamplingError(f"num_beams={sampling.num_beams} cannot stream: the best beam is known at the end only")
    speculate = {"auto": None, "on": True, "off": False}[one_of(config, "speculate", ("auto", "on", "off"))]
    return GenerateOptions(config.max_new_tokens, sampling, config.constrain, speculate)


def loc_scale(config: ConfigDict) -> int:
    """The location that means the far edge of a picture."""
    return one_of(config, "loc_scale", (1023, 1024))


def choice(config: ConfigDict) -> None:
    """Check what decides about the objects that are kept: min_score and nms."""
    for key in ("min_score", "nms"):
        if not 0 <= (value := getattr(config, key)) <= 1:
            raise ConfigError(f"{key}={value} is not possible: give a number from 0 to 1")


def video_fps(config: ConfigDict) -> float:
    """Frames looked at of each second of a video."""
    if not (config.video_fps > 0 and math.isfinite(config.video_fps)):
        raise ConfigError(f"video_fps={config.video_fps} is not possible: give a number above 0, such as 0.5")
    return config.video_fps


def exports(config: ConfigDict) -> list[str]:
    """The kinds of files that objects are exported to, each once."""
    names = list(dict.fromkeys(name.strip() for name in config.export.split(",") if name.strip()))
    if (strange := next((name for name in names if name not in EXPORTS), None)) is not None:
        raise ConfigError(f"export={config.export!r} is not possible: {strange!r} is not one of {', '.join(EXPORTS)}")
    if names and not config.output_dir:
        raise ConfigError(f"export={config.export!r} needs a place for its files: set output_dir too")
    return names


def prompts(config: ConfigDict) -> list[str]:
    """The prompt, or the prompts of a file, one per line; empty lines are skipped."""
    if not config.prompts_file:
        return [config.prompt]
    path = expanded(config.prompts_file)
    try:
        lines = read_lines(path)
    except FileNotFoundError:
        raise PromptError(f"prompts_file {path} does not exist: give a text file with a prompt per line") from None
    except OSError as error:
        raise PromptError(f"prompts_file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PromptError(f"prompts_file {path} is not UTF-8 text: save it as UTF-8") from None
    if not (found := [prompt for line in lines if (prompt := line.strip(" \t"))]):
        raise PromptError(f"prompts_file {path} is empty: write a prompt on each line")
    return found
