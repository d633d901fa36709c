"""Live comparison with PEFT of adapters in training: forward, loss, gradients, merge and files, on the same weights."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_transformers import GEOMETRIES, ROWS, TOLERANCE

from paligemma_jax import checkpoints
from paligemma_jax.checkpoints.adapter_targets import TABLE, current_naming
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.runs.answers_check import compare_answers
from paligemma_jax.training import adapters
from paligemma_jax.training.adapters import LoraSettings
from paligemma_jax.training.loss import suffix_loss
from paligemma_jax.training.trainable import join, names_of, split

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

SETTINGS = {
    "decoder": LoraSettings(3, 7.0),
    "decoder, tower and projector": LoraSettings(3, 7.0, "all"),
    "rsLoRA": LoraSettings(4, 7.0, "all", use_rslora=True),
    "DoRA": LoraSettings(3, 7.0, "all", use_dora=True),
    "table": LoraSettings(3, 7.0, "embed_tokens v_proj"),
}
SMALL = ("decoder, tower and projector", "DoRA")  # of the second generation
CASES = [("gemma-groups-of-2", name) for name in SETTINGS] + [("gemma2-groups-of-2", name) for name in SMALL]
PARTS = {
    "down": "lora_A.default.weight",
    "up": "lora_B.default.weight",
    "magnitude": "lora_magnitude_vector.default.weight",
}


@pytest.fixture(scope="module")
def reference():
    """Our wrapper of transformers."""
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package)
    import torch_reference

    return torch_reference


@pytest.fixture(scope="module", params=["gemma-groups-of-2", "gemma2-groups-of-2"])
def geometry(request):
    return GEOMETRIES[request.param]


@pytest.fixture(scope="module")
def base(reference, geometry, tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    reference.random_model(geometry).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def plain(base):
    """Geometry and float32 parameters of the base."""
    return checkpoints.load(base, "float32", progress=False)


@pytest.fixture
def adapted(plain, base, tmp_path):
    """adapted(settings): what trains, what does not, and the directory of the adapter; B is not zero."""
    config, params = plain

    def make(settings):
        paths = adapters.target_paths(settings, names_of(config))
        tree = adapters.init_adapters(params, paths, settings, 0)
        keys = iter(jax.random.split(jax.random.key(3), len(jax.tree.leaves(tree))))
        trained = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), tree)
        frozen = split(params, [])[1]
        adapters.save(tmp_path / "adapter", config, trained, frozen, settings, str(base))
        return trained, frozen, tmp_path / "adapter"

    return make


def loss_and_gradients(reference, model, batch):
    """The mean over rows of the mean over suffix tokens, in torch, and the gradients of what trains by name."""
    import torch

    output = reference._teacher_forced.__wrapped__(model, batch)
    log_probs = torch.log_softmax(output.logits.float(), dim=-1)
    rows = []
    for i, (first, end) in enumerate(zip(batch.prefix_length, batch.length, strict=True)):
        targets = torch.from_numpy(batch.tokens[i, first:end]).long()
        rows.append(-log_probs[i, first - 1 : end - 1].gather(1, targets[:, None]).mean())
    loss = torch.stack(rows).mean()
    loss.backward()
    named = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), named


def our_loss_and_gradients(config, loss_params, batch, trained):
    num_answers = int((batch.length - batch.prefix_length).max())

    def loss(trained):
        return suffix_loss(PaliGemma(config), 0.0, num_answers, loss_params(trained), vars(batch))

    (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)
    return float(value), {path: np.asarray(leaf) for path, leaf in flatten_dict(grads, sep="/").items()}


def peft_name(config, path):
    """PEFT's name of a part of an adapter in memory, and whether it lies there transposed."""
    path, _, part = path.rpartition("/")
    module = "base_model.model." + current_naming(config)[path].removesuffix(".weight")
    if path == TABLE:
        return f"{module}.lora_embedding_{'B' if part == 'down' else 'A'}.default", True
    return f"{module}.{PARTS[part]}", False


def close(ours, theirs):
    """To 1e-5 of the largest number."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1.0, np.abs(theirs).max()))


def close_gradients(pairs):
    """As near as float32 leaves them on either side, which attention here amplifies: 5e-5 of the norm of all."""
    assert np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs)) < 5e-5
    largest = max(np.abs(theirs).max() for _, theirs in pairs)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4 * max(np.abs(theirs).max(), 0.01 * largest))


@pytest.mark.parametrize("geometry, name", CASES, indirect=["geometry"])
def test_adapters_train_in_peft_as_here(reference, geometry, plain, base, adapted, name, our_logits, error):
    """The files load there; logits, loss, every gradient and the merged weights are the same."""
    import peft

    settings, config = SETTINGS[name], plain[0]
    trained, frozen, directory = adapted(settings)
    model = peft.PeftModel.from_pretrained(reference.read_model(base), directory, is_trainable=True).eval()
    batch = dataclasses.replace(reference.random_batch(config, ROWS))
    joined = join(trained, frozen, "float32", settings.scale)
    logits = reference.logits(model, batch)
    assert error(our_logits(*plain, batch), logits, batch) > 100 * TOLERANCE
    assert error(our_logits(config, joined, batch), logits, batch) < max(TOLERANCE, 1e-5 * np.abs(logits).max())

    loss, gradients = loss_and_gradients(reference, model, batch)
    ours, our_gradients = our_loss_and_gradients(
        config, lambda trained: join(trained, frozen, "float32", settings.scale), batch, trained
    )
    assert ours == pytest.approx(loss, rel=1e-5)
    names = {path: peft_name(config, path) for path in our_gradients}
    if name == "table":  # the tied head has the same numbers as parameters of its own there
        module = "base_model.model.model.language_model.embed_tokens.lora_embedding_{}.default"
        for part, other in (("A", "B"), ("B", "A")):
            gradients[module.format(part)] += gradients.pop(f"base_model.model.lm_head.lora_{other}.default.weight").T
    assert {named for named, _ in names.values()} == set(gradients)
    pairs = [
        (our_gradients[path].T if transposed else our_gradients[path], gradients[named])
        for path, (named, transposed) in names.items()
    ]
    close_gradients(pairs)

    merged = flatten_dict(adapters.merge(base, trained, settings, "float32"), sep="/")
    theirs = {named: p.detach().numpy() for named, p in model.merge_and_unload().named_parameters()}
    for path, named in current_naming(config).items():
        if path in merged and path != TABLE:  # PEFT adds the change to a tied table twice
            close(merged[path], theirs[named])


@pytest.mark.parametrize("geometry", ["gemma-groups-of-2", "gemma2-groups-of-2"], indirect=True)
def test_full_gradients_are_those_of_transformers(reference, geometry, plain, base):
    config, params = plain
    batch = reference.random_batch(config, ROWS)
    loss, gradients = loss_and_gradients(reference, reference.read_model(base), batch)
    ours, our_gradients = our_loss_and_gradients(config, lambda trained: trained, batch, params)
    assert ours == pytest.approx(loss, rel=1e-5)
    naming = current_naming(config)
    assert {naming[path] for path in our_gradients} == set(gradients)
    close_gradients([(gradient, gradients[naming[path]]) for path, gradient in our_gradients.items()])


@pytest.mark.parametrize("geometry", ["gemma-groups-of-2"], indirect=True)
def test_modules_that_train_whole_are_read_by_peft(reference, geometry, plain, base, tmp_path, our_logits, error):
    import peft

    config, params = plain
    settings = LoraSettings(3, 7.0, "q_proj")
    drawn = adapters.init_adapters(params, adapters.target_paths(settings, names_of(config)), settings, 0)
    whole, frozen = split(params, ["multi_modal_projector/linear/weight"])
    trained = {**drawn, **jax.tree.map(lambda leaf: leaf + 0.05, whole)}
    adapters.save(tmp_path, config, trained, frozen, settings, str(base))
    model = peft.PeftModel.from_pretrained(reference.read_model(base), tmp_path).eval()
    batch = reference.random_batch(config, ROWS)
    ours = our_logits(config, join(trained, frozen, "float32", settings.scale), batch)
    assert error(ours, reference.logits(model, batch), batch) < TOLERANCE


def test_answers_of_a_written_model_are_compared(reference, make_model, tmp_path):
    make_model("gemma2").save(tmp_path)
    assert compare_answers(tmp_path).startswith("4 greedy answers are those of transformers ")
