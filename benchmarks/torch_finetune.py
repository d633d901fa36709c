"""Steps of fine-tuning in transformers and PEFT: the other side of finetune_peft.py; prints a line of JSON."""

import argparse
import json
import resource
import statistics
import time

import numpy as np
import torch
from transformers import PaliGemmaForConditionalGeneration

_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--batch", required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    model = PaliGemmaForConditionalGeneration.from_pretrained(
        options.checkpoint, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
    )
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if options.method == "lora":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=_TARGETS))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)
    inputs = _inputs(options.batch, getattr(torch, options.dtype))
    losses, times = [], []
    for _ in range(options.steps + 2):
        start = time.perf_counter()
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"step_s": statistics.median(times[2:]), "peak": peak, "losses": losses[:3]}))


def _inputs(file: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the processor of transformers gives for a prefix and a suffix."""
    batch = np.load(file)
    tokens = torch.from_numpy(batch["tokens"]).long()
    position = torch.arange(tokens.shape[1])[None]
    is_suffix = position >= torch.from_numpy(batch["prefix_length"])[:, None]
    return {
        "input_ids": tokens,
        "pixel_values": torch.from_numpy(batch["pixels"].transpose(0, 3, 1, 2).copy()).to(dtype),
        "attention_mask": torch.ones_like(tokens),
        "token_type_ids": is_suffix.long(),
        "labels": torch.where(is_suffix, tokens, -100),
    }


if __name__ == "__main__":
    main()
