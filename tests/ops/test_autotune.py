"""What was measured is remembered beside the compiled programs, and a broken memory is none."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from paligemma_jax import ops
from paligemma_jax.ops import autotune

TARGET = ops.Target("cpu", "abc", 2)
LABELS = ["sin", "cos"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The compilation cache in a folder that is not there yet, and a process that knows nothing."""
    monkeypatch.setattr(autotune, "_known", {})
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "compiled"))
    yield tmp_path / "compiled"
    jax.config.update("jax_compilation_cache_dir", before)


def _calls() -> list[autotune.Call]:
    return [(jnp.sin, jnp.ones(4)), (jnp.cos, jnp.ones(4))]


def _never() -> list[autotune.Call]:
    raise AssertionError("measured again")


def remembered(calls, name="waves", target=TARGET, new_process=True):
    if new_process:
        autotune._known.clear()
    return autotune._remembered(name, LABELS, calls, target)


def test_a_second_process_knows_what_the_first_measured():
    first = remembered(_calls)
    assert set(first) == set(LABELS) and all(0 < x < 10 for x in first.values())
    assert remembered(_never, new_process=False) == remembered(_never) == first
    others = remembered(_calls, "others")
    assert (remembered(_never), remembered(_never, "others")) == (first, others)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"NAME": 3}', '{"NAME": {}}', '{"NAME": {"sin": "x"}}', '{"NAME": {"sin": 0.1}}']
)
def test_a_broken_memory_is_measured_over(cache, text):
    remembered(_calls)
    [name] = json.loads((cache / "autotune.json").read_text())
    (cache / "autotune.json").write_text(text.replace("NAME", name))
    found = remembered(_calls)
    assert set(found) == set(LABELS) and remembered(_never) == found


@pytest.mark.parametrize("change", [{"processor": "other"}, {"cores": 4}, {"jaxlib": "9.9.9"}])
def test_another_machine_or_version_measures_for_itself(change):
    remembered(_calls)
    with pytest.raises(AssertionError, match="measured again"):
        remembered(_never, target=dataclasses.replace(TARGET, **change))
    assert remembered(_never, target=dataclasses.replace(TARGET, num_rows=9))


def test_nothing_is_kept_where_nothing_can_be_written(cache):
    cache.write_text("a file where the folder should be")
    assert set(remembered(_calls)) == set(LABELS)


def test_without_a_cache_nothing_is_kept(cache):
    jax.config.update("jax_compilation_cache_dir", None)
    assert set(remembered(_calls)) == set(LABELS) and not cache.exists()
    with pytest.raises(AssertionError, match="measured again"):
        remembered(_never)


def test_every_candidate_can_be_measured_and_is_printed(monkeypatch):
    monkeypatch.setattr(autotune, "_MEASURED_BYTES", 2**16)
    monkeypatch.setattr(autotune, "LARGE", 2**10)
    monkeypatch.setattr(autotune, "_TURNS", 1)
    plain = [jax.ShapeDtypeStruct((64, 128), dtype) for dtype in ("bfloat16", "float32")]
    weights = [*plain, *(ops.quantized_shape(plain[0], name) for name in ops.FORMATS)]
    table = autotune.autotune(weights, TARGET)
    assert len(table.entries) == 5
    for weight in weights:
        spec = autotune.spec_of(weight, table.unsigned)
        assert set(table.of(spec)) == {f"{kernel}/{rows}" for kernel, rows in spec.candidates()}
        assert table.best(spec, 1) > 0
    assert str(table).count("\n") == 4 and "bfloat16 of 128 inputs: " in str(table)
