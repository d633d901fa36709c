"""Values of a run config that come from files."""

import pytest
from ml_collections import ConfigDict

from paligemma_jax.errors import PromptError
from paligemma_jax.runs import chat, settings


def prompts(path) -> list[str]:
    return settings.prompts(ConfigDict({"prompts_file": str(path), "prompt": "unused"}))


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1c"])
def test_a_prompt_keeps_what_only_looks_like_the_end_of_a_line(tmp_path, type_lines, odd):
    (tmp_path / "x").write_bytes(f"\ufeff caption{odd}en{odd} \r\n\t\r\n\ndetect cat\n".encode())
    expected = [f"caption{odd}en{odd}", "detect cat"]
    assert prompts(tmp_path / "x") == expected
    type_lines(f"\ufeff{expected[0]} ", "detect cat")
    assert list(chat._piped()) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
        (lambda path: path.write_bytes(b"\xff"), "is not UTF-8 text"),
        (lambda path: path.write_bytes(b"\xef\xbb\xbf \n\r\n"), "is empty"),
    ],
)
def test_a_file_of_prompts_that_is_none_is_named(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(PromptError, match=f"prompts_file .*x {message}"):
        prompts(tmp_path / "x")
