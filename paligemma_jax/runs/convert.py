"""Convert PaliGemma checkpoints between formats and dtypes, or say what is in one."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from paligemma_jax import files, ops
from paligemma_jax.checkpoints import (
    Contents,
    Source,
    abstract,
    big_vision,
    companions,
    config_json,
    huggingface,
    load,
    locate,
    parameter_count,
    scan,
)
from paligemma_jax.config import PaliGemmaConfig, variant_name
from paligemma_jax.errors import MOST_CHARACTERS, CheckpointError, ConfigError, UserError, error_line, shortened
from paligemma_jax.processing.tokenizer import TOKENIZER_FILES, Tokenizer
from paligemma_jax.runs.answers_check import compare_answers
from paligemma_jax.runs.verify import describe, verification

_EXAMPLES = """examples:
  paligemma-jax-convert paligemma2-3b-mix-224.npz paligemma2-3b-mix-224 --dtype bfloat16
  paligemma-jax-convert google/paligemma-3b-pt-224 pt_224.npz --rows 257152
  paligemma-jax-convert google/paligemma2-3b-mix-224 paligemma2-int8 --quantize int8
  paligemma-jax-convert google/paligemma2-3b-pt-224 merged --adapter my-lora
  paligemma-jax-convert --verify paligemma2-3b-mix-224
"""


_VERIFY = (
    "say what SRC holds, and all that loading it would refuse; with DST: compare answers of what was written with "
    "those that transformers gives"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 for what a user can mend."""
    options = _parse(arguments)
    try:
        if options.verify and options.destination is None:
            return verify(locate(options.source, options.adapter), options.config)
        convert(options)
        if options.verify:
            _compare(options)
    except (UserError, OSError) as error:
        if options.debug:
            raise
        print(error_line(error), file=sys.stderr)
        return 1
    return 0


class _Parser(argparse.ArgumentParser):
    """Exits with 1, as for any other error of the user."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(1, f"{error_line(message)}\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser("paligemma-jax-convert", description=__doc__, epilog=_EXAMPLES, formatter_class=raw)
    add = parser.add_argument
    add("source", metavar="SRC", help="a Hugging Face directory or hub id, a big_vision .npz, or a PEFT adapter")
    add("destination", metavar="DST", nargs="?", help="the directory or .npz to write")
    add("--verify", action="store_true", help=_VERIFY)
    add("--format", choices=("huggingface", "big_vision"), help="of DST; default: by its name, .npz or a directory")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="cast to this; default: keep")
    add(
        "--quantize",
        choices=ops.FORMATS,
        help="round weights to 8 bits, or the decoder's to 4, for a smaller and faster model",
    )
    add("--rows", type=int, help="embedding rows to keep: 257152 for big_vision (the hub's files have 257216)")
    add("--config", type=Path, metavar="FILE", help="config.json of an .npz that is no released model's")
    add("--adapter", metavar="DIR", help="a PEFT adapter (LoRA) to merge into SRC; one given as SRC names its base")
    add("--processor", type=Path, metavar="DIR", help="copy tokenizer and processor from here; default: from SRC")
    add("--overwrite", action="store_true", help="write DST even if it exists")
    add("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    if options.destination is None and not options.verify:
        parser.error("give DST, --verify, or both")
    return options


def convert(options: argparse.Namespace) -> None:
    """Read SRC whole, then write DST."""
    destination = Path(options.destination)
    to_npz = (options.format or ("big_vision" if destination.suffix == ".npz" else "huggingface")) == "big_vision"
    _check_destination(destination, to_npz, options.overwrite)
    source = locate(options.source, options.adapter)
    directories = (options.processor, *source.directories) if options.processor else source.directories
    contents = scan(source, _read_config(source.base, options.config))
    if to_npz and (options.quantize or contents.quantization):
        raise ConfigError("an .npz holds no quantized weights: give a directory as DST")
    if to_npz and not contents.config.text.tied:
        raise ConfigError("an .npz has no place for an output head of its own: give a directory as DST")
    if options.rows is not None and options.quantize:
        raise ConfigError("--rows is for tables that are not quantized: convert with it first, then with --quantize")
    if options.rows is not None:  # before the long part
        _check_rows(contents, directories, options.rows)
    # To narrow while reading takes less memory; weights that are merged or quantized are better rounded once.
    narrow = "float32" in contents.dtypes or source.adapter is not None
    dtype = options.dtype if narrow and not options.quantize else None
    place = _place(contents, options.quantize) if options.quantize else _on_host
    config, params = load(contents, dtype, quantization=options.quantize, place=place)
    if options.rows is not None:
        config, params = _keep_rows(config, params, options.rows)
    if to_npz:
        big_vision.save(destination, config, params, options.dtype)
        companions.copy(directories, destination.parent, replace=False)
        companions.write_eos(destination.parent, config)
    else:
        huggingface.save(destination, config, params, options.dtype, processor_from=directories)
    print(f"wrote {destination}: {variant_name(config) or 'custom geometry'}, {parameter_count(config):,} parameters")
    beside = destination.parent if to_npz else destination
    if not any((beside / name).is_file() for name in TOKENIZER_FILES):
        print("note: no tokenizer was copied; --processor DIR names a directory that has one", file=sys.stderr)


def _compare(options: argparse.Namespace) -> None:
    destination = Path(options.destination)
    is_model = destination.is_dir()
    said = compare_answers(destination) if is_model else "note: answers were not compared, transformers reads no .npz"
    print(said, file=sys.stderr if said.startswith("note: ") else sys.stdout)


def _on_host(path: str, leaf: Any) -> Any:
    return jax.tree.map(np.asarray, leaf)


def _place(contents: Contents, quantization: str) -> Callable[[str, Any], Any]:
    """Weights as this machine multiplies them, so that it will map the files that are written and copy nothing."""
    target = ops.Target.detect()
    table = ops.tune(abstract(contents, "bfloat16", quantization), target)

    def place(path: str, leaf: Any) -> Any:
        return _on_host(path, ops.prepare_leaf(path, leaf, target, table) if ops.is_weight(leaf) else leaf)

    return place


def _check_destination(destination: Path, to_npz: bool, overwrite: bool) -> None:
    if destination.exists() and destination.is_dir() == to_npz:
        kind = "a directory" if to_npz else "a file"
        raise CheckpointError(f"{destination} is {kind}: give another DST or another --format")
    if not to_npz:
        huggingface.require_no_adapter(destination)
    occupied = destination.is_file() or (destination.is_dir() and any(destination.iterdir()))
    if occupied and not overwrite:
        raise CheckpointError(f"{destination} exists already: pass --overwrite to replace it")


def _read_config(source: Path, path: Path | None) -> PaliGemmaConfig | None:
    if path is None:
        return None
    if source.is_dir():
        raise ConfigError(f"--config is for an .npz: {source} has a config.json of its own")
    return config_json.from_json(files.read_json(path), str(path))


def _check_rows(contents: Contents, directories: Sequence[Path], rows: int) -> None:
    """ConfigError unless a table of so many rows has all tokens that are read or said, added ones too."""
    config, beside = contents.config, companions.tokenizer_dir(directories)
    is_there = any((beside / name).is_file() for name in TOKENIZER_FILES)
    added = Tokenizer.from_dir(beside).added_ids(config) if is_there else ()
    needed = max(config.image_token_id, 1 + max(config.eos_token_ids), *(end for _, end in added))
    if not needed <= rows <= config.text.vocab_size:
        raise ConfigError(
            f"--rows {rows} is impossible: the tokenizer has {needed} ids, and the table {config.text.vocab_size} rows"
        )
    if contents.quantization is not None:
        raise ConfigError("--rows is for tables that are not quantized: give it with the original")


def _keep_rows(config: PaliGemmaConfig, params: dict, rows: int) -> tuple[PaliGemmaConfig, dict]:
    """Drop the rows of the embedding table and of the head from `rows` on, which no text needs."""
    decoder = dict(params["language_model"])
    for name in ("embed_tokens", "lm_head"):
        if name in decoder:
            decoder[name] = {"weight": decoder[name]["weight"][:rows]}
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=rows))
    return config, params | {"language_model": decoder}


def verify(source: Source, config_path: Path | None = None) -> int:
    """Print what a checkpoint holds, and on stderr whatever loading it would refuse; returns the exit status."""
    report = verification(source, _read_config(source.base, config_path))
    if report.contents is not None and not report.problems:
        for label, value in (describe(report.contents) | {"problems": "none"}).items():
            print(f"{label:<11} {value}")
    for kind, lines in (("note", report.notes), ("error", report.problems)):
        for line in lines:
            for part in line.split("; ") if kind == "error" and len(line) > MOST_CHARACTERS - 10 else [line]:
                print(shortened(f"{kind}: {part}"), file=sys.stderr)
    return 1 if report.problems else 0
