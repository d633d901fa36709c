"""Messages: one exception for each kind of thing, and no line too long to read."""

import pytest

from paligemma_jax.errors import UserError, error_line, shortened

LONG = "/data/" + "x" * 5000 + "/picture.png"


@pytest.mark.parametrize(
    "text, start, end",
    [
        (
            f"{LONG} does not exist: give a picture",
            "/data/xxx",
            "x/picture.png does not exist: give a picture",
        ),
        (f"data:image/png;base64,{'A' * 10**6}= is not a picture", "data:image/png;base64,AAA", "= is not a picture"),
        (f"{LONG} and {LONG}: give one", "/data/xxx", "x/picture.png: give one"),
        (f"too many: {'cat ; ' * 500}give fewer", "too many: cat ;", "cat ; give fewer"),
        ("x" * 301, "xxx", "xxx"),
    ],
)
def test_lines_of_messages_are_short(text, start, end):
    line = error_line(UserError(text))
    assert len(line) < 300 and "..." in line
    assert line.startswith(f"error: {start}") and line.endswith(end)
    assert len(shortened(text, 40)) <= 40


@pytest.mark.parametrize("text", ["", "a b", "x" * 290, f"{'x' * 145} {'y' * 144}", "first line\n" + "z" * 280])
def test_short_ones_are_as_they_were(text):
    assert error_line(UserError(text)) == f"error: {text}" and shortened(text) == text


def test_every_line_counts_for_itself():
    assert shortened(f"{'a ' * 100}\n{LONG}\n{'b ' * 100}").count("\n") == 2
    assert all(len(line) < 300 for line in shortened(f"{'a ' * 300}\n{LONG}").split("\n"))


def test_callers_get_the_whole_message():
    assert str(UserError(LONG)) == LONG
