"""Measure annotation of many pictures against `generate` on the same pictures in memory.

    python benchmarks/annotate.py
    python benchmarks/annotate.py --pictures 500 --size 640 480

Draws scenes of the shipped model's world into a folder, some of them broken, then takes turns: `generate` is given the
decoded pictures in memory, in calls of the same batch size; the run reads and decodes them from the disk, and writes
its rows. Loading and compiling count for neither. OUT.md holds the table; a broken picture is no work for either.
"""

import argparse
import datetime
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import paligemma_jax as pj
from benchmarks import machine
from paligemma_jax.annotate import inputs, local
from paligemma_jax.annotate.store import Layout, Store
from paligemma_jax.annotate.worker import Annotator, Job
from paligemma_jax.files import write_text
from paligemma_jax.processing.image import load_image
from paligemma_jax.shapes_world.samples import scene_sample
from paligemma_jax.tasks.prompts import read_prompt

ROOT = Path(__file__).resolve().parents[1]
_PROMPTS = {  # what is asked, and whether the answers in memory become objects with masks too, as those of a run do
    "caption en": ("caption en", False),
    "detect circle ; star": ("detect circle ; star", False),
    "segment star": ("segment star", False),
    "segment star, both with masks": ("segment star", True),
}
_HEADER = """# Annotation of many pictures

Pictures per second: `generate` on decoded pictures in memory, and the annotation run from files to rows. Both take
turns; medians over rounds, with the lowest and the highest in brackets. The share is the median over the rounds.
`generate` alone gives masks as codes, the run decodes them: in the last row `generate` is followed by `objects`.

"""


def draw(folder: Path, count: int, broken: int, size: Sequence[int]) -> None:
    """Scenes as PNG files, every so many of them cut in the middle."""
    for i in range(count):
        path = folder / f"{i}.png"
        scene_sample(20_000_000, i).image.resize(tuple(size), Image.Resampling.BICUBIC).save(path)
        if broken and i % (count // broken) == 0:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def generate(
    model: pj.PaliGemma, pictures: list[Image.Image], prompt: str, batch_size: int, with_objects: bool = False
) -> float:
    """Pictures per second of `generate`, in calls of a batch each."""
    start = time.perf_counter()
    for i in range(0, len(pictures), batch_size):
        some = pictures[i : i + batch_size]
        outputs = model.generate(some, prompt, batch_size=batch_size)
        for picture, output in zip(some, outputs, strict=True) if with_objects else ():
            model.objects(output, picture.size)
    return len(pictures) / (time.perf_counter() - start)


def annotate(
    model: pj.PaliGemma, folder: Path, prompt: str, batch_size: int, threads: int, most: int | None = None
) -> tuple[float, int]:
    """Good pictures per second of a run from files to rows, planning included; and how many failed."""
    start = time.perf_counter()
    sources = inputs.find(str(folder))[:most]
    annotator = Annotator(model, Job((read_prompt(prompt),)))
    with (
        tempfile.TemporaryDirectory() as output,
        Store(Path(output), {}, Layout(len(sources), 1000, "jsonl")) as store,
    ):
        local.annotate(annotator, sources, store.pending(batch_size), threads, store.add)
        return (store.done - store.failed) / (time.perf_counter() - start), store.failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", default="assets/tiny", help="directory of the model")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--pictures", default=2000, type=int)
    parser.add_argument("--broken", default=20, type=int, help="of them")
    parser.add_argument("--size", default=[320, 240], type=int, nargs=2, metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--batch", default=16, type=int)
    parser.add_argument("--threads", default=4, type=int)
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--out", default=ROOT / "benchmarks/results/annotate", type=Path)
    args = parser.parse_args()
    if min(args.pictures, args.batch, args.threads, args.rounds, *args.size) < 1 or args.broken < 0:
        parser.error("numbers are at least 1, broken at least 0")
    model = pj.load(args.checkpoint, dtype=args.dtype, batch_size=args.batch)
    lines = [
        f"{args.pictures} pictures of {args.size[0]} x {args.size[1]} px, {args.broken} of them broken; batches of "
        f"{args.batch}, {args.threads} threads that read; {args.checkpoint}, {args.dtype}.",
        "",
        "| prompt | `generate`, pictures/s | annotate, pictures/s | share | failed |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), args.pictures, args.broken, args.size)
        broken = args.pictures // args.broken if args.broken else args.pictures + 1
        names = [Path(folder, f"{i}.png") for i in range(args.pictures)]
        pictures = [load_image(name) for i, name in enumerate(names) if not args.broken or i % broken]
        for name, (prompt, with_objects) in _PROMPTS.items():
            generate(model, pictures[: 4 * args.batch + 3], prompt, args.batch, with_objects)  # compiles
            annotate(model, Path(folder), prompt, args.batch, args.threads, most=5 * args.batch)
            alone, run = [], []
            for turn in range(args.rounds):
                for which in ((0, 1), (1, 0))[turn % 2]:
                    if which:
                        speed, failed = annotate(model, Path(folder), prompt, args.batch, args.threads)
                        run.append(speed)
                    else:
                        alone.append(generate(model, pictures, prompt, args.batch, with_objects))
            share = statistics.median(a / b for a, b in zip(run, alone, strict=True))
            lines.append(f"| {name} | {_spread(alone)} | {_spread(run)} | {share:.2f} | {failed} |")
            print(lines[-1], flush=True)
    about = machine.describe()
    date = f"{datetime.date.today().isoformat()}: {about['cpu']}, {about['cores']} cores, jax {about['jax']}. "
    date += f"Load average, of other programs too: {os.getloadavg()[1]:.1f}."
    print(text := _HEADER + "\n".join([date, "", *lines, ""]))
    write_text(args.out.with_suffix(".md"), text)
    return 0


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


if __name__ == "__main__":
    sys.exit(main())
