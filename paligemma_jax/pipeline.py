"""PaliGemma in one handle: geometry, parameters and processor; what library users call.

Axes: I pictures, N soft tokens of a picture, B rows (one prompt each), T suffix tokens, D decoder width, V vocabulary.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax import checkpoints
from paligemma_jax.buckets import power_of_two
from paligemma_jax.checkpoints.mask_vae import load_mask_vae, save_mask_vae
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError, ImageError, PromptError, SamplingError
from paligemma_jax.files import replacing
from paligemma_jax.generation import confidence, engine
from paligemma_jax.generation.clock import Clock, Programs, Rehearsal, Rehearsed
from paligemma_jax.generation.output import Output, TextStream, Trace
from paligemma_jax.generation.run import BATCH_SIZE, Choosing, Run
from paligemma_jax.generation.sampling import Sampling, whole_number
from paligemma_jax.locating import locate
from paligemma_jax.models import mask_vae as mask_vae_model
from paligemma_jax.processing.image import ImageSource
from paligemma_jax.processing.processor import Batch, Images, Processor, picture_groups
from paligemma_jax.processing.tokenizer import StreamDecoder
from paligemma_jax.tasks.detection import Detection, parse
from paligemma_jax.tasks.segmentation import attach_masks

MASK_VAE_NAME = "vae-oid.npz"
MASK_VAE_VARIABLE = "PALIGEMMA_MASK_VAE"

_GREEDY = Sampling()


class PaliGemma:
    """A model that is ready to run.

    Args:
      config: geometry.
      params: parameter tree; the handle keeps no other copy.
      processor: makes batches for this geometry.
      mask_vae: parameters of the mask VQ-VAE, or its file, which is read when first needed; None without masks.
      source: directory the model came from; `save` copies its tokenizer and preprocessor files.
      load_s: seconds that loading took.
      compile_s: seconds that were spent on compiling before the first call, which reports them as its own.
    """

    def __init__(
        self,
        config: PaliGemmaConfig,
        params: engine.Params,
        processor: Processor,
        mask_vae: mask_vae_model.Params | Path | None = None,
        source: Path | None = None,
        load_s: float = 0.0,
        compile_s: float = 0.0,
    ):
        self.config = config
        self.params = params
        self.processor = processor
        self.load_s = load_s
        self._mask_vae = mask_vae
        self._source = source
        self.compile_s = compile_s
        self._programs: Programs = {}

    def generate(
        self,
        images: Images | None,
        prompts: str | Sequence[str],
        max_new_tokens: int = 100,
        sampling: Sampling = _GREEDY,
        image_embeddings: jax.Array | np.ndarray | None = None,
        batch_size: int = BATCH_SIZE,
        speculate: bool | None = None,
        constrain: bool = False,
    ) -> list[Output]:
        """Answer prompts about pictures.

        Pixels and soft tokens of all pictures are held until the call ends: give very many in several calls.

        Args:
          images: a PIL image, path, URL or uint8 array [H, W, 3], used for every prompt, or a list with one per prompt;
            an item may itself be a list of pictures seen together.
          prompts: one string, used for every picture, or a list as long.
          max_new_tokens: <eos> included.
          sampling: how tokens are chosen.
          image_embeddings: soft tokens [I, N, D] to use instead of the pictures' own, in the order of `images` (one per
            row when that is None); the pictures are not even read then.
          batch_size: rows that run at once, fewer where prompts are so long that memory would run out; more are run
            in turn.
          speculate: guess some tokens ahead, and check them all at once: the same answers, faster or slower. None
            leaves it to `speculation.choose_num_guesses`.
          constrain: answers to `detect` and `segment` prompts can be nothing but objects with the labels asked for, or
            empty; see `generation.grammar`. Other prompts are answered freely.

        Returns:
          One answer per row.

        Raises:
          ImageError, PromptError, SamplingError: see the message.
        """
        choosing = Choosing(whole_number("max_new_tokens", max_new_tokens, 1), sampling, speculate, constrain)
        batch_size = whole_number("batch_size", batch_size, 1)
        if speculate and sampling.num_beams > 1:
            raise SamplingError(f"num_beams={sampling.num_beams} with speculation: beams have none, leave out one")
        run = self._start(images, prompts, max_new_tokens, image_embeddings)
        answers: list[engine.Chunk] = []
        for rows, chunks in run.answers(self.params, choosing, batch_size):
            whole = jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)
            answers += [jax.tree.map(lambda x: x[:, i], whole) for i in range(len(rows))]  # noqa: B023
        return [self._output(answer, run.clock) for answer in answers]

    def compile(
        self,
        image_groups: Sequence[Sequence[int]],
        prompts: str | Sequence[str],
        max_new_tokens: int = 100,
        sampling: Sampling = _GREEDY,
        batch_size: int = BATCH_SIZE,
        speculate: bool | None = None,
        constrain: bool = False,
    ) -> None:
        """Compile what `generate` will run, so that it starts at once; needs neither pictures nor weights.

        Args:
          image_groups: for each prompt, the numbers of the pictures that it is about; [[0]] for one about one.
          prompts, max_new_tokens, sampling, batch_size, speculate, constrain: those of the `generate` to come. Prompts
            of like length share programs.
        """
        batch = self.processor.layout(image_groups, prompts)
        count = 1 + max(number for group in image_groups for number in group)
        batch = dataclasses.replace(batch, pixels=np.zeros((count, *batch.pixels.shape[1:]), np.float32))
        choosing = Choosing(max_new_tokens, sampling, speculate, constrain)
        with contextlib.suppress(Rehearsed):
            run = self._embed(batch, max_new_tokens, Rehearsal(self._programs))
            for _, chunks in run.answers(self.params, choosing, batch_size):
                for _ in chunks:
                    pass

    def stream(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        prompt: str,
        max_new_tokens: int = 100,
        sampling: Sampling = _GREEDY,
        image_embeddings: jax.Array | np.ndarray | None = None,
        speculate: bool | None = None,
        constrain: bool = False,
    ) -> TextStream:
        """The same as `generate` for one prompt about a picture, or about several seen together, piece by piece."""
        if sampling.num_beams > 1:
            raise SamplingError(f"num_beams={sampling.num_beams} cannot stream: the best beam is known at the end only")
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1)
        images = [image] if isinstance(image, list | tuple) else image
        run = self._start(images, [prompt], max_new_tokens, image_embeddings)  # a list: more than one row is an error
        [(_, chunks)] = run.answers(self.params, Choosing(max_new_tokens, sampling, speculate, constrain), 1)
        return TextStream(self._pieces(chunks, run.clock))

    def score(
        self,
        images: Images | None,
        prefixes: str | Sequence[str],
        suffixes: str | Sequence[str],
        image_embeddings: jax.Array | np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """Log-probabilities of given answers: for each row f32 [suffix tokens + 1], <eos> being the last.

        `image_embeddings` are those of `generate`.
        """
        run, lengths = self._start_pairs(images, prefixes, suffixes, image_embeddings)
        scores = []
        for rows, inputs in run.groups():
            static = {"config": self.config, "num_positions": power_of_two(lengths.max())}
            logprobs = np.asarray(run.clock.call(engine.suffix_logprobs, self.params, inputs, **static))
            scores += [logprobs[i, : lengths[row]] for i, row in enumerate(rows)]
        return scores

    def logits(self, images: Images, prefixes: str | Sequence[str], suffixes: str | Sequence[str]) -> np.ndarray:
        """Teacher-forced logits f32 [B, T, V] with T = tokens of the longest suffix + 1.

        Entry j is what the model expects as suffix token j, the one after the last being <eos>. Rows with a shorter
        suffix are filled up with zeros.
        """
        run, lengths = self._start_pairs(images, prefixes, suffixes)
        result = np.zeros((len(lengths), lengths.max(), self.config.text.vocab_size), np.float32)
        for rows, inputs in run.groups():
            static = {"config": self.config, "num_positions": power_of_two(lengths.max())}
            logits = np.asarray(run.clock.call(engine.suffix_logits, self.params, inputs, **static))
            for i, row in enumerate(rows):
                result[row, : lengths[row]] = logits[i, : lengths[row]]
        return result

    def embed_image(self, images: Images, projected: bool = True) -> jax.Array:
        """Soft tokens [I, N, D] of the pictures in order, lists of pictures flattened, in the parameters' dtype.

        With `projected=False` the encoder's features [I, N, E] instead, which `project` makes soft tokens of.
        """
        rows = images if isinstance(images, list | tuple) else [images]
        flat = [source for row in rows for source in (row if isinstance(row, list | tuple) else [row])]
        batch = self.processor(flat, "")
        embedded = engine.embed_pictures(self.params, self.config, batch.pixels, self._clock(), projected)
        return embedded[batch.image_slots[:, 0] // self.config.vision.num_tokens]

    def project(self, features: jax.Array | np.ndarray) -> jax.Array:
        """The encoder's features [I, N, E] to soft tokens [I, N, D]."""
        features = self._checked_embeddings(features, "features", self.config.vision.width)
        return self._clock().call(engine.project, self.params, features, config=self.config)

    def trace(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        prompt: str,
        answer: str,
        image_embeddings: jax.Array | np.ndarray | None = None,
    ) -> Trace:
        """Hidden states and attention of one prompt with its answer, about a picture or several seen together."""
        images = [image] if isinstance(image, list | tuple) else image
        run, [count] = self._start_pairs(images, [prompt], [answer], image_embeddings)
        [(_, inputs)] = run.groups()
        static = {"config": self.config, "num_positions": power_of_two(count)}
        hidden, attention, logprobs = run.clock.call(engine.trace, self.params, inputs, **static)
        length = int(inputs.length[0])
        return Trace(
            tokens=inputs.tokens[0, :length],
            patches=inputs.image_slots[0, :length],
            prefix_length=int(inputs.prefix_length[0]),
            soft_tokens=run.soft_tokens,
            hidden=hidden[:, 0, :length],
            attention=np.asarray(attention[:, 0, :, :count, :length]),
            logprobs=np.asarray(logprobs[0, :count]),
        )

    def detect(
        self,
        images: ImageSource | Sequence[ImageSource],
        classes: str | Sequence[str],
        max_new_tokens: int = 256,
        **options: Any,
    ) -> list[Detection] | list[list[Detection]]:
        """Boxes of what is named in `classes`, with scores; see `locating.locate` for the options."""
        return locate(self, "detect", images, classes, max_new_tokens, **options)

    def segment(
        self,
        images: ImageSource | Sequence[ImageSource],
        classes: str | Sequence[str],
        max_new_tokens: int = 256,
        **options: Any,
    ) -> list[Detection] | list[list[Detection]]:
        """Boxes and masks of what is named in `classes`, with scores; see `locating.locate` for the options."""
        self.mask_decoder()  # its absence is known before the long part
        return locate(self, "segment", images, classes, max_new_tokens, **options)

    def objects(
        self, output: Output, size: tuple[int, int], loc_scale: int = 1023, masks: bool = True
    ) -> list[Detection]:
        """The complete objects of an answer.

        Args:
          output: from `generate`.
          size: (width, height) of the picture in pixels.
          loc_scale: as in `parse`.
          masks: decode segmentation tokens.

        Returns:
          Objects in pixels, with scores; see `generation.confidence`.

        Raises:
          CheckpointError: masks are asked for and there, but the mask VQ-VAE is not.
        """
        found, _ = parse(output.text, size, loc_scale)
        scored = confidence.score(found, output, self.processor.tokenizer, size, loc_scale)
        if not masks or all(item.codes is None for item in scored):
            return scored
        decoder = self.mask_decoder()
        return attach_masks(scored, size, lambda codes: mask_vae_model.decode(decoder, codes))

    def save(self, directory: str | Path) -> None:
        """Write the model as a Hugging Face directory: config.json, weights, tokenizer, preprocessor, mask VQ-VAE."""
        directory = Path(directory)
        checkpoints.save(directory, self.config, self.params, processor_from=self._source)
        if self._source is None:
            with replacing(directory / "tokenizer.model") as temporary:
                temporary.write_bytes(self.processor.tokenizer.to_bytes())
        self.processor.image_settings.save(directory, self.config.vision.num_tokens)
        if self._mask_vae is not None:
            save_mask_vae(directory / MASK_VAE_NAME, self.mask_decoder(), np.float32)

    def _start(
        self,
        images: Images | None,
        prompts: str | Sequence[str],
        max_new_tokens: int,
        image_embeddings: jax.Array | np.ndarray | None,
        suffixes: str | Sequence[str] | None = None,
    ) -> Run:
        """Lay out prompts, with their answers if there are any, and embed the pictures."""
        if image_embeddings is None:
            return self._embed(self.processor(images, prompts, suffixes), max_new_tokens, self._clock())
        soft_tokens = self._checked_embeddings(image_embeddings)
        batch = self.processor.layout(picture_groups(images, prompts, len(soft_tokens)), prompts, suffixes)
        self._check_length(batch, max_new_tokens)
        return Run(self.config, self.processor.tokenizer, batch, soft_tokens, self._clock())

    def _clock(self) -> Clock:
        clock, self.compile_s = Clock(self._programs, self.compile_s), 0.0
        return clock

    def _start_pairs(
        self,
        images: Images | None,
        prefixes: str | Sequence[str],
        suffixes: str | Sequence[str],
        image_embeddings: jax.Array | np.ndarray | None = None,
    ) -> tuple[Run, np.ndarray]:
        """Lay out prompts with their answers and embed the pictures; also the answers' lengths [B]."""
        run = self._start(images, prefixes, 0, image_embeddings, suffixes)
        return run, run.batch.length - run.batch.prefix_length

    def _embed(self, batch: Batch, max_new_tokens: int, clock: Clock) -> Run:
        self._check_length(batch, max_new_tokens)
        soft_tokens = engine.embed_pictures(self.params, self.config, batch.pixels, clock)
        return Run(self.config, self.processor.tokenizer, batch, soft_tokens, clock)

    def _check_length(self, batch: Batch, max_new_tokens: int) -> None:
        longest, limit = int(batch.length.max()), self.config.text.max_positions
        if longest + max_new_tokens > limit:
            pictures = int((batch.image_slots[batch.length.argmax()] >= 0).sum())
            raise PromptError(
                f"a prompt of {longest} tokens ({pictures} of them for pictures) and max_new_tokens={max_new_tokens} "
                f"do not fit the model's {limit} positions: shorten one of them"
            )

    def _checked_embeddings(
        self, embeddings: jax.Array | np.ndarray, name: str = "image_embeddings", width: int | None = None
    ) -> jax.Array:
        shape, expected = np.shape(embeddings), (self.config.vision.num_tokens, width or self.config.text.width)
        if len(shape) != 3 or shape[1:] != expected or not shape[0]:
            raise ImageError(
                f"{name} have shape {shape}, this model takes (pictures, {expected[0]}, {expected[1]}): "
                "take those of a picture of the same model"
            )
        return jnp.asarray(embeddings, self.params["language_model"]["norm"]["weight"].dtype)

    def _pieces(self, chunks: Iterator[engine.Chunk], clock: Clock) -> Iterator[str | Output]:
        """Text as it comes, then the whole output."""
        decoder = StreamDecoder(self.processor.tokenizer)
        seen = []
        for chunk in chunks:
            seen.append(chunk)
            if piece := "".join(map(decoder.feed, chunk[0][:, 0])):
                yield piece
        if rest := decoder.finish():
            yield rest
        yield self._output(jax.tree.map(lambda *parts: np.concatenate(parts)[:, 0], *seen), clock)

    def _output(self, answer: engine.Chunk, clock: Clock) -> Output:
        ends = np.flatnonzero(answer[0] == self.config.eos_token_id)
        count = int(ends[0]) + 1 if len(ends) else len(answer[0])
        tokens, odds = jax.tree.map(lambda x: x[:count], answer)
        text = self.processor.tokenizer.decode(tokens)
        reason = "eos" if len(ends) else "length"
        return Output(text, tokens, odds.logprobs, reason, clock.timing(count), odds.near, odds.expected)

    def mask_decoder(self) -> mask_vae_model.Params:
        """Parameters of the mask VQ-VAE, read when first asked for; CheckpointError when there are none."""
        if self._mask_vae is None:
            remedy = f"pass mask_vae=FILE, or set {MASK_VAE_VARIABLE}"
            raise CheckpointError(f"masks need {MASK_VAE_NAME}, which is not beside the model: {remedy}")
        if isinstance(self._mask_vae, Path):
            self._mask_vae = load_mask_vae(self._mask_vae)
        return self._mask_vae
