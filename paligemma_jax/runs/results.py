"""Answers to what the user sees: text or JSON on stdout, notes on stderr, drawn pictures in a folder."""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.errors import CheckpointError
from paligemma_jax.files import replacing
from paligemma_jax.runs.exports import Exports
from paligemma_jax.runs.films import Films
from paligemma_jax.runs.notes import note
from paligemma_jax.runs.questions import Question, together
from paligemma_jax.runs.sources import Source, Stems, plain
from paligemma_jax.tasks import export, select
from paligemma_jax.tasks.classes import class_names
from paligemma_jax.tasks.detection import NUM_CODES
from paligemma_jax.tasks.draw import draw

_OBJECT_TOKENS = {"detect": 8, "segment": 8 + NUM_CODES}  # of an object with a short label and what goes before it
_TASK_WORDS = ("answer", "cap", "caption", "describe", "detect", "ocr", "question", "segment")


def warn_about_free_prompts(config: ConfigDict, prompts: list[str]) -> None:
    """Checkpoints that are to be fine-tuned know the prompts of their training only."""
    free = next((p for p in prompts if not p.split() or p.split()[0] not in _TASK_WORDS), None)
    if free is not None and "-pt-" in f"{config.checkpoint} {config.hub_id}":
        words = ", ".join(_TASK_WORDS)
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
        self._directory = Path(config.output_dir).expanduser() if config.output_dir else None
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
        found = [item for output in outputs for item in self._objects(output, source.image.size, about)]
        objects, left_out = _choose(found, self._config.min_score, self._config.nms)
        answer = together(outputs)
        as_json = self._config.format == "json" and not streamed
        if not (as_json or streamed):
            print(answer.text, flush=True)
        files = self._draw(source, question.prompt, objects)
        if self._exports:
            self._exports.add(source, objects)
        if as_json:
            record = self._record(source, question.prompt, outputs, objects, files)
            print(json.dumps(record, ensure_ascii=False), flush=True)
        for item in () if as_json else objects:
            note(f"  {about}{_describe(item)}")
        for oddity in itertools.chain(left_out, self._oddities(question, outputs, source.image)):
            note(f"note: {about}{oddity}")

    def close(self) -> None:
        """Write what is known at the end only."""
        if self._directory:
            self._films.close()
        if self._exports:
            self._exports.close()

    def _objects(self, output: pj.Output, size: tuple[int, int], about: str) -> list[pj.Detection]:
        """The objects of an answer, with masks if they can be decoded."""
        try:
            return self._model.objects(output, size, self._config.loc_scale)
        except CheckpointError as error:
            if self._config.mask_vae:
                raise
            note(f"note: {about}boxes only, {error}")
            return self._model.objects(output, size, self._config.loc_scale, masks=False)

    def _draw(self, source: Source, prompt: str, objects: list[pj.Detection]) -> list[Path]:
        """Write the drawn picture and the masks; returns the files of the masks."""
        if not self._directory or not (objects or source.video):
            return []
        drawn = draw(source.image, objects)
        if source.video:
            self._films.add(source, prompt, drawn)
        if not objects:
            return []
        stem = self._stems.new(plain(source.stem))
        path = self._directory / f"{stem}_drawn.png"
        with replacing(path) as temporary:
            drawn.save(temporary, format="PNG")
        files = export.save_masks(objects, self._directory, stem)
        note(f"wrote {path}" + (f" and {len(files)} mask{'s' * (len(files) > 1)}" if files else ""))
        return files

    def _record(
        self, source: Source, prompt: str, outputs: Sequence[pj.Output], objects: list[pj.Detection], files: list[Path]
    ) -> dict[str, Any]:
        answer = together(outputs)
        return {
            "image": source.name,
            "prompt": prompt,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            **export.to_json(objects, files),
            "details": export.to_details(objects),
            "dropped": [text for output in outputs for text in self._dropped(output, source.image)],
            "timing": {"load_s": self._model.load_s, **dataclasses.asdict(answer.timing)},
        }

    def _dropped(self, output: pj.Output, image: Image.Image) -> list[str]:
        """The incomplete objects of an answer."""
        return pj.parse(output.text, image.size, self._config.loc_scale)[1]

    def _oddities(self, question: Question, outputs: Sequence[pj.Output], image: Image.Image) -> Iterator[str]:
        """What a user should know about an answer."""
        for part, output in zip(question.parts, outputs, strict=True):
            which = f"{part}: " if len(outputs) > 1 else ""
            task, names = part.split()[0] if part.split() else "", " ; ".join(class_names(part))
            if output.finish_reason == "length":
                yield f"{which}cut off after {len(output.tokens)} tokens, max_new_tokens allows no more"
            if dropped := self._dropped(output, image):
                yield f"{which}incomplete objects in the answer, left out: {len(dropped)}"
            room = self._config.max_new_tokens - len(output.tokens)
            if self._config.constrain and names and room < _OBJECT_TOKENS[task]:
                yield f"{which}max_new_tokens={self._config.max_new_tokens} left no room for another object"
            if task in _OBJECT_TOKENS and not names:
                yield f"{which}no class is named: say what to look for, as in {task} cat ; dog"
            elif not output.text.strip():
                yield which + (f"no boxes: no {names} was found" if names else "the answer is empty")


def _choose(found: list[pj.Detection], min_score: float, nms: float) -> tuple[list[pj.Detection], list[str]]:
    """The objects to keep, and what is to be said about the others."""
    good = select.above(found, min_score)
    single = select.without_duplicates(good)
    kept = select.suppress(single, nms) if nms else single
    counts = {
        f"objects with a score below min_score={min_score}": len(found) - len(good),
        "duplicates": len(good) - len(single),
        f"objects under a better one of the same label (nms={nms})": len(single) - len(kept),
    }
    return kept, [f"{what}, left out: {count}" for what, count in counts.items() if count]


def _describe(item: pj.Detection) -> str:
    x0, y0, x1, y1 = (round(v) for v in item.box)
    score = "" if item.score is None else f", score {item.score:.2f}"
    mask = "" if item.mask is None else f", mask of {int(item.mask.sum())} pixels"
    return f"{item.label}: x {x0}..{x1}, y {y0}..{y1}{score}{mask}"
