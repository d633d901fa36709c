"""Whether the maps point at what is named: measured where the truth is known."""

import collections
from collections.abc import Callable

import numpy as np
from PIL import Image
from tqdm import tqdm

from paligemma_jax.inspection import maps, words
from paligemma_jax.inspection.embeddings import grid_side
from paligemma_jax.pipeline import PaliGemma
from paligemma_jax.shapes_world.samples import Sample, drawn_as_in_training

_MAX_NEW_TOKENS = 64


def pointing(
    model: PaliGemma,
    num_scenes: int = 40,
    seed: int = 20_000_000,
    source: Callable[[int, int], Sample] = drawn_as_in_training,
) -> dict[str, float]:
    """How much of each map lies on the thing that `detect` is asked for, over all things that are unique in a scene.

    What counts of a map is what is above its mean. The maps are those of `maps`, in the upper half of the layers and
    the mean of the heads, with the model's own answer; the attention is that of the tokens that say the four
    locations of the thing found first, and that of the tokens of its label.

    Returns:
      "chance", the mean share of a picture that a thing takes, and for each map the mean share of it that lies on the
      thing; "mask" is the thing's own mask as a map of patches, some of which reach beyond it. Then the same of what
      lies on any thing, in pictures of several: "chance_among", "table_among" and so on, which tell a map of the thing
      named from one of all that stands out. Last, how many `things` there were and how many of them were `answered`:
      only these have attention maps. NaN for what could not be measured.
    """
    shares: dict[str, list[float]] = collections.defaultdict(list)
    count = 0
    for index in tqdm(range(num_scenes), desc="pointing", unit="scene"):
        sample = source(seed, index)
        covered = np.stack([coverage(mask, model.config.vision.num_tokens) for mask in sample.masks])
        unique = [place for place, kind in enumerate(sample.kinds) if sample.kinds.count(kind) == 1]
        count += len(unique)
        if not unique:
            continue
        names = [" ".join(sample.kinds[place]) for place in unique]
        prompts = [f"detect {name}" for name in names]
        outputs = model.generate([sample.picture] * len(prompts), prompts, _MAX_NEW_TOKENS)
        for place, name, output in zip(unique, names, outputs, strict=True):
            made = _maps(model, sample.picture, name, output.text) | {"mask": _above_mean(covered[place])}
            for kind, values in made.items():
                shares[kind].append(_share(values, covered[place], np.ones_like(covered[place])))
                if len(covered) > 1:
                    shares[f"{kind}_among"].append(_share(values, covered[place], covered.max(axis=0)))
    kinds = ("chance", "mask", "table", "hidden", "attention_locations", "attention_label")
    means = {key: _mean(shares[key]) for kind in kinds for key in (kind, f"{kind}_among")}
    ordered = dict(sorted(means.items(), key=lambda item: item[0].endswith("_among")))
    return {**ordered, "things": count, "answered": len(shares["attention_locations"])}


def coverage(mask: np.ndarray, num_patches: int) -> np.ndarray:
    """How much of each patch a mask bool [H, W] covers, in 0..1: f32 [N]."""
    side = grid_side(num_patches)
    image = Image.fromarray(mask.astype(np.float32))
    return np.clip(np.asarray(image.resize((side, side), Image.Resampling.BOX)).reshape(-1), 0, 1)


def _maps(model: PaliGemma, picture: Image.Image, name: str, answer: str) -> dict[str, np.ndarray]:
    """Maps [N] of one thing; "chance" is one that makes no difference."""
    tokenizer, num_layers = model.processor.tokenizer, model.config.text.num_layers
    trace = model.trace(picture, f"detect {name}", answer)
    soft_tokens = np.asarray(trace.soft_tokens[0], np.float32)
    hidden = maps.hidden_similarity(trace, maps.find_in_prompt(trace, tokenizer, name))
    found = {
        "chance": np.ones(len(soft_tokens)),
        "table": _above_mean(maps.table_similarity(model, soft_tokens, name)),
        "hidden": _above_mean(maps.upper_half(hidden, num_layers)),
    }
    said = words.words(tokenizer, trace.tokens[trace.prefix_length :].tolist())
    label = said[4 : 4 + len(name.split())]
    if " ".join(word.text for word in label) != name:
        return found
    attention = maps.upper_half(maps.attention(trace, renormalise=True), num_layers).mean(axis=0)  # [n, N]
    spans = (("locations", said[0].start, said[3].stop), ("label", label[0].start, label[-1].stop))
    for key, start, stop in spans:
        found[f"attention_{key}"] = _above_mean(attention[start:stop].mean(axis=0))
    return found


def _above_mean(values: np.ndarray) -> np.ndarray:
    return np.maximum(values - values.mean(), 0)


def _share(values: np.ndarray, inside: np.ndarray, among: np.ndarray) -> float:
    """How much of what lies in `among` lies inside, patches being covered in part."""
    total = float((values * among).sum())
    return float((values * inside).sum()) / total if total else 0.0


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
