"""Numbers that are not finite are an error that names the layers, whatever is asked; never an empty answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paligemma_jax as pj
from paligemma_jax import numerics
from paligemma_jax.errors import NumericsError

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
ASKS = {
    "generate": lambda model: model.generate(IMAGE, "caption en", 4),
    "beams": lambda model: model.generate(IMAGE, "caption en", 4, pj.Sampling(num_beams=2)),
    "sampled": lambda model: model.generate(IMAGE, "caption en", 4, pj.Sampling(temperature=1.0, top_p=0.9)),
    "speculation": lambda model: model.generate(IMAGE, "detect a", 4, constrain=True, speculate=True),
    "stream": lambda model: list(model.stream(IMAGE, "caption en", 4)),
    "score": lambda model: model.score(IMAGE, ["caption en", "a"], ["red", "a circle"]),
    "logits": lambda model: model.logits(IMAGE, "caption en", "red"),
    "trace": lambda model: model.trace(IMAGE, "caption en", "red"),
    "detect": lambda model: model.detect(IMAGE, "a", 4),
    "embed_image": lambda model: model.embed_image(IMAGE),
}
DAMAGE = {  # a parameter: the family that is named
    "language_model/layers_1/mlp/down_proj/weight": "decoder layer 1",
    "language_model/norm/weight": "the final norm",
    "vision_tower/layers_0/mlp/fc1/weight": "the image encoder",
}


def damaged(model: pj.PaliGemma, path: str, value: float, row: int = 1) -> pj.PaliGemma:
    """The model with one number of a parameter replaced; programs are shared."""
    *folders, name = path.split("/")

    def put(tree: dict, keys: list[str]) -> dict:
        if not keys:
            return tree | {name: tree[name].at[(row, 1)[: tree[name].ndim]].set(value)}
        return tree | {keys[0]: put(tree[keys[0]], keys[1:])}

    return pj.PaliGemma(model.config, put(model.params, folders), model.processor, runner=model.runner)


@pytest.fixture(scope="module")
def model(make_model) -> pj.PaliGemma:
    return make_model("gemma2")


@pytest.mark.parametrize("ask", ASKS)
def test_whatever_is_asked_damaged_weights_are_an_error(model, ask):
    broken = damaged(model, "vision_tower/post_layernorm/weight", np.nan)
    with pytest.raises(NumericsError, match=r"first in the image encoder \(vision_tower.post_layernorm.weight itself"):
        ASKS[ask](broken)


@pytest.mark.parametrize("path", DAMAGE)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_the_damaged_parameter_is_named(model, path, value):
    with pytest.raises(NumericsError, match=rf"first in {DAMAGE[path]} \({path.replace('/', '.')} itself holds NaN"):
        ASKS["score"](damaged(model, path, value))


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_an_infinite_score_of_any_token_is_noticed_though_a_cap_would_hide_it(model, value):
    """Of a token that is neither asked nor answered."""
    with pytest.raises(NumericsError, match="first in the token embeddings"):
        ASKS["score"](damaged(model, "language_model/embed_tokens/weight", value, row=700))


@pytest.mark.parametrize(
    "path, place",
    [
        ("vision_tower/layers_0/mlp/fc1/weight", "the image encoder"),
        ("multi_modal_projector/linear/weight", "the projector"),
        ("language_model/layers_1/mlp/down_proj/weight", "decoder layer 1"),
        ("language_model/norm/weight", "the output head"),
    ],
)
def test_an_overflow_is_followed_to_its_layers(model, path, place):
    """Weights that float16 holds, and whose results it does not."""
    names = path.split("/")

    def enlarge(at, value: jax.Array) -> jax.Array:
        value = value.astype(jnp.float16)
        return jnp.full_like(value, 6e4) if [entry.key for entry in at] == names else value

    params = jax.tree_util.tree_map_with_path(enlarge, model.params)
    with pytest.raises(NumericsError, match=f"first in {place}: float16 ends at 65504: use dtype=bfloat16") as caught:
        pj.PaliGemma(model.config, params, model.processor, runner=model.runner).generate(IMAGE, "caption en", 4)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_embeddings_that_are_given_are_named(model):
    embeddings = np.array(model.embed_image(IMAGE))
    embeddings[0, 1, 2] = np.nan
    with pytest.raises(NumericsError, match="first in the embeddings of its images"):
        model.generate(None, "caption en", 4, image_embeddings=embeddings)


def test_one_row_of_several_is_enough(model):
    embeddings = np.array(model.embed_image([IMAGE, IMAGE[::-1]]))
    embeddings[1, 1, 2] = np.inf
    with pytest.raises(NumericsError, match="first in the embeddings of its images"):
        model.generate(None, ["caption en", "caption en"], 4, image_embeddings=embeddings)
    embeddings[1] = 0.0
    assert len(model.generate(None, ["caption en", "caption en"], 4, image_embeddings=embeddings)) == 2


def test_the_row_of_a_training_batch_is_found(model):
    batch = vars(model.processor([IMAGE, IMAGE[::-1]], ["caption en", "a"], ["red", "two blue squares"]))
    assert numerics.explain_batch(model.config, model.params, batch) == "give a lower learning_rate"
    broken = damaged(model, "language_model/layers_0/self_attn/o_proj/weight", np.inf)
    assert "first in decoder layer 0 (" in numerics.explain_batch(model.config, broken.params, batch)
