"""What a run is asked about: pictures, and the frames of videos."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image

from paligemma_jax.errors import ImageError
from paligemma_jax.processing import fetch, video
from paligemma_jax.processing.image import load_image

_Item = TypeVar("_Item")


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One picture, or one frame of a video.

    name: what the user calls it.
    video: the file that a frame is from, None for a picture.
    time: seconds from the video's first frame to this one.
    """

    name: str
    image: Image.Image = dataclasses.field(repr=False)
    video: str | None = None
    time: float = 0.0

    @property
    def stem(self) -> str:
        """The name without folder and suffix, as files that belong to the picture are called."""
        if self.video is not None:
            return f"{Path(self.video).stem}_{self.time:07.2f}s"
        if fetch.is_url(self.name):
            return plain(fetch.stem(self.name))
        return Path(self.name).stem


def plain(stem: str) -> str:
    """A stem with nothing in it but letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^\w.-]+", "_", stem) or "picture"


def read(names: Iterable[str], video_fps: float) -> Iterator[Source | ImageError]:
    """Pictures and frames as they are needed, with the error in place of what cannot be read.

    Args:
      names: paths or URLs of pictures, paths of videos.
      video_fps: frames of each second of a video.

    Raises:
      ConfigError: there is a video, and PyAV is not installed.
    """
    for name in names:
        try:
            if video.is_video(name):
                if fetch.is_url(name):
                    raise ImageError(f"{name} is a video: download it and give its path")
                for time, image in video.frames(name, video_fps):
                    yield Source(f"{name} @ {time:.2f} s", image, name, time)
            else:
                yield Source(fetch.label(name), load_image(name))
        except ImageError as error:
            yield error


def numbered(names: Sequence[str], video_fps: float, start: int) -> Iterator[tuple[int, Source | ImageError]]:
    """What `read` gives for the names from number `start` on, each with the number of its name."""
    for i in range(start, len(names)):
        yield from ((i, item) for item in read(names[i : i + 1], video_fps))


def in_groups(items: Iterator[_Item], size: int) -> Iterator[list[_Item]]:
    """Lists of `size` items, the last one of what is left."""
    while group := list(itertools.islice(items, size)):
        yield group
