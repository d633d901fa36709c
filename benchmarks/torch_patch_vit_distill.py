"""A plain torch loop that distils the patch ViT, for `patch_vit_distill.py`: prints pictures a second of each epoch."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from benchmarks.torch_patch_vit import TorchPatchViT, distill_loss
from paligemma_jax.patch_vit.augment import augment

_SIDE = 224
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Pictures(Dataset):
    """Changed pictures of a folder and what the teacher says of them."""

    def __init__(self, folder: Path):
        self.paths = sorted((folder / "train").iterdir())
        self.targets = np.load(folder / "targets.npy")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = augment(Image.open(self.paths[index]).convert("RGB"), _SIDE, np.random.default_rng())
        pixels = (np.asarray(image, np.float32) / 255 - _MEAN) / _STD
        return torch.tensor(pixels.transpose(2, 0, 1), dtype=torch.float32), torch.from_numpy(self.targets[index])


def main() -> None:
    folder, epochs, batch = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    model = TorchPatchViT()
    model.load_state_dict(load_file(folder / "student" / "model.safetensors"))
    trained = [p for name, p in model.named_parameters() if name != "scale"]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    loader = DataLoader(Pictures(folder), batch, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)
    speeds = []
    for _ in range(epochs):
        start, count = time.perf_counter(), 0
        for pixels, targets in loader:
            optimizer.zero_grad()
            distill_loss(model(pixels)[0], targets).backward()
            optimizer.step()
            count += len(pixels)
        speeds.append(count / (time.perf_counter() - start))
    print(json.dumps(speeds))


if __name__ == "__main__":
    main()
