"""The frames of videos with what was found in them, as videos again."""

from pathlib import Path

from PIL import Image

from paligemma_jax.files import Stems
from paligemma_jax.processing import video
from paligemma_jax.runs.notes import note
from paligemma_jax.runs.sources import Source, plain


class Films:
    """Drawn videos, `{stem}_drawn.mp4`: one for each video and prompt.

    Args:
      directory: where they go.
      stems: names that other files of the run have.
      per_second: frames per second.
    """

    def __init__(self, directory: Path, stems: Stems, per_second: float):
        self._directory = directory
        self._stems = stems
        self._per_second = per_second
        self._video: str | None = None
        self._open: dict[str, tuple[Path, video.Writer]] = {}  # by prompt, of the video whose frames come

    def add(self, source: Source, prompt: str, drawn: Image.Image) -> Path:
        """The next frame of a video; the films of another one are finished. Returns the file that it will be in."""
        if source.video != self._video:
            self.close()
            self._video = source.video
        if prompt not in self._open:
            path = self._directory / f"{self._stems.new(plain(Path(source.video or '').stem))}_drawn.mp4"
            self._open[prompt] = path, video.Writer(path, self._per_second)
        path, writer = self._open[prompt]
        writer.add(source.time, drawn)
        return path

    def close(self) -> None:
        """Finish what is open."""
        while self._open:
            path, writer = self._open.pop(next(iter(self._open)))
            writer.close()
            note(f"wrote {path}")
