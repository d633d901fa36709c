"""What may be typed in a chat: a prompt, a picture, or a command after a slash."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from paligemma_jax.errors import ConfigError
from paligemma_jax.runs import line_editor
from paligemma_jax.runs.settings import did_you_mean
from paligemma_jax.tasks.prompts import TASKS

SETTINGS = (  # keys of the config that may be changed between two prompts
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "speculate"),
    *("constrain", "min_score", "nms", "output_dir"),
)
_EXAMPLES = {"caption": "en", "answer": "en QUESTION", "question": "en ANSWER", "ocr": ""}
_PROMPTS = {name: _EXAMPLES.get(name, "CLASS ; CLASS") for name in TASKS}
_OTHERS = {
    "image": ("PATH", "talk about another picture: a path or URL, quoted if you like; alone, say which it is"),
    "set": ("KEY VALUE", f"change a setting, of {', '.join(SETTINGS)}; alone, show them all"),
    "help": ("", "show this"),
    "quit": ("", "leave; so does Ctrl-D"),
}
_PLAIN = {"help": "help", "exit": "quit", "quit": "quit"}  # words that need no slash
_BOOLEANS = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}


@dataclasses.dataclass(frozen=True)
class Command:
    """What is to be done: "prompt", "image", "set", "help" or "quit", and with what."""

    name: str
    rest: str = ""


def read(line: str, is_picture: Callable[[str], bool]) -> Command | None:
    """What a line asks for; None for an empty one.

    Args:
      is_picture: whether there is a picture of that name; its path alone is then as good as a command.

    Raises:
      ConfigError: there is no such command.
    """
    line = line.strip(" \t")
    if not line:
        return None
    if line in _PLAIN:
        return Command(_PLAIN[line])
    path = line_editor.unescaped(line)
    if is_picture(path):
        return Command("image", path)
    if not line.startswith("/"):
        return Command("prompt", line)
    word, _, rest = line[1:].partition(" ")
    rest = rest.strip(" \t")
    if word in _PROMPTS:
        return Command("prompt", f"{word} {rest}".rstrip())
    if word == "exit":
        return Command("quit")
    if word not in _OTHERS:
        raise ConfigError(f"there is no command /{word}{did_you_mean(word, [*_PROMPTS, *_OTHERS], '/')}")
    return Command(word, line_editor.unescaped(rest) if word == "image" else rest)


def help_text() -> str:
    """All commands, one a line."""
    commands = {f"/{name} {example}".rstrip(): f"the prompt {name!r}" for name, example in _PROMPTS.items()}
    commands |= {f"/{name} {rest}".rstrip(): text for name, (rest, text) in _OTHERS.items()}
    width = max(map(len, commands))
    first = "type a prompt and press Enter, or the path of a picture, or a command. Ctrl-C stops an answer."
    return "\n".join([first, *(f"  {name:<{width}}  {text}" for name, text in commands.items())])


def completions(line: str) -> list[str]:
    """What a line may become with Tab: commands, settings, and paths."""
    word, space, rest = line.partition(" ")
    if not line.startswith("/") or "/" in word[1:]:
        return line_editor.paths(line)
    if not space:
        return [f"/{name} " for name in (*_PROMPTS, *_OTHERS) if name.startswith(word[1:])] or line_editor.paths(line)
    if word == "/image":
        return [f"{word} {path}" for path in line_editor.paths(rest)]
    if word == "/set":
        key, has_value, value = rest.partition(" ")
        if not has_value:
            return [f"{word} {name} " for name in SETTINGS if name.startswith(key)]
        if key == "output_dir":
            return [f"{word} {key} {path}" for path in line_editor.paths(value)]
    return []


def shown(config: ConfigDict) -> str:
    """The settings, one a line."""
    width = max(map(len, SETTINGS))
    return "\n".join(f"  {name:<{width}}  {config[name]}" for name in SETTINGS)


def setting(config: ConfigDict, text: str) -> Mapping[str, Any]:
    """The key and value of "KEY VALUE" or "KEY=VALUE", the value of the key's type.

    Raises:
      ConfigError: there is no such setting, or it cannot have this value.
    """
    key, _, value = text.replace("=", " ", 1).partition(" ") if "=" in text.split(" ")[0] else text.partition(" ")
    value = value.strip(" \t")
    if key not in SETTINGS:
        raise ConfigError(f"there is no setting {key!r}{did_you_mean(key, SETTINGS)}")
    kind = config.get_type(key)
    if kind is str:
        return {key: line_editor.unescaped(value)}
    if kind is bool:
        if value.lower() not in _BOOLEANS:
            raise ConfigError(f"{key}={value!r} is not possible: give on or off")
        return {key: _BOOLEANS[value.lower()]}
    try:
        number = kind(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{key}={value!r} is not possible: give {'an integer' if kind is int else 'a number'}")
    return {key: number}
