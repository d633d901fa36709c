"""config.run=annotate: rows about many pictures, in files, from a run that can be killed and goes on."""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

import paligemma_jax as pj
from paligemma_jax.annotate import cluster, fingerprint, inputs, local, rows, sources
from paligemma_jax.annotate.exports import EXPORTS, export
from paligemma_jax.annotate.store import Group, Layout, Store
from paligemma_jax.annotate.worker import Annotator, Job
from paligemma_jax.errors import ConfigError
from paligemma_jax.files import expanded
from paligemma_jax.runs import environment, settings
from paligemma_jax.runs import model as models
from paligemma_jax.runs.notes import note
from paligemma_jax.runs.questions import questions
from paligemma_jax.runs.results import warn_about_free_prompts
from paligemma_jax.tasks import coco
from paligemma_jax.tasks.prompts import Prompt

SOME_FAILED = 2  # exit status
_LOG_EVERY_S = 30.0  # when stderr is no terminal


def run(config: ConfigDict) -> int:
    """Annotate, and return the exit status: `SOME_FAILED` when there are pictures without an answer."""
    form = settings.one_of(config, "shard_format", rows.FORMATS)
    engine = settings.one_of(config, "engine", ("local", "ray"))
    for key, least in (("batch_size", 1), ("shard_size", 1), ("threads", 1), ("workers", 0)):
        if config[key] < least:
            raise ConfigError(f"{key}={config[key]} is not possible: give an integer of at least {least}")
    if not config.output_dir:
        raise ConfigError("output_dir is empty: name a folder for the rows")
    if engine == "ray":
        settings.refuse(config, ("profile",), "engine=ray works in other processes")
        cluster.require()
    else:
        settings.refuse(config, ("workers",), "it is for engine=ray")
    settings.choice(config)
    kinds = settings.exports(config, EXPORTS)
    prompts = _prompts(config)
    job = Job(prompts, settings.generate_options(config), config.min_score, config.nms, settings.loc_scale(config))
    models.check_weights(config)
    if any(prompt.task and prompt.task.num_codes for prompt in prompts):
        coco.require()
    if form == "parquet":
        sources.parquet()
    pictures = inputs.find(config.image, config.image_column, config.image_root, note)
    warn_about_free_prompts(config, [prompt.text for prompt in prompts])

    job, run_fingerprint = _identified(config, job, [picture.name for picture in pictures])
    layout = Layout(len(pictures), config.shard_size, form)
    directory = expanded(config.output_dir)
    with Store(directory, run_fingerprint, layout, config.overwrite, note) as store:
        if config.retry_failed and (count := store.retry_failed()):
            note(f"{count:,} picture{'s' * (count > 1)} that failed before {'are' if count > 1 else 'is'} tried again")
        annotate = _engine(config, job, pictures, store) if store.done < len(pictures) else None
        with _Progress(store, len(pictures)) as progress:
            if annotate:
                annotate(progress.keep)
        written = export(kinds, directory, store.rows, prompts, inputs.folder_of(config.image, config.image_root))
        if written:
            note(f"wrote {', '.join(map(str, written))}")
        print(progress.summary(), flush=True)
        return SOME_FAILED if store.failed else 0


def _prompts(config: ConfigDict) -> tuple[Prompt, ...]:
    """What is asked about each picture, each once: a prompt in parts has a row for each part."""
    parts = [part for question in questions(config) for part in question.parts]
    return tuple({part.text: part for part in parts}.values())


def _identified(config: ConfigDict, job: Job, names: list[str]) -> tuple[Job, fingerprint.Fingerprint]:
    """The job with the name of its run, and what a run that goes on must have the same."""
    keys = ("dtype", "quantization", "resample", "min_score", "nms", "loc_scale")
    weights = fingerprint.of_weights(config.checkpoint, config.adapter, config.mask_vae)
    others = {key: config[key] for key in keys} | {"checkpoint": config.checkpoint, "adapter": config.adapter}
    made = fingerprint.of_answers(weights, job.prompts, job.options, others)
    job = dataclasses.replace(job, model=config.checkpoint, run_id=fingerprint.run_id(made))
    return job, made | {"image": fingerprint.of_inputs(names)}


def _engine(config: ConfigDict, job: Job, pictures: list[sources.Source], store: Store) -> Callable[[local.Keep], None]:
    """What makes the rows that are to be made, and gives them to be kept. The model is loaded now."""
    groups = store.pending(config.batch_size)
    if config.engine == "ray":
        make = functools.partial(_in_a_worker, config.to_dict(), job, len(pictures))
        return functools.partial(cluster.annotate, make, pictures, groups, config.threads, config.workers)
    profile = environment.profiled(config)
    annotator = _annotator(config, job, len(pictures))

    def annotate(keep: local.Keep) -> None:
        with profile:
            local.annotate(annotator, pictures, groups, config.threads, keep)

    return annotate


def _annotator(config: ConfigDict, job: Job, count: int) -> Annotator:
    at_once = min(config.batch_size, count)
    first = [pj.Request((str(i),), job.prompts[0], job.options) for i in range(at_once)]  # no image is read
    return Annotator(models.load(config, first, at_once), job)


def _in_a_worker(values: dict[str, Any], job: Job, count: int) -> Annotator:
    """The same in another process, which has not been set up by the command line."""
    config = ConfigDict(values)
    environment.quiet()
    environment.collect_garbage_seldom()
    environment.select_platform(config)
    return _annotator(config, job, count)


class _Progress:
    """Pictures done, pictures per second and time left, on stderr: a bar, or where that is no terminal a line at times.

    Args:
      store: keeps the rows, and knows how many pictures are done and failed.
      total: pictures of the run.
    """

    def __init__(self, store: Store, total: int):
        self._store, self._total = store, total
        self._before = store.done
        self._start = self._told = time.monotonic()
        live = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=store.done, unit="picture", disable=not live)
        self._every = None if live else _LOG_EVERY_S
        if self._before:
            note(f"going on: {self._before:,} of {total:,} pictures are done")

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        if kind is not None and self._store.done < self._total:
            note(f"stopped: {self.summary()}; the same command goes on from here")

    def keep(self, group: Group, made: list[list[rows.Row]]) -> None:
        """Store the rows of some pictures, and say how far it is."""
        self._store.add(group, made)
        self._bar.update(self._store.done - self._bar.n)
        if failed := self._store.failed:
            self._bar.set_postfix(failed=failed, refresh=False)
        now = time.monotonic()
        if self._every is not None and now - self._told >= self._every:
            self._told = now
            left = (self._total - self._store.done) / max(self._rate(), 1e-9)
            note(f"{self.summary()}, {tqdm.format_interval(left)} left")

    def summary(self) -> str:
        """As in "1,980 of 2,000 pictures, 20 failed, 16.1/s"."""
        done, failed = self._store.done, self._store.failed
        about = f"{done - failed:,} of {self._total:,} pictures, {failed:,} failed"
        return f"{about}, {self._rate():.1f}/s" if done > self._before else about

    def _rate(self) -> float:
        return (self._store.done - self._before) / (time.monotonic() - self._start)
