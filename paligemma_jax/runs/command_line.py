"""The command line: arguments to a config, a config to a run, and whatever goes wrong to one clear line."""

import importlib
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

import paligemma_jax as pj
from paligemma_jax.errors import ConfigError, UserError, error_line
from paligemma_jax.files import data_folder
from paligemma_jax.loading import keep_compiled
from paligemma_jax.runs import base, environment
from paligemma_jax.runs.notes import note
from paligemma_jax.runs.settings import did_you_mean, one_of

_DEFAULT_CONFIG = "tiny.py"

RUNS = {  # config.run: module in paligemma_jax/runs, and what it does
    "generate": "answer prompts about one picture or many",
    "annotate": "answer prompts about very many pictures, into files, resumable (needs configs/annotate.py)",
    "chat": "answer prompts about a picture as they are typed",
    "train": "fine-tune a model on your own pictures (needs configs/finetune.py)",
    "check": "look for faults in data before training (needs configs/check.py)",
    "evaluate": "measure the shipped model on its scenes, or with configs/evaluate.py a model on a data set",
    "inspect": "draw what an answer is based on: attention, similarity, logit lens (needs configs/inspect.py)",
    "swap": "answer about a picture with another one's embeddings (needs configs/swap.py)",
    "heatmap": "draw where phrases are in a picture (this and the next three need configs/patch_vit.py)",
    "compare": "draw where a patch ViT, its teacher and a PaliGemma look",
    "search": "find pictures of a folder by phrases and by pictures",
    "locate": "find boxes and masks of phrases without a language model",
    "serve": "answer requests over HTTP (needs configs/serve.py)",
    "ui": "show a web page in which a model is asked (needs configs/ui.py)",
    "make_tiny": "build the shipped model from a seed (needs configs/make_tiny.py)",
    "patch_vit_distill": "distil a patch ViT from a CLIP (needs configs/patch_vit_distill.py)",
    "make_patch_vit": "build the shipped patch ViT and its teacher from a seed (needs configs/make_patch_vit.py)",
}

_EVALUATION = ("measure", "data", "num_scenes", "scenes_seed", "output")
_SELECTION = ("min_score", "nms", "loc_scale")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "max_new_tokens", "speculate")
_GOING_ON = ("resume", "overwrite")
_FILES = (*_GOING_ON, "stream", "export", "output_dir", "save_embeddings", "load_embeddings", "embeddings")
_SEARCH = ("index", "query_image", "top", "refresh", "ranking", "save_every_s")
_LOCATE = ("background", "threshold", "min_score", "nms", "export")
_PALIGEMMA = ("checkpoint", "hub_id", "dtype", "seed")
UNUSED = {  # by run, keys of its config that change nothing in it
    "generate": _EVALUATION,
    "chat": (*_EVALUATION, "prompt", "stream", "batch_size", "video_fps", "embeddings", *_GOING_ON),
    "inspect": (*_EVALUATION, "min_score", "nms", "video_fps", "embeddings", "batch_size", "resume"),
    "swap": (*_EVALUATION, *_SELECTION, "video_fps", "mask_vae", "resume"),
    "heatmap": (*_PALIGEMMA, *_SEARCH, *_LOCATE),
    "compare": ("seed", *_SEARCH, *_LOCATE, "prompt", "windows", "output"),
    "search": (*_PALIGEMMA, *_LOCATE, "windows", "output"),
    "locate": (*_PALIGEMMA, *_SEARCH, "output"),
    "check": ("dtype",),
    "evaluate": (
        *("image", "prompt", "prompts_file", "prompt_form", "split_classes", "video_fps", "batch_size"),
        *(*_SELECTION, *_SAMPLING, *_FILES),
    ),
}

_KEY_COMMENT = re.compile(r"^    config\.(\w+) = .*  # (.+)$", re.MULTILINE)
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)")
_EXPECTED = {int: "an integer", float: "a number", bool: "true or false"}


def main(arguments: Sequence[str]) -> int:
    """Run the program.

    Args:
      arguments: without the program's name.

    Returns:
      The exit status: 1 for what a user can mend.
    """
    if "--version" in arguments:
        print(f"paligemma_jax {pj.__version__} (jax {jax.__version__}, Python {platform.python_version()})")
        return 0
    rest = [a for a in arguments if a not in ("--debug", "--help", "-h")]
    debug = "--debug" in arguments
    try:
        file, overrides = _config_file(rest)
        config = _read_config(file, overrides)
        if "--help" in arguments or "-h" in arguments:
            print(_help(file, config))
            return 0
        name = one_of(config, "run", RUNS)
        unused = () if "task" in config else UNUSED.get(name, ())  # an evaluation on a data set has keys of its own
        if unused := sorted(set(_keys(overrides)) & set(unused)):
            note(f"note: run={name} does not use {', '.join(unused)}")
        if not debug:
            environment.quiet()
        environment.collect_garbage_seldom()
        environment.select_platform(config)
        if config.compilation_cache:
            keep_compiled()
        return importlib.import_module(f"paligemma_jax.runs.{name}").run(config)
    except BrokenPipeError:
        raise  # no fault of the user
    except (UserError, OSError) as error:
        return _fail(str(error), debug)
    except ModuleNotFoundError as error:
        if (error.name or "paligemma_jax").startswith("paligemma_jax"):
            raise
        return _fail(f'run={name} needs {error.name}: pip install -e ".[train]"', debug)
    except AttributeError as error:
        if not isinstance(error.obj, ConfigDict):
            raise
        own = _configs() / f"{name}.py"
        remedy = f"take --config=configs/{own.name}" if own.exists() else "take a config made for it, --help lists them"
        return _fail(f"{file} lacks the key {error.name!r}, which run={name} needs: {remedy}", debug)
    except RuntimeError as error:
        return _fail(environment.out_of_memory(error), debug)


def _fail(message: str, debug: bool) -> int:
    if debug:
        raise  # the error that is being handled
    print(error_line(message), file=sys.stderr)
    return 1


def _configs() -> Path:
    """The folder of the config files that are shipped."""
    return data_folder("configs")


def _config_file(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The config file and the overrides, which may stand in any order."""
    file, overrides = str(_configs() / _DEFAULT_CONFIG), []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            file = value if equals else next(remaining, "")
        else:
            overrides.append(argument)
    path, colon, variant = file.partition(":")
    if not Path(path).is_file():
        beside = _configs().parent / path  # so that configs/mix224.py works from any folder
        if not beside.is_file():
            known = [f"configs/{name}.py" for name in _descriptions()]
            raise ConfigError(f"there is no config file {path!r}{did_you_mean(path, known)}")
        path = str(beside)
    return f"{path}{colon}{variant}", overrides


def _keys(overrides: Sequence[str]) -> list[str]:
    """The keys that are set on the command line."""
    return [match[1] for override in overrides if (match := _OVERRIDE.match(override))]


def _read_config(file: str, overrides: Sequence[str]) -> ConfigDict:
    """The config of a file with the overrides in it."""
    config, _ = _parse(file, [])  # first the plain one: it knows which keys there are
    for key in _keys(overrides):
        if key not in config:
            raise ConfigError(f"unknown key --config.{key}{did_you_mean(key, config)}")
    try:
        config, positional = _parse(file, overrides)
    except flags.UnrecognizedFlagError as error:
        known = [f"config.{key}" for key in config] + ["config", "debug", "help"]
        raise ConfigError(f"unknown option --{error.flagname}{did_you_mean(error.flagname, known, '--')}") from None
    except flags.IllegalFlagValueError as error:
        given = re.match(r"flag (--config\.(\w+)=.*?): ", str(error), re.DOTALL)
        expected = _EXPECTED.get(config.get_type(given[2]), "another value")
        raise ConfigError(f"{given[1]} is not possible: give {expected}") from None
    except flags.Error as error:
        raise ConfigError(f"{error}: settings are given as --config.KEY=VALUE") from None
    if positional:
        raise ConfigError(f"unexpected {positional[0]!r}: settings are given as --config.KEY=VALUE, quoted if need be")
    return config


def _parse(file: str, overrides: Sequence[str]) -> tuple[ConfigDict, list[str]]:
    """What config_flags makes of the arguments: the config, and what is no option."""
    arguments = ["main.py", f"--config={file}", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    positional = values(arguments)[1:]
    return values["config"].value, positional


def _descriptions() -> dict[str, str]:
    """Name and first line of each config file."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(_configs().glob("[!_]*.py"))}
    return {name: text.split('"""')[1].splitlines()[0] for name, text in texts.items()}


def _help(file: str, config: ConfigDict) -> str:
    path = Path(file.partition(":")[0])
    comments: dict[str, str] = {}
    for source in (Path(base.__file__), path):
        comments |= _KEY_COMMENT.findall(source.read_text(encoding="utf-8"))
    usage = "usage: paligemma-jax [--config=FILE] [--config.KEY=VALUE ...] [--help] [--version] [--debug]"
    lines = [usage, "", "runs:"]
    lines += [f"  --config.run={name:<10} {text}" for name, text in RUNS.items()]
    lines += ["", f"config files ({_DEFAULT_CONFIG} when none is given):"]
    lines += [f"  --config=configs/{f'{name}.py':<12} {text}" for name, text in _descriptions().items()]
    lines += ["", f"keys of {path.name}, with their values:"]
    order = {key: i for i, key in enumerate(comments)}
    keys = sorted(config, key=lambda key: order.get(key, len(order)))  # as in the files
    settings = {key: f"--config.{key}={config[key]}" for key in keys}
    width = max(len(text) for text in settings.values() if len(text) < 48)
    lines += [f"  {text:<{width}}  {comments.get(key, '')}".rstrip() for key, text in settings.items()]
    lines += ["", "--debug shows tracebacks and the logs of libraries."]
    return "\n".join(lines)
