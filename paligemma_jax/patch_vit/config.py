"""Geometry of the patch ViT and of CLIP, to and from config.json; every size comes from there or from the weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from paligemma_jax.config import VisionConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.encoder import ACTIVATIONS

MODEL_TYPE = "patch_vit"


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """The patch ViT; the defaults are the original's.

    embed_dim: width of the teacher's text space; the network's own is `width`, one channel more for each head.
    masked: patches see their neighbours only, see `student.neighbour_mask`.
    same_norm: patch embeddings get the same norm, see `student.PatchViT`.
    max_scale: the largest such norm.
    teacher: what it was distilled from, for messages; "" where that is not known.
    """

    image_size: int = 224
    patch_size: int = 28
    embed_dim: int = 512
    num_layers: int = 6
    mlp_dim: int = 2112
    num_heads: int = 16
    masked: bool = True
    same_norm: bool = True
    has_scale: bool = True
    max_scale: float = 10.0
    temperature: float = 1.0
    layer_norm_eps: float = 1e-5
    teacher: str = ""

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ConfigError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        if self.embed_dim % self.num_heads:
            raise ConfigError(f"embed_dim {self.embed_dim} is no multiple of num_heads {self.num_heads}")
        if self.same_norm and not self.has_scale:
            raise ConfigError("same_norm needs the parameter `scale`, which these weights lack: leave same_norm out")

    @property
    def width(self) -> int:
        return self.embed_dim + self.num_heads

    @property
    def grid(self) -> int:
        """Patches of a side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    def replaced(self, **changes: Any) -> "StudentConfig":
        """The same with other values of some fields; ConfigError when they contradict each other."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """What `student_from_json` reads."""
        return {"model_type": MODEL_TYPE, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig(VisionConfig):
    """CLIP's image tower: one token more than patches, and an activation of its own."""

    activation: str = "quick_gelu"


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """CLIP's text tower; `context` is its number of positions."""

    vocab_size: int = 49408
    context: int = 77
    width: int = 512
    num_layers: int = 12
    mlp_dim: int = 2048
    num_heads: int = 8
    layer_norm_eps: float = 1e-5
    activation: str = "quick_gelu"
    eos_token_id: int = 49407


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Both towers and the width of the space that they share."""

    vision: ClipVisionConfig
    text: ClipTextConfig
    projection_dim: int = 512

    def to_json(self) -> dict[str, Any]:
        """As transformers writes it."""
        return {
            "model_type": "clip",
            "architectures": ["CLIPModel"],
            "projection_dim": self.projection_dim,
            "vision_config": _written(self.vision, _VISION) | {"model_type": "clip_vision_model"},
            "text_config": _written(self.text, _TEXT) | {"model_type": "clip_text_model"},
        }


# Our field -> transformers' name and the default of its class, for what a file leaves out.
_VISION = {
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 32),
    "width": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 12),
    "mlp_dim": ("intermediate_size", 3072),
    "num_heads": ("num_attention_heads", 12),
    "layer_norm_eps": ("layer_norm_eps", 1e-5),
    "activation": ("hidden_act", "quick_gelu"),
}
_TEXT = {
    "vocab_size": ("vocab_size", 49408),
    "context": ("max_position_embeddings", 77),
    "width": ("hidden_size", 512),
    "num_layers": ("num_hidden_layers", 12),
    "mlp_dim": ("intermediate_size", 2048),
    "num_heads": ("num_attention_heads", 8),
    "layer_norm_eps": ("layer_norm_eps", 1e-5),
    "activation": ("hidden_act", "quick_gelu"),
    "eos_token_id": ("eos_token_id", 49407),
}


def student_from_json(fields: Mapping[str, Any], source: str) -> StudentConfig:
    """A config.json of `StudentConfig.to_json`; ConfigError names the file and the field."""
    if fields.get("model_type") != MODEL_TYPE:
        kind = str(fields.get("model_type"))[:40]
        raise ConfigError(f"{source} is of a {kind!r} model, not of a {MODEL_TYPE!r}: give a directory that holds one")
    known = {field.name: field.default for field in dataclasses.fields(StudentConfig)}
    if strange := sorted(set(fields) - set(known) - {"model_type"}):
        raise ConfigError(
            f"{source}: {strange[0]!r:.60} is unknown: remove it, or take a newer version of this program"
        )
    values = {
        name: _checked(fields.get(name, default), default, f"{source}: {name}") for name, default in known.items()
    }
    try:
        return StudentConfig(**values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def clip_from_json(fields: Mapping[str, Any], source: str) -> ClipConfig:
    """A config.json of transformers' CLIPModel; ConfigError names the file and the field."""
    if fields.get("model_type") != "clip":
        kind = str(fields.get("model_type"))[:40]
        raise ConfigError(f"{source} is of a {kind!r} model, not of 'clip': give a directory that holds a CLIPModel")
    sections = [fields.get(f"{name}_config") or {} for name in ("vision", "text")]
    if not all(isinstance(section, dict) for section in sections):
        raise ConfigError(f"{source}: vision_config and text_config must be objects")
    vision = ClipVisionConfig(**_read(sections[0], _VISION, f"{source}: vision_config"))
    text = ClipTextConfig(**_read(sections[1], _TEXT, f"{source}: text_config"))
    for section, config in (("vision_config", vision), ("text_config", text)):
        if config.width % config.num_heads:
            raise ConfigError(f"{source}: {section}: hidden_size is no multiple of num_attention_heads")
    if vision.image_size % vision.patch_size:
        raise ConfigError(f"{source}: vision_config: image_size is no multiple of patch_size")
    return ClipConfig(vision, text, _checked(fields.get("projection_dim", 512), 512, f"{source}: projection_dim"))


def _read(section: Mapping[str, Any], names: Mapping[str, tuple[str, Any]], where: str) -> dict[str, Any]:
    found = {}
    for field, (name, default) in names.items():
        found[field] = _checked(section.get(name, default), default, f"{where}: {name}")
    if found["activation"] not in ACTIVATIONS:
        raise ConfigError(f"{where}: hidden_act {found['activation']!r:.40} is not one of {', '.join(ACTIVATIONS)}")
    return found


def _written(config: Any, names: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    return {name: getattr(config, field) for field, (name, _) in names.items()}


def _checked(value: Any, default: Any, where: str) -> Any:
    """A value of the type of its default; numbers are positive."""
    kind = type(default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind in (int, float) and not 0 < value < 2**31):
        expected = {int: "a positive integer", float: "a positive number", bool: "true or false", str: "a text"}[kind]
        raise ConfigError(f"{where} is {value!r:.60}, expected {expected}")
    return value
