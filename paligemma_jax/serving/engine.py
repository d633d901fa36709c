"""One model, one thread that drives the device, and requests from any thread that share its slots.

A turn of the thread: see who joins and leaves (`scheduler`), start the programs that embed and prefill new ones, start
the next decode steps of all slots, and while these run turn the tokens of the last turn into text. The answer of each
request is the one that `PaliGemma.generate` gives it alone.
"""

import collections
import dataclasses
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.monitoring
import numpy as np

import paligemma_jax as pj
from paligemma_jax.engine.state import DecodeState
from paligemma_jax.errors import Cancelled, Closed, EngineFailed, Expired, SamplingError, UserError, one_line
from paligemma_jax.processing.request import integer
from paligemma_jax.serving import scheduler
from paligemma_jax.serving.answer import Answer
from paligemma_jax.serving.events import Finished, Stats
from paligemma_jax.serving.job import Job, Tokens, check_stop, lay_out
from paligemma_jax.serving.pictures import SoftTokenCache
from paligemma_jax.serving.programs import Programs, Size
from paligemma_jax.serving.scheduler import Entry
from paligemma_jax.serving.settings import EngineSettings
from paligemma_jax.serving.shown import MOST_TOP, Shown

_COMPILE_EVENT = "backend_compile"
_log = logging.getLogger(__name__)
_DEFAULTS = EngineSettings()


class Engine:
    """Answers requests on the slots of one state.

    Args:
      model: best loaded with `batch_size=num_slots`, for which its kernels are chosen.
      settings: sizes.
      clock: seconds; for tests.
    """

    def __init__(
        self,
        model: pj.PaliGemma,
        settings: EngineSettings = _DEFAULTS,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.model, self.settings, self._clock = model, settings, clock
        self._programs = Programs(model, settings)
        self._wake = threading.Condition()  # guards what follows, up to the thread's own
        self._schedule = scheduler.idle(settings.num_slots, settings.max_waiting)
        self._jobs: dict[int, Job] = {}
        self._cancelled: set[int] = set()
        self._closing = math.inf  # when all that is left is cancelled
        self._failure: BaseException | None = None
        self._ids = itertools.count()
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None
        # Of the thread alone; others may read numbers.
        self._size: Size = self._programs.usual
        self._state: DecodeState | None = None
        self._unsaid: list[tuple[Job, Tokens]] = []
        self._images = SoftTokenCache(settings.cache_bytes)
        self._counts: collections.Counter[str] = collections.Counter()
        self._finished: collections.Counter[str] = collections.Counter()

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return self._ready.is_set() and self._failure is None

    def start(self, early: bool = False) -> None:
        """Compile programs and answer requests, in a thread of its own; those submitted before wait for it.

        Args:
          early: be ready with the programs of a usual request. The others are compiled meanwhile, and the first
            requests that need one of them wait for it.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(early,), name="paligemma-engine", daemon=True)
            self._thread.start()

    def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until programs are compiled; EngineFailed when they cannot be, or it takes longer."""
        if not self._ready.wait(timeout):
            raise EngineFailed(f"the engine was not ready after {timeout} s: give it more time to compile")
        if self._failure is not None:
            raise EngineFailed(f"the engine did not start: {one_line(self._failure)}") from self._failure

    def submit(
        self,
        request: pj.Request,
        *,
        client: str = "",
        timeout_s: float | None = None,
        stop: str | Sequence[str] = (),
        top_logprobs: int = 0,
    ) -> Answer:
        """Ask for an answer.

        Args:
          request: what is asked. Its images are read here, in the caller's thread.
          client: clients take turns.
          timeout_s: seconds after which the request ends, waiting or running, by Expired.
          stop: strings that end the answer, and are no part of its text.
          top_logprobs: how many of the most likely tokens to tell in the place of each token.

        Raises:
          PromptError, ImageError, SamplingError: a request that cannot be answered.
          Busy: as many wait as may.
          Closed: the engine is closing.
        """
        stop, num_top = check_stop(stop), integer("top_logprobs", top_logprobs, 0, MOST_TOP)
        if timeout_s is not None and not timeout_s > 0:
            raise SamplingError(f"timeout_s={timeout_s!r} is not possible: give seconds above 0")
        submitted = self._clock()
        with self._wake:
            self._check_open()
        laid = lay_out(self.model, self._programs, request, self.settings)
        with self._wake:
            self._check_open()
            id_ = next(self._ids)
            answer = Answer(lambda: self._cancel(id_))
            deadline = math.inf if timeout_s is None else submitted + timeout_s
            self._schedule = scheduler.submit(self._schedule, Entry(id_, client, deadline))
            self._jobs[id_] = Job(self.model, id_, laid, answer, stop, submitted, num_top)
            self._wake.notify_all()
        return answer

    def stats(self) -> Stats:
        """Counts of what runs, waits and was done."""
        with self._wake:
            running, waiting = len(self._schedule.running), self._schedule.waiting
        names = "prompt_tokens", "padded_tokens", "generation_tokens", "images_embedded", "images_reused"
        free = self.settings.num_slots - running
        compiles, counts = self._counts["compiles"], (self._counts[name] for name in names)
        cached = len(self._images), self._images.num_bytes
        return Stats(running, waiting, free, dict(self._finished), compiles, *counts, *cached)

    def close(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, finish what is there within `drain_s` seconds, cancel the rest, and end the thread."""
        with self._wake:
            self._closing = min(self._closing, self._clock() + drain_s)
            self._wake.notify_all()
        if self._thread is None:
            self._fail_all(Cancelled("the server has ended: ask again later"), "cancelled")
        elif self._thread is not threading.current_thread():
            self._thread.join()

    def _check_open(self) -> None:
        if self._closing < math.inf:
            raise Closed("the server is ending and takes no new requests: ask again later")
        if self._failure is not None:
            raise EngineFailed(f"the engine did not start: {one_line(self._failure)}")
        scheduler.check_room(self._schedule)

    def _cancel(self, id_: int) -> None:
        with self._wake:
            if id_ in self._jobs:
                self._cancelled.add(id_)
                self._wake.notify_all()

    def _run(self, early: bool) -> None:
        """The thread."""
        jax.monitoring.register_event_duration_secs_listener(self._count_compile)
        try:
            self._programs.warm(self._is_open, only_first=early)
            if early:
                threading.Thread(target=self._compile_rest, name="paligemma-compiler", daemon=True).start()
            self._ready.set()
            while self._turn():
                pass
        except BaseException as error:  # nothing may wait for a thread that is no more
            self._failure = error
            _log.exception("the engine's thread ended")
            self._fail_all(EngineFailed(f"the engine has ended: {one_line(error)}"), "failed")
        finally:
            self._ready.set()
            self._state = None
            self._images.clear()
            jax.monitoring.unregister_event_duration_listener(self._count_compile)

    def _is_open(self) -> bool:
        return self._closing == math.inf

    def _compile_rest(self) -> None:
        try:
            self._programs.warm(self._is_open)
        except Exception:  # whoever needs the program is told
            _log.exception("a program could not be compiled")

    def _count_compile(self, event: str, duration_secs: float, **_: Any) -> None:
        if _COMPILE_EVENT in event and threading.current_thread() is self._thread and self._ready.is_set():
            self._counts["compiles"] += 1

    def _turn(self) -> bool:
        """One look at who comes and goes, and the steps until the next; False when the engine is closed."""
        ended, admitted, is_over = self._look()
        if is_over:
            self._say()
        for id_, error, kind in ended:
            self._end(id_, error, kind)
        if is_over:
            return False
        try:
            self._advance(admitted)
        except Exception as error:  # of a program: its state is gone
            _log.exception("a program failed; the engine goes on with free slots")
            self._state, self._unsaid = None, []
            self._images.clear()
            with self._wake:
                running = list(self._schedule.running)
                self._schedule = scheduler.remove(self._schedule, running)
                lost = [*running, *(job.id for job in self._jobs.values() if job.said and not job.ended)]
            for id_ in lost:
                self._end(id_, EngineFailed(f"the engine failed while it answered: {one_line(error)}"), "failed")
        return True

    def _look(self) -> tuple[list[tuple[int, BaseException, str]], list[tuple[int, Entry]], bool]:
        """Wait until there is something to do: who is ended by what, who joins, and whether the engine is closed."""
        with self._wake:
            while True:
                now = self._clock()
                is_over = now >= self._closing or (self._closing < math.inf and not self._jobs)
                cancelled = set(self._jobs) if is_over else self._cancelled & set(self._jobs)
                self._cancelled.clear()
                late = set(scheduler.expired(self._schedule, now)) - cancelled
                ended = [(id_, Cancelled("the request was cancelled"), "cancelled") for id_ in cancelled]
                ended += [(id_, Expired("the request took longer than its time limit"), "expired") for id_ in late]
                schedule = scheduler.remove(self._schedule, cancelled | late)
                running = any(entry is not None for entry in schedule.slots)
                most = max(1, len(schedule.slots) // 2) if running else len(schedule.slots)
                self._schedule, admitted = scheduler.admit(schedule, most)
                if is_over or ended or running or admitted or self._unsaid:
                    return ended, admitted, is_over
                self._wake.wait(self._seconds_to_wait(now))

    def _seconds_to_wait(self, now: float) -> float | None:
        until = min(self._schedule.next_deadline, self._closing)
        return None if until == math.inf else max(0.0, until - now)

    def _advance(self, admitted: list[tuple[int, Entry]]) -> None:
        """Start what the device has to do, say what is known meanwhile, then look at what it did."""
        joining = [(slot, self._jobs[entry.id]) for slot, entry in admitted]
        self._choose_size([job for _, job in joining])
        firsts = self._admit(joining)
        running = {id_: slot for id_, slot in self._schedule.running.items() if id_ in self._jobs}
        shown = None
        if running:
            jobs = [self._jobs[id_] for id_ in running]
            needs, with_top = frozenset().union(*(job.laid.needs for job in jobs)), any(job.num_top for job in jobs)
            self._state, shown = self._programs.decode(self._state, self._size, needs, with_top)
        self._say()
        for jobs, first in firsts:
            self._read(first, list(enumerate(jobs)))
            self._say()
        if shown is not None:
            self._read(shown, [(slot, self._jobs[id_]) for id_, slot in running.items() if id_ in self._jobs])

    def _choose_size(self, joining: list[Job]) -> None:
        """Have a state with room for the next steps of all rows, and no larger than need be."""
        usual = self._programs.usual
        jobs = [*joining, *(self._jobs[id_] for id_ in self._schedule.running)]
        room = usual.num_slots - self._programs.num_steps - 1
        fits = all(job.laid.usual and job.num_positions <= room for job in jobs)
        size = usual if fits else self._programs.largest
        if self._state is None:
            self._state = self._programs.blank(size)
        elif size != self._size:
            self._state = self._programs.resize(self._state, self._size, size)
        self._size = size

    def _admit(self, joining: list[tuple[int, Job]]) -> list[tuple[list[Job], Shown]]:
        """Start the prefills of requests in their slots; what they will show of their first tokens."""
        now, soft_tokens = self._clock(), self._embed_each([job for _, job in joining])
        joining = [(slot, job) for slot, job in joining if job.id in self._jobs]

        def bucket(item: tuple[int, Job]) -> tuple[int, int]:
            laid, num_images = item[1].laid, len(item[1].laid.images)
            return num_images, self._programs.prompt_size(self._size, num_images, len(laid.prompt))

        started = []
        for group in scheduler.batches(joining, bucket, lambda key: self._programs.batch_sizes(self._size, key[1])):
            slots, jobs = [slot for slot, _ in group], [job for _, job in group]
            laid = [job.laid for job in jobs]
            self._state, first = self._programs.admit(
                self._state,
                self._size,
                slots,
                [each.prompt for each in laid],
                [[soft_tokens[key] for key, _ in each.images] for each in laid],
                [each.options for each in laid],
                [each.table for each in laid],
                any(job.num_top for job in jobs),
            )
            self._counts["prompt_tokens"] += sum(len(each.prompt) for each in laid)
            self._counts["padded_tokens"] += len(group) * bucket(group[0])[1]
            for job in jobs:
                job.admitted = now
            started.append((jobs, first))
        return started

    def _embed_each(self, jobs: list[Job]) -> dict[bytes, jax.Array]:
        """The same as `_embed`; requests whose images cannot be embedded end, and no others."""
        try:
            return self._embed(jobs)
        except Exception as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return {}
        found: dict[bytes, jax.Array] = {}
        for job in jobs:
            found |= self._embed_each([job])
        return found

    def _embed(self, jobs: list[Job]) -> dict[bytes, jax.Array]:
        """Soft tokens of all images of some requests, by digest; those that are not known yet are embedded."""
        pixels = {key: image for job in jobs for key, image in job.laid.images}
        found = {key: soft for key in pixels if (soft := self._images.get(key)) is not None}
        missing = [key for key in pixels if key not in found]
        self._counts["images_embedded"] += len(missing)
        self._counts["images_reused"] += sum(len(job.laid.images) for job in jobs) - len(missing)
        for size in self._programs.image_batches(len(missing)):
            keys, missing = missing[:size], missing[size:]
            embedded = self._programs.embed(np.stack([pixels[key] for key in keys]))
            found |= dict(zip(keys, embedded, strict=True))
        for key, soft_tokens in found.items():
            self._images.put(key, soft_tokens)
        return found

    def _read(self, shown: Shown, rows: list[tuple[int, Job]]) -> None:
        """Wait for what a program shows, and note the new tokens of some of its rows; those that are done are free."""
        with_top = any(job.num_top for _, job in rows)
        shown = jax.device_get(shown if with_top else dataclasses.replace(shown, top=None))
        now = self._clock()
        new = [(job, job.read(shown, row, now)) for row, job in rows]
        self._unsaid += new
        self._free({job.id for job, tokens in new if tokens.done})

    def _say(self) -> None:
        """Tell clients of all tokens that they do not know of yet."""
        unsaid, self._unsaid = self._unsaid, []
        for job, new in unsaid:
            if job.id not in self._jobs or not len(new.ids):
                continue
            try:
                for event in job.grow(new):
                    if isinstance(event, Finished):
                        self._finished[event.reason] += 1
                        self._forget(job)
                    job.answer.put(event)
            except Exception as error:
                self._fail(job, error)
            else:
                self._counts["generation_tokens"] += len(new.ids)

    def _fail(self, job: Job, error: Exception) -> None:
        """End one request by an error that is its own."""
        if not isinstance(error, UserError):
            _log.error("a request failed", exc_info=error)
            error = EngineFailed(f"the request failed: {one_line(error)}")
        self._forget(job)
        self._end(job.id, error, "failed", job)

    def _forget(self, job: Job) -> None:
        self._free({job.id})
        with self._wake:
            self._jobs.pop(job.id, None)

    def _free(self, ids: set[int]) -> None:
        if ids:
            with self._wake:
                self._schedule = scheduler.remove(self._schedule, ids)

    def _end(self, id_: int, error: BaseException, kind: str, job: Job | None = None) -> None:
        with self._wake:
            job = job or self._jobs.pop(id_, None)
        if job is not None:
            self._finished[kind] += 1
            job.answer.put(error)

    def _fail_all(self, error: BaseException, kind: str) -> None:
        with self._wake:
            ids = list(self._jobs)
            self._schedule = scheduler.remove(self._schedule, set(ids))
        for id_ in ids:
            self._end(id_, error, kind)
