"""The text of an answer as it grows, up to the first of its stop strings."""

from collections.abc import Sequence


class StoppingText:
    """Passes text on, except for stop strings and what follows them.

    What could be the beginning of a stop string is held back until it is known not to be one. Of several the one that
    is complete first counts, and the longest of those, however the text is cut into pieces.
    """

    def __init__(self, stop: Sequence[str] = ()):
        """`stop`: strings that are not empty."""
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """What may be said once `text` has come; nothing after a stop string."""
        if self.stopped or not text:
            return ""
        if not self._stop:
            return text
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max(_overlap(text, stop) for stop in self._stop)
        said, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return said

    def finish(self) -> str:
        """What was held back, when nothing more comes."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string that is not complete."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
