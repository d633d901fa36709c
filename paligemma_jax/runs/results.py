"""Answers to what the user sees: text or JSON on stdout, notes on stderr, drawn pictures in a folder."""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.errors import CheckpointError
from paligemma_jax.files import Stems, expanded, replacing
from paligemma_jax.runs.exports import Exports
from paligemma_jax.runs.films import Films
from paligemma_jax.runs.notes import note
from paligemma_jax.runs.questions import Question, together
from paligemma_jax.runs.sources import Source, plain
from paligemma_jax.tasks import export
from paligemma_jax.tasks.classes import UNNAMED
from paligemma_jax.tasks.confidence import words_logprob
from paligemma_jax.tasks.draw import draw
from paligemma_jax.tasks.prompts import TASK_WORDS, Prompt, advice, read_prompt
from paligemma_jax.tasks.select import Selection, select

_DOUBT = -0.7  # mean log-probability of a token of an answer's words: about one half (benchmarks/results/doubt.md)
_OBJECT_TOKENS = 8  # of an object without mask, with a short label and what goes before it


def warn_about_free_prompts(config: ConfigDict, prompts: list[str]) -> None:
    """Checkpoints that are to be fine-tuned know the prompts of their training only."""
    free = next((prompt for prompt in prompts if read_prompt(prompt).task is None), None)
    if free is not None and "-pt-" in f"{config.checkpoint} {config.hub_id}":
        words = ", ".join(sorted(TASK_WORDS))
        note(f"note: pt checkpoints answer free prompts such as {free!r} badly: begin with {words}, or take a mix one")


class Results:
    """Where the answers of a run go.

    Args:
      model: what made the answers.
      config: format, output_dir, loc_scale, mask_vae, min_score, nms and video_fps are used.
      several: there is more than one answer, so that each says what it is about.
      exports: take the objects too.
    """

    def __init__(self, model: pj.PaliGemma, config: ConfigDict, several: bool = False, exports: Exports | None = None):
        self._model = model
        self._config = config
        self._several = several
        self._exports = exports
        self._directory = expanded(config.output_dir) if config.output_dir else None
        self._stems = Stems()
        if self._directory:
            self._directory.mkdir(parents=True, exist_ok=True)  # a bad place is known before the work
            self._films = Films(self._directory, self._stems, config.video_fps)

    def head(self, name: str, prompt: str) -> None:
        """Say whose answer comes next, if the output would not tell."""
        if self._several and self._config.format == "text":
            print(f"==> {name}: {prompt} <==", flush=True)

    def report(self, source: Source, question: Question, outputs: Sequence[pj.Output], streamed: bool = False) -> None:
        """Print the answer to a question, put together from those to its parts, unless it is `streamed` already.

        Its objects are drawn and exported, and what is odd about it is noted.
        """
        about = f"{source.name}: {question.prompt}: " if self._several else ""
        answered = list(zip(outputs, question.parts, strict=True))
        start = time.perf_counter()
        parsed = [self._objects(output, part, source.image.size, about) for output, part in answered]
        masks_s = time.perf_counter() - start
        dropped = [texts for _, texts in parsed]
        chosen = select([item for found, _ in parsed for item in found], self._config.min_score, self._config.nms)
        objects = chosen.kept
        answer = together(outputs)
        as_json = self._config.format == "json" and not streamed
        if not (as_json or streamed):
            print(answer.text, flush=True)
        start = time.perf_counter()
        files = self._draw(source, question.prompt, objects)
        draw_s = time.perf_counter() - start
        if self._exports:
            self._exports.add(source, objects)
        if as_json:
            texts = list(itertools.chain.from_iterable(dropped))
            record = export.record(source.name, question.prompt, answer, objects, texts, files, self._model.load_s)
            record["timing"] |= {"masks_ms": 1e3 * masks_s, "draw_ms": 1e3 * draw_s}
            print(json.dumps(record, ensure_ascii=False), flush=True)
        for item in () if as_json else objects:
            note(f"  {about}{describe(item)}")
        oddities = (self._oddities(*pair, *read, len(outputs) > 1) for pair, read in zip(answered, parsed, strict=True))
        for oddity in itertools.chain(self._left_out(chosen), *oddities):
            note(f"note: {about}{oddity}")

    def close(self) -> None:
        """Write what is known at the end only."""
        if self._directory:
            self._films.close()
        if self._exports:
            self._exports.close()

    def _objects(
        self, output: pj.Output, prompt: Prompt, size: tuple[int, int], about: str
    ) -> tuple[list[pj.Detection], list[str]]:
        """The objects of an answer, with masks if they can be decoded, and the incomplete ones."""
        options = {"loc_scale": self._config.loc_scale, "labels": prompt.labels}
        try:
            return self._model.objects(output, size, **options)
        except CheckpointError as error:
            if self._config.mask_vae:
                raise
            note(f"note: {about}boxes only, {error}")
            return self._model.objects(output, size, **options, masks=False)

    def _draw(self, source: Source, prompt: str, objects: list[pj.Detection]) -> list[Path]:
        """Write the drawn picture and the masks; returns the files of the masks."""
        if not self._directory or not (objects or source.video):
            return []
        drawn = draw(source.image, objects)
        if source.video:
            self._films.add(source, prompt, drawn)
        if not objects:
            return []
        return write_drawn(drawn, objects, self._directory, self._stems.new(plain(source.stem)))

    def _left_out(self, chosen: Selection) -> Iterator[str]:
        """What is to be said about objects that were not kept."""
        counts = {
            f"objects with a score below min_score={self._config.min_score}": chosen.below_score,
            "duplicates": chosen.duplicates,
            f"objects under a better one of the same label (nms={self._config.nms})": chosen.suppressed,
        }
        yield from (f"{what}, left out: {count}" for what, count in counts.items() if count)

    def _oddities(
        self, output: pj.Output, prompt: Prompt, found: list[pj.Detection], dropped: list[str], is_part: bool
    ) -> Iterator[str]:
        """What a user should know about an answer."""
        which = f"{prompt.text}: " if is_part else ""
        names, task = " ; ".join(prompt.labels), prompt.task
        if output.finish_reason == "length":
            yield f"{which}cut off after {len(output.tokens)} tokens, max_new_tokens allows no more"
        if dropped:
            yield f"{which}incomplete objects in the answer, left out: {len(dropped)}"
        room = self._config.max_new_tokens - len(output.tokens)
        if self._config.constrain and names and room < _OBJECT_TOKENS + task.num_codes:
            yield f"{which}max_new_tokens={self._config.max_new_tokens} left no room for another object"
        if task is not None and task.has_objects and not names:
            yield f"{which}no class is named: say what to look for, as in {task.name} cat ; dog"
        elif not output.text.strip():
            yield which + (f"no boxes: no {names} was found" if names else "the answer is empty")
        logprob = words_logprob(output, self._model.processor.tokenizer)
        if logprob is not None and logprob < _DOUBT:
            yield f"{which}the model doubts this answer: its words have a mean log-probability of {logprob:.2f}"
        if (better := advice(prompt)) and not (found or dropped if read_prompt(better).labels else output.text.strip()):
            yield f'{which}models know lower-case words, names with " ; " between them: try "{better}"'


def write_drawn(drawn: Image.Image, objects: Sequence[pj.Detection], directory: Path, stem: str) -> list[Path]:
    """Write a picture with its objects drawn on it, and their masks, whose files are returned; say so."""
    path = directory / f"{stem}_drawn.png"
    with replacing(path) as temporary:
        drawn.save(temporary, format="PNG")
    files = export.save_masks(objects, directory, stem)
    note(f"wrote {path}" + (f" and {len(files)} mask{'s' * (len(files) > 1)}" if files else ""))
    return files


def describe(item: pj.Detection) -> str:
    """An object in a line: "circle: x 67..221, y 44..196, score 0.88"."""
    x0, y0, x1, y1 = (round(v) for v in item.box)
    score = "" if item.score is None else f", score {item.score:.2f}"
    mask = "" if item.mask is None else f", mask of {int(item.mask.sum())} pixels"
    return f"{item.label or UNNAMED}: x {x0}..{x1}, y {y0}..{y1}{score}{mask}"
