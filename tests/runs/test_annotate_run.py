"""config.run=annotate: the keys, the exit status and what is said."""

import json
import sys
from pathlib import Path

import pytest

import paligemma_jax as pj
from paligemma_jax.annotate import rows
from tests.annotate.conftest import draw

BOX = "<loc0000><loc0000><loc1023><loc0512>"


@pytest.fixture
def folder(tmp_path) -> Path:
    return draw(tmp_path / "pictures", 5, broken=[3])


@pytest.fixture
def annotate(main, checkpoint, folder, tmp_path):
    """annotate(KEY=VALUE, ...): the run with the random checkpoint, about five pictures of which one is broken."""

    def start(**keys: object) -> tuple[int, str, str]:
        defaults = {"checkpoint": checkpoint, "compilation_cache": False, "image": folder, "max_new_tokens": 4}
        defaults |= {"prompt": "caption en", "output_dir": tmp_path / "out"}
        settings = (f"--config.{key}={value}" for key, value in (defaults | keys).items())
        return main("--config=configs/annotate.py", *settings)

    return start


def found(directory: Path) -> list[rows.Row]:
    return [row for path in sorted(directory.glob("rows-*")) for row in rows.read(path)]


@pytest.fixture
def embed_nothing(monkeypatch):
    """Pictures are embedded as zeros, and masks cannot be decoded: with `answer_with` no program is compiled."""
    monkeypatch.setattr(pj.PaliGemma, "embed_image", lambda self, images, projected=True: [0] * len(images))


@pytest.fixture
def said(embed_nothing, answer_with):
    """What models are asked; they say a box and a name."""
    return answer_with(lambda prompt: f"{BOX} star" if prompt.startswith("detect") else f"<{prompt}>")


def test_rows_of_a_real_model_and_the_exit_status(annotate, folder, tmp_path, generate):
    status, out, err = annotate(batch_size=4)
    assert status == 2 and out.startswith("4 of 5 pictures, 1 failed, ") and out.endswith("/s\n") and not err
    by_name = {Path(row["image"]).name: row for row in found(tmp_path / "out")}
    assert list(by_name) == [f"{i}.png" for i in range(5)]
    assert "is damaged or truncated" in by_name["3.png"]["error"] or "not a picture" in by_name["3.png"]["error"]
    assert generate(image=folder / "1.png")[1] == f"{by_name['1.png']['text']}\n"
    assert annotate() == (2, "4 of 5 pictures, 1 failed\n", "going on: 5 of 5 pictures are done\n")


def test_prompts_and_their_parts_have_rows_each(annotate, said, tmp_path):
    (tmp_path / "prompts.txt").write_text("caption en\ndetect circle ; star\n\ncaption en\n")
    assert annotate(prompts_file=tmp_path / "prompts.txt", split_classes=True, prompt_form="{task}: {classes}")[0] == 2
    texts = ["caption en", "detect: circle", "detect: star"]
    assert [row["prompt"] for row in found(tmp_path / "out")] == texts * 5
    assert [asked["prompts"][0].text for asked in said] == texts
    assert found(tmp_path / "out")[1]["boxes"][0]["label"] == "star"


def test_batch_size_is_how_many_pictures_are_asked_about_at_once(annotate, said, loaded_with):
    assert annotate(batch_size=2)[0] == 1
    assert (loaded_with[0]["batch_size"], len(loaded_with[0]["warm_up"])) == (2, 2)


def test_batches_threads_and_shards(annotate, said, tmp_path):
    assert annotate(batch_size=2, shard_size=3, threads=1, shard_format="parquet")[0] == 2
    assert [len(asked["prompts"]) for asked in said] == [2, 1, 1]  # of shards with 3 and 2, one being broken
    shards = sorted(path.name for path in (tmp_path / "out").glob("rows-*"))
    assert shards == ["rows-00000.parquet", "rows-00001.parquet"]
    assert [asked["batch_size"] for asked in said] == [2, 1, 1]


def test_how_an_answer_is_made_is_told_to_the_model(annotate, said):
    """temperature, top_k, top_p, min_p, num_beams, seed, max_new_tokens, speculate and constrain."""
    keys = {"temperature": 0.5, "top_k": 7, "top_p": 0.75, "min_p": 0.125, "seed": 3}
    assert annotate(**keys, max_new_tokens=9, speculate="off", constrain=True)[0] == 2
    assert annotate(num_beams=3, overwrite=True)[0] == 2
    first, second = said[0]["options"], said[-1]["options"]
    assert first == pj.GenerateOptions(9, pj.Sampling(**keys), constrain=True, speculate=False)
    assert second.sampling.num_beams == 3


def test_what_is_loaded_is_what_the_config_says(annotate, loaded_with, checkpoint, tmp_path):
    """checkpoint, dtype, quantization, adapter and mask_vae; resample is looked at before."""
    vae = checkpoint / "vae-oid.npz"
    assert annotate(dtype="bfloat16", quantization="int8", mask_vae=vae)[0] == 1
    asked = loaded_with[0]
    assert (asked["path"], asked["dtype"], asked["quantization"], asked["mask_vae"]) == (
        *(str(checkpoint), "bfloat16", "int8", str(vae)),
    )
    assert "resample='no'" in annotate(resample="no", output_dir=tmp_path / "b")[2]
    assert "adapter" in annotate(adapter=tmp_path, output_dir=tmp_path / "c")[2]
    assert "org/name" in annotate(checkpoint="checkpoints/name", hub_id="org/name")[2]


def test_objects_are_kept_as_the_config_says(annotate, said, score_with, tmp_path):
    for name, keys, kept in (("a", {"min_score": 0.5}, 0), ("b", {"nms": 0.5}, 1), ("c", {"loc_scale": 1024}, 1)):
        score_with(0.25)
        assert annotate(prompt="detect star", output_dir=tmp_path / name, **keys)[0] == 2
        row = found(tmp_path / name)[0]
        assert len(row["boxes"]) == kept
    assert row["boxes"][0]["x1"] == pytest.approx(row["width"] * 512 / 1024)


def test_inputs_of_a_table(annotate, said, folder, tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1.png,0.png\n")
    status, out, _ = annotate(image=tmp_path / "t.csv", image_column="b", image_root=folder)
    assert (status, out.split(",")[0]) == (0, "1 of 1 pictures")
    assert found(tmp_path / "out")[0]["image"] == "0.png"


def test_failed_pictures_are_asked_about_again_only_when_told(annotate, said, folder, tmp_path):
    assert annotate()[0] == 2
    draw(folder, 5)
    before = len(said)
    assert annotate()[0] == 2 and len(said) == before
    status, out, err = annotate(retry_failed=True)
    assert status == 0 and out.startswith("5 of 5 pictures, 0 failed") and len(said) == before + 1
    assert "1 picture that failed before is tried again" in err
    assert [row["status"] for row in found(tmp_path / "out")] == ["ok"] * 5


@pytest.mark.parametrize(
    "keys, names",
    [
        ({"prompt": "caption de"}, "prompts"),
        ({"temperature": 0.5}, "temperature"),
        ({"shard_size": 2}, "shard_size"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"shard_format": "parquet"}, "shard_format"),
    ],
)
def test_another_run_in_the_folder_is_refused_before_the_model_is_loaded(annotate, said, tmp_path, keys, names):
    assert annotate()[0] == 2
    status, out, err = annotate(**keys)
    assert (status, out, err.count("\n")) == (1, "", 1) and f"which differs in {names}: " in err
    assert annotate(**keys, overwrite=True)[0] == 2


def test_new_weights_are_another_run(annotate, said, checkpoint, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert annotate(checkpoint=copy)[0] == 2
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert "which differs in weights: " in annotate(checkpoint=copy)[2]


def test_exports_are_made_at_the_end(annotate, said, tmp_path):
    status, _, err = annotate(prompt="detect star ; circle", export="coco,yolo,fiftyone,labelstudio")
    assert status == 2 and "coco_results.json" in err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"coco_dataset.json", "classes.txt", "fiftyone", "labelstudio_tasks.json"}
    (tmp_path / "out" / "coco_dataset.json").unlink()
    assert annotate(prompt="detect star ; circle", export="coco")[0] == 2  # of rows that are there
    assert len(json.loads((tmp_path / "out" / "coco_dataset.json").read_text())["images"]) == 4


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"threads": 0}, "threads=0"),
        ({"workers": -1}, "workers=-1"),
        ({"workers": 2}, "it is for engine=ray"),
        ({"output_dir": ""}, "output_dir is empty"),
        ({"shard_format": "json"}, "shard_format='json' is not possible: give jsonl, parquet"),
        ({"engine": "spark"}, "engine='spark' is not possible: give local, ray"),
        ({"engine": "ray", "profile": "p"}, "profile='p' is not possible, engine=ray"),
        ({"export": "voc"}, "'voc' is not one of coco, yolo, fiftyone, labelstudio"),
        ({"image": "nowhere"}, "does not exist"),
        ({"prompts_file": "nowhere"}, "does not exist"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"platform": "cuda"}, "platform='cuda'"),
    ],
)
def test_bad_settings_are_one_line_before_the_model_is_loaded(annotate, monkeypatch, keys, message):
    monkeypatch.setattr("paligemma_jax.load", lambda *args, **kw: pytest.fail("the model was loaded"))
    status, out, err = annotate(**keys)
    assert (status, out, err.count("\n")) == (1, "", 1) and message in err


@pytest.mark.parametrize(
    "module, keys, extra",
    [
        ("pyarrow", {"shard_format": "parquet"}, "annotate"),
        ("pycocotools", {"prompt": "segment star"}, "export"),
        ("ray", {"engine": "ray"}, "ray"),
    ],
)
def test_what_is_not_installed_is_named(annotate, monkeypatch, module, keys, extra):
    for name in (module, f"{module}.parquet", f"{module}.data"):
        monkeypatch.setitem(sys.modules, name, None)
    status, _, err = annotate(**keys)
    assert status == 1 and f'pip install -e ".[{extra}]"' in err and err.count("\n") == 1


def test_a_run_that_is_stopped_says_how_far_it_is(annotate, said, monkeypatch, tmp_path):
    def generate(self, images, prompts, **options):
        if said:
            raise KeyboardInterrupt
        return real(self, images, prompts, **options)

    real = pj.PaliGemma.generate
    monkeypatch.setattr(pj.PaliGemma, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        annotate(batch_size=2)
    monkeypatch.setattr(pj.PaliGemma, "generate", real)
    status, out, err = annotate(batch_size=2)
    assert (status, out.split(",")[0]) == (2, "4 of 5 pictures") and "going on: 2 of 5 pictures are done" in err


def test_a_long_run_tells_time_left_in_a_log(annotate, said, monkeypatch):
    monkeypatch.setattr("paligemma_jax.runs.annotate._LOG_EVERY_S", 0.0)
    _, _, err = annotate(batch_size=2)
    lines = err.splitlines()
    assert len(lines) == 3 and lines[0].startswith("2 of 5 pictures, 0 failed, ") and lines[0].endswith(" left")


def test_a_profile_is_written(annotate, said, tmp_path):
    assert annotate(profile=tmp_path / "profile")[0] == 2
    assert list((tmp_path / "profile").rglob("*.trace.json.gz"))


def test_a_list_of_nothing_readable_ends_with_failed_rows(annotate, said, tmp_path):
    (tmp_path / "list.txt").write_text("no.png\nnot.png\n")
    status, out, _ = annotate(image=tmp_path / "list.txt")
    assert status == 2 and out.startswith("0 of 2 pictures, 2 failed") and not said
    assert {row["status"] for row in found(tmp_path / "out")} == {"failed"}
