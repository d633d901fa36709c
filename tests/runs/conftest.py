"""A checkpoint directory with random weights, pictures, and the command line in this process."""

import dataclasses
import inspect
import io
import itertools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.checkpoints.mask_vae import save_mask_vae
from paligemma_jax.errors import CheckpointError
from paligemma_jax.models import mask_vae
from paligemma_jax.processing.image import ImageSettings
from paligemma_jax.processing.processor import Processor
from paligemma_jax.runs import command_line
from paligemma_jax.tasks.prompts import read_prompt

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, gemma2, random_params, tokenizer) -> Path:
    """A PaliGemma 2 in very small that answers nonsense, with a mask VQ-VAE."""
    text = dataclasses.replace(gemma2.text, vocab_size=tokenizer.vocab_size + 8)
    config = dataclasses.replace(gemma2, text=text, image_token_id=tokenizer.vocab_size)
    processor = Processor(config, tokenizer, ImageSettings(config.vision.image_size))
    directory = tmp_path_factory.mktemp("runs") / "random"
    pj.PaliGemma(config, random_params(config), processor).save(directory)
    sizes = mask_vae.MaskVAEConfig((4, 4, 4, 4), (4, 4, 4, 4, 4), 8, 128)
    save_mask_vae(directory / "vae-oid.npz", mask_vae.init_params(jax.random.key(0, impl="rbg"), sizes))
    return directory


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder with a.png (30 x 20), b.jpg (20 x 30) and notes.txt."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (20, 30, 3)), ("b.jpg", (30, 20, 3))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture
def main(monkeypatch, capsys):
    """main(*arguments) -> (exit status, stdout, stderr), with configs/tiny.py as the default."""
    monkeypatch.syspath_prepend(ROOT)

    def run(*arguments: str) -> tuple[int, str, str]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"the load_module\(\)", DeprecationWarning)  # in ml_collections
            status = command_line.main(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def generate(main, checkpoint, pictures):
    """generate(KEY=VALUE, ...): `main` with the random checkpoint, a picture and few tokens."""

    def run(*extra: str, **keys: object) -> tuple[int, str, str]:
        defaults = {"checkpoint": checkpoint, "compilation_cache": False}
        run = keys.get("run")
        if run != "evaluate":  # which asks about pictures of its own
            defaults |= {"image": pictures / "a.png", "max_new_tokens": 4}
        if run not in ("evaluate", "chat"):
            defaults |= {"prompt": "caption en"}
        return main(*(f"--config.{key}={value}" for key, value in (defaults | keys).items()), *extra)

    return run


@pytest.fixture
def refused(generate):
    """refused(KEY=VALUE, ...): what a run says that ends with one line about the user's error."""

    def run(*extra: str, **keys: object) -> str:
        status, out, err = generate(*extra, **keys)
        assert (status, out) == (1, "")
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    return run


def _recorded(name: str, calls: list[dict[str, Any]], act: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """A method of the model with the real one's parameters, which notes what each is and does something else."""
    signature = inspect.signature(getattr(pj.PaliGemma, name))

    def method(*args: object, **options: object) -> Any:
        bound = signature.bind(*args, **options)  # an argument that the real one lacks is a TypeError
        bound.apply_defaults()
        calls.append(dict(bound.arguments))
        return act(calls[-1])

    method.__signature__ = signature  # of the real one, for who replaces it again
    return method


@pytest.fixture
def answer_with(monkeypatch):
    """answer_with(text): from now on models say this, or what a function makes of the prompt.

    Each token has probability 1/2; another function makes log-probabilities, `near` and `expected` of the tokens.
    Returns the list of calls to come, each the arguments by their names, those left out too.
    """

    def even(tokens: np.ndarray) -> tuple[np.ndarray, ...]:
        half = np.full(len(tokens), 0.5)
        return np.log(half), half, half

    def patch(
        text: str | Callable[[str], str], scores: Callable[[np.ndarray], tuple[np.ndarray, ...]] = even
    ) -> list[dict[str, Any]]:
        say = (lambda prompt: text(read_prompt(prompt).text)) if callable(text) else lambda prompt: text
        calls: list[dict[str, Any]] = []

        def output(model: pj.PaliGemma, prompt: str) -> pj.Output:
            said = say(prompt)
            tokens = np.array([*model.processor.tokenizer.encode(said), model.config.eos_token_id])
            logprobs, near, expected = scores(tokens)
            return pj.Output(said, tokens, logprobs, "eos", pj.Timing(3.0, 1.0, 2.0, len(tokens)), near, expected)

        def generate(asked: dict[str, Any]) -> list[pj.Output]:
            prompts = asked["prompts"] if isinstance(asked["prompts"], list) else [asked["prompts"]]
            assert not isinstance(asked["images"], list) or len(asked["images"]) == len(prompts)
            return [output(asked["self"], prompt) for prompt in prompts]

        def stream(asked: dict[str, Any]) -> pj.TextStream:
            return pj.TextStream(iter([say(asked["prompt"]), output(asked["self"], asked["prompt"])]))

        monkeypatch.setattr(pj.PaliGemma, "generate", _recorded("generate", calls, generate))
        monkeypatch.setattr(pj.PaliGemma, "stream", _recorded("stream", calls, stream))
        monkeypatch.setattr("paligemma_jax.loading.programs", lambda *args: iter(()))  # all in vain
        return calls

    return patch


@pytest.fixture
def loaded_with(monkeypatch):
    """What models are loaded with from now on, by the names of `load`'s parameters; none is: the run ends with 1."""
    signature, calls = inspect.signature(pj.load), []

    def load(*args: object, **options: object) -> pj.PaliGemma:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        calls.append(dict(bound.arguments))
        raise CheckpointError("enough")

    monkeypatch.setattr(pj, "load", load)
    return calls


@pytest.fixture
def score_with(monkeypatch):
    """score_with(a, b, ...): from now on the objects of an answer have these scores, over and over."""

    def patch(*scores: float) -> None:
        objects = pj.PaliGemma.objects

        def scored(*args, **kw) -> tuple[list[pj.Detection], list[str]]:
            found, dropped = objects(*args, **kw)
            pairs = zip(found, itertools.cycle(scores), strict=False)
            return [dataclasses.replace(item, score=score) for item, score in pairs], dropped

        monkeypatch.setattr(pj.PaliGemma, "objects", scored)

    return patch


@pytest.fixture
def type_lines(monkeypatch):
    """type_lines(*lines): what stdin holds."""
    return lambda *lines: monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
