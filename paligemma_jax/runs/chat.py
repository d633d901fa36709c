"""config.run=chat: prompts about one picture as they are typed, each answered on its own."""

import contextlib
import dataclasses
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
from paligemma_jax.runs import environment, settings
from paligemma_jax.runs import model as models
from paligemma_jax.runs.generate import stream_parts
from paligemma_jax.runs.notes import note
from paligemma_jax.runs.questions import Question
from paligemma_jax.runs.results import Results, warn_about_free_prompts
from paligemma_jax.runs.sources import Source
from paligemma_jax.tasks.prompts import check_form, read_prompt

_USUAL_PROMPT = "caption en"  # most are about as long, and so share its programs
_HELP = """type a prompt and press Enter: caption en, answer en how many cats are there?, detect cat, segment cat
  image PATH   change the picture (a path or URL)
  help         show this
  exit         leave; so do Ctrl-C and Ctrl-D"""


class Chat:
    """A conversation: the model, the picture it is about, and where answers go."""

    def __init__(self, model: pj.PaliGemma, config: ConfigDict, options: pj.GenerateOptions):
        self._model = model
        self._config = config
        self._options = options
        self._results = Results(model, config)
        self._source: Source
        self._soft_tokens: jax.Array

    def show(self, name: str, picture: Image.Image) -> None:
        """Talk about another picture."""
        self._soft_tokens = self._model.embed_image(picture)  # once, however many prompts follow
        self._source = Source(name, picture)
        note(f"picture: {name}, {picture.width} x {picture.height}")

    def answer(self, prompt: str) -> None:
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
    settings.choice(config)
    check_form(config.prompt_form)
    options = settings.generate_options(config, stream=True)
    models.check_weights(config)
    name, picture = _read(config.image)  # before the model is loaded
    profile = environment.profiled(config)
    usual = pj.Request((picture,), read_prompt(_USUAL_PROMPT), dataclasses.replace(options, constrain=False))
    chat = Chat(models.load(config, [usual]), config, options)
    with profile:
        chat.show(name, picture)
        _talk(chat)
    return 0


def _talk(chat: Chat) -> None:
    """Obey what the user types until there is no more, or Ctrl-C."""
    try:
        note("type a prompt, or help")
        for line in _lines():
            if line in ("exit", "quit"):
                break
            try:
                _obey(chat, line)
            except BrokenPipeError:
                raise
            except (pj.UserError, OSError) as error:
                note(error_line(error))
            except RuntimeError as error:
                note(error_line(environment.out_of_memory(error)))
    except KeyboardInterrupt:
        note("")


def _obey(chat: Chat, line: str) -> None:
    command, _, rest = line.partition(" ")
    if line == "help":
        note(_HELP)
    elif command == "image" and rest:
        chat.show(*_read(rest.strip()))  # the old picture stays when this cannot be read
    elif line:
        chat.answer(line)


def _read(name: str) -> tuple[str, Image.Image]:
    """The first picture of a path, URL, folder or glob, with its own name."""
    name = find_images(name, tell=note)[0]
    return label(name), load_image(name)


def _lines() -> Iterator[str]:
    """What the user types, without the white space around it, until the end of the input."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from (line.removeprefix("\ufeff").strip(" \t\r\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):  # some systems have none
        import readline  # noqa: F401 - gives `input` a history and a cursor
    while True:
        try:
            yield input("> ").strip(" \t")
        except EOFError:
            note("")
            return


def _speed(timing: pj.Timing) -> str:
    rate = f"{1e3 / timing.decode_ms_per_token:.1f} tokens/s (decode), " if timing.decode_ms_per_token else ""
    compiled = f", compiling {timing.compile_s:.1f} s" if timing.compile_s >= 0.1 else ""
    tokens = "token" if timing.new_tokens == 1 else "tokens"
    return f"{timing.new_tokens} {tokens}, {rate}prefill {timing.prefill_ms:.0f} ms{compiled}"
