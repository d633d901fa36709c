"""The calls that give the same answer; tests/runs/test_ui.py runs them."""

import ast
import json
import re
import shlex
import subprocess

import paligemma_jax as pj
from paligemma_jax.serving.web import snippets
from paligemma_jax.serving.web.snippets import Source
from tests.serving.web.conftest import question

SAMPLED = {"max_new_tokens": 30, "sampling": pj.Sampling(0.7, 5, 0.9, 0.05, seed=3), "constrain": True}
ODD = 'answer en what\'s "100%" \\n of $HOME?'
TINY = "assets/tiny"


def keys(command: str) -> dict[str, str]:
    python, main, *settings = shlex.split(command.replace("\\\n", " "))
    assert (python, main) == ("python", "main.py")
    return dict(setting.removeprefix("--config.").split("=", 1) for setting in settings)


def test_the_command_line_has_what_is_not_its_default():
    assert keys(snippets.command(Source(TINY), question("detect cat"))) == {
        **{"checkpoint": TINY, "dtype": "float32", "image": "a.png", "prompt": "detect cat"},
    }
    source = Source("org/model", "bfloat16", "int8", "org/lora", "bilinear", "vae.npz", 1024)
    assert keys(snippets.command(source, question(ODD, "my cat's.png", **SAMPLED))) == {
        **{"checkpoint": "org/model", "dtype": "bfloat16", "quantization": "int8", "adapter": "org/lora"},
        **{"resample": "bilinear", "mask_vae": "vae.npz", "loc_scale": "1024", "image": "my cat's.png"},
        **{"prompt": ODD, "temperature": "0.7", "top_k": "5", "top_p": "0.9", "min_p": "0.05", "seed": "3"},
        **{"max_new_tokens": "30", "constrain": "True"},
    }


def test_python_is_python():
    source = Source("org/model", "bfloat16", "int8", "org/lora", "bilinear", "vae.npz")
    text = snippets.python(source, question(ODD, "my cat's.png", **SAMPLED))
    values = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    for value in (
        "org/model",
        "org/lora",
        "int8",
        "vae.npz",
        "bilinear",
        ODD,
        "my cat's.png",
        30,
        0.7,
        5,
        0.9,
        3,
        True,
    ):
        assert value in values, value


def test_curl_sends_the_picture_and_all_settings(tmp_path, monkeypatch):
    """The shell makes of it what a server reads."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my cat's.jpg").write_bytes(b"\xff\xd8picture")
    text = snippets.curl(Source(TINY), question(ODD, "my cat's.jpg", **SAMPLED))
    assert "configs/serve.py --config.checkpoint=assets/tiny" in text
    piped = re.sub(r"curl .*", "cat", text)
    body = json.loads(subprocess.run(["bash", "-c", piped], capture_output=True, check=True).stdout)
    assert body.pop("messages")[0]["content"] == [
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,/9hwaWN0dXJl"}},
        {"type": "text", "text": ODD},
    ]
    assert body == {
        **{"max_tokens": 30, "seed": 3, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
        "constrain": True,
    }


def test_a_server_is_asked_by_its_address():
    source = Source("", server="http://127.0.0.1:9")
    assert "http://127.0.0.1:9/v1/chat/completions" in snippets.curl(source, question())
    assert "Client('http://127.0.0.1:9')" in snippets.python(source, question())
    assert snippets.command(source, question()).startswith("# ")
    assert "API_KEY" not in snippets.curl(source, question()) + snippets.python(source, question())
    keyed = Source("", server="http://127.0.0.1:9", needs_key=True)
    assert '-H "authorization: Bearer $PALIGEMMA_API_KEY" -d @-' in snippets.curl(keyed, question())
    assert ast.parse(snippets.python(keyed, question())) and "API_KEY" in snippets.python(keyed, question())
