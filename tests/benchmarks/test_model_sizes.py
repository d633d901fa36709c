"""Sizes that are computed: the table of the documentation, and the cache that a server really has."""

from pathlib import Path

import jax
import pytest

from benchmarks import model_sizes
from paligemma_jax.serving.programs import Programs
from paligemma_jax.serving.settings import EngineSettings

ROOT = Path(__file__).resolve().parents[2]


def test_the_documentation_has_the_servers_table():
    rows = model_sizes.lines_of(model_sizes.server_table()).splitlines()
    page = (ROOT / "docs" / "serving.md").read_text()
    kept = (ROOT / "benchmarks" / "results" / "model_sizes.md").read_text()
    shown = [row for row in page.splitlines() if row.startswith("| paligemma")]
    assert len(shown) == 4 and set(shown) <= set(rows)
    assert "".join(f"{row}\n" for row in rows) in kept


@pytest.mark.parametrize("size", ["usual", "largest"])
def test_a_servers_cache_has_so_many_bytes(make_model, size):
    model, settings = make_model("gemma2"), EngineSettings(num_slots=3, max_new_tokens=40, max_prompt_tokens=32)
    programs = Programs(model, settings)
    size = getattr(programs, size)
    leaves = jax.tree.leaves(programs._shapes(size).cache)
    expected = 3 * size.num_slots * model_sizes.token_bytes(model.config) * 2  # float32 here
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == expected
