"""Which parameters a geometry has, and how a found set differs from that.

Axes: D decoder width, E encoder width, M mlp width, N query heads, K key/value heads, H head width, V table rows,
L image tokens, P patch size. Every Linear weight is [out, in].
"""

import math
import re
from collections.abc import Mapping

from paligemma_jax.config import PaliGemmaConfig, TextConfig, VisionConfig
from paligemma_jax.errors import CheckpointError, printable

Shape = tuple[int, ...]


def expected_shapes(config: PaliGemmaConfig) -> dict[str, Shape]:
    """Path ("language_model/layers_0/mlp/up_proj/weight") -> shape, for every parameter of the geometry."""
    projector = _affine("multi_modal_projector/linear", (config.text.width, config.vision.width))
    return _vision_shapes(config.vision) | projector | _text_shapes(config.text)


def parameter_count(config: PaliGemmaConfig) -> int:
    """Number of parameters, all rows of the embedding table included; a tied output head counts once."""
    return sum(math.prod(shape) for shape in expected_shapes(config).values())


def _affine(name: str, weight: Shape) -> dict[str, Shape]:
    return {f"{name}/weight": weight, f"{name}/bias": weight[:1]}


def _vision_shapes(config: VisionConfig) -> dict[str, Shape]:
    E, M, P = config.width, config.mlp_dim, config.patch_size
    shapes = _affine("patch_embedding", (E, 3, P, P)) | {"position_embedding/weight": (config.num_tokens, E)}
    for i in range(config.num_layers):
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= _affine(f"layers_{i}/{norm}", (E,))
        for proj in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _affine(f"layers_{i}/self_attn/{proj}", (E, E))
        shapes |= _affine(f"layers_{i}/mlp/fc1", (M, E)) | _affine(f"layers_{i}/mlp/fc2", (E, M))
    shapes |= _affine("post_layernorm", (E,))
    return {f"vision_tower/{name}": shape for name, shape in shapes.items()}


def _text_shapes(config: TextConfig) -> dict[str, Shape]:
    D, M, H = config.width, config.mlp_dim, config.head_dim
    N, K = config.num_heads, config.num_kv_heads
    layer = {
        "pre_attention_norm": (D,),
        "self_attn/q_proj": (N * H, D),
        "self_attn/k_proj": (K * H, D),
        "self_attn/v_proj": (K * H, D),
        "self_attn/o_proj": (D, N * H),
        "pre_ffw_norm": (D,),
        "mlp/gate_proj": (M, D),
        "mlp/up_proj": (M, D),
        "mlp/down_proj": (D, M),
    }
    if config.version == 2:
        layer |= {"post_attention_norm": (D,), "post_ffw_norm": (D,)}
    tables = ("embed_tokens",) if config.tied else ("embed_tokens", "lm_head")
    shapes = dict.fromkeys(tables, (config.vocab_size, D)) | {"norm": (D,)}
    shapes |= {f"layers_{i}/{name}": shape for i in range(config.num_layers) for name, shape in layer.items()}
    return {f"language_model/{name}/weight": shape for name, shape in shapes.items()}


def differences(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> str:
    """Every missing, unexpected and mis-shaped name as one line, layers folded into ranges; empty when all is well."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshaped: dict[tuple[Shape, Shape], list[str]] = {}
    for name, shape in expected.items():
        if name in found and tuple(found[name]) != tuple(shape):
            misshaped.setdefault((tuple(found[name]), tuple(shape)), []).append(name)
    parts = [
        f"{len(names)} {what}: {fold(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if misshaped:
        details = [
            f"{fold(names)} {'is' if len(names) == 1 else 'are'} {list(got)} instead of {list(want)}"
            for (got, want), names in misshaped.items()
        ]
        parts.append(f"{sum(map(len, misshaped.values()))} mis-shaped: {', '.join(details)}")
    return "; ".join(parts)


def require(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Refuse to write parameters that are not those of the geometry."""
    problems = differences(found, expected)
    if problems:
        raise CheckpointError(f"the parameters do not fit the config: {problems}")


def fold(names: list[str]) -> str:
    """Join names, those that differ only in the layer written once: `layers.{0-3,5}.mlp.up_proj.weight`."""
    groups: dict[str, list[int]] = {}
    for name in map(printable, names):
        layer = re.search(r"(?<=layers[._])\d+", name)
        pattern = name[: layer.start()] + "{}" + name[layer.end() :] if layer else name
        groups.setdefault(pattern, []).extend([int(layer.group())] if layer else [])
    folded = []
    for pattern, layers in groups.items():
        ranges = _ranges(sorted(layers))
        folded.append(pattern.replace("{}", ranges if len(layers) < 2 else f"{{{ranges}}}", 1))
    return ", ".join(folded)


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
