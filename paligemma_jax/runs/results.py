"""Answers to what the user sees: text or JSON on stdout, notes on stderr, drawn pictures in a folder."""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.errors import CheckpointError, ImageError, error_line
from paligemma_jax.files import Stems, expanded, replacing
from paligemma_jax.processing.fetch import label
from paligemma_jax.runs.films import Films
from paligemma_jax.runs.folder import Folder, make_folder, refuse_used
from paligemma_jax.runs.notes import note
from paligemma_jax.runs.questions import Question, together
from paligemma_jax.runs.sources import Source, plain
from paligemma_jax.tasks import export
from paligemma_jax.tasks.classes import UNNAMED
from paligemma_jax.tasks.draw import draw
from paligemma_jax.tasks.prompts import TASK_WORDS, Prompt, read_prompt
from paligemma_jax.tasks.remarks import remarks
from paligemma_jax.tasks.select import Selection, select

_DRAWN = "_drawn"  # the end of the name of a drawn picture


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
      folder: `output_dir` where it keeps records; without one, nothing that is there already is replaced.
    """

    def __init__(self, model: pj.PaliGemma, config: ConfigDict, several: bool = False, folder: Folder | None = None):
        self._model = model
        self._config = config
        self._several = several
        self._folder = folder
        self._directory = expanded(config.output_dir) if config.output_dir else None
        if self._directory is None:
            return
        if folder is None:
            refuse_used(self._directory)
            make_folder(self._directory)
            self._stems = Stems(lambda stem: (self._directory / f"{stem}{_DRAWN}.png").exists())
        else:
            self._stems = Stems()
            for name in (name for record in folder.records() for name in record.get("files", ())):
                if (stem := Path(name).stem).endswith(_DRAWN):
                    self._stems.take(stem.removesuffix(_DRAWN))
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
        drawn, files = self._draw(source, question.prompt, objects)
        draw_s = time.perf_counter() - start
        texts = list(itertools.chain.from_iterable(dropped))
        record = export.record(source.name, question.prompt, answer, objects, texts, files, self._model.load_s)
        if as_json:
            record["timing"] |= {"masks_ms": 1e3 * masks_s, "draw_ms": 1e3 * draw_s}
            print(json.dumps(record, ensure_ascii=False), flush=True)
        if self._folder:
            kept = {key: value for key, value in record.items() if key != "timing"}  # the same in every run
            self._folder.add(
                kept
                | {"size": source.image.size, "stem": source.stem, "model": self._config.checkpoint}
                | {"exact_boxes": [item.box for item in objects], "files": [file.name for file in (*drawn, *files)]}
            )
        for item in () if as_json else objects:
            note(f"  {about}{describe(item)}")
        oddities = (self._oddities(*pair, *read, len(outputs) > 1) for pair, read in zip(answered, parsed, strict=True))
        for oddity in itertools.chain(self._left_out(chosen), *oddities):
            note(f"note: {about}{oddity}")

    def fail(self, name: str, error: ImageError) -> None:
        """Say that a picture cannot be answered about."""
        note(error_line(error))
        record = {"image": label(name), "error": str(error)}
        if self._config.format == "json":
            print(json.dumps(record, ensure_ascii=False), flush=True)
        if self._folder:
            self._folder.add(record)

    def close(self) -> None:
        """Finish the video whose frames came last."""
        if self._directory:
            self._films.close()

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

    def _draw(self, source: Source, prompt: str, objects: list[pj.Detection]) -> tuple[list[Path], list[Path]]:
        """Write the drawn picture and the masks; returns the drawn files, and those of the masks."""
        if not self._directory or not (objects or source.video):
            return [], []
        drawn = draw(source.image, objects)
        films = [self._films.add(source, prompt, drawn)] if source.video else []
        if not objects:
            return films, []
        path, files = write_drawn(drawn, objects, self._directory, self._stems.new(plain(source.stem)))
        return [*films, path], files

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
        limits = self._config.max_new_tokens, self._config.constrain
        tokenizer = self._model.processor.tokenizer
        about = f"{prompt.text}: " if is_part else ""
        yield from (about + remark for remark in remarks(output, prompt, found, dropped, *limits, tokenizer))


def write_drawn(
    drawn: Image.Image, objects: Sequence[pj.Detection], directory: Path, stem: str
) -> tuple[Path, list[Path]]:
    """Write a picture with its objects drawn on it, and their masks; say so, and return the files of both."""
    path = directory / f"{stem}{_DRAWN}.png"
    with replacing(path) as temporary:
        drawn.save(temporary, format="PNG")
    files = export.save_masks(objects, directory, stem)
    note(f"wrote {path}" + (f" and {len(files)} mask{'s' * (len(files) > 1)}" if files else ""))
    return path, files


def describe(item: pj.Detection) -> str:
    """An object in a line: "circle: x 67..221, y 44..196, score 0.88"."""
    x0, y0, x1, y1 = (round(v) for v in item.box)
    score = "" if item.score is None else f", score {item.score:.2f}"
    mask = "" if item.mask is None else f", mask of {int(item.mask.sum())} pixels"
    return f"{item.label or UNNAMED}: x {x0}..{x1}, y {y0}..{y1}{score}{mask}"
