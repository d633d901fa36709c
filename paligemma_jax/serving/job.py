"""A request on its way through the engine: laid out in its client's thread, then lengthened look by look."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np

import paligemma_jax as pj
from paligemma_jax.engine.constraints import grammar
from paligemma_jax.engine.generate import check_length
from paligemma_jax.errors import ImageError, NumericsError, PromptError, SamplingError
from paligemma_jax.processing.image import load_image
from paligemma_jax.processing.processor import identity
from paligemma_jax.processing.tokenizer import StreamDecoder
from paligemma_jax.serving.answer import Answer
from paligemma_jax.serving.events import Event, Finished, Piece
from paligemma_jax.serving.pictures import digest
from paligemma_jax.serving.programs import Programs, needs_of, table_fits
from paligemma_jax.serving.settings import EngineSettings
from paligemma_jax.serving.shown import Shown, TopLogprobs
from paligemma_jax.serving.text import StoppingText
from paligemma_jax.tasks.output import Output, Timing
from paligemma_jax.tasks.prompts import Prompt


@dataclasses.dataclass(frozen=True)
class Tokens:
    """New tokens of an answer with their scores, [n] each.

    done: nothing follows.
    time: when they were there.
    top: the most likely tokens in the place of each [n, K], where the request asks for them.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    near: np.ndarray
    expected: np.ndarray
    done: bool
    time: float
    top: TopLogprobs | None = None


@dataclasses.dataclass(frozen=True)
class Laid:
    """A request as the programs take it.

    prompt: i32 [T], its tokens, those of images included.
    images: pixels f32 [S, S, 3] of each, by their digests, in order.
    table: of its grammar, [nodes, F].
    needs: see `programs.needs_of`.
    usual: whether a state of the usual size has room for the prompt.
    """

    prompt: np.ndarray
    images: tuple[tuple[bytes, np.ndarray], ...]
    options: pj.GenerateOptions
    table: np.ndarray
    needs: frozenset[str]
    usual: bool


def lay_out(model: pj.PaliGemma, programs: Programs, request: pj.Request, limits: EngineSettings) -> Laid:
    """Check a request, read its images and lay out its prompt.

    Raises:
      PromptError, ImageError, SamplingError: see the message.
    """
    options, prompt, num_images = request.options, request.prompt, len(request.images)
    if options.sampling.num_beams > 1:
        beams = f"num_beams={options.sampling.num_beams}"
        raise SamplingError(f"{beams} cannot be served together with other requests: give 1, or use generate")
    if options.max_new_tokens > limits.max_new_tokens:
        raise SamplingError(
            f"max_new_tokens={options.max_new_tokens} is more than the {limits.max_new_tokens} that are served: "
            "give fewer"
        )
    if num_images > limits.max_images:
        raise ImageError(f"a request has {num_images} images, at most {limits.max_images} are served: give fewer")
    batch = model.processor.layout([list(range(num_images))], [prompt])
    check_length(model.config, batch, [options])
    length = int(batch.length[0])
    num_text = length - num_images * model.config.vision.num_tokens
    if num_text > limits.max_prompt_tokens:
        most = limits.max_prompt_tokens
        raise PromptError(f"a prompt has {num_text} tokens, at most {most} are served: shorten it")
    table = _table(model, prompt if options.constrain and prompt.labels else None)
    if not table_fits(table, programs.largest):
        raise PromptError(f"{len(prompt.labels)} classes are too many to constrain an answer: ask for fewer at once")
    constrained = options.constrain and bool(prompt.labels)
    usual = bool(programs.prompt_size(programs.usual, num_images, length)) and table_fits(table, programs.usual)
    images = _read_images(model, request)
    return Laid(batch.tokens[0, :length], images, options, table, needs_of(options, constrained), usual)


def _table(model: pj.PaliGemma, prompt: Prompt | None) -> np.ndarray:
    return grammar.tables(model.processor.tokenizer, [prompt], model.config, min_nodes=4)[0]


def _read_images(model: pj.PaliGemma, request: pj.Request) -> tuple[tuple[bytes, np.ndarray], ...]:
    read: dict = {}
    for source in request.images:
        if identity(source) not in read:
            pixels = model.processor.image_settings.to_pixels(load_image(source))
            read[identity(source)] = digest(pixels), pixels
    return tuple(read[identity(source)] for source in request.images)


class Job:
    """A request in the engine, and its answer so far.

    Args:
      id_: its number.
      laid: the request.
      stop: strings that end the answer.
      submitted: when it came.
      num_top: how many of the most likely tokens it asks for.
    """

    def __init__(
        self,
        model: pj.PaliGemma,
        id_: int,
        laid: Laid,
        answer: Answer,
        stop: Sequence[str],
        submitted: float,
        num_top: int,
    ):
        self.id, self.laid, self.answer, self.num_top = id_, laid, answer, num_top
        self.admitted = self.first = math.nan
        self.said = 0  # tokens that the device has chosen
        self.ended = False
        self._submitted = submitted
        self._eos = frozenset(model.config.eos_token_ids)
        self._decoder = StreamDecoder(model.processor.tokenizer)
        self._stopping = StoppingText(stop)
        self._text: list[str] = []
        self._parts: list[Tokens] = []

    @property
    def num_positions(self) -> int:
        """Positions that are in use."""
        return len(self.laid.prompt) + self.said

    def read(self, shown: Shown, row: int, now: float) -> Tokens:
        """What a program shows of the job's row that was not read before."""
        step, done = int(shown.status[0, row]), bool(shown.status[1, row])
        count, self.said = step - self.said, step
        new = slice(shown.tokens.shape[1] - count, None)
        arrays = (shown.tokens, shown.scores.logprobs, shown.scores.near, shown.scores.expected)
        top = shown.top_of(row, count) if self.num_top else None
        return Tokens(*(array[row, new] for array in arrays), done, now, top)

    def grow(self, new: Tokens) -> Iterator[Event]:
        """What the client hears of new tokens; NumericsError when they were chosen without reason."""
        if not np.isfinite(new.logprobs).all():
            raise NumericsError(
                "the model's numbers are NaN or infinite in this answer: the weights are damaged, or float16 is too "
                "small; `generate` says where they arise"
            )
        if not self._parts:
            self.first = new.time
        text, count = "", 0
        for id_ in new.ids:
            count += 1
            if id_ not in self._eos:
                text += self._stopping.feed(self._decoder.feed(id_))
            if self._stopping.stopped:
                break
        else:
            if new.done:
                text += self._stopping.feed(self._decoder.finish()) + self._stopping.finish()
        arrays = (array[:count] for array in (new.ids, new.logprobs, new.near, new.expected))
        top = jax.tree.map(lambda x: x[:count, : self.num_top], new.top)
        new = Tokens(*arrays, new.done or self._stopping.stopped, new.time, top)
        self._text.append(text)
        self._parts.append(new)
        yield Piece(text, new.ids, new.logprobs, top)
        if new.done:
            self.ended = True
            yield self._finished(new.time)

    def _finished(self, now: float) -> Finished:
        names = ("ids", "logprobs", "near", "expected")
        ids, logprobs, near, expected = (np.concatenate([getattr(p, name) for p in self._parts]) for name in names)
        ended = "eos" if ids[-1] in self._eos else "length"
        reason = "stop" if self._stopping.stopped else ended
        per_token = 1e3 * (now - self.first) / (len(ids) - 1) if len(ids) > 1 else None
        timing = Timing(0.0, 1e3 * (self.first - self.admitted), per_token, len(ids))
        output = Output("".join(self._text), ids, logprobs, reason, timing, near, expected)
        seconds = (time - self._submitted for time in (self.admitted, self.first, now))
        top = jax.tree.map(lambda *parts: np.concatenate(parts), *(part.top for part in self._parts))
        return Finished(output, reason, *seconds, top)


def check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Stop strings; SamplingError for what is none."""
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise SamplingError(f"stop={string!r} is not possible: give texts that are not empty")
    return strings
