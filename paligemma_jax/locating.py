"""Classes and pictures to boxes and masks: prompts, answers, and what is kept of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paligemma_jax.errors import PromptError
from paligemma_jax.generation.sampling import Sampling
from paligemma_jax.processing.image import ImageSource, load_image
from paligemma_jax.tasks.classes import class_names
from paligemma_jax.tasks.detection import Detection, is_label
from paligemma_jax.tasks.select import above, suppress, without_duplicates

if TYPE_CHECKING:
    from paligemma_jax.pipeline import PaliGemma

_GREEDY = Sampling()


def locate(
    model: "PaliGemma",
    task: str,
    images: ImageSource | Sequence[ImageSource],
    classes: str | Sequence[str],
    max_new_tokens: int = 256,
    loc_scale: int = 1023,
    sampling: Sampling = _GREEDY,
    constrain: bool = True,
    one_by_one: bool = False,
    min_score: float = 0.0,
    nms: float = 0.0,
) -> list[Detection] | list[list[Detection]]:
    """Find things of some classes in pictures; a class that is not there gives nothing.

    Args:
      task: "detect", or "segment" for masks too.
      images: a picture, or a list of them; each is looked at alone, as a box is of one picture.
      classes: "cat ; dog", or a list of names.
      max_new_tokens: of each answer; a box takes about 6 tokens, a mask 16 more.
      loc_scale: as in `parse`.
      sampling: how tokens are chosen.
      constrain: answers can be nothing but complete objects of these classes; see `generation.grammar`.
      one_by_one: ask for each class in a prompt of its own, all in one batch: slower, and often finds more.
      min_score: objects with a lower score are left out.
      nms: of two boxes of a class that overlap by more than this IoU the lower scored is left out; 0 keeps both. What
        is said twice is given once in any case.

    Returns:
      The objects of the picture, in the order of the answer; for a list of pictures a list of them.

    Raises:
      PromptError: no classes, or thresholds out of range.
    """
    names = class_names(f"{task} {classes}") if isinstance(classes, str) else [" ".join(c.split()) for c in classes]
    if not names or not all(map(is_label, names)):
        raise PromptError(f"classes={classes!r} is not possible: give names, as in 'cat ; dog' or ['cat', 'dog']")
    if not (0 <= min_score <= 1 and 0 <= nms <= 1):
        raise PromptError(f"min_score={min_score} with nms={nms} is not possible: give numbers from 0 to 1")
    several = isinstance(images, list | tuple)
    if several and not images:
        return []
    pictures = [load_image(image) for image in (images if several else [images])]
    asked = [f"{task} {name}" for name in names] if one_by_one else [f"{task} {' ; '.join(names)}"]
    rows = [(picture, prompt) for picture in pictures for prompt in asked]
    outputs = model.generate(
        [picture for picture, _ in rows],
        [prompt for _, prompt in rows],
        max_new_tokens,
        sampling,
        constrain=constrain,
    )
    results = []
    for i, picture in enumerate(pictures):
        answers = outputs[i * len(asked) : (i + 1) * len(asked)]
        parts = (model.objects(answer, picture.size, loc_scale, masks=task == "segment") for answer in answers)
        found = [item for part in parts for item in part]
        found = without_duplicates(above(found, min_score))
        results.append(suppress(found, nms) if nms else found)
    return results if several else results[0]
