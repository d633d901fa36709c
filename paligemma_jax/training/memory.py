"""What a training step takes of each device's memory, from the compiled program itself."""

import dataclasses
import os
from typing import Any

import jax

from paligemma_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class MemoryTable:
    """Bytes on one device by what they are for; `limit` is what the device has, None where it does not say."""

    rows: dict[str, int]
    limit: int | None

    @property
    def total(self) -> int:
        return sum(self.rows.values())

    @property
    def fits(self) -> bool:
        return self.limit is None or self.total <= self.limit

    def __str__(self) -> str:
        rows = self.rows | {"total": self.total}
        rows |= {} if self.limit is None else {"the device has": self.limit}
        width = max(map(len, rows))
        lines = ["memory of each device:", *(f"  {name:<{width}}  {_size(count)}" for name, count in rows.items())]
        if not self.fits:
            lines.append(
                "  this is more than there is: a smaller batch_size with accumulate, remat=layers, dtype=bfloat16, "
                "or method=lora or qlora take less"
            )
        return "\n".join(lines)


def memory_table(compiled: jax.stages.Compiled, state: TrainState, frozen: Any) -> MemoryTable:
    """The memory of a compiled step (`Step.compile`), whose arguments are a state, what is frozen, and a batch."""
    parts = {
        "trained weights": _bytes(state.params),
        "frozen weights": _bytes(frozen),
        "optimizer state": _bytes(state.opt_state),
    }
    stats = compiled.memory_analysis()
    if stats is not None:
        parts["batch"] = max(0, stats.argument_size_in_bytes - sum(parts.values()))
        results = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
        parts["gradients and activations"] = stats.temp_size_in_bytes + results
        parts["program"] = stats.generated_code_size_in_bytes
    return MemoryTable(parts, device_memory())


def device_memory(device: jax.Device | None = None) -> int | None:
    """Bytes that a device has for programs, the host's where that is the device; None if it does not say."""
    device = device or jax.local_devices()[0]
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
    if device.platform != "cpu" or "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _bytes(tree: Any) -> int:
    """Bytes of the arrays of a tree on one device."""

    def size(leaf: Any) -> int:
        return leaf.addressable_shards[0].data.nbytes if isinstance(leaf, jax.Array) else leaf.nbytes

    return sum(map(size, jax.tree.leaves(tree)))


def _size(count: int) -> str:
    """Bytes in words: "12.3 MB"."""
    unit = next((unit for unit in ((1e9, "GB"), (1e6, "MB")) if count >= unit[0]), (1e3, "kB"))
    return f"{count / unit[0]:,.1f} {unit[1]}"
