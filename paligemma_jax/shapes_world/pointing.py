"""How much of each inspection map lies on the object it is about, measured on scenes with known masks."""

import collections
from collections.abc import Callable

import numpy as np
from PIL import Image
from tqdm import tqdm

from paligemma_jax.api import PaliGemma
from paligemma_jax.inspection import maps, words
from paligemma_jax.inspection.embeddings import grid_side
from paligemma_jax.shapes_world.samples import Sample, scene_sample

_MAX_NEW_TOKENS = 64


def pointing(
    model: PaliGemma,
    num_scenes: int = 40,
    seed: int = 20_000_000,
    source: Callable[[int, int], Sample] = scene_sample,
) -> dict[str, float]:
    """Share of each map's mass that lies on the object that `detect` asks for, over objects that are unique in a scene.

    A map's mass is what exceeds its mean. The maps are those of `inspection.maps`, averaged over the upper half of the
    layers and all heads, with the model's own answer; attention is that of the four location tokens of the first object
    of the answer, and that of the tokens of its label.

    Returns:
      "chance", the mean share of an image that an object covers, and for each map the mean share of its mass on the
      object; "mask" is the object's own mask as a map of patches, an upper bound. With "_among" appended, the same
      relative to the mass on all objects, in images of several: it tells a map of the named object from one of
      everything salient. Last, the number of objects (`things`) and of those `answered`: only these have attention
      maps. NaN where nothing was measured.
    """
    shares: dict[str, list[float]] = collections.defaultdict(list)
    count = 0
    for scene in tqdm(range(num_scenes), desc="pointing", unit="scene"):
        sample = source(seed, scene)
        unique = [index for index, kind in enumerate(sample.kinds) if sample.kinds.count(kind) == 1]
        count += len(unique)
        if not unique:
            continue
        covered = np.stack([coverage(mask, model.config.vision.num_tokens) for mask in sample.masks])
        names = [" ".join(sample.kinds[i]) for i in unique]
        prompts = [f"detect {name}" for name in names]
        outputs = model.generate([sample.image] * len(prompts), prompts, _MAX_NEW_TOKENS)
        for i, name, output in zip(unique, names, outputs, strict=True):
            made = _maps(model, sample.image, name, output.text) | {"mask": _above_mean(covered[i])}
            for kind, values in made.items():
                shares[kind].append(_share(values, covered[i], np.ones_like(covered[i])))
                if len(covered) > 1:
                    shares[f"{kind}_among"].append(_share(values, covered[i], covered.max(axis=0)))
    kinds = ("chance", "mask", "table", "hidden", "attention_locations", "attention_label")
    means = {key: _mean(shares[key]) for kind in kinds for key in (kind, f"{kind}_among")}
    ordered = dict(sorted(means.items(), key=lambda item: item[0].endswith("_among")))
    return {**ordered, "things": count, "answered": len(shares["attention_locations"])}


def coverage(mask: np.ndarray, num_patches: int) -> np.ndarray:
    """Share of each patch that a mask bool [H, W] covers, in 0..1: f32 [N]."""
    side = grid_side(num_patches)
    image = Image.fromarray(mask.astype(np.float32))
    return np.clip(np.asarray(image.resize((side, side), Image.Resampling.BOX)).reshape(-1), 0, 1)


def _maps(model: PaliGemma, image: Image.Image, name: str, answer: str) -> dict[str, np.ndarray]:
    """Maps [N] of one object; "chance" is the uniform map."""
    tokenizer, num_layers = model.processor.tokenizer, model.config.text.num_layers
    trace = model.trace(image, f"detect {name}", answer)
    soft_tokens = np.asarray(trace.soft_tokens[0], np.float32)
    hidden = maps.hidden_similarity(trace, maps.find_in_prompt(trace, tokenizer, name))
    found = {
        "chance": np.ones(len(soft_tokens)),
        "table": _above_mean(maps.table_similarity(model, soft_tokens, name)),
        "hidden": _above_mean(maps.upper_half(hidden, num_layers)),
    }
    answer_words = words.words(tokenizer, trace.tokens[trace.prefix_length :].tolist())
    label = answer_words[4 : 4 + len(name.split())]
    if " ".join(word.text for word in label) != name:
        return found
    attention = maps.upper_half(maps.attention(trace, renormalize=True), num_layers).mean(axis=0)  # [n, N]
    spans = (("locations", answer_words[0].start, answer_words[3].stop), ("label", label[0].start, label[-1].stop))
    for key, start, stop in spans:
        found[f"attention_{key}"] = _above_mean(attention[start:stop].mean(axis=0))
    return found


def _above_mean(values: np.ndarray) -> np.ndarray:
    return np.maximum(values - values.mean(), 0)


def _share(values: np.ndarray, inside: np.ndarray, among: np.ndarray) -> float:
    """Share of the mass in `among` that lies `inside`; both are coverages of patches in 0..1."""
    total = float((values * among).sum())
    return float((values * inside).sum()) / total if total else 0.0


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
