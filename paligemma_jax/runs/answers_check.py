"""A written model beside transformers: the same greedy answers, or it is said where they part."""

from pathlib import Path

import numpy as np

import paligemma_jax as pj
from paligemma_jax.checkpoints import huggingface
from paligemma_jax.errors import CheckpointError
from paligemma_jax.files import data_folder

PROMPTS = ("caption en", "detect circle", "answer en how many circles are there?", "ocr")
_MAX_NEW_TOKENS = 16


def compare_answers(directory: Path) -> str:
    """Compare greedy answers about a shipped picture, both in float32; returns the line that says the result.

    Raises:
      CheckpointError: the answers differ; or see `pj.load`.
    """
    if stored := huggingface.scan(directory).quantization:
        return f"note: answers were not compared, transformers does not read our {stored} weights"
    try:
        import torch
        import transformers
    except ImportError as error:
        return f"note: answers were not compared, {error.name} is not installed: pip install torch transformers"
    image = data_folder("assets") / "examples" / "shapes.png"
    model = pj.load(directory, dtype="float32", compilation_cache=False)
    ours = [list(output.tokens) for output in model.generate([image] * len(PROMPTS), list(PROMPTS), _MAX_NEW_TOKENS)]
    batches, config = [model.processor([image], [prompt]) for prompt in PROMPTS], model.config
    del model
    added = {i for start, end in config.added_ids for i in range(start, end)}
    reserved = [i for i in range(config.image_token_id, config.text.vocab_size) if i not in added]
    settings = {"dtype": torch.float32, "attn_implementation": "eager"}
    reference = transformers.PaliGemmaForConditionalGeneration.from_pretrained(directory, **settings).eval()
    for prompt, batch, found in zip(PROMPTS, batches, ours, strict=True):
        tokens = torch.from_numpy(np.asarray(batch.tokens[:1, : batch.length[0]])).long()
        output = reference.generate(
            input_ids=tokens,
            pixel_values=torch.from_numpy(np.asarray(batch.pixels).transpose(0, 3, 1, 2).copy()),
            attention_mask=torch.ones_like(tokens),
            token_type_ids=torch.zeros_like(tokens),
            max_new_tokens=_MAX_NEW_TOKENS,
            do_sample=False,
            suppress_tokens=reserved,
        )
        expected = _until_end(output[0, tokens.shape[1] :].tolist(), config.eos_token_ids)
        found = _until_end(found, config.eos_token_ids)
        if found != expected:
            place = next(
                (i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]),
                min(len(found), len(expected)),
            )
            raise CheckpointError(
                f"{directory} answers {prompt!r} otherwise in transformers {transformers.__version__}, from token "
                f"{place + 1} on: {expected[place : place + 3]} instead of {found[place : place + 3]}"
            )
    return f"{len(PROMPTS)} greedy answers are those of transformers {transformers.__version__}"


def _until_end(tokens: list[int], end: tuple[int, ...]) -> list[int]:
    return next((tokens[:i] for i, token in enumerate(tokens) if token in end), tokens)
