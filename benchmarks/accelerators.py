"""Programs for an H200 and a TPU v5e, compiled on a machine that has neither, and what can be read off them.

    pip install "jax[cuda13]" libtpu          # 5 GB, of jax's own version; nothing else needs them
    python benchmarks/accelerators.py --variant paligemma2-3b-224,paligemma-3b-224 --quantization none,int8

XLA's own compilers for these chips run on any x86 machine with Linux, for a described topology in place of a device.
Their programs tell which kernels run, what takes memory and what is copied; only time is missing. The process has no
backend but the CPU's, so a network whose code asked for the backend, in place of its target, would come out wrong here.
No weights are needed, only shapes.

What is counted. A *kernel* is an instruction of the scheduled program that the chip is sent to run by itself: a fusion,
a custom call of a library, a copy, or whatever else stands unfused. No kernels are: what costs nothing at run time
(parameters, constants, tuples, bitcasts, control flow), the start and end of an asynchronous transfer, and unfused
scalars, which the sequencer of a TPU computes. *A step* counts the body of decode's loop, sampling included; *a layer*
is half of what two more decoder layers add to it, so that the table and sampling do not enter. A *copy* moves numbers
within main memory without computing: `copy`, or a fusion of nothing but reads, slices, transposes and writes. The cache
is *in place* if the state's buffers are those of the result and no copy is as large as one layer's keys.
"""

import argparse
import collections
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.experimental import topologies

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import head, line
from paligemma_jax import ops
from paligemma_jax.checkpoints import expected_shapes, quantized
from paligemma_jax.config import VARIANTS, PaliGemmaConfig
from paligemma_jax.engine import sampling, steps
from paligemma_jax.errors import UserError
from paligemma_jax.files import write_text
from paligemma_jax.processing.request import GenerateOptions

# The fields of XLA's GpuTargetConfigProto, as a process with the chip would find them.
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } device_description_str: "NVIDIA H200"
"""
CHIPS = {
    "H200": ("cuda", {"topology": "1x1x1", "target_config": _H200}),
    "v5e": ("tpu", {"topology_name": "v5e:2x2"}),
}
_PACKAGES = {"cuda": ("jax_cuda13_plugin", "jax_cuda12_plugin"), "tpu": ("libtpu",)}  # any of them will do
_INSTALL = {"cuda": '"jax[cuda13]=={}"', "tpu": "libtpu"}

_PROMPT, _ANSWER, _STEPS = 32, 96, 8  # text tokens of a prompt, cache slots for the answer, steps of a program
_LOC_START = 256000  # id of the first location token in the released vocabularies

_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w-]+)\((.*)")
_ARRAY = re.compile(r"([a-z]+\d*)[a-z\d]*\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%([\w.-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_DATA = frozenset({"parameter", "constant", "tuple", "bitcast"})
_CONTROL = frozenset({"get-tuple-element", "while", "call", "conditional", "after-all", "opt-barrier", "ConcatBitcast"})
_MOVES = frozenset({"copy", "transpose", "reshape", "slice", "dynamic-slice", "concatenate", "broadcast", "pad"})
_MEMORY = ("argument", "temp", "output", "alias")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of an optimized program.

    shape: as XLA writes it, with its layout.
    opcode: XLA's, or the target of a custom call.
    called: the computation that it runs, None for most.
    source: name of the JAX operation that it comes from.
    """

    name: str
    shape: str
    opcode: str
    called: str | None
    source: str

    @property
    def num_bytes(self) -> int:
        """Of the result."""
        return sum(
            _itemsize(kind) * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims, _ in self._arrays
        )

    @property
    def in_fast_memory(self) -> bool:
        """Whether the result lies outside the main memory."""
        return any("S(1)" in layout for _, _, layout in self._arrays)

    @property
    def _arrays(self) -> list[tuple[str, str, str]]:
        return _ARRAY.findall(self.shape)


Program = dict[str, list[Instruction]]  # computations by name; "ENTRY" is the first to run


def parse(text: str) -> Program:
    """The instructions of an optimized HLO module."""
    program: Program = {}
    for row in text.splitlines():
        if row.endswith("{") and not row.startswith((" ", "HloModule")):
            name = "ENTRY" if row.startswith("ENTRY") else row.partition(" ")[0].removeprefix("%")
            current = program.setdefault(name, [])
        elif match := _INSTRUCTION.match(row):
            name, shape, opcode, rest = match.groups()
            found = (pattern.search(rest) for pattern in (_TARGET, _CALLED, _OP_NAME))
            target, called, source = (match.group(1) if match else None for match in found)
            current.append(Instruction(name, shape, target or opcode, called, source or ""))
    return program


def kernels(program: Program, computation: str = "ENTRY") -> list[Instruction]:
    """The kernels of a computation and of those it calls, in order; those of a loop's body once."""
    found = []
    for instruction in program[computation]:
        if instruction.opcode in ("while", "call"):
            found += kernels(program, instruction.called)
        elif _is_kernel(instruction):
            found.append(instruction)
    return found


def loop_body(program: Program) -> str:
    """The computation that the program's main loop repeats: of all, the one with most kernels."""
    loops = [i.called for i in program["ENTRY"] if i.opcode == "while"]
    return max(loops, key=lambda name: len(kernels(program, name)), default="ENTRY")


def copies(program: Program, computation: str = "ENTRY") -> list[Instruction]:
    """Kernels that copy within main memory, the largest first."""
    found = [i for i in kernels(program, computation) if _moves_only(program, i) and not i.in_fast_memory]
    return sorted(found, key=lambda i: -i.num_bytes)


def _is_kernel(instruction: Instruction) -> bool:
    asynchronous = instruction.opcode.endswith(("-start", "-done", "-update"))
    scalar = instruction.opcode != "fusion" and re.match(r"\w+\[\]", instruction.shape)
    return not (instruction.opcode in _DATA | _CONTROL or asynchronous or scalar)


def _moves_only(program: Program, instruction: Instruction) -> bool:
    if instruction.opcode != "fusion":
        return instruction.opcode in ("copy", "transpose")
    inside = {i.opcode for i in program.get(instruction.called, ())}
    return bool(inside) and inside <= _DATA | _MOVES


def _itemsize(kind: str) -> int:
    bits = re.search(r"\d+", kind)
    return max(1, int(bits.group()) // 8) if bits else 1  # pred has one byte


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled.

    chip: key of `CHIPS`.
    quantization: None, "int8" or "int4"; the other weights are bfloat16.
    fused: whether projections of one input are one weight, as `ops.prepare` has it.
    """

    variant: str
    chip: str
    quantization: str | None
    fused: bool
    batch: int

    @property
    def target(self) -> ops.Target:
        return ops.Target(CHIPS[self.chip][0], num_rows=self.batch)

    @property
    def config(self) -> PaliGemmaConfig:
        return VARIANTS[self.variant]

    def __str__(self) -> str:
        weights = f"{self.quantization or 'bfloat16'}{'' if self.fused else ', projections apart'}"
        return f"{self.variant}, {weights}, batch {self.batch}, {self.chip}"


@functools.cache
def device(chip: str) -> Any:
    """One device of a described topology.

    Raises:
      UserError: the package with that compiler is missing.
    """
    platform, topology = CHIPS[chip]
    require_compiler(platform, chip)
    return topologies.get_topology_desc(platform=platform, **topology).devices[0]


def require_compiler(platform: str, chip: str) -> None:
    """UserError when the package with the compiler for a chip of a platform is missing."""
    if not any(importlib.util.find_spec(name) for name in _PACKAGES[platform]):
        raise UserError(f"no compiler for {chip} here: pip install {_INSTALL[platform].format(jax.__version__)}")


def parameters(case: Case, config: PaliGemmaConfig) -> Any:
    """The shapes of a network's parameters, prepared for a chip."""

    def leaf(path: str, shape: tuple[int, ...]) -> Any:
        struct = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        form = quantized.format_of(path, case.quantization) if case.quantization else None
        return ops.quantized_shape(struct, form, quantized.quantizes_activations(path)) if form else struct

    params = unflatten_dict({path: leaf(path, shape) for path, shape in expected_shapes(config).items()}, sep="/")
    params = ops.prepare(params, case.target)
    return params if case.fused else ops.unprepare(params)


def arguments(case: Case, config: PaliGemmaConfig, stage: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A function of the engine, the shapes of its arguments after the parameters, and its static arguments."""
    rows, size, num_soft = case.batch, config.vision.image_size, config.vision.num_tokens
    if stage == "vision":
        pixels = jax.ShapeDtypeStruct((rows, size, size, 3), jnp.float32)
        return steps.run, (pixels,), {"config": config, "method": "embed_image"}
    num_tokens = num_soft + _PROMPT
    sequences, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, num_tokens), (rows,)))
    soft_tokens = jax.ShapeDtypeStruct((rows, num_soft, config.text.width), jnp.bfloat16)
    inputs = steps.Inputs(soft_tokens, sequences, sequences, lengths, lengths)
    options = [GenerateOptions(max_new_tokens=_ANSWER)] * rows
    row_options = jax.eval_shape(
        lambda: sampling.row_options(options, sampling.row_keys([0] * rows, range(rows)), None)
    )
    step_config = sampling.step_config(config, _LOC_START, options, constrained=False)
    static = {"config": step_config, "num_tokens": _ANSWER, "num_slots": num_tokens + _ANSWER}
    if stage == "prefill":
        return steps.prefill, (inputs, row_options), static
    state = jax.eval_shape(functools.partial(steps.prefill, **static), parameters(case, config), inputs, row_options)
    return steps.decode, (state,), {"config": step_config, "num_steps": _STEPS}


def compile_stage(case: Case, stage: str, config: PaliGemmaConfig | None = None) -> tuple[jax.stages.Compiled, float]:
    """The program of "vision", "prefill" or "decode", and the seconds that compiling took."""
    config = config or case.config
    function, args, static = arguments(case, config, stage)
    sharding = jax.sharding.SingleDeviceSharding(device(case.chip))
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (parameters(case, config), *args)
    )
    start = time.perf_counter()
    program = ops.compiled(case.target, function, *placed, **static)
    return program, time.perf_counter() - start


def layer_kernels(case: Case) -> float:
    """Kernels that one decoder layer adds to a step."""
    counts = []
    for num_layers in (4, 2):  # layers alternate in Gemma 2
        text = dataclasses.replace(case.config.text, num_layers=num_layers)
        program = parse(compile_stage(case, "decode", dataclasses.replace(case.config, text=text))[0].as_text())
        counts.append(len(kernels(program, loop_body(program))))
    return (counts[0] - counts[1]) / 2


def examine(case: Case, listed: bool) -> list[str]:
    """Compile all stages of a case: lines of Markdown; `listed` adds each kernel of a decode step."""
    title = ["", "GB: arguments", "temporaries", "results", "of them in place", "kernels", "seconds to compile"]
    lines = [f"## {case}", "", *head(title)]
    for stage in ("vision", "prefill", "decode"):
        compiled, seconds = compile_stage(case, stage)
        memory = compiled.memory_analysis()
        sizes = (f"{getattr(memory, f'{name}_size_in_bytes') / 1e9:.3f}" for name in _MEMORY)
        program = parse(compiled.as_text())
        lines.append(line([stage, *sizes, str(len(kernels(program))), f"{seconds:.1f}"]))
    step = kernels(program, loop_body(program))
    opcodes = ", ".join(f"{n} {name}" for name, n in collections.Counter(i.opcode for i in step).most_common())
    large = [f"{i.num_bytes / 1e6:.3g} MB ({i.name})" for i in copies(program)[:3]]
    return [
        *lines,
        "",
        f"- decode, kernels a step: {len(step)} ({opcodes}); a layer: {layer_kernels(case):g}",
        f"- decode, cache: {_cache_note(case, program, memory.alias_size_in_bytes)}",
        f"- decode, largest copies: {', '.join(large) or 'none'}",
        *(["", "```", *map(_describe, step), "```"] if listed else []),
        "",
    ]


def _cache_note(case: Case, program: Program, aliased: int) -> str:
    """Whether the cache is updated in place."""
    text, slots = case.config.text, case.config.vision.num_tokens + _PROMPT + _ANSWER
    keys = 2 * case.batch * text.num_kv_heads * text.head_dim * slots  # bytes of one layer's, in bfloat16
    cache = 2 * text.num_layers * keys
    size = f"{cache / 1e6:.3g} MB"
    if aliased < cache:
        return f"NOT in place: {aliased / 1e6:.3g} of {size} are those of the result"
    whole, step = (
        sum(i.num_bytes >= keys for i in copies(program, computation)) for computation in ("ENTRY", loop_body(program))
    )
    if not whole:
        return f"{size}, in place"
    return (
        f"{size}, in the state's buffers; as large as a layer's keys: {step} copies a step, {whole - step} at the ends"
    )


def _describe(instruction: Instruction) -> str:
    return f"{instruction.opcode:12} {instruction.name:36} {instruction.shape[:60]:60} {instruction.source[-60:]}"


def _versions() -> str:
    names = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu")
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return ", ".join(f"{name} {found[name]}" for name in names if name in found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", default="paligemma2-3b-224", help="released variants, separated by commas")
    parser.add_argument("--chip", default=",".join(CHIPS), help="some of " + ", ".join(CHIPS))
    parser.add_argument("--quantization", default="none", help="some of none, int8, int4")
    parser.add_argument("--batch", default="1", help="rows of a batch, one or more numbers")
    parser.add_argument("--apart", action="store_true", help="projections as a checkpoint has them, not fused")
    parser.add_argument("--list", action="store_true", help="print each kernel of a decode step")
    parser.add_argument("--out", type=Path, help="a Markdown file, which is replaced")
    args = parser.parse_args()
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # of the driver, which is not here
    jax.config.update("jax_platforms", "cpu")
    lines = [
        "# Programs for an H200 and a v5e",
        "",
        f"{datetime.date.today()}: compiled without either; {_versions()}. What is counted: see accelerators.py.",
        "",
    ]
    try:
        for variant in args.variant.split(","):
            if variant not in VARIANTS:
                raise UserError(f"--variant {variant!r} is unknown: use some of {', '.join(VARIANTS)}")
            for quantization in args.quantization.split(","):
                for batch in map(int, args.batch.split(",")):
                    for chip in args.chip.split(","):
                        form = None if quantization == "none" else quantization
                        found = examine(Case(variant, chip, form, not args.apart, batch), args.list)
                        print("\n".join(found), flush=True)
                        lines += found
                        if args.out:
                            write_text(args.out, "\n".join(lines))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
