"""What was measured is remembered beside the compiled programs, and a broken memory is none."""

import jax
import jax.numpy as jnp
import pytest

from paligemma_jax import measured


@pytest.fixture
def cache(tmp_path):
    """The compilation cache in a folder that is not there yet."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "compiled"))
    yield tmp_path / "compiled"
    jax.config.update("jax_compilation_cache_dir", before)


def _calls() -> list[measured.Call]:
    return [(jnp.sin, jnp.ones(4)), (jnp.cos, jnp.ones(4))]


def _never() -> list[measured.Call]:
    raise AssertionError("measured again")


def test_a_second_process_knows_what_the_first_measured(cache):
    first = measured.remembered("waves", 2, _calls)
    assert len(first) == 2 and all(0 < x < 10 for x in first)
    assert measured.remembered("waves", 2, _never) == first
    others = measured.remembered("others", 2, _calls)
    assert (measured.remembered("waves", 2, _never), measured.remembered("others", 2, _never)) == (first, others)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"NAME": 3}', '{"NAME": []}', '{"NAME": ["x", 0.1]}', '{"NAME": [0.1]}']
)
def test_a_broken_memory_is_measured_over(cache, text):
    cache.mkdir()
    (cache / "products.json").write_text(text.replace("NAME", f"waves, {measured._machine()}"))
    found = measured.remembered("waves", 2, _calls)
    assert len(found) == 2 and measured.remembered("waves", 2, _never) == found


def test_another_processor_or_version_measures_for_itself(cache, monkeypatch):
    measured.remembered("waves", 2, _calls)
    monkeypatch.setattr(measured, "_machine", lambda: "another")
    with pytest.raises(AssertionError, match="measured again"):
        measured.remembered("waves", 2, _never)


def test_wide_loops_are_another_compiler(monkeypatch):
    found = set()
    for wide in (False, True):
        monkeypatch.setattr(measured, "uses_wide_loops", lambda wide=wide: wide)
        found.add(measured._machine.__wrapped__())
    assert len(found) == 2


def test_nothing_is_kept_where_nothing_can_be_written(cache):
    cache.write_text("a file where the folder should be")
    assert len(measured.remembered("waves", 2, _calls)) == 2


def test_without_a_cache_nothing_is_kept(cache):
    jax.config.update("jax_compilation_cache_dir", None)
    assert len(measured.remembered("waves", 2, _calls)) == 2 and not cache.exists()
