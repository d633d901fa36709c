"""Measure how sure the shipped model is: of answers that are right and wrong, and about pictures that it has not seen.

    python benchmarks/doubt.py

Asks a caption, a question, a `detect` and a `segment` about each of the evaluation's scenes, about scenes of another
program, and the same about pictures without any shape. OUT.md tells from which log-probability on a note is due.
"""

import argparse
import dataclasses
import datetime
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import paligemma_jax as pj
from benchmarks import machine
from paligemma_jax.files import write_text
from paligemma_jax.shapes_world.foreign_scenes import foreign_sample
from paligemma_jax.shapes_world.questions import Question, sample_question
from paligemma_jax.shapes_world.samples import Sample, scene_sample
from paligemma_jax.tasks.confidence import words_logprob

ROOT = Path(__file__).resolve().parents[1]
_SEED = 20_000_000  # of the evaluation's scenes
_TASKS = ("caption", "answer", "detect", "segment")
_LIMIT = -0.7  # `runs/results.py` notes answers below it
_HEADER = """# Doubt

Mean log-probability (natural logarithm, with `<eos>`) of the tokens of an answer: of all, `Output.mean_logprob`, and
of its words, without locations and mask codes, `tasks.confidence.words_logprob`. An answer is right when it is so to
the letter, or names the right things in the right order. "Noise" are random pixels, "blobs" random colours that run
into each other, "plain" one colour; they are asked what the scenes are asked. The last column is what a note is
written about.

"""


def noise(index: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (240, 320, 3), np.uint8))


def blobs(index: int) -> Image.Image:
    small = np.random.default_rng(index).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize((320, 240), Image.Resampling.BICUBIC)


def plain(index: int) -> Image.Image:
    return Image.new("RGB", (320, 240), tuple(np.random.default_rng(index).integers(0, 256, 3).tolist()))


@dataclasses.dataclass(frozen=True)
class Answer:
    """How sure an answer is, in all and in its words, and whether it is right; None where nothing is right."""

    total: float
    words: float
    is_right: bool | None


def ask(
    model: pj.PaliGemma,
    task: str,
    count: int,
    source: Callable[[int, int], Sample],
    picture: Callable[[int], Image.Image] | None,
) -> Iterator[Answer]:
    """Answers about the first `count` scenes of a source, or about other pictures in their place."""
    samples = [source(_SEED, index) for index in range(count)]
    questions = [_question(task, sample, index) for index, sample in enumerate(samples)]
    images = [picture(index) if picture else sample.image for index, sample in enumerate(samples)]
    outputs = model.generate(images, [question.prefix for question in questions], 128)
    for question, output in zip(questions, outputs, strict=True):
        words = words_logprob(output, model.processor.tokenizer)
        yield Answer(output.mean_logprob, words, None if picture else _is_right(question, output))


def _question(task: str, sample: Sample, index: int) -> Question:
    left = np.array([box[0] for box in sample.boxes])
    return sample_question(task, sample.kinds, left, np.random.default_rng((_SEED, index, 3)))


def _is_right(question: Question, output: pj.Output) -> bool:
    if question.task in ("caption", "answer"):
        return output.text == question.suffix
    found, dropped = pj.parse(output.text, (1, 1))
    return not dropped and [item.label for item in found] == [label for _, label in question.objects]


def rows(model: pj.PaliGemma, count: int) -> Iterator[str]:
    """The lines of the table."""
    for name, source, picture in (
        ("scenes", scene_sample, None),
        ("foreign scenes", foreign_sample, None),
        ("noise", scene_sample, noise),
        ("blobs", scene_sample, blobs),
        ("plain", scene_sample, plain),
    ):
        for task in _TASKS:
            answers = list(ask(model, task, count, source, picture))
            for kind, word in ((True, "right"), (False, "wrong"), (None, "-")):
                some = [answer for answer in answers if answer.is_right is kind]
                if some:
                    total, words = (np.array([getattr(a, key) for a in some]) for key in ("total", "words"))
                    low = np.mean(words < _LIMIT)
                    yield (
                        f"| {name} | {task} | {word} | {len(some)} | {np.median(total):.2f} | {np.median(words):.2f} | "
                        f"{words.min():.2f} | {low:.1%} |"
                    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scenes", default=300, type=int)
    parser.add_argument("--out", default=ROOT / "benchmarks/results/doubt", type=Path)
    args = parser.parse_args()
    if args.scenes < 1:
        parser.error("scenes is a whole number of at least 1")
    about = machine.describe()
    model = pj.load(ROOT / "assets/tiny", dtype="float32")
    lines = [
        f"{datetime.date.today().isoformat()}: shipped model, float32, {args.scenes} scenes, jax {about['jax']}.",
        "",
        f"| pictures | task | answers | | all tokens, median | words, median | words, lowest | below {_LIMIT} |",
        "|---|---|---|---|---|---|---|---|",
        *rows(model, args.scenes),
        "",
    ]
    print(text := _HEADER + "\n".join(lines))
    write_text(args.out.with_suffix(".md"), text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
