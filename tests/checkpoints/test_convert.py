"""The converter's command line."""

import json
import shutil

import numpy as np
import pytest

from paligemma_jax import checkpoints
from paligemma_jax.runs.convert import main


def refused(capsys, *arguments):
    assert main([str(a) for a in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_there_and_back_keeps_every_bit(tmp_path, checkpoint, capsys):
    source, npz, back = checkpoint("A", "bfloat16"), tmp_path / "model.npz", tmp_path / "back"
    (source / "tokenizer.model").write_bytes(b"pieces")
    assert main([str(source), str(npz)]) == 0
    assert main([str(npz), str(back), "--config", str(source / "config.json"), "--processor", str(source)]) == 0
    again = tmp_path / "again"
    assert main([str(source), str(again)]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.model"):
        assert (back / name).read_bytes() == (again / name).read_bytes()
    assert capsys.readouterr().out.count("wrote ") == 3


def test_casts(tmp_path, checkpoint):
    assert main([str(checkpoint("C", "float32", 2)), str(tmp_path / "out"), "--dtype", "float16"]) == 0
    _, params = checkpoints.load(tmp_path / "out", dtype=None)
    assert params["language_model"]["norm"]["weight"].dtype == np.float16


def test_reserved_rows_can_be_dropped(tmp_path, checkpoint, params, capsys):
    source, out = checkpoint(), tmp_path / "out"
    assert main([str(source), str(out), "--rows", "90"]) == 0
    config, loaded = checkpoints.load(out, dtype=None)
    assert config.text.vocab_size == 90
    table = params["language_model"]["embed_tokens"]["weight"]
    assert np.array_equal(loaded["language_model"]["embed_tokens"]["weight"], table[:90])
    capsys.readouterr()
    assert "--rows 97 is impossible" in refused(capsys, source, tmp_path / "other", "--rows", "97")


@pytest.mark.parametrize("name", ("model.npz", "directory"))
def test_destination_is_not_overwritten_unasked(tmp_path, checkpoint, name, capsys):
    source, out = str(checkpoint()), tmp_path / name
    assert main([source, str(out)]) == 0
    capsys.readouterr()
    assert "pass --overwrite" in refused(capsys, source, out)
    assert main([source, str(out), "--overwrite"]) == 0


def test_format_and_kind_of_destination_must_agree(tmp_path, checkpoint, capsys):
    assert "is a directory" in refused(capsys, checkpoint(), tmp_path, "--format", "big_vision", "--overwrite")


def test_verify_tells_what_is_there(tmp_path, checkpoint, config, capsys, understood):
    source = checkpoint("B", "bfloat16", 2)
    assert main(["--verify", str(source)]) == 0
    report = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert report["format"] == "Hugging Face, layout B, 2 files"
    assert report["variant"] == f"custom PaliGemma {config.version}"
    assert int(report["parameters"].replace(",", "")) == checkpoints.parameter_count(config)
    assert report["dtype"].startswith("bfloat16 (")
    assert report["problems"] == "none"
    npz = tmp_path / "model.npz"
    assert main([str(source), str(npz)]) == 0
    assert main(["--verify", str(npz), "--config", str(source / "config.json")]) == 0
    assert "big_vision .npz" in capsys.readouterr().out


def test_problems_are_one_line_each_and_exit_1(tmp_path, checkpoint, capsys, understood):
    assert "no-such-directory does not exist" in refused(capsys, "--verify", "no-such-directory")
    source = checkpoint()
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["hidden_size"] = 40
    config["projection_dim"] = 40
    (source / "config.json").write_text(json.dumps(config))
    assert "mis-shaped" in refused(capsys, "--verify", source)
    assert "mis-shaped" in refused(capsys, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "has a config.json of its own" in refused(capsys, source, "--verify", "--config", source / "config.json")


@pytest.mark.parametrize("arguments", ([], ["a"], ["a", "b", "--dtype", "int3"]))
def test_unusable_arguments_show_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 1
    usage, error = capsys.readouterr().err.rstrip().rsplit("\n", 1)
    assert usage.startswith("usage: paligemma-jax-convert") and error.startswith("error: ")


def test_help_is_no_error(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "examples:" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantizes_and_says_so(checkpoint, tmp_path, capsys, name, understood):
    assert main([str(checkpoint()), str(tmp_path / "few"), "--quantize", name]) == 0
    assert main(["--verify", str(tmp_path / "few")]) == 0
    assert f"{name} (" in capsys.readouterr().out
    assert main([str(tmp_path / "few"), str(tmp_path / "few.npz")]) == 1
    assert "holds no quantized weights" in capsys.readouterr().err


def test_rows_of_added_tokens_stay(small_checkpoints, write_tokenizer_json, tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(small_checkpoints["gemma2"], source)
    write_tokenizer_json(source, ["<s_menu>"])  # whose id is the next after the image token's
    image = json.loads((source / "config.json").read_text())["image_token_index"]
    assert f"the tokenizer has {image + 2} ids" in refused(capsys, source, out, "--rows", str(image + 1))
    assert main([str(source), str(out), "--rows", str(image + 2)]) == 0
