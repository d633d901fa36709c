"""All findings about an answer, and their figures."""

import numpy as np
import pytest

from paligemma_jax.inspection import findings as findings_module
from paligemma_jax.inspection import maps
from paligemma_jax.inspection.figures import figures
from paligemma_jax.inspection.findings import inspect_answer


def test_everything_has_its_shape(findings, trace):
    count = len(trace.logprobs)
    assert len(findings.answer_pieces) == count and findings.answer_pieces[-1] == "<eos>"
    assert findings.soft_tokens.shape == (9, 32) and findings.norms.shape == findings.table_similarity.shape == (9,)
    assert findings.hidden_similarity.shape == (4, 9) and findings.attention.shape == (3, 4, count, 9)
    assert findings.occlusion.shape == (count, 9)
    assert findings.nearest_tokens.texts.shape == (9, 3) and findings.patch_lens.scores.shape == (4, 9, 3)
    assert findings.patch_similarity.shape == (9, 9)
    np.testing.assert_allclose(findings.logprobs, trace.logprobs, atol=1e-5)


def test_the_words_are_those_of_the_answer_and_its_end(findings):
    texts = [word.text for word in findings.words]
    assert texts == ["<loc0001>", "<loc0002>", "<loc1000>", "<loc1023>", "red", "circle", "<eos>"]
    word_means = findings.word_means(findings.attention)
    assert word_means.shape == (3, 4, 7, 9)
    np.testing.assert_array_equal(word_means[..., 0, :], findings.attention[..., 0, :])
    np.testing.assert_array_equal(word_means[..., -1, :], findings.attention[..., -1, :])


def test_texts_are_those_of_their_ids(findings, model):
    ranked = findings.patch_lens
    for place in ((0, 0, 0), (3, 8, 2)):
        assert ranked.texts[place] == model.processor.tokenizer.decode([ranked.ids[place]])
    assert (np.diff(ranked.scores, axis=-1) <= 0).all()


def test_what_is_said_after_each_token_of_the_text(findings, model, picture, trace):
    count, read = len(trace.logprobs), findings.text_pieces
    assert read[0] == "<bos>" and "".join(read[1:]) == f"{findings.prompt}\n{findings.answer}"
    said = findings.text_lens
    assert said.ids.shape == said.scores.shape == (4, len(read), 3) and len(read) == len(trace.tokens) - 9 - 1
    logits = model.logits(picture, findings.prompt, findings.answer)[0]
    logits[:, model.config.image_token_id :] = -np.inf
    np.testing.assert_array_equal(said.ids[-1, -count:, 0], logits.argmax(axis=-1))


def test_the_ends_of_a_text_have_names(model):
    ids = np.array([[model.config.eos_token_id, model.config.bos_token_id, 300]])
    texts = findings_module._decode(model, ids, np.zeros(3)).texts
    assert texts.tolist() == [["<eos>", "<bos>", model.processor.tokenizer.decode([300])]]


def test_a_text_that_the_prompt_lacks_is_read_on_its_own(model, picture, findings):
    found = inspect_answer(model, picture, findings.prompt, findings.answer, "blue squares", ["similarity"])
    alone = model.trace(picture, "blue squares", "")
    word = maps.find_in_prompt(alone, model.processor.tokenizer, "blue squares")
    np.testing.assert_allclose(found.hidden_similarity, maps.hidden_similarity(alone, word), atol=1e-5)


def test_what_is_not_asked_for_is_not_worked_out(model, picture):
    found = inspect_answer(model, picture, "caption en", "", "", ["norms"])
    assert [word.text for word in found.words] == ["<eos>"]
    assert found.attention is found.occlusion is found.hidden_similarity is found.nearest_tokens is None
    assert [figure.name for figure in figures(found)] == ["norms", "embeddings"]


@pytest.mark.parametrize("layer, head", [(None, None), (0, 3), (2, 0)])
def test_figures_are_images_with_their_arrays(findings, layer, head):
    made = {figure.name: figure for figure in figures(findings, layer, head)}
    assert len({figure.title for figure in made.values()}) == len(made) == 13
    arrays = {name: values for figure in made.values() for name, values in figure.arrays.items()}
    count = len(findings.logprobs)
    text = (4, len(findings.text_pieces), 3)
    assert {name: values.shape for name, values in arrays.items()} == {
        "norms": (3, 3),
        "similarity_table": (3, 3),
        "similarity": (4, 3, 3),
        "similarity_patches": (9, 9),
        "attention": (3, 4, count, 3, 3),
        "occlusion": (count, 3, 3),
        "lens_nearest": (9, 3),
        "lens_nearest_cosines": (9, 3),
        "lens_said": (4, 9, 3),
        "lens_said_probabilities": (4, 9, 3),
        "lens_text": text,
        "lens_text_probabilities": text,
        "embeddings": (9, 32),
    }
    ids = {"lens_nearest", "lens_said", "lens_text"}
    assert all(values.dtype == (np.int32 if name in ids else np.float32) for name, values in arrays.items())
