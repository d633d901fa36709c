"""The load test over HTTP: a server process, few clients for a short time, and the table of what was measured."""

import asyncio
import json

import pytest

import paligemma_jax as pj
from benchmarks import serving, serving_http
from benchmarks.serving_http import ask_each, asked_of, counts, growth, run_clients, running


@pytest.mark.slow
def test_every_answer_under_load_is_the_one_alone_and_none_is_lost():
    requests = serving.make_requests(5, 60)
    model = pj.load("assets/tiny", "float32", batch_size=4)
    outputs = [model.answer([request])[0] for request in requests]
    asked = [asked_of(request, output, i) for i, (request, output) in enumerate(zip(requests, outputs, strict=True))]
    sizes = ("--config.num_slots=4", "--config.max_new_tokens=60", "--config.max_prompt_tokens=64")
    with running(*sizes, "--config.max_images=1", "--config.platform=cpu") as (process, port):
        alone, _ = asyncio.run(ask_each(port, asked))
        assert alone == [each.generated for each in asked]
        load, _, memory = asyncio.run(run_clients(port, asked, alone, 16, 5.0, 0, process.pid))
        told = counts(port)
    assert not load.errors and load.lost == 0
    assert load.answers == load.same == load.as_generated > 16
    assert load.first_s and load.gaps_s and memory
    assert told["paligemma_compiles_while_serving_total"] == 0


def test_requests_are_sent_with_all_that_they_ask():
    [*_, request] = serving.make_requests(2, 30)
    output = pj.Output("a star", [5, 6], [0.0, 0.0], "eos", None, [0.0] * 2, [0.0] * 2)
    asked = [asked_of(request, output, number) for number in range(4)]
    bodies = [json.loads(each.streamed) for each in asked]
    assert [(body["logprobs"], body["top_logprobs"]) for body in bodies] == [
        (False, 0),
        (True, 0),
        (True, 0),
        (True, 5),
    ]
    body, sampling = json.loads(asked[0].whole), request.options.sampling
    assert body["messages"][0]["content"][1]["text"] == request.prompt.text and "stream" not in body
    assert (body["seed"], body["temperature"], body["top_k"]) == (sampling.seed, sampling.temperature, sampling.top_k)
    assert asked[0].generated == ("a star", 2, "stop")


@pytest.mark.parametrize("memory, right", [([5.0] * 60, 0.0), ([*range(60)], 40.0), ([3.0], 0.0), ([1, 9, 1], 0)])
def test_growth_is_that_of_the_last_sixth_over_the_second(memory, right):
    assert growth(memory) == pytest.approx(right, abs=9 if len(memory) == 3 else 0)


def test_the_table_states_what_must_hold():
    found = {
        "load_average": 0.5,
        "requests": 8,
        "ready_s": 9.0,
        "rates": {"alone": [0.25, 0.25], "batches": [40.0, 42.0], "one": [5.0], "served": [1.0, 1.5]},
        "answers": 1000,
        "tokens": 9000,
        "same": 1.0,
        "as_generated": 0.9995,
        "lost": 0,
        "compiles": 0.0,
        "memory_mb": [500.0] * 30 + [503.0] * 30,
        "first_ms": {"p50": 100.0, "p99": 200.0},
        "between_ms": {"p50": 3.0, "p99": 9.0},
    }
    settings = {"clients": 64, "seconds": 60.0, "slots": 16, "max_new_tokens": 96}
    about = {"cpu": "a processor", "cores": 2, "python": "3.12", "jax": "0.1"}
    entry = {"date": "2026-01-02", "machine": about, "device": "cpu", "settings": settings, "found": found}
    text = serving_http.document({"tiny": entry})
    for row in (
        "| `generate`, one request at a time | 0.250, 0.250 | 0.250 | 5.00 |",
        "| same as alone over HTTP | 100.00% |",
        "| same as `generate` | 99.95% |",
        "| lost | 0 |",
        "| compiles while serving | 0 |",
        "| growth of it | +3.0 MB |",
    ):
        assert row in text
