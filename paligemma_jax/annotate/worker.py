"""A model that annotates: pictures are read and decoded by threads, and answered in batches, each prompt in its own."""

import dataclasses
import hashlib
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

import paligemma_jax as pj
from paligemma_jax.annotate import rows as records
from paligemma_jax.annotate.rows import Row
from paligemma_jax.annotate.sources import Source
from paligemma_jax.buckets import power_of_two
from paligemma_jax.engine.generate import check_length
from paligemma_jax.errors import CheckpointError, ConfigError, ImageError, NumericsError, UserError
from paligemma_jax.processing.decode import decode
from paligemma_jax.processing.image import ImageSettings
from paligemma_jax.tasks import coco
from paligemma_jax.tasks.prompts import Prompt
from paligemma_jax.tasks.select import select


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked about each picture, and what is kept of the answers.

    prompts: there is a row for each.
    options: how answers are generated.
    min_score, nms: as for `tasks.select.select`.
    loc_scale: as for `parse`.
    model, run_id: what rows say of their origin.
    """

    prompts: tuple[Prompt, ...]
    options: pj.GenerateOptions = dataclasses.field(default_factory=pj.GenerateOptions)
    min_score: float = 0.0
    nms: float = 0.0
    loc_scale: int = 1023
    model: str = ""
    run_id: str = ""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that was read, or why it could not be.

    name: what the user calls it.
    content: the `hashlib` object of its bytes' SHA-256, None where there are none.
    size: (width, height) in pixels, upright.
    image: as the network takes it, resized; None when `error` says why not.
    """

    name: str
    content: Any
    size: tuple[int, int] | None = None
    image: Image.Image | None = dataclasses.field(default=None, repr=False)
    error: str = ""


def read_picture(source: Source, settings: ImageSettings) -> Picture:
    """Read, decode and resize a picture; what goes wrong is in the result. Of the original nothing stays in memory."""
    content = None
    try:
        data = source.read()
        content = hashlib.sha256(data)
        image = decode(io.BytesIO(data), source.name)
        return Picture(source.name, content, image.size, settings.resized(image))
    except ImageError as error:
        return Picture(source.name, content, error=str(error))


class Annotator:
    """Makes rows of pictures.

    Raises:
      PromptError: a prompt that does not fit the model.
      CheckpointError: masks are asked for, and cannot be decoded.
      ConfigError: they are asked for, and pycocotools is not installed.
    """

    def __init__(self, model: pj.PaliGemma, job: Job):
        self._model, self._job = model, job
        for prompt in job.prompts:  # what would fail for every picture is known before the first
            check_length(model.config, model.processor.layout([[0]], [prompt]), [job.options])
        self._has_masks = True
        try:
            model.mask_decoder()
            coco.require()
        except (CheckpointError, ConfigError):
            if any(prompt.task and prompt.task.num_codes for prompt in job.prompts):
                raise
            self._has_masks = False  # an answer may hold some all the same

    def read(self, source: Source) -> Picture:
        """A picture as `answer` takes it; safe in threads."""
        return read_picture(source, self._model.processor.image_settings)

    def answer(self, pictures: Sequence[Picture]) -> list[list[Row]]:
        """The rows of each picture, one for each prompt.

        What cannot be answered is a failed row, and no reason for another one to fail.

        Raises:
          NumericsError: no picture of several can be answered, so the weights are at fault.
        """
        prompts = self._job.prompts
        answers = iter(self._ask([picture for picture in pictures if picture.image is not None], prompts))
        rows = []
        for picture in pictures:
            about = [picture.error] * len(prompts) if picture.image is None else next(answers)
            rows.append([self._row(picture, *pair) for pair in zip(prompts, about, strict=True)])
        return rows

    def _ask(self, pictures: Sequence[Picture], prompts: Sequence[Prompt]) -> list[list[pj.Output | str]]:
        """The answers about each picture to each prompt; what went wrong in place of one that is not to be had."""
        if not pictures:
            return []
        try:
            by_prompt = self._together([picture.image for picture in pictures], prompts)
            return [list(answers) for answers in zip(*by_prompt, strict=True)]
        except UserError as error:
            if len(pictures) > 1:
                apart = [self._ask([picture], prompts)[0] for picture in pictures]
                if isinstance(error, NumericsError) and all(isinstance(a, str) for row in apart for a in row):
                    raise
                return apart
            if len(prompts) > 1:
                return [[self._ask(pictures, [prompt])[0][0] for prompt in prompts]]
            return [[str(error)]]

    def _together(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[list[pj.Output]]:
        """The answers to each prompt about each image, which are embedded once."""
        padding = [images[0].copy() for _ in range(power_of_two(len(images)) - len(images))]  # or more programs compile
        soft_tokens = self._model.embed_image([*images, *padding])[: len(images)]
        several = {"image_embeddings": soft_tokens, "options": self._job.options, "batch_size": len(images)}
        return [self._model.generate(None, [prompt] * len(images), **several) for prompt in prompts]

    def _row(self, picture: Picture, prompt: Prompt, answer: pj.Output | str) -> Row:
        job = self._job
        key = records.key_of(picture.content, picture.name, prompt.text)
        origin = {"model": job.model, "run_id": job.run_id}
        if isinstance(answer, str):
            return records.failed(key, picture.name, picture.size, prompt, answer) | origin
        found, _ = self._model.objects(answer, picture.size, job.loc_scale, self._has_masks, prompt.labels)
        kept = select(found, job.min_score, job.nms).kept
        return records.answered(key, picture.name, picture.size, prompt, answer, kept) | origin
