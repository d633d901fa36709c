"""config.run=generate about a video that is made here."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.processing import video

BOX = "<loc0000><loc0000><loc1023><loc0512>"


@pytest.fixture
def clip(tmp_path):
    """Four seconds, ten frames each."""
    path = tmp_path / "my clip.mp4"
    writer = video.Writer(path, 10.0)
    rng = np.random.default_rng(0)
    for i in range(40):
        writer.add(i / 10, Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)))
    writer.close()
    return path


def test_one_result_per_frame(generate, clip, answer_with, tmp_path):
    answer_with(f"{BOX} circle")
    out_dir = tmp_path / "out"
    keys = {"image": clip, "prompt": "detect circle", "video_fps": 2.0, "batch_size": 3, "output_dir": out_dir}
    status, out, err = generate(**keys, format="json", export="yolo,coco")
    assert status == 0
    names = [f"{clip} @ {i / 2:.2f} s" for i in range(8)]
    assert [json.loads(line)["image"] for line in out.splitlines()] == names
    frames = [f"my clip_{i / 2:07.2f}s" for i in range(8)]
    assert sorted(path.stem for path in (out_dir / "labels").iterdir()) == frames
    drawn = [f"{name.replace(' ', '_')}_drawn.png" for name in frames]
    assert sorted(path.name for path in out_dir.glob("*.png")) == drawn
    assert f"wrote {out_dir / 'my_clip_drawn.mp4'}" in err
    film = list(video.frames(out_dir / "my_clip_drawn.mp4", 100.0))
    assert [time for time, _ in film] == [i / 2 for i in range(8)]
    for (_, frame), name in zip(film, drawn, strict=True):
        assert np.abs(np.asarray(frame, float) - np.asarray(Image.open(out_dir / name), float)).mean() < 30


def test_frames_without_objects_are_in_the_film_too(generate, clip, answer_with, tmp_path):
    answer_with("")
    status, out, _ = generate(image=clip, prompt="detect star", output_dir=tmp_path / "out")
    assert status == 0 and out.count("==> ") == 4 and f"==> {clip} @ 3.00 s: detect star <==" in out
    assert [path.name for path in (tmp_path / "out").glob("*drawn*")] == ["my_clip_drawn.mp4"]
    assert len(list(video.frames(tmp_path / "out" / "my_clip_drawn.mp4", 100.0))) == 4


def test_a_film_for_each_video_and_prompt(generate, clip, answer_with, tmp_path):
    answer_with(f"{BOX} circle")
    (tmp_path / "other.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "prompts.txt").write_text("detect circle\ndetect star\n")
    keys = {"prompts_file": tmp_path / "prompts.txt", "output_dir": tmp_path / "out"}
    status, out, _ = generate(image=tmp_path / "*.mp4", **keys)
    assert status == 0 and out.count("==> ") == 16
    films = sorted(path.name for path in (tmp_path / "out").glob("*.mp4"))
    assert films == ["my_clip_2_drawn.mp4", "my_clip_drawn.mp4", "other_2_drawn.mp4", "other_drawn.mp4"]


def test_answers_can_be_streamed(generate, clip):
    assert generate(image=clip, video_fps=0.5, stream=True)[:2] == generate(image=clip, video_fps=0.5)[:2]


def test_no_more_frames_than_a_batch_are_held(generate, clip, answer_with, monkeypatch):
    answer_with("a circle")
    read, answered = [], []
    frames = video.frames
    monkeypatch.setattr(video, "frames", lambda *args: (read.append(1) or pair for pair in frames(*args)))
    monkeypatch.setattr(
        "paligemma_jax.runs.generate._answer", lambda model, rows, *args: answered.append((len(read), len(rows)))
    )
    assert generate(image=clip, video_fps=10.0, batch_size=8)[0] == 0
    assert answered == [(8 * i, 8) for i in range(1, 6)]


def test_a_folder_gives_its_pictures_only(generate, clip, pictures, answer_with):
    answer_with("a circle")
    Image.open(pictures / "a.png").save(clip.parent / "a.png")
    assert generate(image=clip.parent)[:2] == (0, "a circle\n")


def test_bad_videos_are_one_line(refused, clip, monkeypatch, tmp_path):
    monkeypatch.setattr("paligemma_jax.load", lambda *args, **kw: pytest.fail("the model was loaded"))
    (tmp_path / "broken.mp4").write_bytes(clip.read_bytes()[:1000])
    assert "broken.mp4 is no video, or damaged" in refused(image=tmp_path / "broken.mp4")
    assert "none.mp4' does not exist" in refused(image=tmp_path / "none.mp4")
    assert "is a video: download it" in refused(image="https://example.invalid/clip.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    assert 'videos need PyAV: pip install -e ".[video]"' in refused(image=clip)


def test_a_corrupt_video_does_not_stop_the_others(generate, clip, answer_with, tmp_path):
    answer_with("a circle")
    (tmp_path / "broken.mp4").write_bytes(clip.read_bytes()[:1000])
    status, out, err = generate(image=tmp_path / "*.mp4")
    assert status == 1 and out.count("a circle\n") == 4
    assert err.startswith("error: ") and "broken.mp4 is no video" in err and err.count("\n") == 2


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_video_that_was_interrupted_is_begun_anew(generate, clip, answer_with, tmp_path, monkeypatch, batch_size):
    answer_with(f"{BOX} circle")
    (tmp_path / "other.mp4").write_bytes(clip.read_bytes())
    keys = {"image": tmp_path / "*.mp4", "prompt": "detect circle", "batch_size": batch_size}
    assert generate(**keys, output_dir=tmp_path / "whole")[0] == 0
    frames = video.frames

    def interrupted(name, per_second):
        for i, frame in enumerate(frames(name, per_second)):
            if name.endswith("other.mp4") and i == 3:
                raise KeyboardInterrupt
            yield frame

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("paligemma_jax.runs.sources.video.frames", interrupted)
        generate(**keys, output_dir=tmp_path / "stopped")
    assert generate(**keys, output_dir=tmp_path / "stopped", resume=True)[0] == 0
    whole, stopped = (sorted(path.name for path in (tmp_path / name).glob("*drawn*")) for name in ("whole", "stopped"))
    assert whole == stopped and len(whole) == 2 * 4 + 2
    for name in (name for name in whole if name.endswith(".mp4")):
        assert len(list(frames(tmp_path / "stopped" / name, 100.0))) == 4
    texts = [(tmp_path / name / "records.jsonl").read_text() for name in ("whole", "stopped")]
    assert texts[0] == texts[1]
