"""What a run tells the user beside its results."""

import sys


def note(text: str) -> None:
    """Tell the user something that is not a result."""
    print(text, file=sys.stderr, flush=True)
