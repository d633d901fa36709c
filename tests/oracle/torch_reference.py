"""Small random PaliGemmas in transformers, and what they compute for a `Batch`: the reference of the oracle tests.

transformers is always told `token_type_ids` (0 for pictures and prefix, 1 for the suffix): without them it silently
becomes causal. Weights are drawn far larger than its own initialisation, whose logits are too even to show a mistake.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from paligemma_jax import config as geometry
from paligemma_jax.processing.processor import Batch


def random_batch(config: geometry.PaliGemmaConfig, rows: list[tuple[int, int, int]], seed: int = 0) -> Batch:
    """Random ids and pictures; each row is (number of pictures, text tokens of the prefix, tokens of the suffix).

    Rows take turns in sharing pictures, and the longest row has some padding too.
    """
    rng = np.random.default_rng(seed)
    num_tokens, side = config.vision.num_tokens, config.vision.image_size
    num_pictures = max(count for count, _, _ in rows) + 1
    prefix_length = np.array([count * num_tokens + prefix for count, prefix, _ in rows], np.int32)
    length = prefix_length + np.array([suffix for _, _, suffix in rows], np.int32)
    shape = len(rows), int(length.max()) + 3
    tokens = np.full(shape, config.pad_token_id, np.int32)
    image_slots = np.full(shape, -1, np.int32)
    for i, (count, _, _) in enumerate(rows):
        tokens[i, : length[i]] = rng.integers(3, config.image_token_id, length[i])
        pictures = (i + np.arange(count)) % num_pictures
        slots = (pictures[:, None] * num_tokens + np.arange(num_tokens)).reshape(-1)
        tokens[i, : len(slots)] = config.image_token_id
        image_slots[i, : len(slots)] = slots
    pixels = rng.integers(0, 256, (num_pictures, side, side, 3)) / 127.5 - 1
    return Batch(pixels.astype(np.float32), tokens, image_slots, prefix_length, length)


def random_model(config: geometry.PaliGemmaConfig, seed: int = 0) -> PaliGemmaForConditionalGeneration:
    """A float32 model with eager attention: unit-gain weights, norms and biases away from 1 and 0."""
    vision, text = config.vision, config.text
    decoder = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "num_hidden_layers": text.num_layers,
        "intermediate_size": text.mlp_dim,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
        "max_position_embeddings": text.max_positions,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    if text.version == 2:
        decoder |= {
            "query_pre_attn_scalar": int(text.query_scalar),
            "attn_logit_softcapping": text.attn_softcap,
            "final_logit_softcapping": text.final_softcap,
            "sliding_window": text.sliding_window,
        }
    encoder = SiglipVisionConfig(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_size=vision.width,
        num_hidden_layers=vision.num_layers,
        intermediate_size=vision.mlp_dim,
        num_attention_heads=vision.num_heads,
        layer_norm_eps=vision.layer_norm_eps,
        vision_use_head=False,
    )
    torch_config = PaliGemmaConfig(
        vision_config=encoder,
        text_config=(GemmaConfig if text.version == 1 else Gemma2Config)(**decoder),
        image_token_index=config.image_token_id,
        projection_dim=text.width,
        hidden_size=text.width,
        attn_implementation="eager",
    )
    model = PaliGemmaForConditionalGeneration(torch_config).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # the tied head is not listed again
            shape = tuple(parameter.shape)
            drawn = rng.normal(size=shape) * (0.3 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5)
            if "embed_tokens" in name:
                drawn *= 0.3  # else a token mostly predicts itself, the table being tied, and greedy answers repeat it
            elif "language_model" in name and len(shape) == 1:
                drawn += 1.0
            parameter.copy_(torch.from_numpy(drawn))
    return model


def read_model(directory: Path) -> PaliGemmaForConditionalGeneration:
    """The float32 model of a directory; every tensor of the file is used and none is missing."""
    settings = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, report = PaliGemmaForConditionalGeneration.from_pretrained(directory, **settings)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model


def _pixel_values(model: PaliGemmaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """The pictures in the order of the rows, each as often as it is seen, channels first."""
    num_tokens = model.config.text_config.num_image_tokens
    pictures = [slot // num_tokens for row in batch.image_slots for slot in row[row >= 0][::num_tokens]]
    return torch.from_numpy(batch.pixels[pictures].transpose(0, 3, 1, 2).copy())


@torch.no_grad()
def _teacher_forced(model: PaliGemmaForConditionalGeneration, batch: Batch, **options):
    """What transformers gives for whole sequences, padded on the right."""
    index = np.arange(batch.tokens.shape[1])[None]
    return model(
        input_ids=torch.from_numpy(batch.tokens).long(),
        pixel_values=_pixel_values(model, batch),
        attention_mask=torch.from_numpy(index < batch.length[:, None]).long(),
        token_type_ids=torch.from_numpy(index >= batch.prefix_length[:, None]).long(),
        **options,
    )


def logits(model: PaliGemmaForConditionalGeneration, batch: Batch) -> np.ndarray:
    """Teacher-forced logits f32 [B, T, V]; those at padding mean nothing."""
    return _teacher_forced(model, batch).logits.numpy()


def inside(model: PaliGemmaForConditionalGeneration, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states f32 [L + 1, B, T, D], the last ones after the final norm, and attention [L, B, heads, T, T]."""
    output = _teacher_forced(model, batch, output_hidden_states=True, output_attentions=True)
    return tuple(torch.stack(arrays).numpy() for arrays in (output.hidden_states, output.attentions))


def greedy(model: PaliGemmaForConditionalGeneration, batch: Batch, max_new_tokens: int, **options) -> np.ndarray:
    """Greedy tokens [B, max_new_tokens] after prompts without a suffix, padded on the left as `generate` wants it.

    Reserved ids, from the one that stands for pictures on, are suppressed; a lone row ends with <eos>.
    `options` are those of `generate` instead, such as `num_beams`.
    """
    prompts = [row[:length] for row, length in zip(batch.tokens, batch.length, strict=True)]
    longest = int(batch.length.max())
    mask = np.stack([np.arange(longest) >= longest - len(prompt) for prompt in prompts])
    tokens = np.stack([np.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    reserved = list(range(model.config.image_token_id, model.config.text_config.vocab_size))
    output = model.generate(
        input_ids=torch.from_numpy(tokens).long(),
        pixel_values=_pixel_values(model, batch),
        attention_mask=torch.from_numpy(mask).long(),
        token_type_ids=torch.zeros(tokens.shape, dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **{"suppress_tokens": reserved} | options,
    )
    return output[:, longest:].numpy()
