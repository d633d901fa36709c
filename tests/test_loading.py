"""Files to a model: what is saved and loaded, prepared for a target, and compiled meanwhile."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

import paligemma_jax as pj
from paligemma_jax import loading, ops
from paligemma_jax.checkpoints import big_vision, expected_shapes, huggingface
from paligemma_jax.errors import CheckpointError, ConfigError, PromptError, TokenizerError
from paligemma_jax.ops import selection

HOT = pj.Sampling(temperature=1.0, seed=5)
PROMPTS = ["caption en", "detect a red circle", "answer en how many"]


@pytest.fixture(scope="module")
def model(make_model) -> pj.PaliGemma:
    return make_model("gemma2")


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8))


def same(first: pj.Output, second: pj.Output) -> bool:
    return (first.text, first.finish_reason) == (second.text, second.finish_reason) and np.array_equal(
        first.tokens, second.tokens
    )


class _PaddingPays(ops.Table):
    """Times by which every weight is faster with padding."""

    def of(self, spec):
        return {f"{kernel}/{rows}": 1.0 for kernel, rows in spec.candidates()}

    def best(self, spec, num_rows):
        return spec.width**-4.0


@pytest.mark.slow
def test_weights_laid_out_for_a_batch_give_the_same_answers(model, pictures, tmp_path, monkeypatch):
    model.save(tmp_path)
    for name in ("LARGE", "_GEMV_SIZE"):
        monkeypatch.setattr(selection, name, 0)
    monkeypatch.setattr(selection, "_padding", lambda weight, target: 4 if target.num_rows > 4 else 0)
    monkeypatch.setattr(ops, "tune", lambda shapes, target: _PaddingPays())
    requests = [pj.Request.of(*asked, max_new_tokens=12) for asked in zip(2 * pictures, 2 * PROMPTS, strict=True)]
    plain, few = (pj.load(tmp_path, dtype="float32", batch_size=count) for count in (1, 4))
    padded = pj.load(tmp_path, dtype="float32", batch_size=6, warm_up=requests)

    def is_padded(loaded: pj.PaliGemma) -> bool:
        return getattr(loaded.params["language_model"]["embed_tokens"]["weight"], "padding", 0) > 0

    assert [is_padded(loaded) for loaded in (plain, few, padded)] == [False, False, True]
    known = len(padded.runner)
    expected, found = (loaded.generate(2 * pictures, 2 * PROMPTS, 12) for loaded in (plain, padded))
    assert all(map(same, expected, found)) and len(padded.runner) == known
    arguments = pictures[:2], PROMPTS[:2], 12, pj.Sampling(num_beams=3)
    assert all(map(same, plain.generate(*arguments), padded.generate(*arguments)))
    for speculate in (True, False):
        options = {"speculate": speculate, "constrain": True}
        assert all(map(same, *(loaded.generate(pictures[0], PROMPTS[1], 20, **options) for loaded in (plain, padded))))
    for a, b in zip(*(loaded.score(pictures, PROMPTS, "a red circle") for loaded in (plain, padded)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    padded.save(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr(loading, "most_at_once", lambda num_tokens: 2)  # as for very large pictures
    assert not is_padded(pj.load(tmp_path, dtype="float32", batch_size=6))


def test_what_is_compiled_while_loading_is_told_with_the_first_answer(model, pictures, tmp_path, monkeypatch):
    """The programs that answer requests together, for shapes: weights are not there yet, and images are not read."""
    model.save(tmp_path)
    seen, programs = [], loading.programs
    monkeypatch.setattr(loading, "programs", lambda r, params, *rest: seen.append(params) or programs(r, params, *rest))
    requests = [
        pj.Request.of(f"no such file {i}.png", prompt, max_new_tokens=4, sampling=HOT, speculate=True)
        for i, prompt in enumerate(PROMPTS[:2])
    ]
    loaded = pj.load(tmp_path, dtype="float32", batch_size=2, warm_up=requests)
    assert len(seen) == 1 and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(seen))
    assert loaded.compile_s > 0
    loaded.compile_s = 1e6  # what was waited for depends on the machine
    known = len(loaded.runner)
    asked = pictures[:2], PROMPTS[:2]
    first, second = (loaded.generate(*asked, options=requests[0].options) for _ in range(2))
    assert len(loaded.runner) == known == 3  # image encoder, prefill, decode
    assert first[0].timing.compile_s >= 1e6 > second[0].timing.compile_s
    assert all(map(same, first, model.generate(*asked, 4, HOT)))
    with pytest.raises(PromptError, match="positions"):
        pj.load(tmp_path, warm_up=[pj.Request.of("a.png", PROMPTS[0], max_new_tokens=10**6)])


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_weights_are_prepared_for_a_target_unless_told_otherwise(model, tmp_path, platform, monkeypatch):
    """And saved as they were; the table they were prepared by is what speculation asks."""
    model.save(tmp_path)
    target, table = ops.Target(platform), ops.Table({"x": {"gemv/1": 1.0}})
    monkeypatch.setattr(ops, "tune", lambda shapes, target: table)
    loaded = pj.load(tmp_path, target=target)
    layer = loaded.params["language_model"]["layers_0"]
    assert loaded.runner.target == target and loaded.runner.table is table
    assert ("qkv_proj" in layer["self_attn"]) == (platform == "tpu")
    assert ops.is_weight(layer["mlp"]["down_proj"]["weight"]) == (platform == "cpu")
    plain = pj.load(tmp_path, target=target, prepare=False)
    shapes = {path: leaf.shape for path, leaf in flatten_dict(plain.params, sep="/").items()}
    assert shapes == expected_shapes(model.config)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(plain.params))
    for name, handle in (("one", loaded), ("two", plain)):
        handle.save(tmp_path / name)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    with pytest.raises(ConfigError, match=r"float16.*use bfloat16"):
        pj.load(tmp_path, dtype="float16", target=ops.Target("tpu"))


def test_save_and_load_give_the_same_model(model, pictures, tmp_path):
    model.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "config.json").exists()
    loaded = pj.load(tmp_path / "saved", dtype="float32")
    assert loaded.config == model.config
    assert loaded.load_s > 0
    assert all(map(same, model.generate(pictures, PROMPTS, 8), loaded.generate(pictures, PROMPTS, 8)))
    loaded.save(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "tokenizer.model", "preprocessor_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    half = pj.load(str(tmp_path / "again"))
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    assert len(half.generate(pictures[0], PROMPTS[0], 2)) == 1


def test_a_model_whose_tokenizer_is_json_alone_gives_the_same_and_is_saved_so(
    model, pictures, write_tokenizer_json, tmp_path
):
    """With tokens of a fine-tune behind <image>, a pad id of the trainer's, and byte order marks."""
    model.save(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    write_tokenizer_json(tmp_path, ("<s_menu>", "</s_menu>"))
    fields = json.loads((tmp_path / "config.json").read_text()) | {"pad_token_id": -1}
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps(fields), encoding="utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_text(json.dumps({"pad_token": "<eos>"}))
    (tmp_path / "generation_config.json").write_text('\ufeff{"eos_token_id": [1, 7]}', encoding="utf-8")
    loaded, image = pj.load(tmp_path, dtype="float32", prepare=False), model.config.image_token_id
    assert loaded.config.added_ids == ((image + 1, image + 3),) and loaded.config.eos_token_ids == (1, 7)
    processor = dataclasses.replace(loaded.processor, config=model.config)  # nothing more to say, and no more programs
    alike = pj.PaliGemma(model.config, loaded.params, processor, runner=model.runner)
    assert all(map(same, model.generate(pictures, PROMPTS, 8), alike.generate(pictures, PROMPTS, 8)))
    again = tmp_path / "again"
    again.mkdir()
    (again / "tokenizer.model").write_bytes(b"of another model")
    loaded.save(again)
    names = {path.name for path in tmp_path.glob("*.json")}
    assert {path.name for path in again.iterdir()} == names | {"model.safetensors"}
    assert json.loads((again / "config.json").read_text())["pad_token_id"] == -1
    assert pj.load(again).config.eos_token_ids == (1, 7)
    pj.PaliGemma(loaded.config, loaded.params, loaded.processor).save(tmp_path / "made")
    assert not (tmp_path / "made" / "tokenizer.model").exists()
    assert pj.load(tmp_path / "made").config.added_ids == ((image + 1, image + 3),)


def test_what_a_fine_tune_added_is_said(model, pictures, write_tokenizer_json, tmp_path):
    """Only if it has a name: the other rows behind <image> are spare, however likely."""
    model.save(tmp_path)
    write_tokenizer_json(tmp_path, ("<s_menu>", "</s_menu>"))
    loaded, image = pj.load(tmp_path, dtype="float32", prepare=False), model.config.image_token_id
    table = np.array(loaded.params["language_model"]["embed_tokens"]["weight"])
    table[:image] *= 0.01
    table[image:] = table[image] * np.r_[9, 1, -1, -9, [9] * (len(table) - image - 4)][:, None]  # one of two is likely
    loaded.params["language_model"]["embed_tokens"]["weight"] = jnp.asarray(table)
    stream = loaded.stream(pictures[0], "caption en", 1)
    [piece] = stream
    [said] = stream.output.tokens
    assert said in (image + 1, image + 2)
    assert piece == stream.output.text == {image + 1: "<s_menu>", image + 2: "</s_menu>"}[said]


def test_save_writes_the_image_settings_that_the_model_runs_with(model, tmp_path):
    model.save(tmp_path)
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "processor_config.json")
    nested = {"image_processor": json.loads((tmp_path / "processor_config.json").read_text())}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    loaded = pj.load(tmp_path)
    settings = dataclasses.replace(loaded.processor.image_settings, resample="bilinear")
    loaded.processor = dataclasses.replace(loaded.processor, image_settings=settings)
    loaded.save(tmp_path / "again")
    assert not (tmp_path / "again" / "processor_config.json").exists()
    assert pj.load(tmp_path / "again").processor.image_settings == settings


def test_a_model_from_an_npz_is_saved_whole(model, pictures, tmp_path, monkeypatch):
    big_vision.save(tmp_path / "model.npz", model.config, model.params)
    (tmp_path / "tokenizer.model").write_bytes(model.processor.tokenizer.to_bytes())
    scan = big_vision.scan
    monkeypatch.setattr(big_vision, "scan", lambda path, config=None: scan(path, model.config))  # no released sizes
    pj.load(tmp_path / "model.npz", dtype="float32").save(tmp_path / "saved")
    fields = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    assert fields["image_seq_length"] == model.config.vision.num_tokens
    [answer] = pj.load(tmp_path / "saved", dtype="float32").generate(pictures[0], PROMPTS[0], 8)
    assert same(answer, model.generate(pictures[0], PROMPTS[0], 8)[0])


def test_load_scans_the_weights_once(model, tmp_path, monkeypatch):
    model.save(tmp_path)
    calls, scan = [], huggingface.scan
    monkeypatch.setattr(huggingface, "scan", lambda path: calls.append(path) or scan(path))
    pj.load(tmp_path)
    assert calls == [tmp_path]


def test_the_mask_vae_beside_a_model_is_saved_with_it(model, tmp_path):
    """Bit for bit, and into the same directory too; one that is given counts before it."""
    model.save(tmp_path / "one")
    (tmp_path / "one" / "vae-oid.npz").write_bytes(b"beside")
    (tmp_path / "other.npz").write_bytes(b"given")
    for given, expected in ((None, b"beside"), (tmp_path / "other.npz", b"given")):
        pj.load(tmp_path / "one", prepare=False, mask_vae=given).save(tmp_path / "new" / "two")
        assert (tmp_path / "new" / "two" / "vae-oid.npz").read_bytes() == expected
    pj.load(tmp_path / "one", prepare=False).save(tmp_path / "one")
    assert (tmp_path / "one" / "vae-oid.npz").read_bytes() == b"beside"


def test_a_missing_mask_vae_is_named_with_where_its_name_came_from(model, tmp_path, monkeypatch):
    model.save(tmp_path)
    monkeypatch.setenv("PALIGEMMA_MASK_VAE", "no/such.npz")
    with pytest.raises(CheckpointError, match=r"no/such\.npz is missing: .*\$PALIGEMMA_MASK_VAE"):
        pj.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"other\.npz is missing: .* with mask_vae"):
        pj.load(tmp_path, mask_vae="other.npz")


def test_an_adapter_is_loaded_over_its_base(model, tmp_path):
    """By its own name, which names the base, and as an argument; quantized too, and saved as a model of its own."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model.save(base)
    layer = "language_model/layers_1/mlp/down_proj/weight"
    plain = np.asarray(flatten_dict(model.params, sep="/")[layer])
    down, up = (np.random.default_rng(0).normal(size=size).astype(np.float32) for size in ((2, 48), (32, 2)))
    prefix = "base_model.model.model.language_model.layers.1.mlp.down_proj."
    adapter.mkdir()
    save_file({f"{prefix}lora_A.weight": down, f"{prefix}lora_B.weight": up}, adapter / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "../base"}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    expected = plain + 2 * (up @ down)
    for arguments in ({"path": adapter}, {"path": base, "adapter": adapter}):
        loaded = pj.load(**arguments, dtype="float32", prepare=False)
        found = flatten_dict(loaded.params, sep="/")
        np.testing.assert_allclose(found[layer], expected, rtol=1e-5, atol=1e-6)
    few = pj.load(adapter, dtype="float32", quantization="int8").params["language_model"]["layers_1"]["mlp"]
    scale = np.abs(expected).max(axis=1) / 127
    assert (np.abs(np.asarray(few["down_proj"]["weight"].dequantize()) - expected).max(axis=1) < scale).all()
    loaded.save(tmp_path / "merged")
    merged = pj.load(tmp_path / "merged", dtype="float32", prepare=False)
    assert jax.tree.all(jax.tree.map(np.array_equal, merged.params, loaded.params))
    assert (tmp_path / "merged" / "tokenizer.model").is_file()


def test_load_names_what_is_wrong(model, tmp_path, tokenizer):
    model.save(tmp_path)
    with pytest.raises(ConfigError, match="int8 or int4"):
        pj.load(tmp_path, quantization="int3")
    with pytest.raises(ConfigError, match="float64"):
        pj.load(tmp_path, dtype="float64")
    with pytest.raises(CheckpointError, match="nowhere"):
        pj.load(tmp_path / "nowhere")
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"image_token_index": tokenizer.vocab_size + 1}))
    with pytest.raises((TokenizerError, ConfigError), match=str(tokenizer.vocab_size)):
        pj.load(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        pj.load(tmp_path)


@pytest.mark.parametrize("name", ["", " ", None, 5])
def test_a_checkpoint_without_a_name_is_told(name):
    with pytest.raises(CheckpointError, match="is no name: give a directory"):
        pj.load(name)


@pytest.mark.parametrize("directory", ["", "/dev/null/x", "a\0b"])
def test_a_directory_that_cannot_be_is_told(model, directory):
    with pytest.raises(CheckpointError, match=r"has no name|cannot be made"):
        model.save(directory)


def test_the_shipped_model_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pg = pj.load("tiny", dtype="float32")
    assert repr(pg) == "<PaliGemma 2 of its own geometry: 3,632,736 parameters, 128 px, float32>"
    (tmp_path / "tiny").mkdir()  # a path of that name goes first
    with pytest.raises(CheckpointError, match=r"config\.json"):
        pj.load("tiny")


@pytest.mark.parametrize("given", [True, False])
def test_compiled_programs_are_kept_unless_told_not_to(monkeypatch, given):
    kept = []
    monkeypatch.setattr(loading, "keep_compiled", lambda: kept.append(True))
    with pytest.raises(CheckpointError):
        pj.load("/nowhere", compilation_cache=given)
    assert bool(kept) == given
