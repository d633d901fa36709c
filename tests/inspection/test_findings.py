"""All that is seen of an answer, and the plates of it."""

import numpy as np
import pytest

from paligemma_jax.inspection import maps
from paligemma_jax.inspection.findings import look
from paligemma_jax.inspection.plates import plates


def test_everything_has_its_shape(findings, trace):
    count = len(trace.logprobs)
    assert len(findings.pieces) == count and findings.pieces[-1] == "<eos>"
    assert findings.soft_tokens.shape == (9, 32) and findings.norms.shape == findings.table_similarity.shape == (9,)
    assert findings.hidden_similarity.shape == (4, 9) and findings.attention.shape == (3, 4, count, 9)
    assert findings.occlusion.shape == (count, 9)
    assert findings.nearest.texts.shape == (9, 3) and findings.said.scores.shape == (4, 9, 3)
    assert findings.said_in_answer.ids.shape == (4, count, 3)
    np.testing.assert_allclose(findings.logprobs, trace.logprobs, atol=1e-5)


def test_the_words_are_those_of_the_answer_and_its_end(findings):
    texts = [word.text for word in findings.words]
    assert texts == ["<loc0001>", "<loc0002>", "<loc1000>", "<loc1023>", "red", "circle", "<eos>"]
    of_words = findings.of_words(findings.attention)
    assert of_words.shape == (3, 4, 7, 9)
    np.testing.assert_array_equal(of_words[..., 0, :], findings.attention[..., 0, :])
    np.testing.assert_array_equal(of_words[..., -1, :], findings.attention[..., -1, :])


def test_texts_are_those_of_their_ids(findings, model):
    ranked = findings.said
    for place in ((0, 0, 0), (3, 8, 2)):
        assert ranked.texts[place] == model.processor.tokenizer.decode([ranked.ids[place]])
    assert (np.diff(ranked.scores, axis=-1) <= 0).all()


def test_a_text_that_the_prompt_lacks_is_read_on_its_own(model, picture, findings):
    found = look(model, picture, findings.prompt, findings.answer, "blue squares", ["similarity"])
    alone = model.trace(picture, "blue squares", "")
    word = maps.find_in_prompt(alone, model.processor.tokenizer, "blue squares")
    np.testing.assert_allclose(found.hidden_similarity, maps.hidden_similarity(alone, word), atol=1e-5)


def test_what_is_not_asked_for_is_not_worked_out(model, picture):
    found = look(model, picture, "caption en", "", "", ["norms"])
    assert [word.text for word in found.words] == ["<eos>"]
    assert found.attention is found.occlusion is found.hidden_similarity is found.nearest is None
    assert [plate.name for plate in plates(found)] == ["norms", "embeddings"]


@pytest.mark.parametrize("layer, head", [(None, None), (0, 3), (2, 0)])
def test_plates_are_pictures_with_their_arrays(findings, layer, head):
    made = {plate.name: plate for plate in plates(findings, layer, head)}
    assert len({plate.title for plate in made.values()}) == len(made) == 12
    arrays = {name: plate.array.shape for name, plate in made.items() if plate.array is not None}
    count = len(findings.logprobs)
    assert arrays == {
        "norms": (3, 3),
        "similarity_table": (3, 3),
        "similarity": (4, 3, 3),
        "attention": (3, 4, count, 3, 3),
        "occlusion": (count, 3, 3),
        "lens_nearest": (9, 3),
        "lens_said": (4, 9, 3),
        "embeddings": (9, 32),
    }
    assert all(plate.array.dtype in (np.float32, np.int32) for plate in made.values() if plate.array is not None)
