"""The documentation: links lead somewhere, the README stays short, the walk of a request too."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"])
_FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_PARTS = "paligemma_jax|benchmarks|tests|configs|ops|engine|models|processing|tasks|runs|checkpoints|inspection"


def prose(page: Path) -> str:
    return _FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What a heading is called in an address, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert link.startswith("http") or target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for path in re.findall(rf"`((?:{_PARTS})/[\w/]+(?:\.\w+)?)`", prose(page)):
        assert page.name == "CHANGELOG.md" or any((base / path).exists() for base in (ROOT, ROOT / "paligemma_jax")), (
            path
        )


def test_the_readme_takes_five_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000


def test_the_walk_of_a_request_has_at_most_12_hops_which_are_there():
    hops = re.findall(
        r"^\| (\d+) \| `([\w/.]+)`: `(?:\w+\.)?(\w+)`", prose(ROOT / "docs" / "architecture.md"), re.MULTILINE
    )
    assert 1 < len(hops) <= 12
    for _, path, name in hops:
        assert re.search(
            rf"^\s*(def|class) {name}\b", (ROOT / "paligemma_jax" / path).read_text(encoding="utf-8"), re.MULTILINE
        ), name
