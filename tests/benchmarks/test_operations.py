"""The table of operations: names, shapes and sums."""

import re
from pathlib import Path

import pytest

import paligemma_jax as pj
from benchmarks import operations

TINY = Path(__file__).parents[2] / "assets" / "tiny"
PROGRAM = """
  %weights.1 = u8[8,4]{1,0} parameter(0)
  %rows = s8[2,4]{1,0} parameter(1)
  %ynn_fusion.12 = s32[8,2]{1,0} fusion(%weights.1, %rows), kind=kCustom, calls=%fused_computation
  ROOT %multiply_fusion.3 = (f32[8,2]{1,0}, f32[2]{0}) fusion(%ynn_fusion.12), kind=kLoop, calls=%other
"""


def test_products_are_told_apart_by_their_shapes():
    called = operations.kinds(PROGRAM)
    assert called["ynn_fusion.12"] == "ynn_fusion: u8[8,4] x s8[2,4] to s32[8,2]"
    assert called["multiply_fusion.3"] == "multiply_fusion"


def test_times_add_up_by_kind_and_are_of_one_step():
    lines = operations.table([("a.1", 4.0), ("b", 1.0), ("a.2", 4.0), ("c", 1.0)], {"a.1": "a", "a.2": "a"}, 2, 1)
    assert lines[2:] == ["| a | 1 | 4 | 80.0% |", "| 2 more | 1 | 1 | 20.0% |"]


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=() if stage == "decode" else pytest.mark.slow) for stage in operations.STAGES]
)
def test_a_stage_is_run_and_traced(stage):
    run, program, steps = operations.make_stage(pj.load(TINY, dtype="float32"), stage, 2)
    found = operations.traced(run)
    called = operations.kinds(program)
    assert {name for name, _ in found} <= set(called)
    assert all(ms >= 0 for _, ms in found)
    assert any(re.search(r"f32\[.*\] to f32", called[name]) for name, _ in found)
    assert steps == (operations._STEPS if stage == "decode" else 1)
