"""One mesh for inference, serving and training, and one table that says which axis of an array lies along which of it.

The mesh has three axes. Rows of a batch are divided over `data` and `fsdp`. Parameters are divided over `fsdp` along
the width of the residual stream (ZeRO-3: gathered where they are used), and over `tensor` along heads, hidden units of
the MLPs and rows of the vocabulary (Megatron-LM, arXiv 1909.08053: two all-reduces a layer). Optimizer state follows
its parameters. The compiler (GSPMD, arXiv 2105.04663) derives the rest of a program from its arguments and results.

An array's logical axes follow from its path; a sharding from the logical axes by `MESH_AXES`. Weights have the file's
orientation, outputs by inputs; quantized ones keep each scale with its output.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from paligemma_jax.config import PaliGemmaConfig, TextConfig
from paligemma_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Those of `_UNITS` are divided between whole heads only.
MESH_AXES: dict[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp"),
    "embed": ("fsdp",),
    "vocabulary": ("tensor", "fsdp"),  # each device has logits of its own rows: the table is never gathered
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vision_heads": ("tensor",),
    "fused": ("tensor",),
    "mlp": ("tensor",),
}
_UNITS: dict[str, Callable[[PaliGemmaConfig], int]] = {
    "heads": lambda config: config.text.num_heads,
    "kv_heads": lambda config: config.text.num_kv_heads,
    "vision_heads": lambda config: config.vision.num_heads,
}
_NAMES = {"kv_heads": "key-value heads", "heads": "query heads", "vision_heads": "heads of the image encoder"}

_LANGUAGE, _VISION = r"language_model/layers_\d+/", r"vision_tower/layers_\d+/"
_Axes = tuple[str | None, ...]
# Module -> logical axes of its weight, outputs first. Fused projections are divided like any rows: `load` takes them
# apart where there is a `tensor` axis, since a part's heads would lie on other devices than those that need them.
_MODULES: tuple[tuple[re.Pattern[str], _Axes], ...] = tuple(
    (re.compile(rf"(?:^|/){pattern}/(?P<part>.+)$"), axes)
    for pattern, axes in (
        (r"language_model/(?:embed_tokens|lm_head)", ("vocabulary", None)),
        (_LANGUAGE + r"self_attn/q_proj", ("heads", "embed")),
        (_LANGUAGE + r"self_attn/[kv]_proj", ("kv_heads", "embed")),
        (_LANGUAGE + r"self_attn/o_proj", ("embed", "heads")),
        (_LANGUAGE + r"self_attn/qkv_proj", ("fused", "embed")),
        (_LANGUAGE + r"mlp/(?:gate_proj|up_proj|gate_up_proj)", ("mlp", "embed")),
        (_LANGUAGE + r"mlp/down_proj", ("embed", "mlp")),
        (_VISION + r"self_attn/[qkv]_proj", ("vision_heads", "embed")),
        (_VISION + r"self_attn/out_proj", ("embed", "vision_heads")),
        (_VISION + r"mlp/fc1", ("mlp", "embed")),
        (_VISION + r"mlp/fc2", ("embed", "mlp")),
        (r"vision_tower/patch_embedding", ("embed", None, None, None)),
        (r"vision_tower/position_embedding", (None, "embed")),
        (r"multi_modal_projector/linear", ("embed", None)),
    )
)
_PARAMETER = re.compile(r"(?:^|/)(?:language_model|vision_tower|multi_modal_projector)/")


def logical_axes(path: str, shape: Sequence[int], num_kv_heads: int) -> _Axes:
    """The logical axis of each axis of an array, None for those that are never divided.

    Args:
      path: names with slashes between them. One that ends like a parameter's ("0/mu/language_model/norm/weight") is
        that parameter, or belongs to it; any other array has rows first.
      shape: of the array.
      num_kv_heads: of the model; arrays [B, K, ...] of four axes that are no parameters are keys or values.
    """
    ndim = len(shape)
    none = (None,) * ndim
    if not _PARAMETER.search(path):
        has_heads = ndim == 4 and shape[1] == num_kv_heads
        return ("rows", "kv_heads" if has_heads else None, *none)[:ndim]
    for pattern, axes in _MODULES:
        if not (match := pattern.search(path)):
            continue
        part = match["part"].rpartition("/")[2]
        if part in ("bias", "scale", "magnitude") and ndim == 1:
            return axes[:1]
        if part in ("group_scale", "up"):  # groups of inputs, and the rank of LoRA, are too few to be divided
            return axes[0], None
        if part == "down":
            return None, axes[1]
        return axes if len(axes) == ndim else none
    return none


def parse_mesh(text: str, num_devices: int, model: TextConfig | None = None) -> tuple[int, int, int]:
    """Sizes of the axes data, fsdp and tensor.

    Args:
      text: "data=2,tensor=4", what is not named being 1; or "auto": all devices.
      num_devices: that there are.
      model: the decoder that is to answer: "auto" divides its heads over as many devices as it can, and rows over the
        rest. None is training, where "auto" is fsdp alone.

    Raises:
      ConfigError: another text, or more devices than there are.
    """
    if text == "auto":
        if model is None:
            return 1, num_devices, 1
        # A single key-value head is copied; several would be moved at every step where they cannot be divided.
        heads = math.gcd(model.num_heads, model.num_kv_heads) if model.num_kv_heads > 1 else model.num_heads
        tensor = math.gcd(num_devices, heads)
        return num_devices // tensor, 1, tensor
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ConfigError(f"mesh={text!r} is not possible: give sizes as data=2,fsdp=2,tensor=2, or auto")
        sizes[name] = int(size)
    shape = tuple(sizes.get(name, 1) for name in AXES)
    if math.prod(shape) > num_devices:
        raise ConfigError(
            f"mesh={text!r} takes {math.prod(shape)} devices, there are {num_devices}: give smaller sizes"
        )
    return shape


def make_mesh(text: str, model: TextConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the first devices that it needs, see `parse_mesh`; by default those of all processes."""
    devices = jax.devices() if devices is None else list(devices)
    shape = parse_mesh(text, len(devices), model)
    count = math.prod(shape)
    if count < len(devices) and jax.process_count() > 1:
        raise ConfigError(f"mesh={text!r} takes {count} devices of {len(devices)}: several processes need all of them")
    automatic = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=automatic, devices=devices[:count])


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the arrays of a model lie on a mesh.

    config: geometry, which says how many heads there are to divide.
    """

    mesh: Mesh
    config: PaliGemmaConfig

    @property
    def num_tensor(self) -> int:
        """Devices that the `tensor` axis has."""
        return self.mesh.shape["tensor"]

    @property
    def replicated(self) -> NamedSharding:
        """Everything on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def sharding(self, path: str, shape: Sequence[int]) -> NamedSharding:
        """That of one array, see `logical_axes`. An axis that cannot be divided evenly is not: see `notes`."""
        return _sharding(self, path, tuple(shape))  # found once: states are looked up at every step

    def shardings(self, tree: Any) -> Any:
        """A tree of shardings: of parameters, training state, a batch, or a state of the engine; shapes suffice."""
        return jax.tree_util.tree_map_with_path(lambda path, leaf: self.sharding(path_name(path), np.shape(leaf)), tree)

    def shapes(self, tree: Any) -> Any:
        """The tree as shapes and dtypes with their shardings."""

        def shape(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            dtype = leaf.dtype if hasattr(leaf, "dtype") else jax.dtypes.canonicalize_dtype(type(leaf))
            return jax.ShapeDtypeStruct(np.shape(leaf), dtype, sharding=sharding)

        return jax.tree.map(shape, tree, self.shardings(tree))

    def place(self, path: str, leaf: Any) -> Any:
        """One parameter, an array or a weight of arrays in host memory, to its shards: each device gets its own only.

        All processes of a run read the same file, and each takes what its devices hold.
        """

        def put(inner: tuple[Any, ...], array: Any) -> jax.Array:
            array = np.asarray(array)
            sharding = self.sharding("/".join(filter(None, (path, path_name(inner)))), array.shape)
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        return jax.tree_util.tree_map_with_path(put, leaf)

    def notes(self, tree: Any) -> list[str]:
        """What of a tree of parameters or states is not divided though the table says so, a line for each reason."""
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        found: dict[str, None] = {}
        for path, leaf in leaves:
            for name, _, kept_whole in self._axes(path_name(path), np.shape(leaf)):
                if kept_whole:
                    what = f"{kept_whole} {_NAMES.get(name, f'of the axis {name}')}"
                    sizes = " and ".join(f"{axis}={self.mesh.shape[axis]}" for axis in MESH_AXES[name])
                    found[f"{what} cannot be divided over {sizes}: each of those devices has them all"] = None
        return list(found)

    def _axes(self, path: str, shape: Sequence[int]) -> Iterator[tuple[str, tuple[str, ...] | None, int]]:
        """For each axis of an array: its logical axis, mesh axes, and how many units could not be divided, else 0."""
        for name, size in zip(logical_axes(path, shape, self.config.text.num_kv_heads), shape, strict=True):
            wanted = tuple(axis for axis in MESH_AXES.get(name or "", ()) if self.mesh.shape[axis] > 1)
            units = _UNITS[name](self.config) if name in _UNITS else size
            fitting = wanted
            while fitting and (units % self._count(fitting) or size % self._count(fitting)):
                fitting = fitting[:-1]
            yield name or "", fitting or None, units if len(fitting) < len(wanted) else 0

    def _count(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)


def put(layout: Layout | None, tree: Any) -> Any:
    """A tree whose arrays are divided over the devices of this process; those in place, or no layout, stay."""
    return tree if layout is None else jax.device_put(tree, layout.shardings(tree))


def trace(layout: Layout | None, function: Callable[..., Any], *args: Any, **static: Any) -> jax.stages.Traced:
    """A function of `jax.jit` traced for arguments, which may be shapes; with a layout they and results are divided.

    What the function donates is donated.
    """
    if layout is None:
        return function.trace(*args, **static)
    shapes = layout.shapes(args)
    traced = function.trace(*shapes, **static)
    donated = [any(leaf.donated for leaf in jax.tree.leaves(info)) for info in traced.args_info[0]]
    whole = jax.jit(
        lambda *args: function(*args, **static),
        donate_argnums=[i for i, is_donated in enumerate(donated) if is_donated],
        out_shardings=layout.shardings(traced.out_info),
    )
    return whole.trace(*shapes)


@functools.lru_cache(maxsize=10_000)
def _sharding(layout: Layout, path: str, shape: tuple[int, ...]) -> NamedSharding:
    return NamedSharding(layout.mesh, PartitionSpec(*(axes for _, axes, _ in layout._axes(path, shape))))


def path_name(path: tuple[Any, ...]) -> str:
    """The keys on the way to a leaf of a tree, with slashes between them."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
