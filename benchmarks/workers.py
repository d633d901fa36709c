"""The processes that are measured: each does one job and reports what it measured as lines of JSON on stdout.

    python benchmarks/workers.py '{"job": "ours", "mode": "bf16", ...}'        (started by speed.py)

A line without values means "now": the parent knows when it started the process. Imports are a part of what is measured,
so a job imports its own libraries only. Pictures and prompts come ready made in a file: see speed.py.
"""

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

OUR_MODES = {  # dtype and quantization of `paligemma_jax.load`
    "float32": ("float32", None),
    "bf16": ("bfloat16", None),
    "int8": ("bfloat16", "int8"),
    "int4": ("bfloat16", "int4"),
}
THEIR_MODES = {"float32": "float32", "bf16": "bfloat16"}  # torch's names

CAPTION_TOKENS = 20
_LONG_S = 5.0  # what takes longer is not repeated within a process
_REPEATS = 5

Report = Callable[..., None]  # report(name, values=None)
T = TypeVar("T")


class Side(Protocol):
    """A model that is loaded, ours or theirs, with the pictures and the prompt that it is asked about."""

    load_s: float
    weights_bytes: int
    decoder_bytes: int  # of the weights, what a decode step reads

    def answer(self, count: int, new_tokens: int) -> tuple[float, float | None]:
        """Answer the prompt about `count` pictures with exactly so many tokens.

        Returns seconds from pictures to tokens, compilation apart, and milliseconds of a decode step of all rows.
        """

    def see(self) -> None:
        """Run the picture encoder over one picture."""

    def peak_memory(self) -> int:
        """The most bytes that were in use so far: of the device, or of the process on CPU."""

    def logits(self, tokens: np.ndarray | None, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits f32 [B, count, V] from the first answer token on of the accuracy prompts, and the tokens followed.

        `tokens` [B, count] are the answers to follow; None lets the model choose.
        """


class Ours:
    """paligemma_jax, started as its command line does."""

    def __init__(self, job: dict[str, Any], report: Report):
        import jax
        from ml_collections import ConfigDict

        import paligemma_jax as pj
        from paligemma_jax import ops
        from paligemma_jax.engine import steps
        from paligemma_jax.runs import environment

        environment.collect_garbage_seldom()
        environment.select_platform(ConfigDict({"platform": job["platform"]}))
        report("imports_s")
        dtype, _ = OUR_MODES[job["mode"]]  # in few bits, the checkpoint is
        self._jax, self._pj, self._steps, self._pad = jax, pj, steps, ops.pad_cache
        self._inputs = np.load(job["inputs"])
        self._pictures = list(self._inputs["pictures"])
        self._prompts = [str(prompt) for prompt in self._inputs["prompts"]]
        self._rows = job.get("rows", 1)
        first = [pj.Request.of(self._pictures[0], self._prompts[0], max_new_tokens=1)] if self._rows == 1 else []
        self._model = pj.load(job["checkpoint"], dtype, batch_size=self._rows, warm_up=first)
        self.load_s = self._model.load_s
        self._num_tokens = len(self._inputs["tokens"])
        self.weights_bytes, self.decoder_bytes = (
            sum(x.nbytes for x in jax.tree.leaves(tree))
            for tree in (self._model.params, self._model.params["language_model"])
        )

    def answer(self, count: int, new_tokens: int) -> tuple[float, float | None]:
        start = time.perf_counter()
        options = self._pj.GenerateOptions(new_tokens, min_new_tokens=new_tokens if new_tokens > 1 else 0)
        outputs = self._model.generate(self._pictures[:count], self._prompts[0], batch_size=count, options=options)
        seconds = time.perf_counter() - start
        assert all(len(output.tokens) == new_tokens for output in outputs)
        timing = outputs[0].timing
        # Rows that are too long to run together take turns, and a step of all of them is as many of the engine's.
        turns = -(-count // min(count, self._steps.most_at_once(self._num_tokens)))
        step_ms = None if timing.decode_ms_per_token is None else turns * timing.decode_ms_per_token
        return seconds - timing.compile_s, step_ms

    def see(self) -> None:
        self._model.embed_image(self._pictures[0]).block_until_ready()

    def peak_memory(self) -> int:
        stats = self._jax.local_devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] if stats else _process_peak()

    def logits(self, tokens: np.ndarray | None, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The first of each row from prefill, the others step by step as decoding does it."""
        jax, steps, model = self._jax, self._steps, self._model
        config, params, run = model.config, model.params, model.runner.get
        batch = model.processor(self._pictures[: len(self._prompts)], self._prompts)
        soft_tokens = steps.run(params, batch.pixels, config=config, method="embed_image")
        inputs = steps.select_rows(batch, soft_tokens, range(len(self._prompts)))
        first = jax.jit(lambda params, inputs: steps.first_logits(params, config, inputs))
        following = jax.jit(lambda params, *args: steps.apply(params, config, "decode", *args))
        now, cache = run(first, params, (inputs,), {})(params, inputs)
        cache = self._pad(cache, batch.tokens.shape[1] + count)
        logits, chosen = [], []
        while True:
            logits.append(np.asarray(now).reshape(len(batch.tokens), -1))
            best = logits[-1][:, : config.image_token_id].argmax(-1)
            chosen.append((best if tokens is None else tokens[:, len(chosen)]).astype(np.int32))
            if len(chosen) == count:
                break
            positions = inputs.prefix_length[:, None] + np.int32(len(chosen) - 1)
            arguments = (chosen[-1][:, None], positions, inputs.prefix_length, cache)
            now, cache = run(following, params, arguments, {})(params, *arguments)
        return np.stack(logits, axis=1), np.stack(chosen, axis=1)


class Theirs:
    """transformers, with its own `generate`."""

    def __init__(self, job: dict[str, Any], report: Report):
        import torch
        from transformers import PaliGemmaForConditionalGeneration

        device = "cuda" if job["platform"] == "gpu" else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("this torch sees no GPU")
        report("imports_s")
        start = time.perf_counter()
        dtype = getattr(torch, THEIR_MODES[job["mode"]])
        model = PaliGemmaForConditionalGeneration.from_pretrained(job["checkpoint"], dtype=dtype)
        self._model = model.to(device).eval()
        self._torch, self._device, self._dtype = torch, device, dtype
        self._wait()
        self.load_s = time.perf_counter() - start
        self._inputs = np.load(job["inputs"])
        self._pixels = self._inputs["pixels"]
        self._tokens = self._inputs["tokens"]
        self.weights_bytes, self.decoder_bytes = (
            sum(x.nbytes for x in part.parameters()) for part in (model, model.model.language_model)
        )

    def answer(self, count: int, new_tokens: int) -> tuple[float, float | None]:
        torch, ends = self._torch, []

        def stamp(ids: Any, scores: Any, **_: Any) -> Any:
            self._wait()
            ends.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        start = time.perf_counter()
        output = self._model.generate(
            **self._arguments(np.tile(self._tokens, (count, 1)), self._pixels[:count]),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            stopping_criteria=[stamp],
        )
        answers = output[:, len(self._tokens) :].cpu()
        seconds = time.perf_counter() - start
        assert answers.shape == (count, new_tokens) and len(ends) == new_tokens
        return seconds, 1e3 * (ends[-1] - ends[0]) / (new_tokens - 1) if new_tokens > 1 else None

    def see(self) -> None:
        with self._torch.inference_mode():
            self._model.get_image_features(self._tensor(self._pixels[:1]))
        self._wait()

    def peak_memory(self) -> int:
        return self._torch.cuda.max_memory_allocated() if self._device == "cuda" else _process_peak()

    def logits(self, tokens: np.ndarray | None, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Each row in one call, with the answer that it follows as its suffix."""
        torch, rows = self._torch, []
        assert tokens is not None, "they only follow"
        prompts = zip(self._inputs["prompt_tokens"], self._inputs["prompt_lengths"], strict=True)
        for i, (prompt, length) in enumerate(prompts):
            ids = np.concatenate([prompt[:length], tokens[i, : count - 1]])[None]
            arguments = self._arguments(ids, self._pixels[i : i + 1])
            arguments["token_type_ids"][:, length:] = 1  # the suffix
            with torch.inference_mode():
                logits = self._model(**arguments, logits_to_keep=count).logits
            rows.append(logits[0].float().cpu().numpy())
        return np.stack(rows), tokens

    def _arguments(self, ids: np.ndarray, pixels: np.ndarray) -> dict[str, Any]:
        """What their model takes for rows without padding; token types are given, or it silently becomes causal."""
        torch = self._torch
        ids = torch.from_numpy(ids.astype(np.int64)).to(self._device)
        return {
            "input_ids": ids,
            "pixel_values": self._tensor(pixels),
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
        }

    def _tensor(self, pixels: np.ndarray) -> Any:
        """Pixels [I, S, S, 3] as they take them, channels first."""
        return self._torch.from_numpy(pixels.transpose(0, 3, 1, 2)).to(self._device, self._dtype).contiguous()

    def _wait(self) -> None:
        """Until the GPU has done what it was told."""
        if self._device == "cuda":
            self._torch.cuda.synchronize()


SIDES: dict[str, type[Side]] = {"ours": Ours, "theirs": Theirs}


def measure(job: dict[str, Any], report: Report) -> None:
    """Start a side, and unless `only_start` is set, measure what one answer takes."""
    side = SIDES[job["side"]](job, report)
    report("load_s", [side.load_s])
    side.answer(1, 1)
    report("start_s")
    if job["only_start"]:
        return
    report("weights_bytes", [side.weights_bytes])
    report("decoder_bytes", [side.decoder_bytes])
    report("first_token_ms", [1e3 * seconds for seconds, _ in repeated(lambda: side.answer(1, 1))])
    report("vision_ms", [1e3 * seconds for seconds in repeated(lambda: _timed(side.see))])
    _measure_answers(side, 1, job["new_tokens"], report)


def measure_rows(job: dict[str, Any], report: Report) -> None:
    """The same of job["rows"] answers at once, by a side that is loaded for them."""
    side = SIDES[job["side"]](job, lambda *_: None)
    _measure_answers(side, job["rows"], job["new_tokens"], report)


def measure_captions(job: dict[str, Any], report: Report) -> None:
    """Pictures that are captioned per second, job["rows"] at once."""
    side, rows = SIDES[job["side"]](job, lambda *_: None), job["rows"]
    answers = repeated(lambda: side.answer(rows, CAPTION_TOKENS))
    report(f"captions_per_s/{rows}", [rows / seconds for seconds, _ in answers])


def _measure_answers(side: Side, count: int, new_tokens: int, report: Report) -> None:
    seconds, step_ms = zip(*repeated(lambda: side.answer(count, new_tokens)), strict=True)
    report(f"decode_ms/{count}", step_ms)
    report(f"tokens_per_s/{count}", [1e3 * count / ms for ms in step_ms])
    report(f"answer_s/{count}", seconds)
    report(f"peak_bytes/{count}", [side.peak_memory()])


def save_logits(job: dict[str, Any], report: Report) -> None:
    """Write the logits of a side to job["output"]; it follows the answers of job["follow"], or its own without one."""
    side = SIDES[job["side"]](job, report)
    tokens = np.load(job["follow"])["tokens"] if job["follow"] else None
    logits, tokens = side.logits(tokens, job["count"])
    np.savez(job["output"], logits=logits, tokens=tokens)


def find_ceilings(job: dict[str, Any], report: Report) -> None:
    """What the machine can do at best, and what JAX calls it."""
    import jax
    from ml_collections import ConfigDict

    from benchmarks import machine
    from paligemma_jax.runs import environment

    environment.select_platform(ConfigDict({"platform": job["platform"]}))
    for name, value in machine.ceilings().items():
        report(name, [value])
    report("device", [jax.devices()[0].device_kind])


JOBS = {
    "measure": measure,
    "rows": measure_rows,
    "captions": measure_captions,
    "logits": save_logits,
    "ceilings": find_ceilings,
}


def repeated(run: Callable[[], T]) -> list[T]:
    """Results of up to _REPEATS runs, of one when it takes long, after one more that finds everything cold."""
    run()
    start = time.perf_counter()
    results = [run()]
    while len(results) < _REPEATS and time.perf_counter() - start < _LONG_S:
        results.append(run())
    return results


def _timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _process_peak() -> int:
    """Most bytes of memory that this process has used; getrusage would count the parent's before exec as well."""
    status = Path("/proc/self/status")
    if status.exists():
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> int:
    job = json.loads(sys.argv[1])
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no report

    def report(name: str, values: Sequence[Any] | None = None) -> None:
        print(json.dumps({"name": name, "values": values}), file=lines, flush=True)

    try:
        JOBS[job["job"]](job, report)
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)  # the parent shows this line
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
