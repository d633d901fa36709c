"""What scale.py reads off compiled programs, and the limits that it computes."""

import pytest
from jax.sharding import AbstractMesh, AxisType

from benchmarks import scale, scale_programs
from benchmarks.accelerators import parse
from benchmarks.chips import MACHINES
from paligemma_jax import ops
from paligemma_jax.checkpoints import parameter_count
from paligemma_jax.config import VARIANTS
from paligemma_jax.errors import UserError
from paligemma_jax.sharding import AXES, Layout

PROGRAM = """HloModule jit_step

%scatter (p: bf16[8,4]) -> bf16[4,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %scattered = bf16[4,4]{1,0} reduce-scatter(%p), channel_id=1, dimensions={0}
}

%scatter.clone (p: bf16[8,4]) -> bf16[4,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %scattered.2 = bf16[4,4]{1,0} reduce-scatter(%p), channel_id=1, dimensions={0}
}

%body (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  ROOT %sum = bf16[8,4]{1,0} all-reduce(%x), channel_id=2, to_apply=%add
}

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %loop = bf16[8,4]{1,0} while(%x), condition=%more, body=%body
  %both = (bf16[8,4]{1,0}, f32[4]{0}) all-reduce-start(%x, %y), channel_id=2, to_apply=%add
  %gathered = (bf16[4,4]{1,0}, bf16[4,4]{1,0}) all-gather-start(%x), channel_id=4, dimensions={0}
  %done = bf16[4,4]{1,0} all-gather-done(%gathered)
  %async-collective-start = bf16[4,4]{1,0} fusion(%x), kind=kLoop, calls=%scatter
  %async-collective-fusion.3 = bf16[4,4]{1,0} fusion(%x), kind=kLoop, calls=%scatter.clone
  ROOT %async-collective-done = bf16[4,4]{1,0} fusion(%x), kind=kLoop, calls=%scatter.clone
}
"""

ENCODER = 0.42e9  # parameters of the image encoder and the projector, about


def test_collectives_are_counted_once_with_the_bytes_of_their_results():
    found = scale.collectives(parse(PROGRAM))
    assert found == {"all-reduce": [2, 64 + 64 + 16], "all-gather": [1, 32], "reduce-scatter": [1, 32]}


def test_every_row_has_a_name_of_its_own_and_filters_choose():
    keys = scale.keys()
    assert len(keys) == len(set(keys)) == 3 * 3 * len(MACHINES) * len(scale.PROGRAMS)
    assert keys[0].startswith("3b 224")
    chosen = list(scale.wanted("28b,decode,v5e-8; 3b,full,H200,224"))
    assert len(chosen) == 4 and all(("28b" in key) == ("decode" in key) for key in chosen)
    with pytest.raises(UserError, match="2b"):
        list(scale.wanted("2b"))


@pytest.mark.parametrize(
    "message, needs",
    [
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G.", 20.5 * 2**30),
        ("Used 300.00M of 15.75G hbm", 300 * 2**20),
        ("something else", None),
    ],
)
def test_what_does_not_fit_has_a_number(message, needs):
    assert scale._needed(message) == needs


def work_of(variant: str, program: str, **sizes: int) -> scale_programs.Work:
    shape = tuple(sizes.get(name, 1) for name in AXES)
    layout = Layout(AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * 3), VARIANTS[variant])
    return scale_programs.build(variant, program, layout, ops.Target("tpu"))


def test_a_decode_step_reads_each_weight_of_the_decoder_once():
    """paligemma2-3b: 5.2 GB in bfloat16, and the cache; on 8 devices an eighth of 10b's decoder and cache."""
    one = work_of("paligemma2-3b-224", "decode")
    assert 5.2e9 < one.read_bytes < 5.9e9 and one.count == scale_programs.ROWS
    decoder = 2 * (parameter_count(VARIANTS["paligemma2-10b-224"]) - ENCODER)
    assert decoder / 8 < work_of("paligemma2-10b-224", "decode", tensor=8).read_bytes < decoder / 8 * 1.1


def test_operations_are_twice_the_parameters_for_each_token():
    step = work_of("paligemma2-3b-224", "decode")
    decoder = parameter_count(VARIANTS["paligemma2-3b-224"]) - ENCODER
    assert step.flops == pytest.approx(2 * step.count * decoder, rel=0.05)
