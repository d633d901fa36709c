"""Frames out of a video file and drawn frames back into one, by PyAV (`pip install -e ".[video]"`).

One frame is in memory at a time, however long the video.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from paligemma_jax.errors import ConfigError, ImageError, one_line
from paligemma_jax.files import replacing
from paligemma_jax.processing.decode import MAX_PIXELS

VIDEO_SUFFIXES = (
    ".3gp",
    ".avi",
    ".flv",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".ogv",
    ".ts",
    ".webm",
    ".wmv",
)

_UPRIGHT = {  # degrees that a frame is to be turned by, against the clock
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
    -90: Image.Transpose.ROTATE_270,
}
_FAST = {"preset": "veryfast", "crf": "20"}  # of x264: few frames are held back, small letters can be read


def is_video(name: str) -> bool:
    """Whether a file is a video by its name."""
    return Path(name).suffix.lower() in VIDEO_SUFFIXES


def require() -> ModuleType:
    """PyAV; ConfigError when it is not installed."""
    try:
        import av
    except ImportError:
        raise ConfigError('videos need PyAV: pip install -e ".[video]"') from None
    return av


def frames(path: str | os.PathLike[str], per_second: float) -> Iterator[tuple[float, Image.Image]]:
    """Frames of a video's first stream of pictures, decoded as they are asked for.

    Args:
      path: a video file of any kind that FFmpeg reads.
      per_second: the most frames of each second of the video; the first frame of each such interval is taken.

    Yields:
      The time of a frame in seconds after the first one, and the frame as an upright RGB picture.

    Raises:
      ConfigError: PyAV is not installed.
      ImageError: the file is no video, has no pictures, or is damaged, which may be found after some frames.
    """
    av = require()
    try:
        with Path(path).open("rb") as file, av.open(file) as container:  # a name may be no protocol of FFmpeg's
            if not container.streams.video:
                raise ImageError(f"{path} holds no pictures, only sound or text: give another video")
            stream = container.streams.video[0]
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MAX_PIXELS:
                limit = f"at most {MAX_PIXELS // 10**6} million pixels can be read, make it smaller"
                raise ImageError(f"{path} is {width} x {height}: {limit}")
            stream.thread_type = "AUTO"
            due = -1
            for time, frame in _timed(container.decode(stream), stream):
                interval = math.floor(time * per_second + 1e-6)
                if interval > due:
                    due = interval
                    yield time, _upright(frame)
            if due < 0:
                raise ImageError(f"{path} is damaged: it has no frame that can be read, save or download it again")
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist: give the path of a video") from None
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{path} is no video, or damaged ({one_line(reason)}): save or download it again") from None


def _timed(decoded: Iterator[Any], stream: Any) -> Iterator[tuple[float, Any]]:
    """Frames with their seconds after the first one; a file that tells no times has its frame rate."""
    start = None
    for i, frame in enumerate(decoded):
        time = i / float(stream.average_rate or 25) if frame.time is None else frame.time
        start = time if start is None else start
        yield max(0.0, time - start), frame


def _upright(frame: Any) -> Image.Image:
    picture = frame.to_image()
    turn = _UPRIGHT.get(round(frame.rotation))
    return picture if turn is None else picture.transpose(turn)


class Writer:
    """A video that is written frame by frame, and is there, whole, after `close`.

    Args:
      path: an .mp4 file, replaced when it exists.
      per_second: frames per second; times are rounded to it.
    """

    def __init__(self, path: Path, per_second: float):
        self._av = require()
        self._path = path
        self._rate = max(Fraction(per_second).limit_denominator(1000), Fraction(1, 1000))
        self._files = contextlib.ExitStack()
        self._stream: Any = None
        self._container: Any = None
        self._last = -1

    def add(self, time: float, picture: Image.Image) -> None:
        """Show a picture from `time`, in seconds, on; every one has the size of the first, and later times."""
        if self._stream is None:
            self._open(picture.size)
        frame = self._av.VideoFrame.from_image(_cut(picture.convert("RGB"), (self._stream.width, self._stream.height)))
        self._last = max(self._last + 1, round(time * self._rate))
        frame.pts, frame.time_base = self._last, 1 / self._rate
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finish the file; a video without frames is not written."""
        with self._files:  # renames it, or removes what there is when the end cannot be written
            if self._stream is not None:
                stream, self._stream = self._stream, None
                self._container.mux(stream.encode())
                self._container.close()

    def _open(self, size: tuple[int, int]) -> None:
        temporary = self._files.enter_context(replacing(self._path))
        has_x264 = "libx264" in self._av.codecs_available
        self._container = self._av.open(os.fspath(temporary), "w", format="mp4")
        self._stream = self._container.add_stream("libx264" if has_x264 else "mpeg4", rate=self._rate)
        if has_x264:
            self._stream.options = _FAST
        else:
            self._stream.bit_rate = 8_000_000
        self._stream.width, self._stream.height = (side + side % 2 for side in size)  # the format has even sides only
        self._stream.pix_fmt = "yuv420p"


def _cut(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at the top left of one of `size`: its edge repeated where it is too small, cut where too large."""
    if picture.size == size:
        return picture
    width, height = (min(a, b) for a, b in zip(picture.size, size, strict=True))
    canvas = picture.crop((0, 0, width, height)).resize(size, Image.Resampling.NEAREST)
    canvas.paste(picture, (0, 0))
    return canvas
