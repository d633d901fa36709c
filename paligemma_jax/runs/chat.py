"""config.run=chat: prompts about one picture as they are typed, each answered on its own."""

import dataclasses
import os
import sys
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.errors import ConfigError, error_line
from paligemma_jax.processing.fetch import label
from paligemma_jax.processing.find import find_images
from paligemma_jax.processing.image import load_image
from paligemma_jax.runs import chat_commands, environment, line_editor, settings
from paligemma_jax.runs import model as models
from paligemma_jax.runs.chat_commands import Command
from paligemma_jax.runs.generate import stream_parts
from paligemma_jax.runs.notes import note
from paligemma_jax.runs.questions import Question
from paligemma_jax.runs.results import Results, warn_about_free_prompts
from paligemma_jax.runs.sources import Source
from paligemma_jax.tasks.prompts import check_form, read_prompt

_USUAL_PROMPT = "caption en"  # most are about as long, and so share its programs


class Chat:
    """A conversation: the model, the picture it is about, settings, and where answers go."""

    def __init__(self, model: pj.PaliGemma, config: ConfigDict):
        self._model = model
        self._config, self._options = config, options_of(config)
        self._results = Results(model, config)
        self._source: Source
        self._soft_tokens: jax.Array

    def obey(self, command: Command) -> None:
        """Do what was typed, "quit" excepted."""
        if command.name == "prompt":
            self._answer(command.rest)
        elif command.name == "help":
            note(chat_commands.help_text())
        elif command.name == "image":
            if command.rest:
                self.show(*read_picture(command.rest))  # the old picture stays when this cannot be read
            else:
                self._say_picture()
        elif command.rest:
            self._set(command.rest)
        else:
            note(chat_commands.shown(self._config))

    def show(self, name: str, picture: Image.Image) -> None:
        """Talk about another picture."""
        self._soft_tokens = self._model.embed_image(picture)  # once, however many prompts follow
        self._source = Source(name, picture)
        self._say_picture()

    def _say_picture(self) -> None:
        picture = self._source.image
        note(f"picture: {self._source.name}, {picture.width} x {picture.height}")

    def _set(self, text: str) -> None:
        """Change a setting; all stay as they are when its value cannot be."""
        changed = self._config.copy_and_resolve_references()
        changed.update(new := chat_commands.setting(changed, text))
        options = options_of(changed)
        if "output_dir" in new:
            self._results = Results(self._model, changed)
            self._config = changed
        self._config.update(new)  # which the results look at too
        self._options = options

    def _answer(self, prompt: str) -> None:
        """Stream the answer, then say how fast it came."""
        warn_about_free_prompts(self._config, [prompt])
        question = Question.of(prompt, self._config.prompt_form)
        outputs = stream_parts(self._model, question, self._soft_tokens, self._options)
        self._results.report(self._source, question, outputs, streamed=True)
        note(_speed(outputs[-1].timing))


def run(config: ConfigDict) -> int:
    """Talk until the user leaves."""
    if settings.one_of(config, "format", ("text", "json")) == "json":
        raise ConfigError("chat prints text while it is made: set format=text, or run=generate for JSON")
    unused = ("export", "save_embeddings", "load_embeddings", "prompts_file", "split_classes")
    settings.refuse(config, unused, "chat asks one prompt at a time")
    settings.loc_scale(config)
    check_form(config.prompt_form)
    options = options_of(config)
    models.check_weights(config)
    name, picture = read_picture(config.image)  # before the model is loaded
    profile = environment.profiled(config)
    usual = pj.Request((picture,), read_prompt(_USUAL_PROMPT), dataclasses.replace(options, constrain=False))
    chat = Chat(models.load(config, [usual]), config)
    with profile:
        chat.show(name, picture)
        return _talk(chat)


def options_of(config: ConfigDict) -> pj.GenerateOptions:
    """How answers are generated; what says which objects are kept is checked too."""
    settings.choice(config)
    return settings.generate_options(config, stream=True)


def _talk(chat: Chat) -> int:
    """Obey what is typed until there is no more; the exit status."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    note("type a prompt, or /help")
    for line in line_editor.lines("> ", chat_commands.completions) if is_terminal else _piped():
        try:
            command = chat_commands.read(line, _is_picture)
            if command is not None and command.name == "quit":
                break
            if command is not None:
                chat.obey(command)
        except KeyboardInterrupt:
            if not is_terminal:
                raise  # whoever pipes prompts wants to stop all of them
            note("\nstopped")
        except BrokenPipeError:
            raise
        except (pj.UserError, OSError) as error:
            note(error_line(error))
        except RuntimeError as error:
            note(error_line(environment.out_of_memory(error)))
    return 0


def read_picture(name: str) -> tuple[str, Image.Image]:
    """The first picture of a path, URL, folder or glob, with its own name."""
    name = find_images(name, tell=note)[0]
    return label(name), load_image(name)


def _is_picture(name: str) -> bool:
    """Whether a line is nothing but the path of a file, as terminals write one that is dropped on them."""
    try:
        return os.path.isfile(os.path.expanduser(name))
    except ValueError:  # no possible path
        return False


def _piped() -> Iterator[str]:
    """The lines of stdin, without the white space around them."""
    yield from (line.removeprefix("\ufeff").strip(" \t\r\n") for line in sys.stdin)


def _speed(timing: pj.Timing) -> str:
    rate = f"{1e3 / timing.decode_ms_per_token:.1f} tokens/s (decode), " if timing.decode_ms_per_token else ""
    compiled = f", compiling {timing.compile_s:.1f} s" if timing.compile_s >= 0.1 else ""
    tokens = "token" if timing.new_tokens == 1 else "tokens"
    return f"{timing.new_tokens} {tokens}, {rate}prefill {timing.prefill_ms:.0f} ms{compiled}"
