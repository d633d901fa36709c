"""A model in this process, on an engine; another one is loaded beside it and takes its place when it is ready."""

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence

import paligemma_jax as pj
from paligemma_jax.errors import CheckpointError, Closed, ConfigError, UserError, one_line, shortened
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.serving.answer import Answer
from paligemma_jax.serving.engine import Engine
from paligemma_jax.serving.settings import EngineSettings
from paligemma_jax.serving.web.backend import TIMEOUT_S, State, Status
from paligemma_jax.serving.web.questions import Question
from paligemma_jax.serving.web.snippets import Source

_DRAIN_S = 60.0  # for the answers of a model whose place is taken
_END_S = 5.0  # for a model that is being loaded when the page ends
_log = logging.getLogger(__name__)


class OnEngine:
    """`backend.Served` on an engine."""

    def __init__(self, engine: Engine, source: Source):
        self.engine, self.source = engine, source
        self.model: pj.PaliGemma = engine.model
        self.tokenizer: Tokenizer | None = self.model.processor.tokenizer

    def ask(self, question: Question, client: str) -> Answer:
        request = pj.Request((question.picture,), question.prompt, question.options)
        return self.engine.submit(request, client=client, timeout_s=TIMEOUT_S)

    def objects(
        self, output: pj.Output, size: tuple[int, int], labels: Sequence[str]
    ) -> tuple[list[pj.Detection], list[str]]:
        options = {"loc_scale": self.source.loc_scale, "labels": labels}
        try:
            return self.model.objects(output, size, **options)
        except CheckpointError:  # there is no mask decoder: the boxes are good all the same
            return self.model.objects(output, size, masks=False, **options)


class Local:
    """`backend.Backend` of this process.

    Args:
      load: makes a model of its source; UserError when it cannot.
      settings: of its engine.
      can_load: whether visitors may choose another one.
      after: called with each model that is ready, such as to compile what the engine does not.
      tell: called with a line when a model could not be loaded.
    """

    def __init__(
        self,
        load: Callable[[Source], pj.PaliGemma],
        settings: EngineSettings,
        can_load: bool = True,
        after: Callable[[pj.PaliGemma], None] = lambda model: None,
        tell: Callable[[str], None] = lambda line: None,
    ):
        self.can_load = can_load
        self._load, self._settings, self._after, self._tell = load, settings, after, tell
        self._lock = threading.Lock()  # guards what follows
        self._served: OnEngine | None = None
        self._coming: Source | None = None
        self._error = ""
        self._closed = False
        self._thread: threading.Thread | None = None

    def served(self) -> OnEngine | None:
        with self._lock:
            if self._served is None and self._coming is None:
                raise CheckpointError(f"no model is loaded: {self._error or 'choose one'}")
            return self._served

    def status(self) -> Status:
        with self._lock:
            served, coming, error = self._served, self._coming, self._error
        if served is None:
            state: State = "loading" if coming else "failed"
            return Status(state, coming.checkpoint if coming else "no model", error, bool(error))
        news = error or (f"loading {coming.checkpoint}; this one answers meanwhile" if coming else "")
        if coming is served.source:
            return Status("warming", coming.checkpoint)
        return Status("ready" if served.engine.ready else "failed", served.source.checkpoint, news, bool(error))

    def load(self, source: Source) -> None:
        if not source.checkpoint.strip():
            raise CheckpointError("no checkpoint is given: name a directory or a hub id")
        with self._lock:
            if self._closed:
                raise Closed("the server is ending: start it again")
            if self._served is not None and not self.can_load:
                raise ConfigError("models cannot be chosen on this page: start one of your own")
            if self._coming is not None:
                raise ConfigError(f"{self._coming.checkpoint} is being loaded: wait until it is ready")
            source = dataclasses.replace(source, checkpoint=source.checkpoint.strip())
            self._coming, self._error = source, ""
            self._thread = threading.Thread(target=self._run, args=(source,), name="model-loader", daemon=True)
            self._thread.start()

    def close(self) -> bool:
        with self._lock:
            self._closed = True
            served = self._served
        if served is not None:
            served.engine.close()
        if self._thread is not None:
            self._thread.join(_END_S)
        return self._thread is None or not self._thread.is_alive()

    def _run(self, source: Source) -> None:
        """The thread that loads: the first model takes requests while it is made ready, a later one when it is."""
        engine, error = None, ""
        try:
            engine = Engine(self._load(source), self._settings)
            engine.start(early=True)
            coming = OnEngine(engine, source)
            with self._lock:
                before = self._served
                self._served = before or coming
            engine.wait_ready()
        except UserError as known:
            error = str(known)
        except Exception as unknown:
            _log.exception("a model could not be loaded")
            error = f"{source.checkpoint} could not be loaded: {one_line(unknown)}"
        with self._lock:
            self._coming, self._error = None, shortened(" ".join(error.split()))
            served, ends = self._served, [] if engine is None else [engine]
            if not error and not self._closed:
                self._served, ends = coming, [] if before is None else [before.engine]
            elif served is not None and served.engine is engine:
                self._served = None
        if self._error:
            self._tell(self._error)
        for unused in ends:
            unused.close(_DRAIN_S if unused is not engine else 0.0)
        if not error and not self._closed:
            self._after(engine.model)
