"""config.run=swap: what a model says of a picture when it is given another one's embeddings."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

import paligemma_jax as pj
from paligemma_jax.errors import ConfigError
from paligemma_jax.files import expanded
from paligemma_jax.inspection import embeddings as em
from paligemma_jax.processing.fetch import label
from paligemma_jax.processing.image import load_image
from paligemma_jax.runs import environment, settings
from paligemma_jax.runs import model as models
from paligemma_jax.runs.drawings import claim
from paligemma_jax.runs.notes import note


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of the model: what stands for its picture, in words and as embeddings [1, N, D]."""

    name: str
    embeddings: np.ndarray


@dataclasses.dataclass(frozen=True)
class Variations:
    """What is tried beyond the four plain runs."""

    patches: np.ndarray | None  # bool [N], swapped alone
    shares: list[float]
    bits: list[int]


def run(config: ConfigDict) -> int:
    """Save the embeddings of two pictures, ask about each with its own and with the other's, then about variations."""
    as_json = settings.one_of(config, "format", ("text", "json")) == "json"
    stage = settings.one_of(config, "embeddings", ("projected", "features"))
    options = settings.generate_options(config)
    shares, bits = _numbers(config, "mix", float), _numbers(config, "bits", int)
    for value in bits:
        em.quantize(np.zeros((1, 1)), value)  # what is impossible is known before the model is loaded
    if any(not 0 <= share <= 1 for share in shares):
        raise ConfigError(f"mix={config.mix!r} is not possible: give shares of the first picture between 0 and 1")
    box = tuple(_numbers(config, "box", float))
    if box and len(box) != 4:
        raise ConfigError(f"box={config.box!r} is not possible: give x0,y0,x1,y1 as shares of the picture, 0..1")
    if box:
        em.patches_in(box, 1)
    pictures = [load_image(name) for name in (config.image, config.other_image)]
    names = [label(config.image), label(config.other_image)]
    if not config.output_dir:
        raise ConfigError("swap writes a.npy and b.npy: set output_dir")
    unused = ("stream", "export", "save_embeddings", "load_embeddings", "prompts_file", "split_classes", "prompt_form")
    settings.refuse(config, unused, "swap asks one prompt about two pictures")
    drawings = claim(config, expanded(config.output_dir))  # a bad place is known before the work

    profile = environment.profiled(config)
    count = 4 + bool(box) + len(shares) + len(bits)  # of trials
    model = models.load(config, batch_size=min(config.batch_size, count))
    with profile:
        own = np.asarray(model.embed_image(pictures, projected=stage == "projected"), np.float32)
        drawings.begin()
        files = drawings.own(drawings.directory / f"{letter}.npy" for letter in "ab")
        for name, file, values in zip(names, files, own, strict=True):
            em.save(file, values[None])
            note(f"saved {file}, the {stage} embeddings of {name}: {values[None].shape}")
        patches = em.patches_in(box, own.shape[1]) if box else None
        loaded = [em.load(file) for file in files]
        trials = list(_trials(names, loaded, Variations(patches, shares, bits)))
        given = np.concatenate([trial.embeddings for trial in trials])
        if stage == "features":
            given = model.project(given)
        prompts = [config.prompt] * len(trials)
        outputs = model.generate(None, prompts, image_embeddings=given, batch_size=config.batch_size, options=options)
    _report(trials, outputs, config, as_json)
    return 0


def _trials(names: list[str], own: list[np.ndarray], variations: Variations) -> Iterator[Trial]:
    (a, b), (first, second) = own, (Path(name).name for name in names)
    yield Trial(f"A, {first}", a)
    yield Trial("B with A's embeddings", a)
    yield Trial(f"B, {second}", b)
    yield Trial("A with B's embeddings", b)
    if variations.patches is not None:
        count = int(variations.patches.sum())
        yield Trial(
            f"A with B's in the box ({count} of {len(variations.patches)} patches)", em.swap(a, b, variations.patches)
        )
    for share in variations.shares:
        yield Trial(f"{share:g} A + {1 - share:g} B", em.mix(a, b, share))
    for bits in variations.bits:
        yield Trial(f"A in {bits} bits", em.fake_quantize(a, bits))


def _report(trials: list[Trial], outputs: list[pj.Output], config: ConfigDict, as_json: bool) -> None:
    width = max(len(trial.name) for trial in trials)
    for trial, output in zip(trials, outputs, strict=True):
        if as_json:
            record = {"embeddings": trial.name, "prompt": config.prompt, "text": output.text}
            print(json.dumps(record, ensure_ascii=False))
        else:
            print(f"{trial.name:<{width}}  {output.text}")


def _numbers(config: ConfigDict, key: str, kind: type) -> list:
    """The numbers of a key that holds some, separated by commas."""
    try:
        return [kind(part) for part in str(config[key]).split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{key}={config[key]!r} is not possible: give numbers with commas between them") from None
