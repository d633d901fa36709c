"""benchmarks/scenes_as_coco.py: what it writes is what the readers of the evaluation take."""

from benchmarks.scenes_as_coco import write
from paligemma_jax.evaluation.evaluate import check
from paligemma_jax.evaluation.tasks import TASKS


def test_scenes_are_read_as_data_sets(tmp_path):
    write(tmp_path, 2)
    for name, split in (("coco_captions", "val"), ("coco_detection", "val"), ("jsonl", "answer"), ("jsonl", "detect")):
        examples = TASKS[name].read(tmp_path, split)
        check(TASKS[name], examples)
        assert len(examples) == 2 and all(len(example.images) == 1 for example in examples)
    write(tmp_path / "again", 2)
    for name in ("annotations/captions_val.json", "annotations/instances_val.json", "answer.jsonl", "detect.jsonl"):
        assert (tmp_path / name).read_text() == (tmp_path / "again" / name).read_text()
