"""Fine-tuning of the shipped model on real pictures by each method: before and after, on unseen data and old tasks.

    python benchmarks/finetune_demos.py digits
    python benchmarks/finetune_demos.py emoji --emoji node_modules/emoji-datasource-google/img/google/64
    python benchmarks/finetune_demos.py words

Data are those of `demo_data.py`, mixed with scenes of the shipped model's world, so that it does not forget them. What
it does on unseen ones of these is measured by `run=evaluate`, as is the rest. A run that was stopped goes on: what is
trained and measured already, in `--work`, is not done again.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine, scenes_as_coco

ROOT = Path(__file__).resolve().parents[1]
_SHIPPED = "assets/tiny"
_METHODS = {
    "full": {"learning_rate": 5e-4},
    "decoder": {"learning_rate": 5e-4},
    "lora": {"learning_rate": 2e-3, "lora_rank": 16, "lora_alpha": 32, "lora_targets": "all"},
    "qlora": {"learning_rate": 2e-3, "lora_rank": 16, "lora_alpha": 32, "lora_targets": "all", "quantization": "int8"},
}
_KINDS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 6, "old": 0.3, "measures": {"test": "exact"}, "text_length": 48},
    "emoji": {
        "epochs": 3,
        "old": 0.3,
        "measures": {"test_answer": "exact", "test_detect": "detection_f1"},
        "text_length": 96,
    },
    "words": {"epochs": 6, "old": 0.3, "measures": {"test": "exact", "new_words": "exact"}, "text_length": 48},
}
_OLD = {"caption": "exact", "answer": "exact", "detect": "detection_f1"}
_OLD_SCENES, _OLD_TEST = 600, 150


def run(*arguments: str) -> str:
    """`main.py`; its standard output."""
    done = subprocess.run(
        [sys.executable, "main.py", *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        raise SystemExit(f"main.py {' '.join(arguments)} failed")
    return done.stdout


def measure(checkpoint: str, data: Path, metric: str, output: Path) -> float:
    """The main number of a metric over a file of rows."""
    keys = {"checkpoint": checkpoint, "data": data, "metric": metric, "output_dir": output, "format": "json"}
    run("--config=configs/evaluate.py", *(f"--config.{key}={value}" for key, value in keys.items()))
    result = json.loads((output / "result.json").read_text())
    return float(result["main"]["value"])


def train(kind: str, method: str, work: Path, args: argparse.Namespace) -> float | None:
    """Fine-tune into `work/method`; minutes, None where that was done before."""
    if (work / method / "model.safetensors").exists():
        return None
    about, started = _KINDS[kind], time.monotonic()
    data = f"{work / 'data' / 'train.jsonl'} ; {about['old']} {work / 'old' / 'train.jsonl'}"
    keys = {"method": method, "data": data, "output_dir": work / method, "batch_size": 32, "weight_decay": 0.0}
    keys |= {"epochs": args.epochs or about["epochs"], "text_length": about["text_length"], "log_every": 20}
    keys |= _METHODS[method]
    run("--config=configs/finetune.py", *(f"--config.{key}={value}" for key, value in keys.items()))
    return (time.monotonic() - started) / 60


def prepare(kind: str, work: Path, args: argparse.Namespace) -> None:
    """Data to train and measure on."""
    if not (work / "data").exists():
        extra = ["--emoji", str(args.emoji)] if args.emoji else []
        extra += ["--count", str(args.count)] if args.count else []
        program = [sys.executable, "benchmarks/demo_data.py", kind, str(work / "data"), *extra]
        subprocess.run(program, cwd=ROOT, check=True)
    for name, count, seed in (("old", _OLD_SCENES, 7), ("old_test", _OLD_TEST, scenes_as_coco.SEED)):
        if not (work / name / "train.jsonl").exists():
            scenes_as_coco.write(work / name, count, seed)
            texts = [(work / name / f"{task}.jsonl").read_text() for task in _OLD]
            lines = [line for text in texts for line in text.splitlines(keepends=True)]
            # A question about what is not there has no answer, which training refuses but for `detect`.
            kept = [line for line in lines if (row := json.loads(line))["suffix"] or row["prefix"].startswith("detect")]
            (work / name / "train.jsonl").write_text("".join(kept))


def measured(kind: str, work: Path, name: str, checkpoint: str) -> dict[str, float]:
    """All numbers of a model: of the new data, then of the old tasks."""
    found = {}
    for data, metric in _KINDS[kind]["measures"].items():
        found[f"{data}: {metric}"] = measure(
            checkpoint, work / "data" / f"{data}.jsonl", metric, work / "measured" / name / data
        )
    for task, metric in _OLD.items():
        output = work / "measured" / name / f"old_{task}"
        found[f"old {task}: {metric}"] = measure(checkpoint, work / "old_test" / f"{task}.jsonl", metric, output)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=_KINDS)
    parser.add_argument("--methods", default=",".join(_METHODS))
    parser.add_argument("--emoji", type=Path, help="folder of PNG files, see demo_data.py")
    parser.add_argument("--count", type=int, help="training pictures of emoji and words")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--work", type=Path, help="by default output/demo_KIND")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/finetune_demos"))
    args = parser.parse_args()
    work = (args.work or ROOT / "output" / f"demo_{args.kind}").absolute()
    prepare(args.kind, work, args)
    rows = {"before": {"minutes": 0.0, "numbers": measured(args.kind, work, "before", _SHIPPED)}}
    for method in args.methods.split(","):
        minutes = train(args.kind, method, work, args)
        rows[method] = {"minutes": minutes, "numbers": measured(args.kind, work, method, str(work / method))}
    machine.keep(args.out, args.kind, {"rows": rows, "machine": machine.describe()}, document)


def document(entries: dict[str, dict]) -> str:
    """The tables of all entries."""
    lines = ["# Fine-tuning the shipped model on real pictures", ""]
    lines += [
        "Unseen pictures; `old` is what the model knew before. Minutes are those of training, a dash where an",
        "earlier run of the script had done it.",
        "",
    ]
    for kind, entry in entries.items():
        about, names = entry["machine"], list(entry["rows"]["before"]["numbers"])
        lines += [f"## {kind}", "", f"{about['cpu']}, {about['cores']} cores, jax {about['jax']}", ""]
        lines += [f"| | {' | '.join(names)} | minutes |", f"|---|{'---|' * len(names)}---|"]
        for name, row in entry["rows"].items():
            values = " | ".join(f"{row['numbers'][key]:.3f}" for key in names)
            minutes = "-" if row["minutes"] is None else f"{row['minutes']:.1f}"
            lines.append(f"| {name} | {values} | {minutes} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
