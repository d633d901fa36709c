"""A model that annotates: pictures are read and decoded by threads, and answered in batches, each prompt in its own."""

import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.annotate import rows as records
from paligemma_jax.annotate.rows import Row
from paligemma_jax.annotate.sources import Source
from paligemma_jax.buckets import power_of_two
from paligemma_jax.config import MASK_SIZE
from paligemma_jax.engine.generate import check_length
from paligemma_jax.errors import CheckpointError, ConfigError, ImageError, NumericsError, UserError
from paligemma_jax.models import mask_vae
from paligemma_jax.processing.decode import decode
from paligemma_jax.processing.image import ImageSettings
from paligemma_jax.tasks import coco
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.prompts import Prompt
from paligemma_jax.tasks.reading import NUM_CODES
from paligemma_jax.tasks.segmentation import attach_masks
from paligemma_jax.tasks.select import select

_MASKS = 4  # that are decoded at once: on a CPU more take longer each, and few are wasted

Answer = pj.Output | str  # or what went wrong


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

    def answer(self, pictures: Sequence[Picture]) -> list[list[Answer]]:
        """The answers about each picture, one for each prompt, or what went wrong in place of one.

        What cannot be answered is no reason for another picture to fail.

        Raises:
          NumericsError: no picture of several can be answered, so the weights are at fault.
        """
        prompts = self._job.prompts
        answers = iter(self._ask([picture for picture in pictures if picture.image is not None], prompts))
        return [[p.error] * len(prompts) if p.image is None else next(answers) for p in pictures]

    def rows(self, pictures: Sequence[Picture], answers: Sequence[Sequence[Answer]]) -> list[list[Row]]:
        """The rows of each picture for its answers; safe in a thread beside `answer`."""
        pairs = [list(zip(self._job.prompts, about, strict=True)) for about in answers]
        each = list(zip(pictures, pairs, strict=True))
        objects = [[self._objects(picture, *pair) for pair in about] for picture, about in each]
        decode = self._decoder(item.codes for about in objects for found in about for item in found)
        return [
            [self._row(picture, *pair, found, decode) for pair, found in zip(about, founds, strict=True)]
            for (picture, about), founds in zip(each, objects, strict=True)
        ]

    def _ask(self, pictures: Sequence[Picture], prompts: Sequence[Prompt]) -> list[list[Answer]]:
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

    def _objects(self, picture: Picture, prompt: Prompt, answer: Answer) -> list[Detection]:
        """The objects of an answer that are kept, their masks as codes."""
        if isinstance(answer, str):
            return []
        job = self._job
        found, _ = self._model.objects(answer, picture.size, job.loc_scale, masks=False, labels=prompt.labels)
        return select(found, job.min_score, job.nms).kept

    def _decoder(self, codes: Iterable[tuple[int, ...] | None]) -> Callable[[np.ndarray], np.ndarray]:
        """A function from codes [N, 16] to masks [N, 64, 64] that has decoded some already, so many at once."""
        known: dict[tuple[int, ...], np.ndarray] = {}
        unique = list(dict.fromkeys(code for code in codes if code is not None)) if self._has_masks else []
        for start in range(0, len(unique), _MASKS):
            some = unique[start : start + _MASKS]
            batch = np.zeros((_MASKS, NUM_CODES), np.int32)  # always as many, for a single program
            batch[: len(some)] = some
            known |= zip(some, np.asarray(mask_vae.decode(self._model.mask_decoder(), batch)), strict=False)
        nothing = np.zeros((MASK_SIZE, MASK_SIZE), np.float32)  # `attach_masks` pads
        return lambda codes: np.stack([known.get(tuple(code.tolist()), nothing) for code in codes])

    def _row(
        self,
        picture: Picture,
        prompt: Prompt,
        answer: Answer,
        found: list[Detection],
        decode: Callable[[np.ndarray], np.ndarray],
    ) -> Row:
        key = records.key_of(picture.content, picture.name, prompt.text)
        origin = {"model": self._job.model, "run_id": self._job.run_id}
        if isinstance(answer, str):
            return records.failed(key, picture.name, picture.size, prompt, answer) | origin
        objects = attach_masks(found, picture.size, decode) if self._has_masks else found
        return records.answered(key, picture.name, picture.size, prompt, answer, objects) | origin
