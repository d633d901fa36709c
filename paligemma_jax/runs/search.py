"""config.run=search: pictures of a folder that phrases or other pictures look for, from an index of embeddings."""

import functools
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from paligemma_jax import patch_vit
from paligemma_jax.checkpoints import resolve
from paligemma_jax.errors import ConfigError, DataError, ImageError, error_line
from paligemma_jax.files import Stems, digest, expanded
from paligemma_jax.patch_vit import drawing, indexing, ranking
from paligemma_jax.patch_vit import index as indexes
from paligemma_jax.patch_vit.activation import embed_phrases
from paligemma_jax.processing.fetch import is_url
from paligemma_jax.processing.find import find_images
from paligemma_jax.processing.image import load_image
from paligemma_jax.runs import pair, settings, sources
from paligemma_jax.runs.notes import note
from paligemma_jax.tasks.prompts import split_labels

_MODEL_FILES = (".safetensors", ".json", ".txt", ".pt")
_LOG_EVERY_S = 30.0  # when stderr is no terminal
_NAMED = 20  # pictures that could not be read, by name
_LONGEST = 80  # letters of a query in the name of its file

Query = tuple[str, np.ndarray, np.ndarray]  # its name, and its embedding for each model [D]


def run(config: ConfigDict) -> int:
    """Update the index, answer the queries, and return the exit status: 1 where pictures could not be read."""
    pair.check(config)
    settings.one_of(config, "ranking", ranking.KINDS)
    if config.top < 1:
        raise ConfigError(f"top={config.top} is not possible: give an integer of at least 1")
    if not config.save_every_s >= 0:
        raise ConfigError(f"save_every_s={config.save_every_s} is not possible: give a number of at least 0")
    phrases = split_labels(config.prompt)
    if not (phrases or config.query_image):
        raise ConfigError("there is nothing to search for: give phrases in prompt, or a picture in query_image")
    if not config.index:
        raise ConfigError("index is empty: name a file for it")
    if is_url(config.image):
        raise ConfigError(f"image={config.image} is a URL: search looks through files, give a folder or a glob")
    asked = pair.Pictures(config.query_image) if config.query_image else None
    names = [os.path.abspath(name) for name in find_images(config.image, tell=note)]
    directory, path = pair.folder(config, ()), expanded(config.index)
    models = {key: _digest(config[key]) for key in ("student", "clip")} | {"same_norm": config.same_norm}
    old = _usable(config, path, models)
    student, clip = pair.load(config)
    index = _updated(config, path, old, names, models, indexing.of_models(student, clip, config.batch_size))

    queries = _phrase_queries(clip, phrases) + ([] if asked is None else _picture_queries(student, clip, asked))
    stems = Stems()
    for number, (results, rank_ms) in enumerate(_ranked(config, index, queries)):
        name = queries[number][0]
        stem = name if number < len(phrases) else Path(name).stem
        file = directory / f"search_{stems.new(sources.plain(stem)[:_LONGEST])}.png"
        drawing.save_png(drawing.found_grid([_row(title, found) for title, found in results.items()], name), file)
        _report(config, name, results, file, rank_ms)
    return 1 if index.failed or (asked is not None and asked.failed) else 0


def _digest(path: str) -> str:
    """A name for the contents of a model's files."""
    found = resolve(path)
    files = [found] if found.is_file() else sorted(p for p in found.iterdir() if p.suffix in _MODEL_FILES)
    return hashlib.sha256(b"".join(digest(file) for file in files)).hexdigest()[:16]


def _usable(config: ConfigDict, path: Path, models: dict[str, str]) -> indexes.Index | None:
    """The index that is there, if its embeddings count; ConfigError and DataError with what to do when they do not."""
    source = os.path.abspath(os.path.expanduser(config.image))
    if config.overwrite and not config.refresh:
        raise ConfigError("overwrite=true makes an index, and refresh=false leaves it as it is: leave out one of them")
    if config.refresh and not path.exists():
        return None
    if path.exists():
        indexes.require(path)
    try:
        old = indexes.load(path)
    except DataError:
        if config.overwrite:
            return None
        raise
    if changed := [key for key in models if old.models.get(key) != models[key]]:
        if config.overwrite:
            return None
        remedy = "give the one it was made with, name another file with index=, or set overwrite=true to make it again"
        raise ConfigError(f"the index {path} was made with another {changed[0]}: {remedy}")
    if old.source != source and not config.overwrite:
        raise ConfigError(
            f"the index {path} is of {old.source}, not of {source}: name another file with index=, or set "
            "overwrite=true to make it one of these pictures"
        )
    return old


def _updated(
    config: ConfigDict,
    path: Path,
    old: indexes.Index | None,
    names: list[str],
    models: dict[str, str],
    embedder: indexing.Embedder,
) -> indexes.Index:
    """The index to search in, and notes about it."""
    stale = indexes.staleness(old, names) if old else None
    if old and not config.refresh:
        if stale:
            note(f"note: the index {path} is stale ({stale}): set refresh=true to bring it up to date")
        return old
    source = os.path.abspath(os.path.expanduser(config.image))
    if old and not stale and old.source == source:
        note(f"{len(old.entries):,} pictures in {path}, none is new")
        _name_failed(old)
        return old
    waits = {"delay": 2.0} if sys.stderr.isatty() else {"delay": _LOG_EVERY_S, "mininterval": _LOG_EVERY_S}
    with tqdm(total=len(names), unit="picture", **waits) as bar:
        save = functools.partial(indexes.save, path)
        done = indexing.update(old, source, names, models, embedder, save, config.save_every_s, bar.update)
    said = [f"{done.embedded:,} embedded"] + [f"{done.moved:,} known by their contents"] * bool(done.moved)
    said += [f"stale before: {stale}"] if stale else []
    note(f"{len(done.index.entries):,} pictures in {path}: {', '.join(said)}")
    _name_failed(done.index)
    return done.index


def _name_failed(index: indexes.Index) -> None:
    for entry in index.failed[:_NAMED]:
        note(error_line(entry.problem))
    if index.failed:
        more = f", {_NAMED} of them named above" if len(index.failed) > _NAMED else ""
        note(f"note: pictures that could not be read: {len(index.failed):,}{more}")


def _phrase_queries(clip: patch_vit.Clip, phrases: tuple[str, ...]) -> list[Query]:
    """Texts as they are, not normalized, for both models."""
    texts = embed_phrases(clip, phrases) if phrases else ()
    return [(phrase, text, text) for phrase, text in zip(phrases, texts, strict=True)]


def _picture_queries(student: patch_vit.Student, clip: patch_vit.Clip, asked: pair.Pictures) -> list[Query]:
    """Pictures as unit vectors, so that scores are cosine similarities."""
    embedder = indexing.of_models(student, clip, 1)
    found = [(source.name, indexing.embed(embedder, [embedder.prepare(source.image)])) for _, source in asked]
    if not found:
        raise ImageError("no picture of query_image could be read: give another one")
    return [(name, first[0], second[0]) for name, (first, second) in found]


def _ranked(config: ConfigDict, index: indexes.Index, queries: list[Query]) -> Any:
    """For each query {model: [(path, score)]}, best first, and the milliseconds that both rankings took."""
    started = time.monotonic()
    rankers = [ranking.ranker(vectors, config.ranking) for vectors in (index.student, index.teacher)]
    if config.ranking != "exact":
        note(f"faiss took {time.monotonic() - started:.1f} s to take up {len(index.entries):,} pictures twice")
    for _, *vectors in queries:
        started = time.monotonic()
        found = [rank(vector[None], config.top) for rank, vector in zip(rankers, vectors, strict=True)]
        rank_ms = 1000 * (time.monotonic() - started)
        yield (
            {
                name: [(index.entries[row].path, float(score)) for score, row in zip(*best, strict=True) if row >= 0]
                for name, best in zip(
                    ("student", "teacher"), ((scores[0], rows[0]) for scores, rows in found), strict=True
                )
            },
            rank_ms,
        )


def _row(title: str, found: list[tuple[str, float]]) -> tuple[str, list[tuple[Image.Image | None, str]]]:
    """Pictures and captions for a row of the grid."""
    captions = [f"{score:.3f}  {os.path.basename(path)}" for path, score in found]
    return title, [(_again(path), text) for (path, _), text in zip(found, captions, strict=True)]


def _again(path: str) -> Image.Image | None:
    try:
        return load_image(path)
    except ImageError as error:  # since it was indexed
        note(error_line(error))
        return None


def _report(
    config: ConfigDict, query: str, results: dict[str, list[tuple[str, float]]], file: Path, rank_ms: float
) -> None:
    if config.format == "json":
        found = {
            name: [{"image": path, "score": round(score, 4)} for path, score in rows] for name, rows in results.items()
        }
        record = {"query": query, **found, "file": str(file), "timing": {"rank_ms": round(rank_ms, 2)}}
        print(json.dumps(record, ensure_ascii=False), flush=True)
        return
    print(f"{query}:")
    for name, rows in results.items():
        print(f"  {name}: " + ", ".join(f"{os.path.basename(path)} {score:.3f}" for path, score in rows))
    print(f"wrote {file}", flush=True)
