"""The patch ViT in plain torch, as its specification reads: what the networks here are compared with."""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, mlp), "c_proj": nn.Linear(mlp, width)})

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


class TorchPatchViT(nn.Module):
    """Parameters have the names of the original's files."""

    def __init__(self, image=224, patch=28, embed=512, layers=6, heads=16, mlp=2112, masked=True, same_norm=True):
        super().__init__()
        width, self.heads, self.same_norm, grid = embed + heads, heads, same_norm, image // patch
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid, width) * width**-0.5)
        if same_norm:
            self.scale = nn.Parameter(torch.ones(1))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(embed)
        blocks = nn.ModuleList(Block(width, heads, mlp) for _ in range(layers))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        row, column = torch.arange(grid * grid) // grid, torch.arange(grid * grid) % grid
        far = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs()) > 1
        mask = torch.zeros(far.shape).masked_fill(far, float("-inf")) if masked else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pixels [B, 3, S, S] to image embeddings, probabilities and patch embeddings."""
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.transformer["resblocks"]:
            x = block(x, self.mask)
        heads = x.unflatten(-1, (self.heads, -1))
        probabilities = heads[..., -1].mean(-1).softmax(-1)
        patches = heads[..., :-1].flatten(2)
        if self.same_norm:
            patches = patches / patches.norm(dim=-1, keepdim=True) * self.scale.clamp(max=10)
        return torch.einsum("bn,bnd->bd", probabilities, patches), probabilities, patches


def distill_loss(pooled: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """20 times the mean distance of the coordinates of unit vectors."""
    unit = nn.functional.normalize
    return 20 * (unit(pooled, dim=-1) - unit(target, dim=-1)).abs().mean()


def main() -> None:
    """One line of JSON for each line of JSON read: {"task": "infer" or "train", "batch": B, "count": n} to seconds.

    Seconds are those of `count` runs, one after the other. Arguments: the student's model.safetensors, its config.json.
    """
    weights, config = sys.argv[1:3]
    fields = json.loads(Path(config).read_text())
    names = ("image_size", "patch_size", "embed_dim", "num_layers", "num_heads", "mlp_dim", "masked", "same_norm")
    model = TorchPatchViT(*(fields[name] for name in names))
    model.load_state_dict(load_file(weights))
    side, embed = fields["image_size"], fields["embed_dim"]
    trained = [p for name, p in model.named_parameters() if name != "scale"]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    for line in sys.stdin:
        asked = json.loads(line)
        generator = torch.Generator().manual_seed(asked["batch"])
        pixels = torch.randn(asked["batch"], 3, side, side, generator=generator)
        targets = torch.randn(asked["batch"], embed, generator=generator)
        start = time.perf_counter()
        for _ in range(asked["count"]):
            if asked["task"] == "infer":
                with torch.inference_mode():
                    model.eval()(pixels)
            else:
                optimizer.zero_grad()
                distill_loss(model.train()(pixels)[0], targets).backward()
                optimizer.step()
        print(json.dumps(time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
