"""Evaluation with models that know everything, nothing, or one thing wrongly."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest

from paligemma_jax.shapes_world import evaluation
from paligemma_jax.shapes_world.evaluation import evaluate
from paligemma_jax.shapes_world.questions import caption, matches
from paligemma_jax.shapes_world.samples import Sample, scene_sample, wide_sample
from paligemma_jax.tasks.detection import Detection, format_objects, parse

NUM_SCENES, SEED = 40, 5


class Oracle:
    """Knows the scenes by their pictures, and the answers by the rules of the language; can be told to err."""

    def __init__(self, drawn=scene_sample):
        self.drawn, self.samples = drawn, {}

    def source(self, seed, index) -> Sample:
        sample = self.drawn(seed, index)
        self.samples[sample.image.tobytes()] = sample
        return sample

    def things(self, prefix, sample):
        """Objects of a `detect` or `segment`, in order."""
        task, _, names = prefix.partition(" ")
        return [
            Detection(name, box, mask=mask if task == "segment" else None)
            for name in names.split(" ; ")
            for kind, box, mask in zip(sample.kinds, sample.boxes, sample.masks, strict=True)
            if matches(kind, name)
        ]

    def answer(self, prefix, sample):
        words = prefix.rstrip("?").split()
        kinds = sample.kinds
        if words[0] == "caption":
            return caption(kinds, words[1])
        question = " ".join(words[2:4])
        if question == "how many":
            asked = {word.removesuffix("s") for word in words[4:-2]} - {"shape"}
            return str(sum(asked <= set(kind) for kind in kinds))
        if question == "is there":
            return "yes" if any(set(words[5:]) <= set(kind) for kind in kinds) else "no"
        known, place = (words[-1], 0) if question == "what color" else (words[-2], 1)
        return next((kind[place] for kind in kinds if known in kind), "")

    def generate(self, pictures, prompts, max_new_tokens, constrain):
        outputs = []
        for picture, prompt in zip(pictures, prompts, strict=True):
            sample = self.samples[picture.tobytes()]
            if prompt.startswith(("detect", "segment")):
                things = self.things(prompt, sample)
                outputs.append(SimpleNamespace(text=format_objects(things, picture.size), things=things))
            else:
                outputs.append(SimpleNamespace(text=self.answer(prompt, sample), things=[]))
        return outputs

    def objects(self, output, size):
        found, dropped = parse(output.text, size)
        assert not dropped
        pairs = zip(found, output.things, strict=True)
        return [dataclasses.replace(item, mask=thing.mask) for item, thing in pairs], dropped


def measure(model, num_scenes=NUM_SCENES):
    return evaluate(model, num_scenes, SEED, model.source)


@pytest.fixture(scope="module")
def perfect():
    return measure(Oracle())


def test_who_knows_everything_gets_full_marks(perfect):
    assert set(perfect["caption"].values()) == set(perfect["answer"].values()) == {1.0}
    for task in ("detect", "segment"):
        measured = perfect[task]
        assert measured["recall"] == measured["precision"] == measured["absent_empty"] == 1
        assert measured["mean_iou"] > 0.97  # locations are rounded
        assert measured["malformed"] == 0
    assert perfect["segment"]["mask_miou"] == 1


def test_scenes_without_a_thing_are_counted_by_themselves(perfect):
    class Inventive(Oracle):
        """Sees a red star wherever there is nothing, and masks but does not box it."""

        def answer(self, prefix, sample):
            return super().answer(prefix, sample).replace("nothing", "a red star")

        def things(self, prefix, sample):
            invent = not sample.kinds and prefix.startswith("segment")
            return [Detection("star", (0.0, 0.0, 9.0, 9.0))] if invent else super().things(prefix, sample)

    assert "empty" not in perfect
    drawn = functools.cache(wide_sample)
    measured = measure(Oracle(drawn), 24)
    count = sum(not drawn(SEED, index).kinds for index in range(24))
    rates = {"caption_en": 1.0, "caption_de": 1.0, "detect": 1.0, "segment": 1.0}
    assert count > 1 and measured["empty"] == {**rates, "scenes": count}
    assert measured["caption"] == {"exact_en": 1, "exact_de": 1} and measured["segment"]["mask_miou"] == 1
    found = measure(Inventive(drawn), 24)
    assert found["empty"] == {**rates, "caption_en": 0, "segment": 0, "scenes": count}
    assert found["detect"]["recall"] == 1 and found["segment"]["precision"] < 1


def test_scores_that_know_what_is_right():
    class Unsure(Oracle):
        """Adds a wrong thing to each answer, and knows that it may be."""

        def __init__(self, right, wrong):
            super().__init__()
            self.scores = right, wrong

        def things(self, prefix, sample):
            things = super().things(prefix, sample)
            invented = Detection(things[0].label, (0.0, 0.0, 1.0, 1.0), mask=sample.masks[0]) if things else None
            return [*things, invented] if invented else []

        def objects(self, output, size):
            found, dropped = super().objects(output, size)
            *things, last = found or [None]
            right, wrong = self.scores
            things = [dataclasses.replace(thing, score=right) for thing in things]
            return things + ([dataclasses.replace(last, score=wrong)] if last else []), dropped

    knows, errs = measure(Unsure(0.9, 0.2))["detect"], measure(Unsure(0.2, 0.9))["detect"]
    assert knows["score_auc"] == 1 and errs["score_auc"] == 0
    assert knows["map"] > 0.95 > 0.8 > errs["map"]
    assert knows["precision"] == errs["precision"] < 1


def test_counts(perfect):
    assert perfect["counts"]["scenes"] == NUM_SCENES and perfect["counts"]["answers"] == 3 * NUM_SCENES
    assert NUM_SCENES / 2 < perfect["counts"]["objects"] < 4 * NUM_SCENES


def test_who_says_nothing(perfect):
    class Silent(Oracle):
        def generate(self, pictures, prompts, max_new_tokens, constrain):
            return [SimpleNamespace(text="", things=[]) for _ in pictures]

    measured = measure(Silent())
    assert set(measured["caption"].values()) == {0}
    assert measured["answer"]["accuracy"] < 0.2  # "" is right when asked about what is not there
    for task in ("detect", "segment"):
        assert measured[task]["recall"] == measured[task]["precision"] == 0 and measured[task]["absent_empty"] == 1
        assert np.isnan(measured[task]["mean_iou"])
    assert measured["segment"]["mask_miou"] == 0
    assert measured["counts"] == perfect["counts"]


def test_who_says_everything_twice(perfect):
    class Stutterer(Oracle):
        def things(self, prefix, sample):
            return super().things(prefix, sample) * 2

    measured = measure(Stutterer())
    for task in ("detect", "segment"):
        assert measured[task]["recall"] == 1 and measured[task]["precision"] == 0.5
    assert measured["segment"]["mask_miou"] == 1 and measured["answer"] == perfect["answer"]


def test_who_misnames_or_invents_things():
    class Liar(Oracle):
        def things(self, prefix, sample):
            things = super().things(prefix, sample) or [Detection("cat", (0, 0, 9, 9), mask=np.zeros((9, 9), bool))]
            return [dataclasses.replace(thing, label=thing.label + "x") for thing in things]

    measured = measure(Liar())
    for task in ("detect", "segment"):
        assert measured[task]["recall"] == measured[task]["precision"] == measured[task]["absent_empty"] == 0


def test_half_a_mask_counts_half():
    class Half(Oracle):
        def things(self, prefix, sample):
            things = super().things(prefix, sample)
            if prefix.startswith("detect"):
                return things
            return [dataclasses.replace(thing, mask=half(thing.mask)) for thing in things]

    def half(mask):
        inside = np.flatnonzero(mask)
        cut = np.zeros(mask.size, bool)
        cut[inside[: len(inside) // 2]] = True
        return cut.reshape(mask.shape)

    measured = measure(Half())
    assert measured["segment"]["mask_miou"] == pytest.approx(0.5, abs=0.01) and measured["segment"]["recall"] == 1


def test_who_leaves_objects_incomplete():
    """Every third answer ends in half an object: `malformed` is the share of such answers, and nothing else falls."""

    class Mumbler(Oracle):
        def __init__(self):
            super().__init__()
            self.said = {"detect": [], "segment": []}

        def generate(self, pictures, prompts, max_new_tokens, constrain):
            outputs = super().generate(pictures, prompts, max_new_tokens, constrain)
            for prompt, output in zip(prompts, outputs, strict=True):
                if (task := prompt.split()[0]) in self.said:
                    broken = bool(output.things) and len(self.said[task]) % 3 == 0
                    self.said[task].append(broken)
                    output.text += " ; <loc0001><loc0002> half" if broken else ""
            return outputs

        def objects(self, output, size):
            found, dropped = parse(output.text, size)
            pairs = zip(found, output.things, strict=True)
            return [dataclasses.replace(item, mask=thing.mask) for item, thing in pairs], dropped

    model = Mumbler()
    measured = measure(model)
    for task in ("detect", "segment"):
        share = np.mean(model.said[task])
        assert 0.1 < share < 0.4 and measured[task]["malformed"] == pytest.approx(share)
        assert measured[task]["recall"] == measured[task]["precision"] == measured[task]["absent_empty"] == 1


def test_recall_and_precision_are_told_apart():
    """Who misses every second thing finds nothing that is not there; IoU is of what was matched alone."""

    class Forgetful(Oracle):
        def things(self, prefix, sample):
            return super().things(prefix, sample)[::2]

    measured = measure(Forgetful())
    for task in ("detect", "segment"):
        assert 0.4 < measured[task]["recall"] < 0.9 and measured[task]["precision"] == 1
        assert measured[task]["mean_iou"] > 0.97
    assert measured["segment"]["mask_miou"] == pytest.approx(measured["segment"]["recall"])


def test_constrain_is_told_to_the_model():
    class Watched(Oracle):
        def generate(self, pictures, prompts, max_new_tokens, constrain):
            told.add((max_new_tokens, constrain))
            return super().generate(pictures, prompts, max_new_tokens, constrain)

    for constrain in (False, True):
        told, model = set(), Watched()
        evaluate(model, 2, SEED, model.source, constrain)
        assert told == {(128, constrain)}


def test_pictures_are_those_of_the_seed_and_each_is_drawn_once(monkeypatch):
    drawn = []

    class Watched(Oracle):
        def source(self, seed, index):
            drawn.append((seed, index))
            return super().source(seed, index)

    monkeypatch.setattr(evaluation, "_BATCH_SCENES", 4)
    model = Watched()
    evaluate(model, 6, 123, model.source)
    assert drawn == [(123, i) for i in range(6)]
