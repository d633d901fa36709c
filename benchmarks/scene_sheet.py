"""Draw the first scenes of an evaluation set on one sheet, to look at what a model is asked about.

    python benchmarks/scene_sheet.py wide sheet.png

Sets are those of config.data: scenes, foreign, wide, wide_foreign.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paligemma_jax.files import replacing
from paligemma_jax.runs.evaluate import SOURCES

_COLUMNS, _CELL, _GAP = 6, 256, 4


def sheet(data: str, count: int, seed: int) -> Image.Image:
    """The first `count` images of a seed, in rows of six, at their own size or smaller."""
    rows = -(-count // _COLUMNS)
    step = _CELL + _GAP
    out = Image.new("RGB", (_COLUMNS * step - _GAP, rows * step - _GAP), "white")
    for index in range(count):
        image = SOURCES[data](seed, index).image
        image.thumbnail((_CELL, _CELL))
        out.paste(image, (index % _COLUMNS * step, index // _COLUMNS * step))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=SOURCES)
    parser.add_argument("output", type=Path, help="a .png file")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--seed", type=int, default=20_000_000, help="that of the evaluation")
    args = parser.parse_args()
    with replacing(args.output) as temporary:
        sheet(args.data, args.count, args.seed).save(temporary, "PNG")


if __name__ == "__main__":
    main()
