"""Tables that say which test knows an option, and that the test is there."""

import ast
import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def source(test: str) -> str:
    """The text of a test, its decorators too: "runs/test_chat.py::test_help" is in tests/."""
    file, _, function = test.partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    [node] = [item for item in ast.parse(text).body if getattr(item, "name", "") == function]
    first = min(item.lineno for item in (node, *node.decorator_list))
    return "\n".join(text.splitlines()[first - 1 : node.end_lineno])


def unknown(table: Mapping[str, str]) -> list[tuple[str, str]]:
    """The options whose test does not name them."""
    return [(option, test) for option, test in table.items() if not re.search(rf"\b{option}\b", source(test))]
