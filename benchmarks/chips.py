"""Accelerators that programs are compiled for without having one, and what they can do at most.

Memory, bandwidth and bf16 rate of TPUs: https://cloud.google.com/tpu/docs/v5e and .../v6e. Of the H200 (data sheet:
141 GB, 4.8 TB/s, 989 TFLOP/s): what was measured of one, a copy within memory and a large bf16 matmul.
"""

import dataclasses
import functools
from typing import Any

from jax.experimental import topologies

from benchmarks.accelerators import CHIPS, require_compiler


@dataclasses.dataclass(frozen=True)
class Machine:
    """Chips that are used together.

    topology: arguments of `get_topology_desc`.
    memory: bytes of a chip that programs may use.
    bandwidth: bytes/s of a chip's memory.
    flops: bf16 operations/s of a chip.
    """

    platform: str
    topology: dict[str, str]
    num_chips: int
    memory: float
    bandwidth: float
    flops: float


def _h200(topology: str, num_chips: int) -> Machine:
    described = CHIPS["H200"][1] | {"topology": topology}
    return Machine("cuda", described, num_chips, 150e9, 4.3e12, 790e12)


MACHINES = {
    "v5e-8": Machine("tpu", {"topology_name": "v5e:2x4"}, 8, 15.75 * 2**30, 0.82e12, 197e12),
    "v6e-8": Machine("tpu", {"topology_name": "v6e:2x4"}, 8, 31.25 * 2**30, 1.6e12, 918e12),
    "H200": _h200("1x1x1", 1),
    "8xH200": _h200("1x1x8", 8),
}


@functools.cache
def devices(machine: str) -> Any:
    """The devices of a described topology.

    Raises:
      UserError: the package with that compiler is missing.
    """
    chosen = MACHINES[machine]
    require_compiler(chosen.platform, machine)
    return topologies.get_topology_desc(platform=chosen.platform, **chosen.topology).devices
