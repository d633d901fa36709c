"""`convert --verify` means "this will run": whatever `pj.load` refuses is said, all of it, and nothing else."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import paligemma_jax as pj
from paligemma_jax.checkpoints import big_vision
from paligemma_jax.errors import UserError
from paligemma_jax.runs.convert import main as convert

NORM = "language_model.model.norm.weight"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(make_model, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    make_model("gemma2").save(directory)
    return directory


@pytest.fixture
def model(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def verify(capsys) -> Callable[..., tuple[int, str, list[str]]]:
    """verify(source, *options): exit status, what was printed, and the lines on stderr."""

    def run(source: Path, *options: str) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        status = convert(["--verify", str(source), *options])
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return run


def loads(path: Path) -> str | None:
    """What `pj.load` says when it refuses."""
    try:
        pj.load(path, prepare=False)
    except UserError as error:
        return str(error)
    return None


def fields(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors(path: Path, change: Callable[[dict], object]) -> None:
    found = load_file(path)
    change(found)
    save_file(found, path)


FAULTS = {  # each is refused by loading
    "no config": lambda d: (d / "config.json").unlink(),
    "bad config": lambda d: fields(d / "config.json", model_type="llava"),
    "untied without a head": lambda d: fields(d / "config.json", tie_word_embeddings=False),
    "no weights": lambda d: (d / WEIGHTS).unlink(),
    "cut weights": lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-9]),
    "a tensor too few": lambda d: tensors(d / WEIGHTS, lambda t: t.pop(NORM)),
    "a tensor too many": lambda d: tensors(d / WEIGHTS, lambda t: t.update(x=np.zeros(3))),
    "a wrong shape": lambda d: tensors(d / WEIGHTS, lambda t: t.update({NORM: np.zeros(3, np.float32)})),
    "a wrong dtype": lambda d: tensors(d / WEIGHTS, lambda t: t.update({NORM: np.zeros(32, np.int8)})),
    "pickled": lambda d: (d / WEIGHTS).rename(d / "pytorch_model.bin"),
    "no tokenizer": lambda d: (d / "tokenizer.model").unlink(),
    "damaged tokenizer": lambda d: (d / "tokenizer.model").write_bytes(b"\x00\x01"),
    "wrong size of pictures": lambda d: fields(d / "preprocessor_config.json", size={"height": 99, "width": 99}),
    "odd pictures": lambda d: fields(d / "preprocessor_config.json", resample=7),
    "broken picture settings": lambda d: (d / "preprocessor_config.json").write_text("{"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_whatever_loading_refuses_is_said_in_its_words(model, verify, name):
    FAULTS[name](model)
    refusal = loads(model)
    status, out, lines = verify(model)
    assert refusal is not None and status == 1 and out == ""
    assert f"error: {refusal}" in lines


def test_another_models_tokenizer_is_found(model, verify, train_tokenizer):
    (model / "tokenizer.model").write_bytes(train_tokenizer(vocab_size=1580))
    refusal = loads(model)
    assert refusal is not None and verify(model) == (1, "", [f"error: {refusal}"])


def test_what_loads_has_no_problems(model, verify):
    for change in (
        lambda: None,
        lambda: (model / "preprocessor_config.json").unlink(),
        lambda: tensors(model / WEIGHTS, lambda t: t.update({"language_model.lm_head.weight": load_table(t) + 1})),
    ):
        change()
        status, out, lines = verify(model)
        assert status == 0 and out.endswith("problems    none\n") and loads(model) is None
        assert all(line.startswith("note: ") for line in lines)
    assert "a head of its own" in out and "is not the embedding table" in lines[0]


def load_table(found: dict) -> np.ndarray:
    return found["language_model.model.embed_tokens.weight"]


def test_all_problems_are_listed(model, verify):
    """Weights, tokenizer and pictures, one line each."""
    for name in ("a wrong shape", "damaged tokenizer", "odd pictures"):
        FAULTS[name](model)
    status, _, lines = verify(model)
    assert status == 1 and len(lines) == 3 and all(line.startswith("error: ") for line in lines)
    for part, line in zip(("mis-shaped", "tokenizer.model", "resample"), lines, strict=True):
        assert part in line


def test_all_damaged_shards_and_all_misfits_are_listed(model, verify, tmp_path):
    found = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    weight_map = {}
    for i, names in enumerate(np.array_split(sorted(found), 3)):
        file = f"model-0000{i + 1}-of-00003.safetensors"
        save_file({name: found[name] for name in names}, model / file)
        weight_map |= dict.fromkeys(map(str, names), file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert verify(model)[0] == 0
    for i in (1, 3):
        path = model / f"model-0000{i}-of-00003.safetensors"
        path.write_bytes(path.read_bytes()[:-4])
    status, _, lines = verify(model)
    text = "\n".join(lines)
    assert status == 1 and text.count("is truncated") == 2 and "model-00003-of-00003" in text
    assert all(len(line) < 300 for line in lines)
    (tmp_path / "model" / "model-00001-of-00003.safetensors").unlink()
    assert "lacks 1 of 3 shards: model-00001-of-00003.safetensors" in verify(model)[2][0]


def test_wrong_shapes_and_wrong_dtypes_are_told_together(model, verify):
    other = "language_model.model.layers.0.input_layernorm.weight"
    tensors(model / WEIGHTS, lambda t: t.update({NORM: np.zeros(32, np.int8), other: np.zeros(3, np.float32)}))
    [line] = verify(model)[2]
    assert "mis-shaped" in line and f"not I8: {NORM}" in line


def test_a_damaged_mask_decoder_is_a_note(model, verify):
    """It is read when a mask is asked for."""
    (model / "vae-oid.npz").write_bytes(b"no zip")
    status, out, [line] = verify(model)
    assert status == 0 and "problems    none" in out and loads(model) is None
    assert line.startswith("note: ") and "vae-oid.npz is not a readable .npz file" in line


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_a_note(model, verify, value):
    tensors(model / WEIGHTS, lambda t: t.update({NORM: np.full(32, value, np.float32)}))
    assert verify(model)[::2] == (0, [f"note: NaN or infinity in {NORM}: answers will mean nothing"])


def test_a_mask_decoder_that_the_environment_names_must_be_there(model, verify, monkeypatch):
    monkeypatch.setenv("PALIGEMMA_MASK_VAE", "no/such.npz")
    assert verify(model) == (1, "", [f"error: {loads(model)}"])


def test_the_checksums_of_an_npz_are_tried(make_model, model, verify, tmp_path, monkeypatch):
    geometry, scan = make_model("gemma2").config, big_vision.scan
    monkeypatch.setattr(big_vision, "scan", lambda path, config=None: scan(path, geometry))  # no released sizes
    npz = tmp_path / "model.npz"
    big_vision.save(npz, geometry, make_model("gemma2").params)
    assert f"error: {loads(npz)}" in verify(npz)[2] and "tokenizer" in verify(npz)[2][0]
    shutil.copy(model / "tokenizer.model", tmp_path)
    assert verify(npz)[0] == 0
    data = bytearray(npz.read_bytes())
    data[len(data) // 2] ^= 1
    npz.write_bytes(data)
    status, _, [line] = verify(npz)
    assert status == 1 and "is damaged" in line and "is damaged" in loads(npz)


@pytest.mark.parametrize("harm", ["damaged", "encrypted", "unsupported"])
@pytest.mark.parametrize("read", [False, True])
def test_only_arrays_that_are_read_are_tried(make_model, model, verify, tmp_path, monkeypatch, harm, read):
    geometry, scan = make_model("gemma2").config, big_vision.scan
    monkeypatch.setattr(big_vision, "scan", lambda path, config=None: scan(path, geometry))  # no released sizes
    npz = tmp_path / "model.npz"
    big_vision.save(npz, geometry, make_model("gemma2").params)
    shutil.copy(model / "tokenizer.model", tmp_path)
    with zipfile.ZipFile(npz, "a") as archive:
        archive.writestr("opt/mu.npy", b"marks of Adam")
    data = bytearray(npz.read_bytes())
    with zipfile.ZipFile(npz) as archive:
        member = archive.getinfo("params/img/pos_embedding.npy" if read else "opt/mu.npy")
    entry = data.rindex(member.filename.encode()) - 46  # in the central directory
    if harm == "damaged":
        data[
            member.header_offset
            + 30
            + int.from_bytes(data[member.header_offset + 28 :][:2], "little")
            + len(member.filename)
            + member.file_size
            - 1
        ] ^= 1
    elif harm == "encrypted":
        data[entry + 8] |= 1
        data[member.header_offset + 6] |= 1
    else:
        data[entry + 10] = data[member.header_offset + 8] = 99
    npz.write_bytes(data)
    status, _, lines = verify(npz)
    assert (status, loads(npz) is not None) == (read, read) and len(lines) == read
    assert all("is damaged" in line for line in lines)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_that_are_none_are_a_note_in_an_npz(make_model, model, verify, tmp_path, monkeypatch, dtype):
    small, scan = make_model("gemma2"), big_vision.scan
    monkeypatch.setattr(big_vision, "scan", lambda path, config=None: scan(path, small.config))  # no released sizes
    decoder = small.params["language_model"] | {"norm": {"weight": np.full(32, np.nan, np.float32)}}
    big_vision.save(tmp_path / "model.npz", small.config, small.params | {"language_model": decoder}, dtype)
    shutil.copy(model / "tokenizer.model", tmp_path)
    note = "note: NaN or infinity in llm/final_norm/scale: answers will mean nothing"
    assert verify(tmp_path / "model.npz")[::2] == (0, [note])


@pytest.mark.parametrize("where", ["base", "A", "bias"])
def test_numbers_that_are_none_are_a_note_in_adapters_and_their_base(model, verify, tmp_path, where):
    adapter, module = tmp_path / "adapter", "base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1."
    adapter.mkdir()
    found = load_file(model / WEIGHTS)
    weight = found["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"]
    parts = {"A": np.zeros((2, weight.shape[1])), "B": np.zeros((weight.shape[0], 2)), "bias": np.zeros(len(weight))}
    if where == "base":
        tensors(model / WEIGHTS, lambda t: t.update({NORM: np.full(32, np.nan, np.float32)}))
    else:
        parts[where][..., 1] = np.inf
    names = {"A": f"{module}lora_A.weight", "B": f"{module}lora_B.weight", "bias": f"{module}base_layer.bias"}
    save_file({names[k]: v.astype(np.float32) for k, v in parts.items()}, adapter / "adapter_model.safetensors")
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "../model", "bias": "lora_only"}
    (adapter / "adapter_config.json").write_text(json.dumps(stated))
    status, _, [line] = verify(adapter)
    assert status == 0 and line == f"note: NaN or infinity in {names.get(where, NORM)}: answers will mean nothing"


@pytest.mark.parametrize("named", [True, False])
def test_adapters_are_verified_over_their_base(model, verify, tmp_path, named):
    adapter, prefix = tmp_path / "adapter", "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_"
    adapter.mkdir()
    down, up = np.zeros((2, 48), np.float32), np.zeros((32, 2), np.float32)
    save_file({f"{prefix}A.weight": down, f"{prefix}B.weight": up}, adapter / "adapter_model.safetensors")
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "../model" if named else None}
    (adapter / "adapter_config.json").write_text(json.dumps(stated))
    arguments = [adapter] if named else [model, "--adapter", str(adapter)]
    status, out, lines = verify(*arguments)
    assert (status, lines) == (0, []) and "and an adapter of 1 parameters" in out
    fields(adapter / "adapter_config.json", r=3)
    FAULTS["no tokenizer"](model)
    status, _, lines = verify(*arguments)
    assert status == 1 and "has rank 2, adapter_config.json says 3" in lines[0] and "tokenizer.model" in lines[1]
