"""How well a patch ViT finds scenes by their captions, and shapes by their names, on scenes it has not seen.

Axes: N pictures, C different captions, G patches of a side of a map.
"""

import collections
import math
from collections.abc import Callable, Sequence

import numpy as np

from paligemma_jax.patch_vit import Clip, Student
from paligemma_jax.patch_vit.activation import PhraseMaps, patch_logits, softmax
from paligemma_jax.patch_vit.locate import locate
from paligemma_jax.shapes_world.pointing import coverage
from paligemma_jax.shapes_world.questions import caption
from paligemma_jax.shapes_world.samples import Sample, scene_sample

_RANKS = (1, 5, 10)
_CHUNK = 50  # scenes that are drawn and embedded together


def evaluate(
    student: Student,
    clip: Clip,
    num_scenes: int = 500,
    seed: int = 20_000_000,
    source: Callable[[int, int], Sample] = scene_sample,
) -> dict[str, dict[str, float]]:
    """Everything that is measured: for "student", "cls_attention", "training_free" and "chance" what applies to it.

    "recall_K": share of different captions for which a picture that has it is among the K nearest of all pictures, by
      raw text . unit image embedding. For "teacher": by the teacher's image embeddings.
    "pointing": share of shapes, those that are the only ones of their kind in a picture, that hold the middle of the
      patch where the map of their name ("red circle") is highest.
    "inside": share of that map which lies on the shape, patches that it covers in part counting in part.
    "iou": mean IoU of the shape's mask and the best object of `locate` for its name alone, 0 where there is none.
    """
    scores: dict[str, dict[str, list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    captions: list[str] = []
    images: dict[str, list[np.ndarray]] = {"student": [], "teacher": []}
    for first in range(0, num_scenes, _CHUNK):
        samples = [source(seed, index) for index in range(first, min(first + _CHUNK, num_scenes))]
        captions += [caption(sample.kinds) for sample in samples]
        pictures = [sample.image for sample in samples]
        pixels, theirs = student.preprocess(pictures), clip.preprocess(pictures)
        images["student"].append(student.embed(pixels)[0])
        images["teacher"].append(clip.embed_image(theirs))
        patches = {"student": student.embed_patches(pixels), "training_free": clip.self_self_attention_patches(theirs)}
        attention = clip.cls_attention(theirs)
        for row, sample in enumerate(samples):
            _measure(scores, sample, {name: found[row] for name, found in patches.items()}, attention[row], clip)
    results = {name: {key: float(np.mean(values)) for key, values in found.items()} for name, found in scores.items()}
    texts = sorted(set(captions))
    vectors = clip.embed_text(texts)
    for name, parts in images.items():
        results.setdefault(name, {}).update(recall(vectors, texts, np.concatenate(parts), captions))
    results["chance"] |= chance(texts, captions)
    results["counts"] = {"scenes": num_scenes, "captions": len(texts), "shapes": len(scores["student"]["pointing"])}
    return results


def recall(vectors: np.ndarray, texts: Sequence[str], images: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
    """Recall of texts [C] with vectors [C, D] among images [N, D] with captions [N]."""
    units = images / np.linalg.norm(images, axis=-1, keepdims=True)
    order = np.argsort(-(vectors @ units.T), axis=1, kind="stable")[:, : max(_RANKS)]
    right = np.array(captions)[order] == np.array(texts)[:, None]
    return {f"recall_{rank}": float(right[:, :rank].any(axis=1).mean()) for rank in _RANKS}


def chance(texts: Sequence[str], captions: Sequence[str]) -> dict[str, float]:
    """Expected recall of a random order."""
    counts, total = collections.Counter(captions), len(captions)

    def one(rank: int) -> float:
        misses = [math.comb(total - counts[text], rank) / math.comb(total, rank) for text in texts]
        return 1 - sum(misses) / len(misses)

    return {f"recall_{rank}": one(min(rank, total)) for rank in _RANKS}


def _measure(scores: dict, sample: Sample, patches: dict[str, np.ndarray], attention: np.ndarray, clip: Clip) -> None:
    """Add what the maps of one picture say of its shapes."""
    for kind, mask in zip(sample.kinds, sample.masks, strict=True):
        if sample.kinds.count(kind) > 1:
            continue
        name = " ".join(kind)
        text = clip.embed_text([name])
        for method, found in patches.items():
            logits = _square(patch_logits(found[None], text)[0])
            _score(scores[method], softmax(logits)[0], mask)
            objects = locate(PhraseMaps((name,), logits), sample.image.size)
            scores[method]["iou"].append(_iou(objects[0].mask, mask) if objects else 0.0)
        _score(scores["cls_attention"], _square(attention[None])[0] / attention.sum(), mask)
        uniform = float(mask.mean())
        for key in ("pointing", "inside", "iou"):  # of a random point, of a uniform map, of the whole picture
            scores["chance"][key].append(uniform)


def _score(scores: dict[str, list[float]], values: np.ndarray, mask: np.ndarray) -> None:
    """Pointing and mass of a map [G, G] which sums to 1."""
    grid = len(values)
    row, column = np.divmod(int(values.argmax()), grid)
    y, x = (int((place + 0.5) / grid * side) for place, side in zip((row, column), mask.shape, strict=True))
    scores["pointing"].append(float(mask[y, x]))
    scores["inside"].append(float((values.reshape(-1) * coverage(mask, grid * grid)).sum()))


def _square(rows: np.ndarray) -> np.ndarray:
    """Maps [T, N] as [T, G, G]."""
    grid = round(rows.shape[-1] ** 0.5)
    return rows.reshape(-1, grid, grid)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())
