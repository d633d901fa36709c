"""The load of the serving benchmark: requests of all kinds, and a table of what was measured."""

from benchmarks import serving


def test_requests_differ_in_task_limit_sampling_and_constraints():
    requests = serving.make_requests(6, 60)
    assert len({request.prompt.text for request in requests}) > 12
    assert {request.options.max_new_tokens for request in requests} == {20, 30, 60}
    assert len({request.options.sampling for request in requests}) == 4
    constrained = [request.prompt.task.name for request in requests if request.options.constrain]
    assert set(constrained) == {"detect", "segment"}


def test_the_table_states_what_must_hold():
    found = {
        "load_average": 0.5,
        "requests": 8,
        "ready_s": 9.0,
        "programs": 30,
        "rates": {"alone": [10.0, 12.0], "batches": [40.0, 42.0], "served": [44.0, 66.0], "without": [50.0, 60.0]},
        "answers": 1000,
        "tokens": 9000,
        "same": 1.0,
        "lost": 0,
        "compiles": 0,
        "memory_mb": [500.0, 501.0],
        "padding": 0.1,
        "first_ms": {"p50": 100.0, "p99": 200.0},
        "between_ms": {"p50": 3.0, "p99": 9.0},
        "kl": [0.0, 1e-12],
    }
    settings = {"clients": 64, "seconds": 60.0, "slots": 16, "max_new_tokens": 96}
    about = {"cpu": "a processor", "cores": 2, "python": "3.12", "jax": "0.1"}
    entry = {"date": "2026-01-02", "machine": about, "device": "cpu", "settings": settings, "found": found}
    text = serving.document({"tiny": entry})
    assert "| one request at a time | 10.0, 12.0 | 11.0 | 5.00 |" in text
    for row in (
        "| same as alone | 100.00% |",
        "| lost | 0 |",
        "| compiles while serving | 0 |",
        "| KL in a crowd, largest of 2 rows | 1.0e-12 |",
    ):
        assert row in text
