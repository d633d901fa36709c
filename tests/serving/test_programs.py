"""Sizes of a server's programs: few, and every request that may come has one."""

import types

import numpy as np
import pytest

from paligemma_jax import ops
from paligemma_jax.config import VARIANTS
from paligemma_jax.engine.sampling import step_config
from paligemma_jax.processing.request import GenerateOptions, Sampling
from paligemma_jax.serving.programs import Programs, Size, _fit_table, needs_of
from paligemma_jax.serving.settings import EngineSettings


def programs_of(config, **settings) -> Programs:
    tokenizer = types.SimpleNamespace(loc_start=5)
    model = types.SimpleNamespace(
        config=config,
        params=None,
        runner=types.SimpleNamespace(target=ops.Target("cpu")),
        processor=types.SimpleNamespace(tokenizer=tokenizer),
    )
    return Programs(model, EngineSettings(**settings))


@pytest.mark.parametrize("name", ["paligemma-3b-224", "paligemma2-10b-448", "paligemma2-3b-896"])
@pytest.mark.parametrize("most_text", [8, 40, 64, 65, 512, 2000])
def test_every_request_has_a_program_and_they_are_few(name, most_text):
    config = VARIANTS[name]
    programs = programs_of(config, max_prompt_tokens=most_text)
    per_image, limit = config.vision.num_tokens, config.text.max_positions
    for num_images in range(1, 5):
        for num_text in (2, most_text // 2, most_text):
            length = num_images * per_image + num_text
            if length >= limit:
                continue
            size = programs.prompt_size(programs.largest, num_images, length)
            assert length <= size <= programs.largest.num_slots
            assert min(limit, length + 512) <= programs.largest.num_slots
            usual = programs.prompt_size(programs.usual, num_images, length)
            assert (usual is not None) == (num_images == 1 and num_text <= 64) or most_text > num_text > 64
            assert usual is None or length <= usual < programs.usual.num_slots
    declared = list(programs._all())
    assert len(declared) == len(set(declared)) <= 28


@pytest.mark.parametrize("size", [Size(0, 4, 2), Size(0, 8, 4), Size(0, 4, 4), Size(0, 16, 1)])
def test_a_table_keeps_its_nodes_in_every_size_that_holds_them(size):
    table = np.arange(2 * 4 * (5 + 3 * 2)).reshape(2, 4, 11)
    fitted = _fit_table(table, size, np)
    assert fitted.shape == (2, size.num_nodes, 5 + 3 * size.num_single)
    kept = min(2, size.num_single)
    np.testing.assert_array_equal(fitted[:, :4, :5], table[:, :, :5])
    for i, fill in enumerate((-1, 0, 0)):
        part = fitted[:, :4, 5 + i * size.num_single :][:, :, : size.num_single]
        np.testing.assert_array_equal(part[..., :kept], table[..., 5 + 2 * i :][..., :kept])
        assert (part[..., kept:] == fill).all()
    assert not fitted[:, 4:, :].any()


@pytest.mark.parametrize(
    "options",
    [
        GenerateOptions(),
        GenerateOptions(sampling=Sampling(temperature=1.0)),
        GenerateOptions(sampling=Sampling(temperature=1.0, top_k=3)),
        GenerateOptions(sampling=Sampling(top_k=3)),  # greedy all the same
        GenerateOptions(min_new_tokens=4),
        GenerateOptions(constrain=True),
    ],
)
def test_a_step_knows_what_generate_would(options):
    config = step_config(VARIANTS["paligemma-3b-224"], 5, [options], options.constrain)
    asked = {name for name in ("samples", "filters", "constrained", "delayed") if getattr(config, name)}
    assert needs_of(options, options.constrain) == asked
