"""Load a server over HTTP: the process that users start, and many clients at once.

    python benchmarks/serving_http.py
    python benchmarks/serving_http.py --checkpoint DIR --quantization int8 --seconds 180 --scenes 8 --max_new_tokens 24

The requests are those of `serving.py`, sent to `/v1/chat/completions` by asyncio clients of this process, streamed and
whole, with log-probabilities and without. First each is asked alone; every answer under load is compared with that one,
and with the one of `generate`, by text, number of tokens and what ended it. `generate` without a server takes turns
with the load, one request at a time and in batches. OUT.json holds all numbers, OUT.md the tables.
"""

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import paligemma_jax as pj
from benchmarks import machine, serving
from benchmarks.serving import BATCH, ROUNDS, note, percentiles
from paligemma_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
_START_S = 1800.0  # until the server is ready: a large model on a slow disk
_PATIENCE_S = 600  # of a request: many wait for few slots
_TITLES = {
    "alone": "`generate`, one request at a time",
    "batches": f"`generate`, batches of {BATCH}",
    "one": "over HTTP, one request at a time, pictures new",
    "served": "over HTTP, all clients",
}
_HEADER = """# Serving over HTTP

The server as users start it, in a process of its own, and asyncio clients in another on the same machine, which
also holds `generate` and takes its part of the processor. Requests differ in task, length and sampling; some are
streamed. "Same" is the share of answers under load with the text, the number of tokens and the end of the request
alone. Times are what clients see of streams: to the first token from the request on, waiting for a slot included;
between tokens, the time between two events over the tokens of the later one. Memory is that of the server, read every
second under load; its growth is the median of the last sixth of the time less that of the second.
"""

Said = tuple[str, int, str]  # text of an answer, number of its tokens, and why it ended


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request as it is sent, whole and streamed, and what `generate` answers."""

    whole: bytes
    streamed: bytes
    generated: Said


@dataclasses.dataclass
class HttpLoad(serving.Load):
    """as_generated: answers that are those of `generate` too."""

    as_generated: int = 0


def asked_of(request: pj.Request, output: pj.Output, number: int) -> Asked:
    """A request as a chat completion; three of four streams have log-probabilities, one the most likely tokens too."""
    file = io.BytesIO()
    request.images[0].save(file, "png")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": request.prompt.text}]
    options, sampling = request.options, request.options.sampling
    body = {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": options.max_new_tokens,
        "constrain": options.constrain,
        **{name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")},
    }
    streamed = body | {"stream": True, "stream_options": {"include_usage": True}, "logprobs": number % 4 > 0}
    streamed["top_logprobs"] = 5 if number % 4 == 3 else 0
    finish = "length" if output.finish_reason == "length" else "stop"
    said = output.text, len(output.tokens), finish
    return Asked(json.dumps(body).encode(), json.dumps(streamed).encode(), said)


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """A server process that is ready, on a free port: (process, port). UserError when it does not start."""
    command = [sys.executable, "main.py", "--config=configs/serve.py", "--config.port=0", *arguments]
    with tempfile.TemporaryFile("w+") as err, contextlib.ExitStack() as stack:
        process = subprocess.Popen(command, cwd=ROOT, stderr=err)
        stack.callback(process.wait)
        stack.callback(process.kill)
        deadline, port = time.monotonic() + _START_S, None
        while port is None or not _is_ready(port):
            said = os.pread(err.fileno(), 2**16, 0).decode("utf-8", "replace")
            found = re.search(r"at http://\S+:(\d+): /ready", said)
            port = int(found[1]) if found else None
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"the server did not start: {said.strip()[-500:]}")
            time.sleep(0.1)
        yield process, port


def _is_ready(port: int) -> bool:
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10).status == 200
    return False


def counts(port: int) -> dict[str, float]:
    """The counters without labels that the server tells."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for line in lines if line[0] != "#" for name, _, value in [line.partition(" ")]}


async def post(port: int, body: bytes) -> AsyncIterator[bytes]:
    """The content of an answer, part by part as it comes; RuntimeError for any status but 200."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    try:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        answered = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b" 200 " not in answered.partition(b"\r\n")[0]:
            raise RuntimeError((await reader.read()).decode("utf-8", "replace"))
        if b"transfer-encoding: chunked" not in answered:
            yield await reader.read()
            return
        while size := int(await reader.readline(), 16):
            yield (await reader.readexactly(size + 2))[:-2]
    finally:
        writer.close()


async def ask(port: int, asked: Asked, is_streamed: bool, load: serving.Load) -> Said:
    """One answer; the times of a stream are noted."""
    if not is_streamed:
        answer = json.loads(b"".join([part async for part in post(port, asked.whole)]))
        [choice] = answer["choices"]
        return choice["message"]["content"], answer["usage"]["completion_tokens"], choice["finish_reason"]
    begun = before = time.perf_counter()
    text, ended, usage, parts = "", "", {}, []
    async for part in post(port, asked.streamed):
        parts.append(part)
        for line in part.decode().split("\n\n"):
            event = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {"choices": []}
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                ended = choice["finish_reason"] or ended
                text += (said := choice["delta"].get("content") or "")
                scores = (choice["logprobs"] or {}).get("content", ())
                now = time.perf_counter()
                if (said or scores) and before == begun:
                    load.first_s.append(now - begun)
                elif scores:
                    load.gaps_s += [(now - before) / len(scores)] * len(scores)
                before = now if said or scores else before
    if not parts[-1].endswith(b"data: [DONE]\n\n"):
        raise RuntimeError("a stream ended before [DONE]")
    return text, usage["completion_tokens"], ended


async def ask_each(port: int, all_asked: Sequence[Asked]) -> tuple[list[Said], float]:
    """The answers to requests one after the other, streamed in turns; and answers per second."""
    begun = time.perf_counter()
    said = [await ask(port, asked, number % 2 == 1, serving.Load()) for number, asked in enumerate(all_asked)]
    return said, len(said) / (time.perf_counter() - begun)


async def run_clients(
    port: int, all_asked: Sequence[Asked], alone: Sequence[Said], num_clients: int, seconds: float, turn: int, pid: int
) -> tuple[HttpLoad, float, list[float]]:
    """Clients that ask again and again until the time is over: what they saw, how long it took, the server's memory."""
    load, memory, begun = HttpLoad(), [], time.perf_counter()

    async def client(number: int) -> None:
        rng = np.random.default_rng((turn, number))
        while time.perf_counter() - begun < seconds:
            index = int(rng.integers(len(all_asked)))
            try:
                said = await asyncio.wait_for(ask(port, all_asked[index], rng.random() < 0.5, load), _PATIENCE_S)
            except Exception as error:
                load.lost += 1
                load.errors.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.1)
                continue
            load.answers += 1
            load.tokens += said[1]
            load.same += said == alone[index]
            load.as_generated += said == all_asked[index].generated

    async def watch() -> None:
        while True:
            memory.append(_resident_mb(pid))
            await asyncio.sleep(1.0)

    watching = asyncio.ensure_future(watch())
    await asyncio.gather(*map(client, range(num_clients)))
    watching.cancel()
    return load, time.perf_counter() - begun, memory


def _resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def growth(memory: Sequence[float]) -> float:
    """Median of the last sixth of some samples less that of the second sixth."""
    part = max(1, len(memory) // 6)
    return statistics.median(memory[-part:]) - statistics.median(memory[part : 2 * part] or memory[:1])


def arguments_of(args: argparse.Namespace) -> list[str]:
    """What starts the server of a load test."""
    path = Path(args.checkpoint)
    keys = {
        "checkpoint": path.resolve() if path.exists() else args.checkpoint,  # it may be a hub id
        "dtype": args.dtype,
        "quantization": args.quantization or "none",
        "num_slots": args.slots,
        "max_waiting": args.clients,
        "request_timeout_s": float(_PATIENCE_S),
        **{name: getattr(args, name) for name in ("max_new_tokens", "max_prompt_tokens", "max_images")},
    }
    return [f"--config.{key}={value}" for key, value in keys.items()]


def measure(model: pj.PaliGemma, args: argparse.Namespace) -> dict[str, Any]:
    """All numbers of a model; progress on stderr."""
    load_average = os.getloadavg()[0]
    requests = serving.make_requests(args.scenes, args.max_new_tokens)
    order, batches = serving.in_batches(requests)
    note("answering without a server")
    outputs = [model.answer([request])[0] for request in requests]
    for batch in batches:
        model.answer(batch, batch_size=BATCH)
    all_asked = [
        asked_of(request, output, i) for i, (request, output) in enumerate(zip(requests, outputs, strict=True))
    ]
    note("starting the server")
    begun = time.perf_counter()
    with running(*arguments_of(args)) as (process, port):
        ready_s = time.perf_counter() - begun
        note("answering alone")
        alone, one = asyncio.run(ask_each(port, all_asked))
        rates: dict[str, list[float]] = {name: [] for name in _TITLES} | {"one": [one]}
        whole, memory, part = HttpLoad(), [], args.seconds / ROUNDS
        loading = all_asked, alone, args.clients
        asyncio.run(run_clients(port, *loading, min(2.0, part), 1000, process.pid))  # first runs are slower
        for turn in range(ROUNDS):
            note(f"round {turn + 1} of {ROUNDS}")
            alone_rate, batched_rate = serving.rates_of_generate(model, order, batches, part / 3, turn)
            rates["alone"].append(alone_rate)
            rates["batches"].append(batched_rate)
            load, took, seen = asyncio.run(run_clients(port, *loading, part, turn, process.pid))
            rates["served"].append(load.answers / took)
            memory += seen
            whole.add(load)
            if process.poll() is not None:
                raise UserError(f"the server ended under load: {whole.errors[-1:]}")
        told = counts(port)
    for error in dict.fromkeys(whole.errors):
        note(error)
    return {
        "load_average": load_average,
        "requests": len(requests),
        "ready_s": ready_s,
        "rates": rates,
        "answers": whole.answers,
        "tokens": whole.tokens,
        "same": whole.same / max(1, whole.answers),
        "as_generated": whole.as_generated / max(1, whole.answers),
        "lost": whole.lost,
        "compiles": told["paligemma_compiles_while_serving_total"],
        "memory_mb": memory,
        "first_ms": percentiles(whole.first_s),
        "between_ms": percentiles(whole.gaps_s),
    }


def document(entries: dict[str, dict[str, Any]]) -> str:
    """Everything that was measured, as Markdown: a section for each model."""
    lines = [_HEADER]
    for name, entry in entries.items():
        found = entry["found"]
        memory = found["memory_mb"]
        lines += [
            *serving.section(name, entry, _TITLES),
            f"| same as alone over HTTP | {found['same']:.2%} |",
            f"| same as `generate` | {found['as_generated']:.2%} |",
            *serving.load_rows(found),
            f"| memory of the server, median and highest | {statistics.median(memory):.0f}, {max(memory):.0f} MB |",
            f"| growth of it | {growth(memory):+.1f} MB |",
            "",
        ]
    return "\n".join(lines)


def main() -> int:
    args = serving.read_arguments(__doc__, ROOT / "benchmarks/results/serving_http")
    try:
        name, model = serving.load_model(args)
        machine.keep(args.out, name, serving.entry_of(args, measure(model, args)), document)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
