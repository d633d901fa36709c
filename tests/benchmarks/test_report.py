"""Samples to tables."""

import numpy as np
import pytest

from benchmarks import report

OURS = {
    "start_cold_s": [6.0],
    "start_s": [2.0, 4.0, 3.0],
    "decode_ms/1": [50.0],
    "decode_ms/16": [80.0],
    "decoder_bytes": [2_000_000_000],
    "first_token_ms": [500.0],
    "peak_bytes/1": [1_500_000_000],
    "others_share": [0.0, 0.25],
}
THEIRS = {"start_s": [8.0, 12.0], "decode_ms/1": [200.0], "decoder_bytes": [4_000_000_000]}


@pytest.fixture
def entry() -> dict:
    return {
        "date": "2026-01-01",
        "machine": {
            "cpu": "Abacus",
            "cores": 2,
            "memory_gb": 24.0,
            **dict.fromkeys(("python", "jax", "jaxlib", "torch", "transformers"), "1.0"),
        },
        "device": "Quadro 9",
        "settings": {
            "platform": "cpu",
            "prompt_tokens": 80,
            "new_tokens": 33,
            "caption_tokens": 20,
            "repeats": 3,
        },
        "first_token_flops": 10**12,
        "samples": {"ours bf16": OURS, "theirs bf16": THEIRS, "ours int8": {}},
        "ceilings": {"copy_gb_s": [100.0], "read_gb_s": [80.0], "matmul_tflop_s": [4.0]},
        "notes": {"ours int8": "not available: no such thing"},
        "accuracy": {},
    }


@pytest.fixture
def cells(entry):
    """cells(start): what stands in the row of the table that begins so."""

    def find(start: str) -> list[str]:
        [row] = [line for line in report.section("small", entry).splitlines() if line.startswith(f"| {start}")]
        return [cell.strip() for cell in row.strip("|").split("|")][1:]

    return find


def test_medians_come_with_their_spread_and_their_ratio(cells):
    assert cells("process start to first token, second") == ["3.00 (2.00-4.00)", "10.0 (8.00-12.0)", "-", "0.300", "-"]


def test_what_one_side_lacks_has_no_ratio(cells):
    assert cells("process start to first token, first") == ["6.00", "-", "-", "-", "-"]


def test_batch_sizes_are_rows_in_order_of_size(entry, cells):
    assert cells("decode step, batch 16") == ["80.0", "-", "-", "-", "-"]
    text = report.section("small", entry)
    assert text.index("batch 1,") < text.index("batch 16,")


def test_shares_of_the_ceilings(cells):
    assert cells("share of the memory bandwidth")[:3] == ["40%", "20%", "-"]  # 2 GB in 50 ms of 100 GB/s
    assert cells("share of the bf16 matrix rate")[:3] == ["50%", "-", "-"]  # 1 TFLOP in 0.5 s of 4 TFLOP/s


def test_bytes_are_shown_in_gb(cells):
    assert cells("peak memory, batch 1")[0] == "1.50"


def test_other_work_is_said(entry):
    assert "- other work on the machine took 12.5 (0-25.0) % of" in report.section("small", entry)


def test_alone_there_is_no_ratio(entry):
    del entry["samples"]["theirs bf16"]
    head = next(line for line in report.section("small", entry).splitlines() if line.startswith("|"))
    assert head == "|  | ours bf16 | ours int8 |"


def test_the_title_names_model_and_machine(entry):
    assert "## small on Abacus\n" in report.section("small", entry)
    entry["settings"]["platform"] = "gpu"
    assert "## small on Quadro 9\n" in report.section("small", entry)


def test_what_is_not_available_is_said(entry):
    assert "- ours int8: not available: no such thing" in report.section("small", entry)


def test_a_document_has_a_section_for_each_model(entry):
    text = report.document({"a": entry, "b": entry})
    assert text.startswith("# ") and [line for line in text.splitlines() if line.startswith("## ")] == [
        "## a on Abacus",
        "## b on Abacus",
    ]


def test_errors_are_in_units_of_the_rms_logit(entry):
    reference = np.array([[[3.0, -3.0, 3.0], [-3.0, 3.0, -3.0]]], np.float32)
    logits = reference + np.array([[[0.0, 0.0, 0.3], [6.3, 0.0, 0.0]]], np.float32)
    found = report.compare(reference, logits)
    assert found["positions"] == 2 and found["top1_agreement"] == 0.0
    assert found["max_error"] == pytest.approx(2.1)
    assert found["rms_error"] == pytest.approx(np.sqrt((0.1**2 + 2.1**2) / 6))
    entry["accuracy"] = {"ours int8": found}
    assert "| ours int8 | 0.858 | 2.10 | 0.0% | 2 |" in report.section("small", entry)
