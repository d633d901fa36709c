"""config.run=generate: every prompt about every picture."""

import contextlib
import itertools
import sys

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from tqdm import tqdm

import paligemma_jax as pj
from paligemma_jax.errors import ConfigError, ImageError, error_line
from paligemma_jax.files import expanded
from paligemma_jax.processing.find import find_images
from paligemma_jax.processing.video import VIDEO_SUFFIXES, is_video, require
from paligemma_jax.runs import environment, exports, settings
from paligemma_jax.runs import model as models
from paligemma_jax.runs.embedded import Embedded
from paligemma_jax.runs.notes import note
from paligemma_jax.runs.questions import Question, questions
from paligemma_jax.runs.results import Results, warn_about_free_prompts
from paligemma_jax.runs.sources import Source, in_groups, read


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
    prompts = [question.prompt for question in asked]
    kinds = settings.exports(config)
    exports.check(kinds, prompts)
    models.check_weights(config)
    names = find_images(config.image, also=VIDEO_SUFFIXES, tell=note)
    has_video = any(map(is_video, names))
    if has_video:
        require()
    warn_about_free_prompts(config, prompts)

    parts = [part for question in asked for part in question.parts]
    groups = in_groups(read(names, fps), max(1, config.batch_size // len(parts)))
    first = next(groups)
    if len(names) == 1 and isinstance(problem := first[0], ImageError):
        raise problem  # before the model is loaded

    embedded = Embedded(config, None if has_video else len(names))
    profile = environment.profiled(config)
    sources = [source for source in first if isinstance(source, Source)]
    warm_up = [] if embedded.asked else [pj.Request((s.image,), part, options) for s in sources for part in parts]
    at_once = 1 if config.stream else min(config.batch_size, len(sources) * len(parts))
    model = models.load(config, warm_up[:at_once], at_once)
    several = has_video or len(names) * len(prompts) > 1
    writers = exports.Exports(kinds, expanded(config.output_dir), exports.classes_of(prompts)) if kinds else None
    failed = 0
    with (
        contextlib.closing(Results(model, config, several, writers)) as results,
        profile,
        _progress_bar(None if has_video else len(names)) as bar,
    ):
        for group in itertools.chain([first], groups):
            bar.clear()
            for problem in (item for item in group if isinstance(item, ImageError)):
                note(error_line(problem))
                failed += 1
            sources = [source for source in group if isinstance(source, Source)]
            pictures = [source.image if isinstance(source, Source) else None for source in group]
            soft_tokens = embedded.soft_tokens(model, pictures)
            if sources:
                _answer(model, sources, asked, soft_tokens, config, options, results)
            bar.update(len(group))
        embedded.close()  # at the end only: what a stopped run has is not worth the file that may be there
    return 1 if failed else 0


def _answer(
    model: pj.PaliGemma,
    sources: list[Source],
    asked: list[Question],
    soft_tokens: jax.Array | None,
    config: ConfigDict,
    options: pj.GenerateOptions,
    results: Results,
) -> None:
    """Answer and report all questions about some pictures, whose soft tokens [I, N, D] may be given."""
    if config.stream:
        _stream(model, sources, asked, soft_tokens, options, results)
        return
    parts = [part for question in asked for part in question.parts]
    pictures = [source.image for source in sources for _ in parts]
    if soft_tokens is not None:
        soft_tokens = jnp.repeat(soft_tokens, len(parts), axis=0)
    prompts = parts * len(sources)
    outputs = iter(
        model.generate(pictures, prompts, image_embeddings=soft_tokens, batch_size=config.batch_size, options=options)
    )
    for source, question in itertools.product(sources, asked):
        results.head(source.name, question.prompt)
        results.report(source, question, list(itertools.islice(outputs, len(question.parts))))


def _stream(
    model: pj.PaliGemma,
    sources: list[Source],
    asked: list[Question],
    soft_tokens: jax.Array | None,
    options: pj.GenerateOptions,
    results: Results,
) -> None:
    """The same, every answer printed while it is made."""
    for i, source in enumerate(sources):
        # Once, however many prompts follow.
        embeddings = model.embed_image(source.image) if soft_tokens is None else soft_tokens[i : i + 1]
        for question in asked:
            results.head(source.name, question.prompt)
            results.report(source, question, stream_parts(model, question, embeddings, options), streamed=True)


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


def _progress_bar(total: int | None) -> tqdm:
    """A bar on stderr for many pictures, `None` being an unknown number, whose answers go elsewhere."""
    hidden = total == 1 or not sys.stderr.isatty() or sys.stdout.isatty()
    return tqdm(total=total, unit="picture", disable=hidden)
