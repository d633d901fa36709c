"""The patch ViT in plain torch, as its specification reads: what the networks here are compared with."""

import torch
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
