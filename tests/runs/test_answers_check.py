"""What is said where answers cannot be compared with transformers; tests/oracle compares them."""

import sys

import numpy as np
import pytest

from paligemma_jax.runs import convert
from paligemma_jax.runs.answers_check import compare_answers


@pytest.fixture(scope="module")
def written(make_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("written")
    make_model("gemma2").save(directory)
    return directory


def test_without_torch_one_line_says_so(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    line = compare_answers(written)
    assert line == "note: answers were not compared, torch is not installed: pip install torch transformers"


def test_quantized_weights_are_for_us_alone(written, tmp_path):
    assert convert.main([str(written), str(tmp_path / "int8"), "--quantize", "int8"]) == 0
    assert "transformers does not read our int8 weights" in compare_answers(tmp_path / "int8")


def test_the_converter_compares_what_it_wrote(written, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert, "compare_answers", lambda directory: f"compared {directory.name}")
    assert convert.main([str(written), str(tmp_path / "copy"), "--verify"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "compared copy"
    assert convert.main([str(written), str(tmp_path / "copy.npz"), "--verify"]) == 0
    assert "transformers reads no .npz" in capsys.readouterr().err
    assert np.load(tmp_path / "copy.npz").files
