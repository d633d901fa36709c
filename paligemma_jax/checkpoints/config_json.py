"""Geometry to and from Hugging Face's config.json.

Files leave out what equals a default of the class that wrote them, so those defaults are stated here. A setting that
would change the network and that this implementation does not have is refused by name, never passed over.
Source: transformers 5, models/{paligemma,gemma,gemma2,siglip}/configuration_*.py; 4.4x and later files are read too.
"""

import dataclasses
import sys
from typing import Any

from paligemma_jax import ops
from paligemma_jax.config import PaliGemmaConfig, TextConfig, VisionConfig
from paligemma_jax.errors import ConfigError

_VISION_DEFAULTS = {
    "model_type": "siglip_vision_model",
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}
_TEXT_DEFAULTS = {
    "model_type": "gemma",
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "hidden_act": "gelu_pytorch_tanh",
}
_GEMMA2_DEFAULTS = _TEXT_DEFAULTS | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
}
_TOP_DEFAULTS = {"image_token_index": 256000}
_GEMMA2_ONLY = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
_BOS, _EOS, _PAD = 2, 1, 0
_MOST, _MOST_LAYERS = 2**31 - 1, 1000
_LEAST = 1e-30  # below, float32 makes nothing of a cap or an epsilon
_LONGEST = 200  # characters of what is wrong with a field
_TANH_GELUS = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")  # three names of one function
_GEMMA_VOCABULARY = 257152  # pieces, <loc0000>..<loc1023>, <seg000>..<seg127>
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


class _Section:
    """One object of the file with its class defaults; every getter names the field when it refuses."""

    def __init__(self, value: Any, prefix: str, defaults: dict[str, Any], source: str):
        self.value, self.prefix, self.defaults, self.source = value, prefix, defaults, source
        if not isinstance(value, dict):
            raise self.error("", "is missing" if value is None else "must be an object")

    def error(self, name: str, problem: str) -> ConfigError:
        problem = problem if len(problem) <= _LONGEST else f"{problem[:_LONGEST]}..."
        return ConfigError(f"{self.source}: {f'{self.prefix}.{name}'.strip('.')} {problem}")

    def get(self, name: str) -> Any:
        return self.value.get(name, self.defaults.get(name))

    def positive_int(self, name: str) -> int:
        value = self.get(name)
        if type(value) is not int or value < 1:
            raise self.error(name, f"must be a positive integer, not {value!r}")
        if value > (most := _MOST_LAYERS if name == "num_hidden_layers" else _MOST):
            raise self.error(name, f"{value} is impossible: it is at most {most}")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id or a list of them, each once; none when the field is absent."""
        value = self.get(name)
        ids = value if isinstance(value, list) else [value] if value is not None else []
        return tuple(dict.fromkeys(_Section({name: id_}, self.prefix, {}, self.source).token_id(name) for id_ in ids))

    def token_id(self, name: str) -> int:
        value = self.get(name)
        if type(value) is not int or value < 0:
            raise self.error(name, f"must be one token id, not {value!r}")
        return value

    def positive(self, name: str) -> float:
        value = self.get(name)
        if type(value) not in (int, float) or not _LEAST <= value <= sys.float_info.max:
            raise self.error(name, f"must be a positive number, not {value!r:.80}")
        return float(value)

    def positive_or_none(self, name: str) -> float | None:
        return None if self.get(name) is None else self.positive(name)

    def side(self, name: str) -> int:
        """A size in pixels; [s, s] is read as s."""
        value = self.get(name)
        if isinstance(value, list) and len(set(map(repr, value))) == 1:
            return _Section({name: value[0]}, self.prefix, {}, self.source).positive_int(name)
        return self.positive_int(name)

    def require(self, name: str, allowed: tuple[Any, ...]) -> None:
        """Refuse a setting that is stated (or defaulted) and not one of `allowed`."""
        value = self.get(name)
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            choices = " or ".join("absent" if choice is None else repr(choice) for choice in allowed)
            raise self.error(name, f"is {value!r}, but only {choices} is supported")


def from_json(value: dict[str, Any], source: str = "config.json") -> PaliGemmaConfig:
    """Read a parsed config.json.

    Args:
      value: the file's JSON object.
      source: what error messages call the file.
    Raises:
      ConfigError: a field is missing, impossible, contradicts another or asks for something that is not supported.
    """
    if "image_token_index" not in value and "image_token_id" in value:  # another name of it in transformers 5
        value = value | {"image_token_index": value["image_token_id"]}
    top = _Section(value, "", _TOP_DEFAULTS, source)
    top.require("model_type", ("paligemma",))
    top.require("quantization_config", (None, *map(_quantization_note, ops.FORMATS)))
    top.require("tie_word_embeddings", (None, True, False))
    vision = _Section(value.get("vision_config"), "vision_config", _VISION_DEFAULTS, source)
    text = _Section(value.get("text_config"), "text_config", _TEXT_DEFAULTS, source)
    text.require("model_type", ("gemma", "gemma2"))
    if text.get("model_type") == "gemma2":
        text.defaults = _GEMMA2_DEFAULTS
    # The hub's files state ids at the top, transformers 5 in text_config.
    bos = top.token_ids("bos_token_id") or text.token_ids("bos_token_id") or (_BOS,)
    eos = top.token_ids("eos_token_id") or text.token_ids("eos_token_id") or (_EOS,)
    if len(bos) > 1:
        raise top.error("bos_token_id", f"must be one token id, not {list(bos)}")
    config = PaliGemmaConfig(
        vision=_read_vision(vision),
        text=dataclasses.replace(_read_text(text), tied=top.get("tie_word_embeddings") is not False),
        image_token_id=top.token_id("image_token_index"),
        bos_token_id=bos[0],
        eos_token_id=eos[0],
        pad_token_id=_pad_token_id(top, text),
        more_eos_ids=eos[1:],
    )
    _check_joints(config, top, vision, text)
    return config


def with_generation(
    config: PaliGemmaConfig, value: dict[str, Any], source: str = "generation_config.json"
) -> PaliGemmaConfig:
    """`config` with what ends an answer by a parsed generation_config.json, which wins, as in transformers."""
    section = _Section(value, "", {}, source)
    ids = section.token_ids("eos_token_id") or config.eos_token_ids
    _check_ids(section, "eos_token_id", ids, config)
    return dataclasses.replace(config, eos_token_id=ids[0], more_eos_ids=ids[1:])


def _pad_token_id(top: _Section, text: _Section) -> int:
    """Kept as it is, -1 too: nothing sees padding."""
    section = top if top.get("pad_token_id") is not None else text
    value = section.get("pad_token_id")
    one = value[0] if isinstance(value, list) and len(value) == 1 else value
    if type(one) not in (int, type(None)):
        raise section.error("pad_token_id", f"must be one token id, not {value!r}")
    return _PAD if one is None else one


def _read_vision(section: _Section) -> VisionConfig:
    section.require("model_type", ("siglip_vision_model",))
    section.require("num_channels", (3,))
    section.require("hidden_act", _TANH_GELUS)
    config = VisionConfig(
        image_size=section.side("image_size"),
        patch_size=section.side("patch_size"),
        width=section.positive_int("hidden_size"),
        num_layers=section.positive_int("num_hidden_layers"),
        mlp_dim=section.positive_int("intermediate_size"),
        num_heads=section.positive_int("num_attention_heads"),
        layer_norm_eps=section.positive("layer_norm_eps"),
    )
    if config.image_size % config.patch_size:
        problem = f"{config.image_size} is not a multiple of patch_size {config.patch_size}"
        raise section.error("image_size", problem)
    if config.width % config.num_heads:
        problem = f"{config.width} is not a multiple of num_attention_heads {config.num_heads}"
        raise section.error("hidden_size", problem)
    return config


def _read_text(section: _Section) -> TextConfig:
    version = 2 if section.get("model_type") == "gemma2" else 1
    section.require("hidden_act", (*_TANH_GELUS, "gelu"))  # Gemma's "gelu" always meant the tanh form
    section.require("hidden_activation", (*_TANH_GELUS, None))
    section.require("attention_bias", (None, False))
    section.require("use_bidirectional_attention", (None, True))
    section.require("tie_word_embeddings", (None, True, False))  # transformers goes by the one at the top
    section.require("quantization_config", (None,))
    config = TextConfig(
        version=version,
        vocab_size=section.positive_int("vocab_size"),
        width=section.positive_int("hidden_size"),
        num_layers=section.positive_int("num_hidden_layers"),
        mlp_dim=section.positive_int("intermediate_size"),
        num_heads=section.positive_int("num_attention_heads"),
        num_kv_heads=section.positive_int("num_key_value_heads"),
        head_dim=section.positive_int("head_dim"),
        query_scalar=section.positive("query_pre_attn_scalar" if version == 2 else "head_dim"),
        rms_norm_eps=section.positive("rms_norm_eps"),
        rope_theta=_rope_theta(section),
        attn_softcap=section.positive_or_none("attn_logit_softcapping"),
        final_softcap=section.positive_or_none("final_logit_softcapping"),
        sliding_window=_sliding_window(section, version),
        max_positions=section.positive_int("max_position_embeddings"),
    )
    if version == 1:
        for name in _GEMMA2_ONLY:
            if section.get(name) is not None:
                raise section.error(name, "belongs to Gemma 2, but text_config.model_type is 'gemma'")
    if config.num_heads % config.num_kv_heads:
        problem = f"{config.num_heads} is not a multiple of num_key_value_heads {config.num_kv_heads}"
        raise section.error("num_attention_heads", problem)
    if config.head_dim % 2:
        raise section.error("head_dim", f"is {config.head_dim}, but rotary positions need an even one")
    return config


def _rope_theta(section: _Section) -> float:
    """Base of the rotary positions: rope_parameters.rope_theta (transformers 5) or rope_theta (before)."""
    for name in ("rope_parameters", "rope_scaling"):
        if section.get(name) is None:
            continue
        rope = _Section(section.get(name), f"{section.prefix}.{name}", {}, section.source)
        rope.require("rope_type", (None, "default"))
        rope.require("type", (None, "default"))
        rope.require("partial_rotary_factor", (None, 1.0, 1))
        if rope.get("rope_theta") is not None:
            theta = rope.positive("rope_theta")
            if section.value.get("rope_theta", theta) != theta:
                raise section.error(
                    "rope_theta", f"{section.get('rope_theta')!r} contradicts {name}.rope_theta {theta}"
                )
            return theta
    return section.positive("rope_theta")


def _sliding_window(section: _Section, version: int) -> int | None:
    """Window of the local layers: Gemma 2 alternates, starting with a local one; all layers may be global instead."""
    layers = section.positive_int("num_hidden_layers")
    kinds = section.get("layer_types")
    everywhere_global = kinds == [_GLOBAL] * layers
    alternating = [_GLOBAL if i % 2 else _LOCAL for i in range(layers)]
    if kinds is not None and not everywhere_global and (version == 1 or kinds != alternating):
        problem = f"must name {layers} layers, all {_GLOBAL!r}"
        raise section.error("layer_types", problem + (f" or alternating from {_LOCAL!r}" if version == 2 else ""))
    if version == 1 or everywhere_global or section.get("sliding_window") is None:
        return None
    return section.positive_int("sliding_window")


def _check_joints(config: PaliGemmaConfig, top: _Section, vision: _Section, text: _Section) -> None:
    """What encoder, projector, decoder and vocabulary must agree on; the top-level hidden_size is often wrong."""
    section = top if top.get("projection_dim") is not None else vision
    if section.get("projection_dim") not in (None, config.text.width):
        problem = f"{section.get('projection_dim')!r} differs from text_config.hidden_size {config.text.width}"
        raise section.error("projection_dim", problem)
    # Only text_config's count: transformers never reads the vision_config's, and real 448 px files have a stale 256.
    if text.get("num_image_tokens") not in (None, config.vision.num_tokens):
        problem = (
            f"{text.get('num_image_tokens')!r} differs from the {config.vision.num_tokens} patches of vision_config"
        )
        raise text.error("num_image_tokens", problem)
    _check_ids(top, "bos_token_id", (config.bos_token_id,), config)
    _check_ids(top, "eos_token_id", config.eos_token_ids, config)
    image = config.image_token_id
    if image == config.bos_token_id or image < _GEMMA_VOCABULARY <= config.text.vocab_size:
        raise top.error("image_token_index", f"{image} is an ordinary token; the released models have 257152")


def _check_ids(section: _Section, name: str, ids: tuple[int, ...], config: PaliGemmaConfig) -> None:
    for id_ in ids:
        if id_ >= config.text.vocab_size:
            raise section.error(name, f"{id_} is outside text_config.vocab_size {config.text.vocab_size}")
        if id_ == config.image_token_id:
            raise section.error(name, f"{id_} is the image token: give the id of <bos> or <eos>")


def _quantization_note(quantization: str) -> dict[str, Any]:
    return {"quant_method": "paligemma_jax", "bits": int(quantization.removeprefix("int"))}


def to_json(config: PaliGemmaConfig, dtype: str = "bfloat16", quantization: str | None = None) -> dict[str, Any]:
    """The config.json of a checkpoint whose weights have `dtype`; transformers 4.4x to 5.x read it.

    A checkpoint with `quantization` is for this package alone, which the file then says.

    Raises:
      ConfigError: Gemma 1 with what only a Gemma 2 config can say.
    """
    vision, text = config.vision, config.text
    gemma2_settings = (text.attn_softcap, text.final_softcap, text.sliding_window)
    if text.version == 1 and (text.query_scalar != text.head_dim or gemma2_settings != (None, None, None)):
        raise ConfigError(
            "a Gemma 1 decoder has no query scalar, softcap or sliding window that config.json could state"
        )
    eos = list(config.eos_token_ids) if config.more_eos_ids else config.eos_token_id
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": eos, "pad_token_id": config.pad_token_id}
    decoder = {
        "model_type": "gemma" if text.version == 1 else "gemma2",
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "num_hidden_layers": text.num_layers,
        "intermediate_size": text.mlp_dim,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "max_position_embeddings": text.max_positions,
        "num_image_tokens": vision.num_tokens,
        "torch_dtype": dtype,
        "tie_word_embeddings": text.tied,
        **ids,
    }
    if text.version == 2:
        scalar = int(text.query_scalar) if text.query_scalar.is_integer() else text.query_scalar
        local = _GLOBAL if text.sliding_window is None else _LOCAL
        decoder |= {
            "query_pre_attn_scalar": scalar,  # transformers 5 insists on an integer
            "attn_logit_softcapping": text.attn_softcap,
            "final_logit_softcapping": text.final_softcap,
            # Where no layer is local the number means nothing, but early versions want one and ignore layer_types.
            "sliding_window": text.sliding_window or text.max_positions,
            "layer_types": [_GLOBAL if i % 2 else local for i in range(text.num_layers)],
        }
    encoder = {
        "model_type": "siglip_vision_model",
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": 3,
        "hidden_size": vision.width,
        "num_hidden_layers": vision.num_layers,
        "intermediate_size": vision.mlp_dim,
        "num_attention_heads": vision.num_heads,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": vision.layer_norm_eps,
        "num_image_tokens": vision.num_tokens,
        "projection_dim": text.width,
        "torch_dtype": dtype,
        "vision_use_head": False,
    }
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        **ids,
        "image_token_index": config.image_token_id,
        "hidden_size": text.width,
        "projection_dim": text.width,
        "tie_word_embeddings": text.tied,
        "torch_dtype": dtype,
        "text_config": decoder,
        "vision_config": encoder,
        **({"quantization_config": _quantization_note(quantization)} if quantization else {}),
    }
