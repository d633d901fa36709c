"""Samples to tables that people read: medians with their spread, ratios, shares of what the machine can do."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

Samples = dict[str, list[float]]  # of one column, by the name of the measure

_HEADER = """# Speed, ours and transformers

Medians, with the lowest and the highest sample in brackets. The columns took turns, each in a process of its own, on
the same weights, pictures and prompt. The last columns are ours divided by theirs. A first start finds no compiled
program of ours on disk, a second one does; files are in memory both times.
"""

CEILINGS = ("copy_gb_s", "read_gb_s", "matmul_tflop_s")  # names of their samples

_MEASURES = (  # name of the samples, what the table calls them, what they are multiplied by
    ("start_cold_s", "process start to first token, first start, s", 1),
    ("start_s", "process start to first token, second start, s", 1),
    ("imports_s", "of it: until the libraries are imported, s", 1),
    ("load_s", "of it: load, s", 1),
    ("first_token_ms", "picture to first token, ms", 1),
    ("vision_ms", "of it: picture encoder, ms", 1),
    ("decode_ms/{}", "decode step, batch {}, ms", 1),
    ("tokens_per_s/{}", "decode, batch {}, tokens/s", 1),
    ("answer_s/{}", "whole answers of {new_tokens} tokens, batch {}, s", 1),
    ("captions_per_s/{}", "captions of {caption_tokens} tokens, batch {}, pictures/s", 1),
    ("weights_bytes", "weights, GB", 1e-9),
    ("peak_bytes/{}", "peak memory, batch {}, GB", 1e-9),
)
_BANDWIDTH = "share of the memory bandwidth, decode at batch 1"
_MATRIX_RATE = "share of the bf16 matrix rate, picture to first token"


def document(entries: dict[str, dict[str, Any]]) -> str:
    """Everything that was measured, as Markdown: a section for each model."""
    return "\n".join([_HEADER, *(section(name, entry) for name, entry in entries.items())])


def section(model: str, entry: dict[str, Any]) -> str:
    """What was measured of one model; see speed.py for the entry."""
    machine, settings = entry["machine"], entry["settings"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "jax", "jaxlib", "torch", "transformers"))
    if (theirs := machine.get("their_python", machine["python"])) != machine["python"]:
        versions += f" (theirs in python {theirs})"
    place = machine["cpu"] if settings["platform"] == "cpu" else entry["device"]
    lines = [
        f"## {model} on {place}",
        "",
        f"{entry['date']}: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; {versions}. "
        f"Prompt of {settings['prompt_tokens']} tokens with its picture, greedy; rounds: {settings['repeats']}.",
        "",
        *_speed_table(entry),
        "",
        *_ceilings(entry["ceilings"]),
        *_others(entry["samples"]),
        *(f"- {label}: {note}" for label, note in entry["notes"].items()),
        "",
    ]
    if entry["accuracy"]:
        lines += [*_accuracy_table(entry["accuracy"]), ""]
    return "\n".join(lines)


def compare(reference: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """How far logits [B, T, V] are from a reference: errors in units of its RMS, and agreement about the likeliest."""
    rms = float(np.sqrt(np.mean(np.square(reference, dtype=np.float64))))
    error = logits.astype(np.float64) - reference
    agree = logits.argmax(-1) == reference.argmax(-1)
    return {
        "rms_error": float(np.sqrt(np.mean(np.square(error)))) / rms,
        "max_error": float(np.abs(error).max()) / rms,
        "top1_agreement": float(agree.mean()),
        "positions": agree.size,
    }


def _speed_table(entry: dict[str, Any]) -> list[str]:
    columns: dict[str, Samples] = entry["samples"]
    theirs = next((label for label in columns if label.startswith("theirs")), None)
    ours = [label for label in columns if label != theirs]
    ratios = [f"{label.removeprefix('ours ')} / theirs" for label in ours] if theirs else []
    lines = head(["", *columns, *ratios])
    for name, label, scale in _rows(columns, entry["settings"]):
        found = {column: samples.get(name, []) for column, samples in columns.items()}
        cells = [_spread([scale * x for x in values]) for values in found.values()]
        for column in ours if theirs else ():
            both = found[column] and found[theirs]
            cells.append(_number(_median(found[column]) / _median(found[theirs])) if both else "-")
        lines.append(line([label, *cells]))
    for label, share in ((_BANDWIDTH, _bandwidth_share), (_MATRIX_RATE, _matrix_share)):
        cells = [share(samples, entry) for samples in columns.values()]
        lines.append(line([label, *cells, *[""] * len(ratios)]))
    return lines


def _rows(columns: dict[str, Samples], settings: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Name, label and scale of the measures that any column has; those of a batch size once for each."""
    present = {name for samples in columns.values() for name in samples}
    rows = []
    for pattern, label, scale in _MEASURES:
        if "{}" not in pattern:
            rows += [(pattern, label, scale)] if pattern in present else []
            continue
        prefix = pattern.format("")
        for size in sorted(int(name.removeprefix(prefix)) for name in present if name.startswith(prefix)):
            rows.append((pattern.format(size), label.format(size, **settings), scale))
    return rows


def _bandwidth_share(samples: Samples, entry: dict[str, Any]) -> str:
    """Bytes of the decoder's weights, each read once per token, against the higher of the two ceilings."""
    ceilings = entry["ceilings"]
    if not (samples.get("decode_ms/1") and ceilings):
        return "-"
    reached = samples["decoder_bytes"][0] / (_median(samples["decode_ms/1"]) * 1e-3) / 1e9
    return f"{reached / max(_median(ceilings['copy_gb_s']), _median(ceilings['read_gb_s'])):.0%}"


def _matrix_share(samples: Samples, entry: dict[str, Any]) -> str:
    if not (samples.get("first_token_ms") and entry["ceilings"]):
        return "-"
    reached = entry["first_token_flops"] / (_median(samples["first_token_ms"]) * 1e-3) / 1e12
    return f"{reached / _median(entry['ceilings']['matmul_tflop_s']):.0%}"


def _ceilings(ceilings: Samples) -> list[str]:
    if not ceilings:
        return []
    copy, read, matmul = (_spread(ceilings[name]) for name in CEILINGS)
    found = f"copy {copy} GB/s, read {read} GB/s, bf16 products {matmul} TFLOP/s"
    return [f"- ceilings, measured by JAX in every round: {found}"]


def _others(columns: dict[str, Samples]) -> list[str]:
    shares = [100 * share for samples in columns.values() for share in samples.get("others_share", [])]
    return [f"- other work on the machine took {_spread(shares)} % of its processor meanwhile"] if shares else []


def _accuracy_table(accuracy: dict[str, dict[str, float]]) -> list[str]:
    lines = [
        "Logits against ours in float32, which chose the tokens that all follow; errors in units of its RMS logit.",
        "",
        *head(["", "RMS error", "largest error", "same likeliest token", "positions"]),
    ]
    for label, found in accuracy.items():
        errors = (_number(found["rms_error"]), _number(found["max_error"]))
        lines.append(line([label, *errors, f"{found['top1_agreement']:.1%}", str(found["positions"])]))
    return lines


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _spread(values: Sequence[float]) -> str:
    """Median and range: "2.31 (2.28-2.40)"; "-" without a sample."""
    if not values:
        return "-"
    lowest, highest = _number(min(values)), _number(max(values))
    return _number(_median(values)) + (f" ({lowest}-{highest})" if lowest != highest else "")


def _number(value: float) -> str:
    """Three digits, and no exponent: 0.0123, 1.23, 123, 1234."""
    if value == 0:
        return "0"
    digits = 2 - int(np.floor(np.log10(abs(value))))
    return f"{value:.{max(digits, 0)}f}"


def head(cells: list[str]) -> list[str]:
    return [line(cells), line(["---"] * len(cells))]


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
