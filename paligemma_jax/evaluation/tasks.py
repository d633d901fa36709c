"""Tasks that PaliGemma's paper reports, as data: how they are asked, read, measured, and what the paper found.

Prompts, lengths and beams are those of big_vision's configs/proj/paligemma/transfers. The paper's numbers (arXiv
2407.07726) are of PaliGemma 3B after a transfer to the task, those of POPE of the mix checkpoints.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from paligemma_jax.errors import DataError, one_line
from paligemma_jax.evaluation.datasets import captions, documents, objects, questions, rows
from paligemma_jax.evaluation.examples import Example


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    read: a folder and a split to examples.
    prompt: the prompt, with the examples' fields in braces.
    metrics: names in `METRICS`, the main one first.
    max_new_tokens: of an answer.
    split: the usual one.
    num_beams: above 1 for beam search.
    clean: applied to answers and references before they are measured.
    mean_of_groups: the main number is the mean over groups instead of examples.
    paper: percent by resolution in pixels, of the main metric; for POPE also by split.
    paper_split: what the paper measured.
    """

    name: str
    read: Callable[[Path, str], list[Example]]
    prompt: str
    metrics: tuple[str, ...]
    max_new_tokens: int
    split: str
    num_beams: int = 1
    clean: Callable[[str], str] = str
    mean_of_groups: bool = False
    paper: Mapping[int, float | Mapping[str, float]] = dataclasses.field(default_factory=dict)
    paper_split: str = ""

    def reference(self, resolution: int, split: str) -> float | None:
        """The paper's number in percent; None where it has none."""
        found = self.paper.get(resolution)
        return found.get(split) if isinstance(found, Mapping) else found


_ANSWER = "answer en {question}"
_SCIENCE = r"Question: {question}\nContext: {hint}\nOptions: {options}\nAnswer:"  # two letters "\n", as in big_vision
_ANLS = ("anls", "anls_big_vision")
_DETECTION = ("detection_f1", "detection_ap")
_POPE = ("random", "popular", "adversarial")

TASKS = {
    task.name: task
    for task in (
        Task(
            "coco_captions",
            captions.coco_captions,
            "caption en",
            ("cider",),
            32,
            "karpathy_val",
            num_beams=2,
            paper={224: 141.92, 448: 144.60},
            paper_split="karpathy_val",
        ),
        Task(
            "textcaps",
            captions.textcaps,
            "caption en",
            ("cider",),
            32,
            "val",
            num_beams=3,
            paper={224: 127.48, 448: 153.94},
            paper_split="val",
        ),
        Task(
            "vqav2",
            questions.vqav2,
            _ANSWER,
            ("vqa",),
            32,
            "val2014",
            paper={224: 83.19, 448: 85.64},
            paper_split="test-std",
        ),
        Task(
            "textvqa",
            questions.textvqa,
            _ANSWER,
            ("vqa",),
            32,
            "val",
            paper={224: 55.47, 448: 73.15, 896: 76.48},
            paper_split="test-std",
        ),
        Task(
            "docvqa",
            documents.docvqa,
            "{question}",
            _ANLS,
            32,
            "val",
            clean=str.lower,
            paper={224: 43.74, 448: 78.02, 896: 84.77},
            paper_split="test",
        ),
        Task("infovqa", documents.infovqa, _ANSWER, _ANLS, 48, "val", clean=str.lower),
        Task("stvqa", questions.stvqa, _ANSWER, _ANLS, 48, "train_task_3", clean=str.lower),
        Task(
            "chartqa",
            documents.chartqa,
            "{question}",
            ("relaxed",),
            48,
            "test",
            clean=str.lower,
            mean_of_groups=True,
            paper={224: 57.08, 448: 71.36},
            paper_split="test",
        ),
        Task(
            "science_qa",
            documents.science_qa,
            _SCIENCE,
            ("science_qa",),
            16,
            "test",
            paper={224: 95.39, 448: 95.93},
            paper_split="test",
        ),
        Task("ai2d", documents.ai2d, "answer en  {question} choose from: {options}", ("exact",), 128, "test"),
        Task(
            "nlvr2",
            questions.nlvr2,
            "answer en {sentence}",
            ("exact",),
            16,
            "test1",
            paper={224: 90.02, 448: 88.93},
            paper_split="test1",
        ),
        Task(
            "pope",
            questions.pope,
            "{question}",
            ("pope",),
            48,
            "random",
            paper={
                224: dict(zip(_POPE, (88.00, 86.63, 85.67), strict=True)),
                448: dict(zip(_POPE, (89.37, 88.40, 87.47), strict=True)),
            },
            paper_split="the same, mix checkpoint",
        ),
        Task(
            "refcoco",
            objects.refcoco,
            "{phrase}",
            ("refcoco",),
            48,
            "val",
            paper={224: 73.40, 448: 75.57, 896: 76.94},
            paper_split="val",
        ),
        Task(
            "coco_detection",
            objects.coco_detection,
            "detect {classes}",
            ("detection_f1", "detection_ap"),
            512,
            "val2017",
        ),
        Task("jsonl", rows.jsonl, "{prefix}", ("exact",), 100, "test"),
    )
}


def read(task: Task, root: Path) -> list[Example]:
    """The examples of a task's split in a folder.

    Raises:
      DataError: files are missing, or do not hold what the public ones do.
    """
    try:
        return task.read(root, task.split)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # a value of another kind
        why = f"{type(error).__name__}: {one_line(error)}"
        raise DataError(f"{root} does not hold {task.name} as docs/evaluation.md shows it ({why})") from None
