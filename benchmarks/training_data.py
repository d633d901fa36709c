"""Opening a data set of a million rows, its memory, and how long training steps wait for their batches.

    python benchmarks/training_data.py --rows 1000000 --pictures 2000

The rows are JSON lines, half of them captions and half of them boxes, over JPEG files of 640 x 480. A step is a pause
of a fixed time, as a device that works leaves the processor free; batches are prepared as in training.
"""

import argparse
import datetime
import json
import resource
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from paligemma_jax import checkpoints, loading
from paligemma_jax.files import write_text
from paligemma_jax.processing.processor import Processor
from paligemma_jax.training.data import Batches, make_batches, open_data

ROOT = Path(__file__).resolve().parents[1]
_WORDS = ("a", "red", "star", "blue", "circle", "and", "two", "green", "squares", "on", "the", "left", "of", "small")
_HEADER = """# Data of training

Opening is reading and checking every row, without looking into pictures; laying out is counting tokens. Memory is the
largest of the process, and what of it was there before. Waiting is the time that steps of a fixed length wait for their
batch, the first one apart, as a share of all time.

"""


def write_rows(folder: Path, num_rows: int, num_pictures: int) -> Path:
    """JSON lines and their pictures; the path of the lines."""
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for i in range(num_pictures):
        coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(folder / "pictures" / f"{i}.jpg")
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(num_rows):
            row = {"image": f"pictures/{i % num_pictures}.jpg"}
            if i % 2:
                row |= {"prefix": "caption en", "suffix": f"{' '.join(rng.choice(_WORDS, rng.integers(4, 20)))} {i}"}
            else:
                boxes = rng.integers(0, 1024, (rng.integers(1, 5), 4))
                objects = ["".join(f"<loc{v:04}>" for v in box) + " star" for box in boxes]
                row |= {"prefix": "detect star ; circle", "suffix": " ; ".join(objects)}
            file.write(json.dumps(row) + "\n")
    return path


def waiting(batches: Batches, step_s: float, num_steps: int) -> tuple[float, float]:
    """Share of the time that steps wait, and seconds until the first batch."""
    waited = first = 0.0
    with ThreadPoolExecutor(1) as pool:  # as training does it
        upcoming = pool.submit(batches, 0)
        for step in range(num_steps):
            start = time.perf_counter()
            upcoming.result()
            upcoming = pool.submit(batches, step + 1)
            took = time.perf_counter() - start
            if step:
                waited += took
            else:
                first = took
            time.sleep(step_s)
    return waited / (waited + step_s * (num_steps - 1)), first


def peak_gb() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--checkpoint", default="tiny", help="whose tokenizer and picture size are used")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--step-ms", type=int, nargs="+", default=[50, 100, 200, 500, 1000])
    parser.add_argument("--folder", type=Path, help="where the rows are written, and found again; by default nowhere")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "training_data.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        path = folder / "rows.jsonl"
        if not path.exists():
            write_rows(folder, arguments.rows, arguments.pictures)
        source = checkpoints.locate(arguments.checkpoint)
        config = checkpoints.scan(source).config
        processor = Processor(config, loading.read_tokenizer(source), loading.read_image_settings(source, config))
        before = peak_gb()
        start = time.perf_counter()
        examples = open_data(path)
        opened_s = time.perf_counter() - start
        options = {"batch_size": arguments.batch_size, "epochs": 1, "text_length": 128, "seed": 0}
        batches = make_batches(examples, processor, **options, num_threads=arguments.threads)
        laid_out_s = time.perf_counter() - start - opened_s
        memory = peak_gb()
        lines = [
            "| rows | opening, s | laying out, s | memory, GB | before, GB |",
            "|---|---|---|---|---|",
            f"| {len(examples):,} | {opened_s:.1f} | {laid_out_s:.1f} | {memory:.2f} | {before:.2f} |",
            "",
            f"Batches of {arguments.batch_size} at {config.vision.image_size} px, {arguments.threads} threads:",
            "",
            "| a step, ms | waiting | first batch, ms |",
            "|---|---|---|",
        ]
        for step_ms in arguments.step_ms:
            share, first = waiting(batches, step_ms / 1000, arguments.steps)
            lines.append(f"| {step_ms} | {share:.1%} | {1000 * first:.0f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    found = machine.describe()
    footer = f"\n{found['cpu']}, {found['cores']} cores, {datetime.date.today()}.\n"
    write_text(arguments.output, _HEADER + text + footer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
