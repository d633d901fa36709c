"""PaliGemma in one handle: geometry, parameters, processor and compiled programs; what library users call.

Axes: I images, N soft tokens of an image, B rows (one prompt each), T suffix tokens, D decoder width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paligemma_jax import checkpoints, numerics, ops
from paligemma_jax.buckets import power_of_two
from paligemma_jax.checkpoints.companions import MASK_VAE_NAME
from paligemma_jax.checkpoints.mask_vae import load_mask_vae, save_mask_vae
from paligemma_jax.config import PaliGemmaConfig, variant_name
from paligemma_jax.engine import forward, steps
from paligemma_jax.engine.generate import (
    BATCH_SIZE,
    Generation,
    Progress,
    check_embeddings,
    check_length,
    embed_images,
    text_pieces,
    to_output,
)
from paligemma_jax.engine.runner import Call, Runner
from paligemma_jax.errors import CheckpointError, SamplingError
from paligemma_jax.files import expanded
from paligemma_jax.models import mask_vae as mask_vae_model
from paligemma_jax.processing.image import ImageSource, load_image
from paligemma_jax.processing.processor import Batch, Images, Processor, Prompts, Suffixes, image_groups, per_row
from paligemma_jax.processing.request import GenerateOptions, Request, Sampling, integer
from paligemma_jax.tasks.confidence import read_objects
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.detections import Detections
from paligemma_jax.tasks.output import Output, TextStream
from paligemma_jax.tasks.prompts import FORM, Prompt, class_prompts, read_prompt
from paligemma_jax.tasks.segmentation import attach_masks
from paligemma_jax.tasks.select import check_thresholds, select

MASK_VAE_VARIABLE = "PALIGEMMA_MASK_VAE"

_GREEDY = Sampling()
_EMBEDDINGS = jax.Array | np.ndarray | None

Found = Detections | list[Detections]  # the objects of an image, or of each of a list of images


class PaliGemma:
    """A model that is ready to run.

    Args:
      config: geometry.
      params: parameter tree; the handle keeps no other copy.
      processor: makes batches for this geometry.
      mask_vae: parameters of the mask VQ-VAE, or its file, which is read when first needed; None without masks.
      source: directories the model came from; `save` copies their tokenizer and preprocessor files.
      runner: its compiled programs; by default for the machine's own platform.
      load_s: seconds that loading took.
      compile_s: seconds that were spent on compiling before the first call, which reports them as its own.
    """

    def __init__(
        self,
        config: PaliGemmaConfig,
        params: steps.Params,
        processor: Processor,
        mask_vae: mask_vae_model.Params | Path | None = None,
        source: Sequence[Path] = (),
        runner: Runner | None = None,
        load_s: float = 0.0,
        compile_s: float = 0.0,
    ):
        self.config = config
        self.params = params
        self.processor = processor
        self.runner = Runner(ops.Target.detect()) if runner is None else runner  # one without programs is false
        self.load_s = load_s
        self.compile_s = compile_s
        self._mask_vae = mask_vae
        self._source = source

    def __repr__(self) -> str:
        geometry = variant_name(self.config) or f"PaliGemma {self.config.text.version} of its own geometry"
        size = f"{checkpoints.parameter_count(self.config):,} parameters, {self.config.vision.image_size} px"
        return f"<{geometry}: {size}, {self.params['language_model']['norm']['weight'].dtype}>"

    def generate(
        self,
        images: Images | None,
        prompts: Prompts,
        max_new_tokens: int = 100,
        sampling: Sampling = _GREEDY,
        image_embeddings: _EMBEDDINGS = None,
        batch_size: int = BATCH_SIZE,
        speculate: bool | None = None,
        constrain: bool = False,
        options: GenerateOptions | None = None,
    ) -> list[Output]:
        """Answer prompts about images.

        Pixels and soft tokens of all images are held until the call ends: give very many in several calls.

        Args:
          images: an image as `load_image` takes it, used for every prompt, or a list with one per prompt; an item may
            itself be a list of images seen together.
          prompts: one string, used for every image, or a list as long; a leading `<image>` for each image may be there.
          max_new_tokens, sampling, speculate, constrain: see `GenerateOptions`, which `options` takes as one.
          image_embeddings: soft tokens [I, N, D] to use instead of the images' own, in the order of `images` (one per
            row when that is None); the images are not even read then.
          batch_size: rows that run at once, fewer where prompts are so long that memory would run out; more are run
            in turn.

        Returns:
          One answer per row.

        Raises:
          ImageError, PromptError, SamplingError: see the message.
        """
        options = options or GenerateOptions(max_new_tokens, sampling, constrain, speculate)
        batch_size = integer("batch_size", batch_size, 1)
        batch, embeddings = self._lay_out(images, prompts, image_embeddings)
        return self._answer(batch, embeddings, per_row(prompts, len(batch.tokens)), [options], batch_size)

    def answer(self, requests: Sequence[Request], batch_size: int = BATCH_SIZE) -> list[Output]:
        """Answer requests that differ in everything: prompts, images, sampling, limits, constraints.

        They share batches; the answer of each is the one that it would get alone.

        Raises:
          ImageError, PromptError, SamplingError: see the message.
        """
        batch_size = integer("batch_size", batch_size, 1)
        if not requests:
            return []
        prompts = [request.prompt for request in requests]
        batch, _ = self._lay_out([list(request.images) for request in requests], prompts, None)
        return self._answer(batch, None, prompts, [request.options for request in requests], batch_size)

    def stream(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        prompt: str | Prompt,
        max_new_tokens: int = 100,
        sampling: Sampling = _GREEDY,
        image_embeddings: _EMBEDDINGS = None,
        speculate: bool | None = None,
        constrain: bool = False,
        options: GenerateOptions | None = None,
    ) -> TextStream:
        """The same as `generate` for one prompt about an image, or about several seen together, piece by piece."""
        options = options or GenerateOptions(max_new_tokens, sampling, constrain, speculate)
        if (num_beams := options.sampling.num_beams) > 1:
            raise SamplingError(f"num_beams={num_beams} cannot stream: the best beam is known at the end only")
        images = [image] if isinstance(image, list | tuple) else image
        batch, embeddings = self._lay_out(images, [prompt], image_embeddings)  # a list: more than one row is an error
        check_length(self.config, batch, [options])
        call = self._call()
        generation = self._generation(call, batch, embeddings, [prompt], [options])
        [group] = generation.groups(self.runner, self.params, 1)
        return TextStream(text_pieces(numerics.answers(call, generation, group), call, generation))

    def score(
        self, images: Images | None, prefixes: Prompts, suffixes: Suffixes, image_embeddings: _EMBEDDINGS = None
    ) -> list[np.ndarray]:
        """Log-probabilities of given answers: for each row f32 [suffix tokens + 1], <eos> being the last.

        `image_embeddings` are those of `generate`.
        """
        pairs = self._forward(forward.suffix_logprobs, images, prefixes, suffixes, image_embeddings)
        return [logprobs[:length] for logprobs, length in pairs]

    def logits(self, images: Images, prefixes: Prompts, suffixes: Suffixes) -> np.ndarray:
        """Teacher-forced logits f32 [B, T, V] with T = tokens of the longest suffix + 1.

        Entry j is what the model expects as suffix token j, the one after the last being <eos>. Rows with a shorter
        suffix are filled up with zeros.
        """
        pairs = list(self._forward(forward.suffix_logits, images, prefixes, suffixes, None))
        result = np.zeros((len(pairs), max(n for _, n in pairs), self.config.text.vocab_size), np.float32)
        for row, (logits, length) in enumerate(pairs):
            result[row, :length] = logits[:length]
        return result

    def embed_image(self, images: Images, projected: bool = True) -> jax.Array:
        """Soft tokens [I, N, D] of the images in order, lists of images flattened, in the parameters' dtype.

        With `projected=False` the encoder's features [I, N, E] instead, which `project` makes soft tokens of.
        """
        rows = images if isinstance(images, list | tuple) else [images]
        flat = [source for row in rows for source in (row if isinstance(row, list | tuple) else [row])]
        batch = self.processor(flat, "")
        method = "embed_image" if projected else "encode_image"
        embedded = embed_images(self._call(), self.config, batch.pixels, method)
        numerics.require_finite_images(embedded, self.config, self.params, batch.pixels)
        return embedded[batch.image_slots[:, 0] // self.config.vision.num_tokens]

    def project(self, features: jax.Array | np.ndarray) -> jax.Array:
        """The encoder's features [I, N, E] to soft tokens [I, N, D]."""
        features = check_embeddings(features, self.config, self.params, projected=False)
        return self._call().run(steps.run, features, config=self.config, method="project")

    def trace(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        prompt: str | Prompt,
        answer: str,
        image_embeddings: _EMBEDDINGS = None,
    ) -> forward.Trace:
        """Hidden states and attention of one prompt with its answer, about an image or several seen together."""
        images = [image] if isinstance(image, list | tuple) else image
        batch, embeddings = self._lay_out(images, [prompt], image_embeddings, [answer])
        call = self._call()
        soft_tokens = self._generation(call, batch, embeddings, [prompt], [GenerateOptions()]).soft_tokens
        inputs = steps.select_rows(batch, soft_tokens, range(1))
        length, prefix_length = int(batch.length[0]), int(batch.prefix_length[0])
        num_positions = power_of_two(count := length - prefix_length)
        hidden, attention, logprobs = call.run(forward.trace, inputs, config=self.config, num_positions=num_positions)
        numerics.require_finite(np.asarray(logprobs)[0, :count], self.config, self.params, inputs, 0)
        return forward.Trace(
            tokens=inputs.tokens[0, :length],
            patches=inputs.image_slots[0, :length],
            prefix_length=prefix_length,
            soft_tokens=soft_tokens,
            hidden=hidden[:, 0, :length],
            attention=np.asarray(attention[:, 0, :, :count, :length]),
            logprobs=np.asarray(logprobs[0, :count]),
        )

    def detect(self, images: Images, classes: str | Sequence[str], max_new_tokens: int = 256, **options: Any) -> Found:
        """Boxes of what is named in `classes`, with scores; see `locate` for the options."""
        return self.locate("detect", images, classes, max_new_tokens, **options)

    def segment(self, images: Images, classes: str | Sequence[str], max_new_tokens: int = 256, **options: Any) -> Found:
        """Boxes and masks of what is named in `classes`, with scores; see `locate` for the options."""
        self.mask_decoder()  # its absence is known before the long part
        return self.locate("segment", images, classes, max_new_tokens, **options)

    def locate(
        self,
        task: str,
        images: Images,
        classes: str | Sequence[str],
        max_new_tokens: int = 256,
        loc_scale: int = 1023,
        sampling: Sampling = _GREEDY,
        constrain: bool = True,
        split_classes: bool = False,
        min_score: float = 0.0,
        nms: float = 0.0,
        prompt_form: str = FORM,
    ) -> Found:
        """Find objects of some classes in images; a class that is not there gives nothing.

        Args:
          task: "detect", or "segment" for masks too.
          images: an image, or a list of them; each is looked at alone, as a box is of one image.
          classes: "cat ; dog", or a list of names.
          max_new_tokens: of each answer; a box takes about 6 tokens, a mask 16 more.
          loc_scale, sampling, constrain, min_score, nms: as in `parse`, `GenerateOptions` and `tasks.select.select`.
          split_classes: ask for each class in a prompt of its own, all in one batch: slower, and often finds more.
          prompt_form: for fine-tunes that are asked in another way: "bare" (the name alone, a prompt for each), or a
            text with {classes} or {phrase}, see `tasks.prompts.check_form`. Objects without a label have the one asked.

        Returns:
          The objects of the image, in the order of the answer, with its `size`; for a list of images a list of them.

        Raises:
          PromptError: no classes, another form, or thresholds out of range.
        """
        parts = class_prompts(task, classes, prompt_form, split_classes)
        check_thresholds(min_score, nms)
        several, masks = isinstance(images, list | tuple), task == "segment"
        pictures = [load_image(image) for image in (images if several else [images])]
        options = GenerateOptions(max_new_tokens, sampling, constrain)
        requests = [Request((picture,), part, options) for picture in pictures for part in parts]
        outputs = iter(self.answer(requests))
        results = []
        for picture in pictures:
            each = (self.objects(next(outputs), picture.size, loc_scale, masks, part.labels) for part in parts)
            found = [item for objects, _ in each for item in objects]
            results.append(Detections(select(found, min_score, nms).kept, picture.size))
        return results if several else results[0]

    def objects(
        self,
        output: Output,
        size: tuple[int, int],
        loc_scale: int = 1023,
        masks: bool = True,
        labels: Sequence[str] = (),
    ) -> tuple[list[Detection], list[str]]:
        """The complete objects of an answer, in pixels and with scores, and the text of each incomplete one.

        Args:
          output: from `generate`.
          size: (width, height) of the image in pixels.
          loc_scale, labels: as in `parse`.
          masks: decode segmentation tokens.

        Raises:
          CheckpointError: masks are asked for and there, but the mask VQ-VAE is not.
        """
        found, dropped = read_objects(output, self.processor.tokenizer, size, loc_scale, labels)
        if masks:
            found = attach_masks(found, size, lambda codes: mask_vae_model.decode(self.mask_decoder(), codes))
        return found, dropped

    def mask_decoder(self) -> mask_vae_model.Params:
        """Parameters of the mask VQ-VAE, read when first asked for; CheckpointError when there are none."""
        if self._mask_vae is None:
            remedy = f"pass mask_vae=FILE, or set {MASK_VAE_VARIABLE}"
            raise CheckpointError(f"masks need {MASK_VAE_NAME}, which is not beside the model: {remedy}")
        if isinstance(self._mask_vae, Path):
            self._mask_vae = load_mask_vae(self._mask_vae)
        return self._mask_vae

    def save(self, directory: str | Path) -> None:
        """Write the model as a Hugging Face directory: config.json, weights, tokenizer, preprocessor, mask VQ-VAE."""
        if not str(directory).strip():
            raise CheckpointError("the directory to save to has no name: give one")
        directory = expanded(directory)
        checkpoints.save(directory, self.config, self.params, processor_from=self._source)
        if not self._source:
            self.processor.tokenizer.save(directory)
        self.processor.image_settings.save(directory, self.config.vision.num_tokens)
        if self._mask_vae is not None:
            save_mask_vae(directory / MASK_VAE_NAME, self._mask_vae, np.float32)

    def _call(self) -> Call:
        call, self.compile_s = Call(self.runner, self.params, self.compile_s), 0.0
        return call

    def _lay_out(
        self, images: Images | None, prompts: Prompts, image_embeddings: _EMBEDDINGS, suffixes: Suffixes | None = None
    ) -> tuple[Batch, jax.Array | None]:
        """Prompts, with their answers if there are any, as arrays; and the embeddings, if they are given."""
        if image_embeddings is None:
            return self.processor(images, prompts, suffixes), None
        embeddings = check_embeddings(image_embeddings, self.config, self.params)
        groups = image_groups(images, prompts, len(embeddings))
        return self.processor.layout(groups, prompts, suffixes), embeddings

    def _generation(
        self,
        call: Call,
        batch: Batch,
        embeddings: jax.Array | None,
        prompts: Sequence[str | Prompt],
        options: Sequence[GenerateOptions],
    ) -> Generation:
        """Rows that are laid out, with one option for all or one for each, and their images embedded."""
        soft_tokens = embed_images(call, self.config, batch.pixels) if embeddings is None else embeddings
        options = list(options) * (len(prompts) // len(options))
        parsed, tokenizer = list(map(read_prompt, prompts)), self.processor.tokenizer
        return Generation(self.config, tokenizer, parsed, options, batch, soft_tokens)

    def _answer(
        self,
        batch: Batch,
        embeddings: jax.Array | None,
        prompts: Sequence[str | Prompt],
        options: Sequence[GenerateOptions],
        batch_size: int,
    ) -> list[Output]:
        check_length(self.config, batch, options)
        call = self._call()
        generation = self._generation(call, batch, embeddings, prompts, options)
        rows: list[tuple[Progress, int]] = []
        for group in generation.groups(self.runner, self.params, batch_size):
            *_, last = numerics.answers(call, generation, group)
            rows += [(last, i) for i in range(len(group.rows))]
        return [to_output(progress, row, call, generation) for progress, row in rows]

    def _forward(
        self, function: Any, images: Images | None, prefixes: Prompts, suffixes: Suffixes, image_embeddings: _EMBEDDINGS
    ) -> Iterator[tuple[np.ndarray, int]]:
        """What a teacher-forced pass gives for each row, and how many of its positions are the row's own."""
        batch, embeddings = self._lay_out(images, prefixes, image_embeddings, suffixes)
        check_length(self.config, batch, [])
        call = self._call()
        prompts = per_row(prefixes, len(batch.tokens))
        generation = self._generation(call, batch, embeddings, prompts, [GenerateOptions()])
        lengths = batch.length - batch.prefix_length
        static = {"config": self.config, "num_positions": power_of_two(lengths.max())}
        for rows in generation.runs(BATCH_SIZE):
            inputs = steps.select_rows(batch, generation.soft_tokens, rows)
            values = np.asarray(call.run(function, inputs, **static))
            for i, row in enumerate(rows):
                numerics.require_finite(values[i, : lengths[row]], self.config, self.params, inputs, i)
                yield values[i], int(lengths[row])
