"""Clips that are made here, read back; and files that are no clips."""

import contextlib
import sys

import av
import numpy as np
import pytest
from PIL import Image

from paligemma_jax.errors import ConfigError, ImageError
from paligemma_jax.processing import video


def write(path, count=50, size=(64, 48), rate=10, codec="mpeg4"):
    """A clip whose frame i is grey of brightness 4 i, its left upper quarter white."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(count):
            pixels = np.full((size[1], size[0], 3), 4 * i, np.uint8)
            pixels[: size[1] // 2, : size[0] // 2] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    return path


def brightness(image):
    return np.asarray(image)[-4:, -4:].mean()


@pytest.mark.parametrize("suffix, codec", [(".mp4", "mpeg4"), (".mkv", "mpeg4"), (".avi", "mpeg4"), (".MP4", "mpeg4")])
def test_frames_at_the_right_times(tmp_path, suffix, codec):
    path = write(tmp_path / f"clip{suffix}", codec=codec)
    assert video.is_video(str(path))
    found = list(video.frames(path, 2.0))
    np.testing.assert_allclose([time for time, _ in found], np.arange(10) / 2, atol=1e-3)
    np.testing.assert_allclose([brightness(image) for _, image in found], 4 * 5 * np.arange(10), atol=4)
    assert {(image.mode, image.size) for _, image in found} == {("RGB", (64, 48))}


@pytest.mark.parametrize("per_second, count", [(0.1, 1), (0.25, 2), (1.0, 5), (4.0, 20), (10.0, 50), (1000.0, 50)])
def test_never_more_frames_than_asked_for_or_there(tmp_path, per_second, count):
    path = write(tmp_path / "clip.mp4")
    times = [time for time, _ in video.frames(path, per_second)]
    assert len(times) == count and times[0] == 0 and times == sorted(set(times))


def test_frames_are_decoded_as_they_are_asked_for(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4")
    made = []
    monkeypatch.setattr(video, "_upright", lambda frame: made.append(1) or frame.to_image())
    reading = video.frames(path, 5.0)
    assert not made
    next(reading), next(reading)
    assert len(made) == 2
    reading.close()


@pytest.mark.parametrize(
    "matrix, corner", [((0, 1, -1, 0), (-1, 0)), ((-1, 0, 0, -1), (-1, -1)), ((0, -1, 1, 0), (0, -1))]
)
def test_turned_clips_are_upright(tmp_path, matrix, corner):
    """Phones store a turned picture with the matrix a, b, c, d of its display; `corner` is where the white one goes."""
    path = write(tmp_path / "clip.mp4", count=2)
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    for place, value in zip((0, 1, 3, 4), matrix, strict=True):
        data[start + 4 * place : start + 4 * place + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    _, image = next(video.frames(path, 1.0))
    assert image.size == ((48, 64) if matrix[0] == 0 else (64, 48))
    pixels = np.asarray(image).mean(-1)
    assert pixels[corner[1], corner[0]] > 200 and (pixels > 128).mean() == pytest.approx(0.25, abs=0.05)


def test_what_cannot_be_read_is_named(tmp_path):
    whole = write(tmp_path / "clip.mp4").read_bytes()
    for name, data in {"text.mp4": b"no video", "empty.mp4": b"", "half.mp4": whole[: len(whole) // 2]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=f"{name} is no video, or damaged .*: save or download it again"):
            list(video.frames(tmp_path / name, 1.0))
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    with pytest.raises(ImageError, match=r"sound\.mp4 holds no pictures"):
        list(video.frames(tmp_path / "sound.mp4", 1.0))
    with pytest.raises(ImageError, match="does not exist"):
        list(video.frames(tmp_path / "none.mp4", 1.0))


def test_frames_before_a_damaged_end_are_read(tmp_path):
    path = write(tmp_path / "clip.mkv", count=60)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    seen = []
    with contextlib.suppress(ImageError):  # a cut is an error in some formats, and the end in others
        for time, _ in video.frames(path, 10.0):
            seen.append(time)
    assert 10 < len(seen) < 60


def test_too_many_pixels_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(ImageError, match=r"clip\.mp4 is 64 x 48: at most 0 million pixels"):
        list(video.frames(write(tmp_path / "clip.mp4"), 1.0))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r'videos need PyAV: pip install -e "\.\[video\]"'):
        next(video.frames(tmp_path / "clip.mp4", 1.0))


@pytest.mark.parametrize("size", [(64, 48), (33, 17), (1, 1), (3, 200)])
@pytest.mark.parametrize("with_x264", [True, False])
@pytest.mark.parametrize("per_second", [0.3, 1.0, 29.97])
def test_written_frames_read_back(tmp_path, monkeypatch, size, with_x264, per_second):
    if not with_x264:
        monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    writer = video.Writer(tmp_path / "out.mp4", per_second)
    for i in range(6):
        writer.add(i / per_second, Image.new("RGB", size, (40 * i,) * 3))
    assert not (tmp_path / "out.mp4").exists()
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    found = list(video.frames(tmp_path / "out.mp4", 1000.0))
    np.testing.assert_allclose([time for time, _ in found], np.arange(6) / per_second, atol=2e-3)
    np.testing.assert_allclose([np.asarray(image).mean() for _, image in found], 40 * np.arange(6), atol=4)
    assert found[0][1].size == tuple(side + side % 2 for side in size)


def test_frames_keep_their_times_when_there_are_fewer_than_planned(tmp_path):
    writer = video.Writer(tmp_path / "out.mp4", 100.0)
    for i in range(4):
        writer.add(i / 5, Image.new("RGB", (32, 32 + 16 * (i % 2)), (60 * i,) * 3))  # sizes may vary
    writer.close()
    np.testing.assert_allclose([time for time, _ in video.frames(tmp_path / "out.mp4", 100.0)], np.arange(4) / 5)


def test_a_writer_without_frames_leaves_nothing(tmp_path):
    video.Writer(tmp_path / "out.mp4", 1.0).close()
    assert not list(tmp_path.iterdir())
