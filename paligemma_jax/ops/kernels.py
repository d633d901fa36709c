"""Which kernel serves how many rows: the static choice that a prepared weight carries."""

import math

Kernels = tuple[tuple[int | None, str], ...]  # (most rows, name of the kernel), fewest rows first; None is any number

REFERENCE = "reference"  # one dot_general


def kernel_for(kernels: Kernels, num_rows: int) -> str:
    """The kernel that serves so many rows; the reference where none was chosen."""
    return next((name for most, name in kernels if most is None or num_rows <= most), REFERENCE)


def describe(kernels: Kernels) -> str:
    """In words: "gemv up to 4 rows, dot"."""
    return ", ".join(name if most is None else f"{name} up to {most} rows" for most, name in kernels) or REFERENCE


class Sized:
    """What follows from the shape of a weight, as of an array."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)
