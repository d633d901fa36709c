"""What is read off an optimized program."""

import dataclasses

import jax
import pytest

from benchmarks import accelerators
from paligemma_jax.errors import UserError

PROGRAM = """HloModule jit_decode, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%fused_multiply (param_0: bf16[4,256]) -> bf16[4,256] {
  %param_0 = bf16[4,256]{1,0} parameter(0)
  ROOT %multiply.1 = bf16[4,256]{1,0} multiply(%param_0, %param_0)
}

%fused_slice (param_1: bf16[8,256]) -> bf16[4,256] {
  %param_1 = bf16[8,256]{1,0} parameter(0)
  ROOT %slice.1 = bf16[4,256]{1,0} slice(%param_1), slice={[0:4], [0:256]}
}

%body (state: (s32[], bf16[4,256])) -> (s32[], bf16[4,256]) {
  %state = (s32[], bf16[4,256]{1,0:T(8,128)(2,1)}) parameter(0)
  %step = s32[] get-tuple-element(%state), index=0
  %next = s32[] add(%step, %step)
  %x = bf16[4,256]{1,0} get-tuple-element(%state), index=1
  %double = bf16[4,256]{1,0} fusion(%x), kind=kLoop, calls=%fused_multiply, metadata={op_name="jit(decode)/norm/mul"}
  %start = (bf16[4,256]{1,0}, bf16[4,256]{1,0:S(1)}, u32[]) copy-start(%double)
  %done = bf16[4,256]{1,0:S(1)} copy-done(%start)
  %product = (bf16[4,256]{1,0}, s8[16]{0}) custom-call(%done), custom_call_target="__cublas$gemm"
  ROOT %tuple.1 = (s32[], bf16[4,256]{1,0}) tuple(%next, %double)
}

ENTRY %main (weights.1: bf16[8,256]) -> bf16[4,256] {
  %weights.1 = bf16[8,256]{1,0} parameter(0)
  %part = bf16[4,256]{1,0} fusion(%weights.1), kind=kLoop, calls=%fused_slice
  %copy.1 = bf16[8,256]{0,1} copy(%weights.1)
  %zero = s32[] constant(0)
  %first = (s32[], bf16[4,256]{1,0}) tuple(%zero, %part)
  %loop = (s32[], bf16[4,256]{1,0}) while(%first), condition=%condition, body=%body
  ROOT %last = bf16[4,256]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_kernels_are_what_the_chip_is_sent_to_run():
    program = accelerators.parse(PROGRAM)
    assert accelerators.loop_body(program) == "body"
    step = accelerators.kernels(program, "body")
    assert [instruction.name for instruction in step] == ["double", "product"]
    assert step[0].source == "jit(decode)/norm/mul"
    assert [i.name for i in accelerators.kernels(program)] == ["part", "copy.1", "double", "product"]


def test_a_program_without_a_loop_is_its_own_step():
    assert accelerators.loop_body({"ENTRY": []}) == "ENTRY"


def test_copies_do_nothing_but_move_and_the_largest_is_first():
    found = accelerators.copies(accelerators.parse(PROGRAM))
    assert [(i.name, i.num_bytes) for i in found] == [("copy.1", 8 * 256 * 2), ("part", 4 * 256 * 2)]


def test_bytes_of_a_result_are_those_of_all_its_arrays():
    program = accelerators.parse(PROGRAM)
    product = next(i for i in program["body"] if i.name == "product")
    assert product.num_bytes == 4 * 256 * 2 + 16
    done = next(i for i in program["body"] if i.name == "done")
    assert done.in_fast_memory and not product.in_fast_memory


def test_arguments_need_no_device():
    case = accelerators.Case("paligemma2-3b-224", "H200", "int8", True, 2)
    params = accelerators.parameters(case, case.config)
    layer = params["language_model"]["layers_0"]
    assert layer["self_attn"]["qkv_proj"]["weight"].shape == (4096, 2304)
    assert layer["mlp"]["gate_up_proj"]["weight"].values.dtype == jax.numpy.int8
    _, (state,), static = accelerators.arguments(case, case.config, "decode")
    assert state.cache[0][0].shape == (2, 4, 256 + 32 + 96, 256)
    assert static["num_steps"] > 1
    apart = accelerators.parameters(dataclasses.replace(case, fused=False), case.config)
    assert "q_proj" in apart["language_model"]["layers_0"]["self_attn"]


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(accelerators.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install libtpu"):
        accelerators.device.__wrapped__("v5e")
