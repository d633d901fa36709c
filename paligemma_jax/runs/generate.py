"""config.run=generate: every prompt about every picture."""

import contextlib
import itertools
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from tqdm import tqdm

import paligemma_jax as pj
from paligemma_jax.annotate import fingerprint
from paligemma_jax.errors import ConfigError, ImageError
from paligemma_jax.files import expanded
from paligemma_jax.processing.find import find_images
from paligemma_jax.processing.video import VIDEO_SUFFIXES, is_video, require
from paligemma_jax.runs import environment, exports, settings
from paligemma_jax.runs import model as models
from paligemma_jax.runs.embedded import Embedded
from paligemma_jax.runs.folder import Folder, refuse_inputs
from paligemma_jax.runs.notes import note
from paligemma_jax.runs.questions import Question, questions
from paligemma_jax.runs.results import Results, warn_about_free_prompts
from paligemma_jax.runs.sources import Source, in_groups, numbered
from paligemma_jax.tasks.prompts import Prompt


def run(config: ConfigDict) -> int:
    """Answer, and return the exit status: 1 when a picture could not be read."""
    output_format = settings.one_of(config, "format", ("text", "json"))
    if config.stream and output_format == "json":
        raise ConfigError("stream prints text while it is made: set format=text, or leave stream out")
    if config.stream and config.split_classes:
        raise ConfigError("split_classes asks all classes at once, stream one after the other: leave out one of them")
    if config.batch_size < 1:
        raise ConfigError(f"batch_size={config.batch_size} is not possible: give an integer of at least 1")
    settings.loc_scale(config)
    settings.choice(config)
    fps = settings.video_fps(config)
    options = settings.generate_options(config, stream=config.stream)
    asked = questions(config)
    kinds = settings.exports(config)
    parts = [part for question in asked for part in question.parts]
    exports.check(kinds, parts)
    models.check_weights(config)
    names = find_images(config.image, also=VIDEO_SUFFIXES, tell=note)
    has_video = any(map(is_video, names))
    if has_video:
        require()
    warn_about_free_prompts(config, [question.prompt for question in asked])
    with contextlib.ExitStack() as stack:
        folder = _folder(config, parts, options, names)
        if folder is not None:
            stack.callback(folder.close)
        start = folder.done if folder else 0
        groups = in_groups(numbered(names, fps, start), max(1, config.batch_size // len(parts)))
        first = next(groups, [])
        if len(names) == 1 and first and isinstance(problem := first[0][1], ImageError):
            raise problem  # before the model is loaded
        embedded = Embedded(config, None if has_video else len(names))
        profile = environment.profiled(config)
        failed, begun = folder.failed if folder else 0, time.perf_counter()
        if first:
            sources = [source for _, source in first if isinstance(source, Source)]
            warm_up = (
                [] if embedded.asked else [pj.Request((s.image,), part, options) for s in sources for part in parts]
            )
            at_once = 1 if config.stream else min(config.batch_size, len(sources) * len(parts))
            model = models.load(config, warm_up[:at_once], at_once)
            begun = time.perf_counter()
            if folder:
                folder.begin()
            results = Results(model, config, has_video or len(names) * len(asked) > 1, folder)
            stack.callback(results.close)
            stack.enter_context(profile)
            bar = stack.enter_context(_progress_bar(None if has_video else len(names), start))
            progress = _Progress(folder, results, start, failed)
            try:
                for group in itertools.chain([first], groups):
                    bar.clear()
                    _answer(model, group, names, asked, embedded, config, options, results, progress)
                    bar.update(len(group))
            except BaseException:
                if folder and len(names) > 1:
                    note(f"stopped: {folder.done:,} of {len(names):,} pictures are done; add resume=True to go on")
                raise
            progress.finish(len(names))
            failed = progress.failed
            embedded.close()  # at the end only: what a stopped run has is not worth the file that may be there
        elif folder:
            folder.begin()
        if folder:
            exports.write(kinds, folder, parts)
    if len(names) > 1:
        rate = f", {(len(names) - start) / (time.perf_counter() - begun):.1f}/s" if start < len(names) else ""
        note(f"{len(names) - failed:,} of {len(names):,} pictures, {failed:,} failed{rate}")
    return 1 if failed else 0


def _folder(config: ConfigDict, parts: list[Prompt], options: pj.GenerateOptions, names: list[str]) -> Folder | None:
    """The folder of the results, if there is to be one."""
    if not config.output_dir:
        settings.refuse(config, ("resume", "overwrite"), "there is no output_dir")
        return None
    if config.resume:
        settings.refuse(
            config, ("save_embeddings", "load_embeddings"), "a run that goes on has only some of its pictures"
        )
    keys = ("dtype", "quantization", "resample", "min_score", "nms", "loc_scale", "video_fps", "load_embeddings")
    keys = (*keys, "prompt_form", "split_classes")
    weights = fingerprint.of_weights(config.checkpoint, config.adapter, config.mask_vae)
    made = fingerprint.of_answers(weights, parts, options, {key: config[key] for key in keys})
    made |= {"image": fingerprint.of_inputs(names)}
    refuse_inputs(directory := expanded(config.output_dir), names)
    return Folder(directory, made, len(names), config.resume, config.overwrite)


class _Progress:
    """Which names are done, told to the folder after each batch. A video is done with its last frame."""

    def __init__(self, folder: Folder | None, results: Results, start: int, failed: int):
        self._folder, self._results = folder, results
        self._index, self.failed = start - 1, failed
        self._before = (folder.mark() if folder else 0), failed  # as it was when the name at hand began

    def begin(self, index: int) -> None:
        """What comes now is about this name."""
        if index != self._index:
            self._results.close()
            self._index, self._before = index, ((self._folder.mark() if self._folder else 0), self.failed)

    def commit(self, is_frame: bool) -> None:
        """A batch is over; there may be more frames of its last name."""
        if self._folder is None:
            return
        if is_frame:
            self._folder.commit(self._index, *self._before)
        else:
            self._folder.commit(self._index + 1, self._folder.mark(), self.failed)

    def finish(self, count: int) -> None:
        """All names are done."""
        self._results.close()
        if self._folder:
            self._folder.commit(count, self._folder.mark(), self.failed)


def _answer(
    model: pj.PaliGemma,
    group: list[tuple[int, Source | ImageError]],
    names: list[str],
    asked: list[Question],
    embedded: Embedded,
    config: ConfigDict,
    options: pj.GenerateOptions,
    results: Results,
    progress: _Progress,
) -> None:
    """Answer and report all questions about some pictures, and what is wrong with others."""
    sources = [source for _, source in group if isinstance(source, Source)]
    soft_tokens = embedded.soft_tokens(model, [s.image if isinstance(s, Source) else None for _, s in group])
    answers = (_streamed if config.stream else _batched)(model, sources, asked, soft_tokens, config, options)
    for index, item in group:
        progress.begin(index)
        if isinstance(item, ImageError):
            results.fail(names[index], item)
            progress.failed += 1
            continue
        for question in asked:
            results.head(item.name, question.prompt)
            results.report(item, question, next(answers), streamed=config.stream)
    index, last = group[-1]
    progress.commit(is_frame=isinstance(last, Source) and last.video is not None)


def _batched(
    model: pj.PaliGemma,
    sources: list[Source],
    asked: list[Question],
    soft_tokens: jax.Array | None,
    config: ConfigDict,
    options: pj.GenerateOptions,
) -> Iterator[list[pj.Output]]:
    """The answers to all questions about each picture, whose soft tokens [I, N, D] may be given."""
    if not sources:
        return
    parts = [part for question in asked for part in question.parts]
    pictures = [source.image for source in sources for _ in parts]
    if soft_tokens is not None:
        soft_tokens = jnp.repeat(soft_tokens, len(parts), axis=0)
    outputs = iter(
        model.generate(
            pictures, parts * len(sources), image_embeddings=soft_tokens, batch_size=config.batch_size, options=options
        )
    )
    for _, question in itertools.product(sources, asked):
        yield list(itertools.islice(outputs, len(question.parts)))


def _streamed(
    model: pj.PaliGemma,
    sources: list[Source],
    asked: list[Question],
    soft_tokens: jax.Array | None,
    config: ConfigDict,
    options: pj.GenerateOptions,
) -> Iterator[list[pj.Output]]:
    """The same, every answer printed while it is made."""
    for i, source in enumerate(sources):
        # Once, however many prompts follow.
        embeddings = model.embed_image(source.image) if soft_tokens is None else soft_tokens[i : i + 1]
        for question in asked:
            yield stream_parts(model, question, embeddings, options)


def stream_parts(
    model: pj.PaliGemma, question: Question, embeddings: jax.Array, options: pj.GenerateOptions
) -> list[pj.Output]:
    """Print the answer to each part of a question as it comes, on a line of its own."""
    outputs = []
    for part in question.parts:
        pieces = model.stream(None, part, image_embeddings=embeddings, options=options)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)
        outputs.append(pieces.output)
    return outputs


def _progress_bar(total: int | None, start: int) -> tqdm:
    """A bar on stderr for many pictures, `None` being an unknown number, whose answers go elsewhere."""
    hidden = total == 1 or not sys.stderr.isatty() or sys.stdout.isatty()
    return tqdm(total=total, initial=start, unit="picture", disable=hidden)
