"""Measure paligemma_jax, side by side with transformers: start, first token, decode, throughput, memory, accuracy.

    python benchmarks/speed.py --variant paligemma-3b-224 --tokenizer PATH/tokenizer.model --work DIR
    python benchmarks/speed.py --variant paligemma-3b-224 --tokenizer PATH/tokenizer.model --work DIR --platform gpu
    python benchmarks/speed.py --checkpoint assets/tiny --against none

A variant gets random weights, which are made once and kept in the work directory; a checkpoint is measured as it is.
The columns take turns, each in a process of its own, for as many rounds as asked for. OUT.json holds every sample,
OUT.md the tables; a model that is measured again replaces its own part only.
"""

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine, report, workers
from paligemma_jax import checkpoints
from paligemma_jax.config import VARIANTS
from paligemma_jax.errors import UserError
from paligemma_jax.files import read_json, replacing, write_json
from paligemma_jax.processing.image import ImageSettings
from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = (  # the first one is timed; all of them are asked where accuracy is measured
    "answer en what is in the picture?",
    "caption en",
    "detect cat ; dog",
    "segment person",
    "ocr",
    "answer en how many people are there?",
    "caption de",
    "describe en",
)
_ACCURACY_TOKENS = 8
_REFERENCE = "ours float32"  # of the accuracy table

Samples = report.Samples


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the table."""

    side: str  # "ours" or "theirs"
    mode: str  # of workers.OUR_MODES or THEIR_MODES

    @property
    def label(self) -> str:
        return f"{self.side} {self.mode}"


class Workplace:
    """Where the processes of one model are started.

    Args:
      folder: for what they need and leave: their inputs, logs, compiled programs and logits.
      checkpoint: directory of the model.
      platform: "cpu" or "gpu".
      their_python: interpreter of the processes of theirs.
    """

    def __init__(self, folder: Path, checkpoint: Path, platform: str, their_python: str = sys.executable):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._checkpoint, self._their_python = checkpoint, their_python
        self._common = {"checkpoint": str(checkpoint), "platform": platform, "inputs": str(folder / "inputs.npz")}

    def write_inputs(self, count: int) -> dict[str, Any]:
        """Write `count` pictures and the prompts, the same for all; returns facts about the model and its prompt.

        Pictures have the model's own size, and one side gets them as pixels: making those is not compared.
        """
        config = checkpoints.scan(self._checkpoint).config
        size = config.vision.image_size
        settings = ImageSettings.from_dir(self._checkpoint, size)
        processor = Processor(config, Tokenizer.from_dir(self._checkpoint), settings)
        pictures = np.random.default_rng(0).integers(0, 256, (max(count, len(PROMPTS)), size, size, 3), np.uint8)
        batch = processor(list(pictures), [PROMPTS[i % len(PROMPTS)] for i in range(len(pictures))])
        tokens = batch.tokens[0, : batch.length[0]]
        rows = {"prompt_tokens": batch.tokens[: len(PROMPTS)], "prompt_lengths": batch.length[: len(PROMPTS)]}
        arrays = {"pictures": pictures, "pixels": batch.pixels, "prompts": np.array(PROMPTS), "tokens": tokens} | rows
        with replacing(self.folder / "inputs.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
        flops = machine.first_token_flops(config, len(tokens))
        return {"prompt_tokens": len(tokens), "first_token_flops": flops}

    def quantized(self, quantization: str) -> Path:
        """The checkpoint as the converter writes it in 8 or 4 bits, made when there is none that is newer.

        Raises:
          UserError: it cannot be made.
        """
        path = self.folder / f"checkpoint-{quantization}"
        config = path / "config.json"
        if not config.exists() or config.stat().st_mtime < (self._checkpoint / "config.json").stat().st_mtime:
            shutil.rmtree(path, ignore_errors=True)
            new = path.with_name(f"{path.name}.new")
            shutil.rmtree(new, ignore_errors=True)
            command = [sys.executable, "-m", "convert", str(self._checkpoint), str(new), "--quantize", quantization]
            if subprocess.run(command, cwd=ROOT).returncode:
                raise UserError(f"{path} could not be made")
            new.rename(path)
        return path

    def forget_programs(self) -> None:
        """Programs of an earlier run may be of other code, which would make a second start look like a first one."""
        shutil.rmtree(self.folder / "cache", ignore_errors=True)

    def cache(self, label: str) -> Path:
        """Directory for what the processes of a column compile; it may not be there yet."""
        path = self.folder / "cache" / label.replace(" ", "_")
        path.parent.mkdir(exist_ok=True)
        return path

    def run(self, label: str, job: dict[str, Any], cache: Path | None = None) -> tuple[Samples, str]:
        """Start a process, read its reports to the end, and return them with what went wrong, "" if nothing did.

        The samples include "others_share": how much of the processor other work had meanwhile.

        Args:
          label: names the log file.
          job: for workers.py, without what all jobs have in common.
          cache: user's cache directory, where compiled programs are kept.
        """
        _read_files(Path(job.get("checkpoint", self._checkpoint)))
        environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # it would go before ours
        if cache:
            cache.mkdir(exist_ok=True)
            environment["XDG_CACHE_HOME"] = str(cache)
        python = self._their_python if job.get("side") == "theirs" else sys.executable
        command = [python, str(ROOT / "benchmarks" / "workers.py"), json.dumps(self._common | job)]
        log = self.folder / f"{label.replace(' ', '_')}.log"
        found: Samples = {}
        with log.open("w") as errors, _OtherWork() as others:
            start = time.monotonic()
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment) as process:
                for line in process.stdout:
                    seconds = time.monotonic() - start
                    message = json.loads(line)
                    found[message["name"]] = [seconds] if message["values"] is None else message["values"]
        found |= {"others_share": [others.share]} if others.share is not None else {}
        if not process.returncode:
            return found, ""
        if process.returncode == 1 and (lines := log.read_text(errors="replace").splitlines()):
            return found, lines[-1]
        return found, f"ended with status {process.returncode}, see {log}"


class _OtherWork:
    """A block, with its processes, and the share of the processor that others had meanwhile; None if not known."""

    share: float | None = None

    def __enter__(self) -> "_OtherWork":
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        seconds, own, busy = (b - a for a, b in zip(self._start, self._now(), strict=True))
        if busy:
            self.share = min(1.0, max(0.0, busy - own) / (seconds * os.cpu_count()))

    def _now(self) -> tuple[float, float, float]:
        """Time, processor time of this process and its ended children, and of the whole machine."""
        return time.monotonic(), sum(os.times()[:4]), machine.busy_seconds() or 0.0


def benchmark(
    workplace: Workplace, columns: list[Column], args: argparse.Namespace, save: Callable[[dict[str, Any]], None]
) -> None:
    """Measure one model; `save` gets the entry of the results after every round."""
    captions = args.captions if args.captions is not None else 64 * (args.platform == "gpu")
    facts = workplace.write_inputs(max(*args.batch, captions))
    entry = {
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe() | machine.their_versions(args.their_python),
        "device": "",
        "settings": {
            "platform": args.platform,
            "prompt_tokens": facts["prompt_tokens"],
            "new_tokens": args.new_tokens,
            "caption_tokens": workers.CAPTION_TOKENS,
            "repeats": args.repeats,
        },
        "first_token_flops": facts["first_token_flops"],
        "samples": {column.label: {} for column in columns},
        "ceilings": {},
        "notes": {},
        "accuracy": {},
    }
    jobs = [{"job": "rows", "rows": rows} for rows in args.batch if rows > 1]
    jobs += [{"job": "captions", "rows": captions}] if captions else []
    workplace.forget_programs()
    for i in range(args.repeats):
        note(f"round {i + 1} of {args.repeats}")
        ceilings, problem = workplace.run("ceilings", {"job": "ceilings"})
        if problem:
            raise UserError(f"--platform {args.platform}: {problem}")
        entry["device"] = ceilings.pop("device")[0]
        _add(entry["ceilings"], {name: ceilings[name] for name in report.CEILINGS})
        for column in columns[:: 1 if i % 2 == 0 else -1]:
            if column.label in entry["notes"]:
                continue
            start = time.monotonic()
            found, problem = _measure(workplace, column, args.new_tokens, jobs)
            _add(entry["samples"][column.label], found)
            if problem:
                entry["notes"][column.label] = f"not available: {problem}"
            note(f"  {column.label}: {problem or f'{time.monotonic() - start:.0f} s'}")
            save(entry)
    if args.accuracy:
        entry["accuracy"] = _accuracy(workplace, [c for c in columns if c.label not in entry["notes"]])
        save(entry)


def _job(workplace: Workplace, column: Column) -> dict[str, Any]:
    """What a process is told about its column: ours in few bits are loaded from a checkpoint that was written so."""
    quantization = workers.OUR_MODES[column.mode][1] if column.side == "ours" else None
    return dataclasses.asdict(column) | ({"checkpoint": str(workplace.quantized(quantization))} if quantization else {})


def _measure(workplace: Workplace, column: Column, new_tokens: int, more: list[dict[str, Any]]) -> tuple[Samples, str]:
    """The samples of one round of a column, and what went wrong: from two starts, and a process for each job more."""
    common = {"new_tokens": new_tokens} | _job(workplace, column)
    kept, fresh = workplace.cache(column.label), workplace.cache("new")
    shutil.rmtree(fresh, ignore_errors=True)
    start = common | {"job": "measure"}
    first, problem = workplace.run(column.label, start | {"only_start": True}, fresh)
    if problem:
        return {}, problem
    if not kept.exists():
        fresh.rename(kept)
    samples: Samples = {"start_cold_s": first["start_s"], "others_share": first.get("others_share", [])}
    for job in [start | {"only_start": False}, *(common | job for job in more)]:
        found, problem = workplace.run(column.label, job, kept)
        _add(samples, found)
        if problem:
            break
    return samples, problem


def _accuracy(workplace: Workplace, columns: list[Column]) -> dict[str, dict[str, float]]:
    """Logits of each column against ours in float32, by label."""
    found = {}
    reference = workplace.folder / "reference.npz"
    job = {"job": "logits", "count": _ACCURACY_TOKENS}
    first = {"side": "ours", "mode": "float32", "follow": None, "output": str(reference)}
    note("accuracy")
    _, problem = workplace.run(_REFERENCE, job | first, workplace.cache(_REFERENCE))
    if problem:
        note(f"  {_REFERENCE}: {problem}")
        return {}
    expected = np.load(reference)["logits"]
    for column in columns:
        if column.label == _REFERENCE:
            continue
        output = workplace.folder / "logits.npz"
        specific = _job(workplace, column) | {"follow": str(reference), "output": str(output)}
        _, problem = workplace.run(column.label, job | specific, workplace.cache(column.label))
        if problem:
            note(f"  {column.label}: {problem}")
            continue
        found[column.label] = report.compare(expected, np.load(output)["logits"])
        output.unlink()
    return found


def _add(samples: Samples, found: Samples) -> None:
    for name, values in found.items():
        samples.setdefault(name, []).extend(values)


def _read_files(checkpoint: Path) -> None:
    """Read the weights, so that every process finds them in memory and no disk is measured."""
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(2**24)
            while file.readinto(buffer):
                pass


def _columns(args: argparse.Namespace) -> list[Column]:
    """Ours and theirs; theirs comes second, so that it is measured close to our first."""
    ours = [Column("ours", mode) for mode in args.modes]
    if args.against == "none":
        return ours
    versions = machine.their_versions(args.their_python)
    if missing := [name for name in ("torch", "transformers") if versions[name] is None]:
        note(f"{' and '.join(missing)} missing: nothing to compare with (pip install torch transformers)")
        return ours
    return [ours[0], Column("theirs", args.their_dtype), *ours[1:]]


def _models(args: argparse.Namespace) -> dict[str, Path]:
    """Name and directory of what is measured; variants that are not there yet are made."""
    if args.checkpoint:
        return {args.checkpoint.resolve().name: args.checkpoint}
    if unknown := [name for name in args.variant if name not in VARIANTS]:
        raise UserError(f"there is no variant {unknown[0]!r}: give one of {', '.join(VARIANTS)}")
    directories = {name: args.work / name / "checkpoint" for name in args.variant}
    for name, directory in directories.items():
        if directory.exists():
            continue
        if args.tokenizer is None:
            raise UserError(f"{name} has to be made first: give --tokenizer, the tokenizer.model of a PaliGemma")
        new = directory.with_name("checkpoint.new")
        new.mkdir(parents=True, exist_ok=True)
        program = str(ROOT / "benchmarks" / "random_checkpoint.py")  # apart: its memory and its device go with it
        arguments = ["--variant", name, "--tokenizer", str(args.tokenizer), "--out", str(new)]
        if subprocess.run([sys.executable, program, *arguments]).returncode:
            raise UserError(f"{name} could not be made in {new}")
        new.rename(directory)
    return directories


def note(text: str) -> None:
    """Tell the user something."""
    print(text, file=sys.stderr, flush=True)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--variant", type=_list, help="released geometries to fill with random weights: a,b")
    model.add_argument("--checkpoint", type=Path, help="a Hugging Face directory instead")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model of PaliGemma, for a variant")
    parser.add_argument("--work", type=Path, default=ROOT / "output" / "speed", help="directory for large files")
    parser.add_argument("--modes", type=_list, default=["bf16", "int8", "int4"], help="ours: float32,bf16,int8,int4")
    parser.add_argument("--against", choices=("transformers", "none"), default="transformers")
    parser.add_argument("--their-dtype", choices=workers.THEIR_MODES, default="bf16")
    parser.add_argument("--their-python", default=sys.executable, help="interpreter of theirs, if not this one")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--batch", type=_numbers, default=[1, 4, 16], help="answers at once: 1,4,16; 1 always")
    parser.add_argument("--new-tokens", type=int, default=33, help="length of an answer: 1 and whole decode chunks")
    parser.add_argument("--captions", type=int, help="pictures captioned at once; 64 on a GPU by default, 0 for none")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--accuracy", action="store_true", help="compare logits with float32, which needs its memory")
    parser.add_argument("--out", type=Path, help="results without suffix; benchmarks/results/PLATFORM by default")
    args = parser.parse_args(arguments)
    if unknown := [mode for mode in args.modes if mode not in workers.OUR_MODES]:
        parser.error(f"--modes: there is no {unknown[0]!r}: give some of {', '.join(workers.OUR_MODES)}")
    if min(*args.batch, args.repeats) < 1 or args.new_tokens < 2:
        parser.error("--batch and --repeats are at least 1, --new-tokens at least 2")
    args.work = args.work.resolve()  # a cache directory is used only when its path is absolute
    args.out = args.out or ROOT / "benchmarks" / "results" / args.platform
    return args


def _list(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return sorted(int(part) for part in text.split(","))


def main(arguments: list[str]) -> int:
    args = _parse(arguments)
    table, samples = (args.out.with_name(args.out.name + suffix) for suffix in (".md", ".json"))
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        entries = read_json(samples) if samples.exists() else {}
        for name, checkpoint in _models(args).items():
            note(f"{name}: {checkpoint}")

            def save(entry: dict[str, Any], name: str = name) -> None:
                entries[name] = entry
                write_json(samples, entries)
                with replacing(table) as temporary:
                    temporary.write_text(report.document(entries), encoding="utf-8")

            benchmark(
                Workplace(args.work / name, checkpoint, args.platform, args.their_python), _columns(args), args, save
            )
            print(report.section(name, entries[name]))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    note(f"wrote {table} and {samples}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
