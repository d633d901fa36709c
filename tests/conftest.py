"""Every test runs on CPU, where a broadcast between ranks is an error; small models and a tokenizer that they share."""

import dataclasses
import functools
import io
import os
from collections.abc import Iterable
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers
from flax.traverse_util import unflatten_dict

import paligemma_jax as pj
from paligemma_jax.checkpoints import expected_shapes
from paligemma_jax.config import PaliGemmaConfig, TextConfig, VisionConfig
from paligemma_jax.processing.image import ImageSettings
from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.tokenizer import LOC_TOKENS, SEG_TOKENS, Tokenizer
from tests.checkpoints.mutate import write_checkpoint

jax.config.update("jax_numpy_rank_promotion", "raise")
# What is measured here is not for others; the folder is for running the same tests again and again.
jax.config.update("jax_compilation_cache_dir", os.environ.get("PALIGEMMA_TEST_CACHE"))
jax.config.update("jax_enable_compilation_cache", "PALIGEMMA_TEST_CACHE" in os.environ)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:  # compiling is what tests spend their time on
    jax.config.update("jax_disable_most_optimizations", True)
    if jax.__version_info__ < (0, 11):  # XLA's older code generator compiles in half the time; later ones have none
        flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
jax.devices()  # XLA has read its flags now, whatever a test makes of them

_VISION = VisionConfig(image_size=28, patch_size=14, width=16, num_layers=2, mlp_dim=24, num_heads=2)
_GEMMA = TextConfig(
    vocab_size=104, width=32, num_layers=2, mlp_dim=48, num_heads=4, num_kv_heads=1, head_dim=6, query_scalar=10.0
)
_GEMMA2 = dataclasses.replace(
    _GEMMA, version=2, num_kv_heads=2, attn_softcap=4.0, final_softcap=6.0, sliding_window=5, max_positions=256
)
_CONFIGS = {
    "gemma": PaliGemmaConfig(_VISION, _GEMMA, image_token_id=96),
    "gemma2": PaliGemmaConfig(_VISION, _GEMMA2, image_token_id=96),
    "gemma2-mha": PaliGemmaConfig(
        _VISION, dataclasses.replace(_GEMMA2, num_kv_heads=4, num_layers=3), image_token_id=96
    ),
}
_TEXT = "caption en detect segment answer how many what color is the a red circle and two blue squares yes no ; ? é"


@functools.cache
def _random_params(config: PaliGemmaConfig, dtype: str = "float32") -> dict:
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> jax.Array:
        scale = 0.3 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5
        return jnp.asarray(rng.normal(size=shape) * scale, dtype)

    with jax.ensure_compile_time_eval():  # the first to ask may be a program that is traced
        return unflatten_dict({path: draw(shape) for path, shape in expected_shapes(config).items()}, sep="/")


@pytest.fixture(scope="session")
def random_params():
    """random_params(config, dtype="float32"): the parameter tree of a geometry, drawn at random, always the same."""
    return _random_params


@pytest.fixture(
    scope="session",
    params=["gemma", "gemma2", pytest.param("gemma2-mha", marks=pytest.mark.slow)],
)
def config(request: pytest.FixtureRequest) -> PaliGemmaConfig:
    """Small geometries, ids below 96: Gemma 1 with groups of 4, Gemma 2 with a window of 5 and groups of 2 and 1."""
    return _CONFIGS[request.param]


@pytest.fixture(scope="session")
def small_configs() -> dict[str, PaliGemmaConfig]:
    """The small geometries by name."""
    return _CONFIGS


@pytest.fixture(scope="session")
def gemma2() -> PaliGemmaConfig:
    """The Gemma 2 among the small geometries."""
    return _CONFIGS["gemma2"]


@pytest.fixture(scope="session")
def params(config: PaliGemmaConfig) -> dict:
    """Random float32 parameters of `config`."""
    return _random_params(config)


def _train_tokenizer(
    user_defined_symbols: Iterable[str] = ("<mask>", "\n", *LOC_TOKENS, *SEG_TOKENS), **options
) -> bytes:
    """A SentencePiece model of Gemma's kind; `options` replace its settings."""
    file = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 1600,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "pad_piece": "<pad>",
        "eos_piece": "<eos>",
        "bos_piece": "<bos>",
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([_TEXT] * 9),
        model_writer=file,
        user_defined_symbols=list(user_defined_symbols),
        **(settings | options),
    )
    return file.getvalue()


@pytest.fixture(scope="session")
def train_tokenizer():
    """train_tokenizer(user_defined_symbols, **options): the bytes of a small SentencePiece model of Gemma's kind."""
    return _train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A checkpoint directory that holds a tokenizer only, one with all loc and seg tokens."""
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.model").write_bytes(_train_tokenizer())
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir) -> Tokenizer:
    return Tokenizer.from_dir(tokenizer_dir)


@pytest.fixture(scope="session")
def write_tokenizer_json(tokenizer_dir):
    """write_tokenizer_json(directory, more=(), **flags): tokenizer.json of the tokenizer, as transformers 5 saves it.

    `more` are tokens behind <image>, with the flags of `tokenizers.AddedToken`.
    """
    model = sentencepiece.SentencePieceProcessor(str(tokenizer_dir / "tokenizer.model"))
    vocabulary = {model.id_to_piece(id_): id_ for id_ in range(model.vocab_size())}
    parts = [((piece[:i], piece[i:]), id_) for piece, id_ in vocabulary.items() for i in range(1, len(piece))]
    merges = [pair for pair, _ in sorted(parts, key=lambda p: p[1]) if pair[0] in vocabulary and pair[1] in vocabulary]

    def write(directory: Path, more: Iterable[str] = (), **flags) -> None:
        bpe = tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        result = tokenizers.Tokenizer(bpe)
        result.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        result.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
        result.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in ("\n", *LOC_TOKENS, *SEG_TOKENS)])
        result.add_special_tokens(["<image>"])
        result.add_special_tokens([tokenizers.AddedToken(text, normalized=False, **flags) for text in more])
        result.save(str(directory / "tokenizer.json"))

    return write


@pytest.fixture(scope="session")
def make_model(random_params, tokenizer):
    """make_model(name): a random model of a small geometry that speaks the tokenizer's language; always the same."""

    @functools.cache
    def make(name: str) -> pj.PaliGemma:
        geometry = _CONFIGS[name]
        text = dataclasses.replace(geometry.text, vocab_size=tokenizer.vocab_size + 64)
        config = dataclasses.replace(geometry, text=text, image_token_id=tokenizer.vocab_size)
        processor = Processor(config, tokenizer, ImageSettings(config.vision.image_size))
        return pj.PaliGemma(config, random_params(config), processor)

    return make


@pytest.fixture(scope="session")
def saved_models(make_model) -> dict[str, pj.PaliGemma]:
    """One of each generation, with a query scalar that a config.json of Gemma 1 can state."""
    first, second = make_model("gemma"), make_model("gemma2")
    text = dataclasses.replace(first.config.text, query_scalar=float(first.config.text.head_dim))
    config = dataclasses.replace(first.config, text=text)
    return {"gemma": pj.PaliGemma(config, first.params, first.processor), "gemma2": second}


@pytest.fixture(scope="session")
def small_checkpoints(saved_models, write_tokenizer_json, tmp_path_factory) -> dict[str, Path]:
    """Directories of the saved models, with every file that some tool writes, in shards."""
    found = {name: tmp_path_factory.mktemp(name) for name in saved_models}
    for name, model in saved_models.items():
        write_checkpoint(model, found[name], write_tokenizer_json)
    return found
