"""config.json: class defaults filled in, contradictions and what cannot be honoured refused by field name."""

import copy
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_jax.checkpoints.config_json import from_json, to_json, with_generation
from paligemma_jax.config import VARIANTS, PaliGemmaConfig, TextConfig, VisionConfig
from paligemma_jax.errors import ConfigError

HUB_PALIGEMMA_1 = {
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "bos_token_id": 2,
    "eos_token_id": 1,
    "hidden_size": 2048,
    "ignore_index": -100,
    "image_token_index": 257152,
    "model_type": "paligemma",
    "pad_token_id": 0,
    "projection_dim": 2048,
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_image_tokens": 256,
        "num_key_value_heads": 1,
        "torch_dtype": "float32",
        "vocab_size": 257216,
    },
    "torch_dtype": "float32",
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_image_tokens": 256,
        "patch_size": 14,
        "projection_dim": 2048,
        "projector_hidden_act": "gelu_fast",
        "vision_use_head": False,
    },
}


@pytest.fixture
def paligemma_1():
    return copy.deepcopy(HUB_PALIGEMMA_1)


@pytest.fixture
def paligemma_2():
    """Gemma 2 with every field at its class default left out, as some writers do; that is the 2B decoder."""
    value = copy.deepcopy(HUB_PALIGEMMA_1) | {"projection_dim": 2304}
    value["text_config"] = {"model_type": "gemma2", "vocab_size": 257216}
    value["vision_config"]["projection_dim"] = 2304
    return value


def test_omitted_fields_are_the_class_defaults(paligemma_1, paligemma_2):
    assert from_json(paligemma_1) == VARIANTS["paligemma-3b-224"]
    assert from_json(paligemma_2) == VARIANTS["paligemma2-3b-224"]  # top-level hidden_size says 2048: not trusted


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_come_back(name):
    assert from_json(to_json(VARIANTS[name])) == VARIANTS[name]


@st.composite
def geometries(draw: st.DrawFn) -> PaliGemmaConfig:
    size = st.integers(1, 6)
    version, heads, head_dim = draw(st.sampled_from((1, 2))), draw(size), 2 * draw(size)
    text = TextConfig(
        version=version,
        vocab_size=draw(st.integers(8, 500)),
        width=draw(size),
        num_layers=draw(size),
        mlp_dim=draw(size),
        num_heads=heads * draw(size),
        num_kv_heads=heads,
        head_dim=head_dim,
        query_scalar=float(head_dim),
        rope_theta=draw(st.sampled_from((10000.0, 500.0))),
        max_positions=draw(st.integers(1, 9000)),
        tied=draw(st.booleans()),
    )
    if version == 2:
        softcap = st.none() | st.floats(0.5, 100)
        window = draw(st.none() | size)
        scalar = draw(st.sampled_from((24.0, 12.5)))
        caps = {"attn_softcap": draw(softcap), "final_softcap": draw(softcap)}
        text = dataclasses.replace(text, query_scalar=scalar, sliding_window=window, **caps)
    heads, patch = draw(size), draw(size)
    vision = VisionConfig(patch * draw(size), patch, heads * draw(size), draw(size), draw(size), heads, 1e-5)
    return PaliGemmaConfig(vision, text, image_token_id=draw(st.integers(3, 600)))


@given(geometries())
def test_every_geometry_comes_back(config):
    assert from_json(to_json(config)) == config


def test_rope_base_is_read_from_either_place(paligemma_1):
    paligemma_1["text_config"]["rope_theta"] = 5000.0
    assert from_json(paligemma_1).text.rope_theta == 5000.0
    paligemma_1["text_config"]["rope_parameters"] = {"rope_theta": 5000.0, "rope_type": "default"}
    assert from_json(paligemma_1).text.rope_theta == 5000.0
    del paligemma_1["text_config"]["rope_theta"]
    assert from_json(paligemma_1).text.rope_theta == 5000.0


def test_special_ids_may_stand_in_the_text_config(paligemma_1):
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        del paligemma_1[name]
    paligemma_1["text_config"] |= {"bos_token_id": 5, "eos_token_id": [6], "pad_token_id": None}
    config = from_json(paligemma_1)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (5, 6, 0)


@pytest.mark.parametrize(
    ("top", "text", "generation", "expected"),
    [
        ([1, 107], None, {}, (1, 107)),
        (None, [107, 1, 107], {}, (107, 1)),
        ([], 106, {}, (106,)),
        (None, None, {"eos_token_id": None}, (1,)),
        (1, [1, 5], {"eos_token_id": [107, 9]}, (107, 9)),
        ([1, 107], None, {"eos_token_id": 8}, (8,)),
        ([1, 107], None, {"max_length": 20}, (1, 107)),
    ],
)
def test_several_ids_may_end_an_answer_and_generation_config_wins(paligemma_1, top, text, generation, expected):
    paligemma_1["eos_token_id"], paligemma_1["text_config"]["eos_token_id"] = top, text
    config = with_generation(from_json(paligemma_1), generation)
    assert config.eos_token_ids == expected and config.eos_token_id == expected[0]
    saved = to_json(config)
    assert saved["eos_token_id"] == saved["text_config"]["eos_token_id"]
    assert saved["eos_token_id"] == (list(expected) if len(expected) > 1 else expected[0])
    assert from_json(saved) == config


@pytest.mark.parametrize("bad", [300000, "1", [[1]], -3, 257152])
def test_a_bad_generation_config_is_named(paligemma_1, bad):
    with pytest.raises(ConfigError, match=r"^here/generation_config\.json: eos_token_id"):
        with_generation(from_json(paligemma_1), {"eos_token_id": bad}, "here/generation_config.json")


@pytest.mark.parametrize("pad", [1, -1, 257152, 10**6, [0], None])
def test_any_pad_id_is_kept_and_changes_nothing(paligemma_1, pad):
    paligemma_1["pad_token_id"] = paligemma_1["text_config"]["pad_token_id"] = pad
    config = from_json(paligemma_1)
    assert dataclasses.replace(config, pad_token_id=0) == VARIANTS["paligemma-3b-224"]
    assert to_json(config)["pad_token_id"] == (pad if isinstance(pad, int) else 0)


@pytest.mark.parametrize(
    "top, text, tied", [(None, None, True), (True, False, True), (False, True, False), (False, None, False)]
)
def test_whether_the_head_is_tied_is_said_at_the_top(paligemma_1, top, text, tied):
    paligemma_1 |= {} if top is None else {"tie_word_embeddings": top}
    paligemma_1["text_config"] |= {} if text is None else {"tie_word_embeddings": text}
    assert from_json(paligemma_1).text.tied is tied


def test_the_placeholder_has_two_names(paligemma_1):
    paligemma_1["image_token_id"] = paligemma_1.pop("image_token_index")
    assert from_json(paligemma_1) == VARIANTS["paligemma-3b-224"]


def test_layers_that_are_all_global_have_no_window(paligemma_2):
    paligemma_2["text_config"]["layer_types"] = ["full_attention"] * 26
    assert from_json(paligemma_2).text.sliding_window is None
    paligemma_2["text_config"]["layer_types"] = ["sliding_attention", "full_attention"] * 13
    assert from_json(paligemma_2).text.sliding_window == 4096


def test_harmless_settings_are_accepted(paligemma_1):
    paligemma_1["text_config"] |= {"hidden_act": "gelu", "hidden_activation": None, "attention_dropout": 0.1}
    paligemma_1["vision_config"] |= {"image_size": [224, 224], "num_image_tokens": 1, "vision_use_head": True}
    assert from_json(paligemma_1) == VARIANTS["paligemma-3b-224"]


BAD = (
    ("model_type", "llava"),
    ("model_type", None),
    ("text_config", None),
    ("vision_config", None),
    ("vision_config", [1]),
    ("quantization_config", {"load_in_4bit": True}),
    ("quantization_config", {"quant_method": "paligemma_jax", "bits": 3}),
    ("tie_word_embeddings", "no"),
    ("text_config.tie_word_embeddings", 0),
    ("image_token_index", -1),
    ("image_token_index", "image"),
    ("image_token_index", 256000),
    ("eos_token_id", [1, 300000]),
    ("eos_token_id", "1"),
    ("eos_token_id", [1, True]),
    ("eos_token_id", 257152),
    ("eos_token_id", -1),
    ("bos_token_id", [2, 3]),
    ("pad_token_id", "<pad>"),
    ("projection_dim", 1024),
    ("text_config.model_type", "gemma3_text"),
    ("text_config.hidden_size", 0),
    ("text_config.hidden_size", "2048"),
    ("text_config.num_hidden_layers", True),
    ("text_config.num_hidden_layers", 10**9),
    ("text_config.vocab_size", 10**30),
    ("vision_config.num_hidden_layers", list(range(1000))),
    ("text_config.num_hidden_layers", None),
    ("text_config.num_attention_heads", 7.0),
    ("text_config.num_key_value_heads", 3),
    ("text_config.head_dim", 255),
    ("text_config.rms_norm_eps", 0),
    ("text_config.rms_norm_eps", float("nan")),
    ("text_config.hidden_act", "silu"),
    ("text_config.hidden_activation", "gelu"),
    ("text_config.attention_bias", True),
    ("text_config.use_bidirectional_attention", False),
    ("text_config.rope_scaling", {"type": "linear", "factor": 2.0}),
    ("text_config.rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0}),
    ("text_config.rope_parameters", 3),
    ("text_config.rope_theta", -1.0),
    ("text_config.num_image_tokens", 1024),
    ("text_config.vocab_size", None),
    ("vision_config.model_type", "clip_vision_model"),
    ("vision_config.num_channels", 1),
    ("vision_config.hidden_act", "gelu"),
    ("vision_config.image_size", 225),
    ("vision_config.image_size", [224, 448]),
    ("vision_config.patch_size", 0),
    ("vision_config.num_attention_heads", 15),
    ("vision_config.layer_norm_eps", "small"),
)
BAD_GEMMA_1 = (
    ("text_config.attn_logit_softcapping", 50.0),
    ("text_config.query_pre_attn_scalar", 256),
    ("text_config.layer_types", ["sliding_attention", "full_attention"] * 9),
)
BAD_GEMMA_2 = (
    ("text_config.layer_types", ["full_attention", "sliding_attention"] * 13),
    ("text_config.layer_types", ["sliding_attention"] * 26),
    ("text_config.layer_types", ["sliding_attention", "full_attention"]),
    ("text_config.sliding_window", 0),
    ("text_config.attn_logit_softcapping", 0.0),
    ("text_config.final_logit_softcapping", 1e-300),
    ("text_config.query_pre_attn_scalar", 0),
)


def assert_refused(value, field, bad):
    section, _, name = field.rpartition(".")
    (value[section] if section else value)[name] = bad
    with pytest.raises(ConfigError) as caught:
        from_json(value, "here/config.json")
    message = str(caught.value)
    assert message.startswith("here/config.json: ") and len(message) < 300
    assert "\n" not in message
    named = {
        "text_config.num_key_value_heads": "num_key_value_heads",
        "vision_config.num_attention_heads": "num_attention_heads",
    }.get(field, field)
    assert named in message


@pytest.mark.parametrize(("field", "bad"), BAD + BAD_GEMMA_1)
def test_bad_fields_are_named(paligemma_1, field, bad):
    assert_refused(paligemma_1, field, bad)


@pytest.mark.parametrize(("field", "bad"), BAD_GEMMA_2)
def test_bad_gemma_2_fields_are_named(paligemma_2, field, bad):
    assert_refused(paligemma_2, field, bad)


def test_contradicting_rope_bases_are_refused(paligemma_1):
    paligemma_1["text_config"]["rope_parameters"] = {"rope_theta": 10000.0}
    assert_refused(paligemma_1, "text_config.rope_theta", 5000.0)


def test_missing_placeholder_is_refused(paligemma_1):
    del paligemma_1["image_token_index"]  # transformers' default, 256000, is <loc0000>
    with pytest.raises(ConfigError, match="image_token_index 256000"):
        from_json(paligemma_1)


def test_gemma_1_cannot_state_what_only_gemma_2_has():
    config = PaliGemmaConfig(text=TextConfig(final_softcap=30.0))
    with pytest.raises(ConfigError, match="Gemma 1"):
        to_json(config)


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ("paligemma-3b-448", "paligemma2-28b-224"))
def test_transformers_agrees(name):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(VARIANTS[name], text=dataclasses.replace(VARIANTS[name].text, rope_theta=777.0))
    theirs = transformers.PaliGemmaConfig.from_dict(to_json(config))
    assert theirs.text_config.rope_parameters["rope_theta"] == 777.0
    assert theirs.text_config.num_image_tokens == config.vision.num_tokens
    for value in (theirs.to_dict(), theirs.to_diff_dict()):
        assert from_json(value) == config
