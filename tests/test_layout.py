"""The layout: imports go one way, files are short, and models know neither platforms nor weight types."""

import ast
import re
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "paligemma_jax"
MOST_LINES = 400

# What is in a row may import what is in the rows above it, and within itself what is named in SIDEWAYS.
ORDER = [
    ("errors",),
    ("files", "buckets"),
    ("config",),
    ("processing", "tasks", "ops"),
    ("models", "sharding"),
    ("checkpoints", "engine"),
    ("numerics",),
    ("api", "loading", "paligemma_jax"),
    ("training", "evaluation", "inspection", "patch_vit", "annotate", "serving", "shapes_world"),
    ("runs",),
    ("__main__",),
]
SIDEWAYS = {
    "tasks": {"processing"},
    "processing": {"tasks"},
    "loading": {"api"},
    "paligemma_jax": {"api", "loading"},
    "serving": {"inspection", "patch_vit"},
    "training": {"evaluation"},
    "patch_vit": {"training"},
    "shapes_world": {"training", "evaluation", "inspection", "patch_vit"},
}
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
WITHOUT_JAX = ("errors", "files", "buckets", "config", "processing", "tasks")
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The full names of what a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(name: str) -> str | None:
    """The part of the package that an imported name belongs to, None outside."""
    first, *rest = name.split(".")
    if first != "paligemma_jax":
        return None
    return rest[0] if rest and rest[0] in RANK else first


def owner(path: Path) -> str:
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "paligemma_jax" if name == "__init__" else name


def code_lines(path: Path) -> int:
    """Lines that hold code: neither blank, nor comments, nor docstrings."""
    with tokenize.open(path) as file:
        source = file.read()
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__):
        if token.type not in (*silent, tokenize.ENDMARKER):
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_every_part_has_its_place():
    assert {owner(path) for path in FILES} <= set(RANK)


@pytest.mark.parametrize("part", sorted({owner(path) for path in FILES}))
def test_imports_go_one_way(part):
    for path in (path for path in FILES if owner(path) == part):
        for name in imported(path):
            other = part_of(name)
            if other is None or other == part:
                continue
            allowed = RANK[other] < RANK[part] or other in SIDEWAYS.get(part, ())
            assert allowed, f"{path.relative_to(ROOT)} imports {name}"
            assert part not in WITHOUT_JAX or other in WITHOUT_JAX, f"{path.relative_to(ROOT)} imports {name}"


def test_nothing_imports_runs_but_the_command_line():
    for path in FILES:
        if owner(path) in ("runs", "__main__"):
            continue
        assert not [name for name in imported(path) if name.startswith("paligemma_jax.runs")], path


def test_all_packages_are_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in PACKAGE.rglob("__init__.py")}
    assert set(settings["packages"]) == found | set(settings["package-dir"])
    for name, patterns in settings["package-data"].items():
        folder = ROOT / settings["package-dir"].get(name, name.replace(".", "/"))
        others = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
        assert others == {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}


def test_prompts_answers_and_pictures_need_no_jax():
    for path in (path for path in FILES if owner(path) in WITHOUT_JAX):
        for name in imported(path):
            assert name.split(".")[0] not in ("jax", "jaxlib", "flax"), f"{path.relative_to(ROOT)} imports {name}"


def test_models_know_neither_platforms_nor_weight_types():
    strange = re.compile(
        r"default_backend|isinstance\([^)]*(Quantized|Padded|Int8|Int4|CpuWeight|Lora)|optimization_barrier|XLA_FLAGS"
    )
    for path in (PACKAGE / "models").rglob("*.py"):
        found = strange.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(ROOT)} has {found[0]}"


@pytest.mark.parametrize("folder", ["paligemma_jax", "tests", "benchmarks", "convert", "configs"])
def test_no_file_is_long(folder):
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py")}
    long = {str(path.relative_to(ROOT)): count for path, count in lengths.items() if count > MOST_LINES}
    assert lengths and not long


@pytest.mark.parametrize(
    "folder, without, most",
    [
        ("models", ("models/mask_vae.py",), 700),
        ("engine", ("engine/strategies", "engine/constraints"), 600),
        ("ops", (), 960),
    ],
)
def test_the_heart_is_small(folder, without, most):
    skipped = [PACKAGE / name for name in without]
    assert all(path.exists() for path in skipped)
    files = [p for p in (PACKAGE / folder).rglob("*.py") if not any(p.is_relative_to(skip) for skip in skipped)]
    assert sum(map(code_lines, files)) < most


def test_lines_of_code_are_counted_without_words(tmp_path):
    (tmp_path / "x.py").write_text(
        '"""A\nmodule."""\n\nx = 1  # one\n# no\n\n\ndef f():\n    """Says."""\n    return """a\nb"""\n'
    )
    assert code_lines(tmp_path / "x.py") == 4
