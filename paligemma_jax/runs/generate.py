"""config.run=generate: every prompt about every picture."""

import itertools
import operator
import sys
from collections.abc import Iterator

from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

import paligemma_jax as pj
from paligemma_jax.errors import ConfigError, ImageError
from paligemma_jax.processing.image import find_images, load_image
from paligemma_jax.runs import environment, settings
from paligemma_jax.runs import model as models
from paligemma_jax.runs.results import Results, note, warn_about_free_prompts

Picture = tuple[str, Image.Image | ImageError]


def run(config: ConfigDict) -> int:
    """Answer, and return the exit status: 1 when a picture could not be read."""
    output_format = settings.one_of(config, "format", ("text", "json"))
    if config.stream and output_format == "json":
        raise ConfigError("stream prints text while it is made: set format=text, or leave stream out")
    if config.batch_size < 1:
        raise ConfigError(f"batch_size={config.batch_size} is not possible: give a whole number of at least 1")
    settings.loc_scale(config)
    settings.speculate(config)
    sampling = settings.sampling(config, stream=config.stream)
    prompts = settings.prompts(config)
    models.check_weights(config)
    names = find_images(config.image)
    warn_about_free_prompts(config, prompts)

    groups = _read(names, max(1, config.batch_size // len(prompts)))
    first = next(groups)
    if len(names) == 1 and isinstance(problem := first[0][1], ImageError):
        raise problem  # before the model is loaded

    profile = environment.profiled(config)
    readable = sum(not isinstance(picture, ImageError) for _, picture in first)
    model = models.load(config, lambda model: _prepare(model, readable, prompts, config, sampling))
    results = Results(model, config, several=len(names) * len(prompts) > 1)
    failed = 0
    with profile, _progress_bar(len(names)) as bar:
        for group in itertools.chain([first], groups):
            readable = [(name, picture) for name, picture in group if not isinstance(picture, ImageError)]
            rows = [(name, picture, prompt) for name, picture in readable for prompt in prompts]
            bar.clear()
            for _, problem in (item for item in group if isinstance(item[1], ImageError)):
                note(f"error: {problem}")
                failed += 1
            if rows:
                _answer(model, rows, config, sampling, results)
            bar.update(len(group))
    return 1 if failed else 0


def _read(names: list[str], count: int) -> Iterator[list[Picture]]:
    """The pictures, `count` at a time, with the error in place of one that cannot be read."""
    for start in range(0, len(names), count):
        group: list[Picture] = []
        for name in names[start : start + count]:
            try:
                group.append((name, load_image(name)))
            except ImageError as error:
                group.append((name, error))
        yield group


def _prepare(
    model: pj.PaliGemma, num_pictures: int, prompts: list[str], config: ConfigDict, sampling: pj.Sampling
) -> None:
    """Compile what the first answers need: all prompts about some pictures, or the first one when they are streamed."""
    if config.stream:
        num_pictures, prompts = 1, prompts[:1]
    groups = [[i] for i in range(num_pictures) for _ in prompts]
    if groups:
        options = {"batch_size": config.batch_size, "speculate": settings.speculate(config)}
        model.compile(groups, prompts * num_pictures, config.max_new_tokens, sampling, **options)


def _answer(
    model: pj.PaliGemma,
    rows: list[tuple[str, Image.Image, str]],
    config: ConfigDict,
    sampling: pj.Sampling,
    results: Results,
) -> None:
    """Answer and report some (name, picture, prompt)."""
    speculate = settings.speculate(config)
    if config.stream:
        for name, asked in itertools.groupby(rows, key=operator.itemgetter(0)):
            asked = list(asked)
            picture = asked[0][1]
            soft_tokens = model.embed_image(picture)  # once, however many prompts follow
            for _, _, prompt in asked:
                results.head(name, prompt)
                pieces = model.stream(None, prompt, config.max_new_tokens, sampling, soft_tokens, speculate)
                print_pieces(pieces)
                results.report(name, picture, prompt, pieces.output, streamed=True)
        return
    _, pictures, prompts = (list(column) for column in zip(*rows, strict=True))
    options = {"batch_size": config.batch_size, "speculate": speculate}
    outputs = model.generate(pictures, prompts, config.max_new_tokens, sampling, **options)
    for (name, picture, prompt), output in zip(rows, outputs, strict=True):
        results.head(name, prompt)
        results.report(name, picture, prompt, output)


def print_pieces(pieces: Iterator[str]) -> None:
    """Print an answer as it comes, and end the line."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def _progress_bar(total: int) -> tqdm:
    """A bar on stderr for many pictures whose answers go elsewhere."""
    hidden = total == 1 or not sys.stderr.isatty() or sys.stdout.isatty()
    return tqdm(total=total, unit="picture", disable=hidden)
