"""The handle: a random model with a real tokenizer, from a directory and back."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pj
from paligemma_jax import api
from paligemma_jax.checkpoints.mask_vae import save_mask_vae
from paligemma_jax.engine import generate, steps
from paligemma_jax.engine.strategies import speculation
from paligemma_jax.errors import CheckpointError, ImageError, PromptError, SamplingError
from paligemma_jax.models import mask_vae
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.tokenizer import SEG_TOKENS
from paligemma_jax.tasks.detection import Detection

HOT = pj.Sampling(temperature=1.0, seed=5)
BOTH = [pytest.param(pj.Sampling(), marks=pytest.mark.slow, id="greedy"), pytest.param(HOT, id="sampled")]
PROMPTS = ["caption en", "detect a red circle", "answer en how many"]


@pytest.fixture(scope="module")
def model(make_model) -> pj.PaliGemma:
    return make_model("gemma2")


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8))


@pytest.fixture
def embedded(monkeypatch) -> list[int]:
    """How many pictures each call of the vision tower was given."""
    counts = []
    plain = api.embed_images
    monkeypatch.setattr(
        api, "embed_images", lambda c, g, pixels, *rest: counts.append(len(pixels)) or plain(c, g, pixels, *rest)
    )
    return counts


def same(first: pj.Output, second: pj.Output) -> bool:
    return (first.text, first.finish_reason) == (second.text, second.finish_reason) and np.array_equal(
        first.tokens, second.tokens
    )


def test_generate_gives_one_consistent_output_per_row(model, pictures):
    outputs = model.generate(pictures, PROMPTS, 12, HOT)
    assert len(outputs) == 3
    for output in outputs:
        assert output.text == model.processor.tokenizer.decode(output.tokens)
        assert len(output.tokens) == len(output.logprobs) == output.timing.new_tokens <= 12
        assert (output.logprobs < 0).all()
        assert (output.tokens < model.config.image_token_id).all()
        assert output.finish_reason == ("eos" if output.tokens[-1] == model.config.eos_token_id else "length")
        assert output.timing.prefill_ms > 0 and output.timing.decode_ms_per_token > 0


@pytest.mark.parametrize("sampling", BOTH)
def test_rows_do_not_depend_on_their_neighbours_or_turns(model, pictures, sampling):
    together = model.generate(pictures, PROMPTS, 12, sampling)
    alone = [
        model.generate(picture, prompt, 12, sampling)[0] for picture, prompt in zip(pictures, PROMPTS, strict=True)
    ]
    assert all(map(same, together, alone))
    assert all(map(same, together, model.generate(pictures, PROMPTS, 12, sampling, batch_size=np.int64(2))))


@pytest.mark.parametrize("sampling", BOTH)
def test_speculation_changes_no_answer(model, pictures, sampling, monkeypatch):
    plain = model.generate(pictures, PROMPTS, 12, sampling, speculate=False)
    monkeypatch.setattr(steps, "decode", None)  # from here on it would be an error
    speculated = model.generate(pictures, PROMPTS, 12, sampling, speculate=True)
    assert all(map(same, plain, speculated))
    for first, second in zip(plain, speculated, strict=True):
        np.testing.assert_allclose(first.logprobs, second.logprobs, atol=1e-4)
        assert second.timing.new_tokens == len(second.tokens) and second.timing.decode_ms_per_token > 0
    stream = model.stream(pictures[0], PROMPTS[0], 12, sampling, speculate=True)
    assert "".join(stream) == plain[0].text and same(stream.output, plain[0])
    monkeypatch.setattr(speculation, "choose_num_drafts", lambda params, context, *_: 7 * context.outlined)
    assert same(model.generate(pictures[1], PROMPTS[1], 12, sampling)[0], plain[1])


def test_long_prompts_run_in_smaller_groups_with_the_same_answers(model, pictures, monkeypatch):
    together = model.generate(pictures, PROMPTS, 8, HOT)
    sizes, select_rows = [], generate.select_rows
    monkeypatch.setattr(generate, "select_rows", lambda *args: sizes.append(len(args[2])) or select_rows(*args))
    monkeypatch.setattr(generate, "most_at_once", lambda num_tokens: 2)
    assert all(map(same, together, model.generate(pictures, PROMPTS, 8, HOT)))
    assert sizes == [2, 1]


def test_the_keys_of_a_call_are_made_once(model, pictures, monkeypatch):
    calls, row_keys = [], generate.row_keys
    monkeypatch.setattr(generate, "row_keys", lambda *args: calls.append(args) or row_keys(*args))
    model.generate(pictures, PROMPTS, 2, HOT, batch_size=1)
    assert len(calls) == 1


def test_copies_of_a_prompt_draw_differently(model, pictures):
    first, second = model.generate(pictures[0], PROMPTS[:1] * 2, 12, HOT)
    assert not np.array_equal(first.tokens, second.tokens)


def test_each_distinct_picture_is_embedded_once(model, pictures, embedded):
    model.generate([pictures[0], pictures[0], pictures[1]], PROMPTS, 2)
    model.generate(pictures[0], PROMPTS, 2)
    assert embedded == [2, 1]


def test_stream_gives_the_same_text_in_whole_characters(model, pictures):
    for sampling in (HOT, dataclasses.replace(HOT, seed=6)):
        [whole] = model.generate(pictures[0], PROMPTS[0], 24, sampling)
        stream = model.stream(pictures[0], PROMPTS[0], 24, sampling)
        pieces = list(stream)
        assert "".join(pieces) == whole.text
        assert all(pieces) and len(pieces) > 1
        assert same(stream.output, whole)


def test_score_is_the_log_softmax_of_logits(model, pictures):
    suffixes = ["a cat", "a red circle and a dog", ""]
    scores = model.score(pictures, PROMPTS, suffixes)
    logits = model.logits(pictures, PROMPTS, suffixes)
    encoded = [[*model.processor.tokenizer.encode(suffix), model.config.eos_token_id] for suffix in suffixes]
    assert logits.shape == (3, max(map(len, encoded)), model.config.text.vocab_size)
    assert logits.dtype == np.float32
    for row, (ids, score) in enumerate(zip(encoded, scores, strict=True)):
        expected = np.asarray(jax.nn.log_softmax(logits[row, : len(ids)], axis=-1))[np.arange(len(ids)), ids]
        np.testing.assert_allclose(score, expected, atol=1e-5)
        assert (logits[row, len(ids) :] == 0).all()


def test_logits_are_those_of_the_whole_network(model, pictures):
    suffixes = ["a cat", "a red circle and a dog", ""]
    logits = model.logits(pictures, PROMPTS, suffixes)
    batch = model.processor(pictures, PROMPTS, suffixes)
    network = jax.jit(PaliGemma(model.config).apply)
    arrays = (batch.pixels, batch.tokens, batch.image_slots, batch.prefix_length, batch.length)
    expected = np.asarray(network({"params": model.params}, *arrays))
    for row, (start, stop) in enumerate(zip(batch.prefix_length, batch.length, strict=True)):
        np.testing.assert_allclose(logits[row, : stop - start], expected[row, start - 1 : stop - 1], atol=1e-4)


def test_injected_embeddings_replace_the_picture(model, pictures, embedded):
    embeddings = model.embed_image(pictures)
    assert embeddings.shape == (3, model.config.vision.num_tokens, model.config.text.width)
    embedded.clear()
    injected = model.generate(pictures[::-1], PROMPTS, 8, image_embeddings=embeddings)
    nameless = model.generate(None, PROMPTS, 8, image_embeddings=np.asarray(embeddings))
    assert embedded == []
    own = model.generate(pictures, PROMPTS, 8)
    assert all(map(same, injected, own)) and all(map(same, nameless, own))
    shared = model.generate(pictures[2], PROMPTS, 8, image_embeddings=embeddings[:1])
    assert all(map(same, shared, model.generate(pictures[0], PROMPTS, 8)))
    pair = model.generate([[pictures[2], pictures[2]]], PROMPTS[0], 8, image_embeddings=embeddings[:2])
    assert same(pair[0], model.generate([pictures[:2]], PROMPTS[0], 8)[0])


def test_beams_are_searched_when_asked_for(model, pictures):
    greedy = model.generate(pictures, PROMPTS, 8)
    assert all(map(same, greedy, model.generate(pictures, PROMPTS, 8, pj.Sampling(num_beams=1))))
    best = model.generate(pictures, PROMPTS, 8, pj.Sampling(num_beams=3))
    assert not all(map(same, greedy, best))
    assert np.mean([out.logprobs.mean() for out in best]) > np.mean([out.logprobs.mean() for out in greedy])
    assert all(out.timing.new_tokens == len(out.tokens) for out in best)


def _answering(model, monkeypatch, text: str) -> list[str]:
    """Make the model answer `text`; returns the prompts it will be asked."""
    tokens = np.array([*model.processor.tokenizer.encode(text), model.config.eos_token_id])
    certain = np.zeros(len(tokens), np.float32)
    timing = pj.Timing(0.0, 1.0, 1.0, 1)
    output = pj.Output(model.processor.tokenizer.decode(tokens), tokens, certain, "eos", timing, certain + 1, certain)
    asked = []
    monkeypatch.setattr(
        model, "answer", lambda requests: asked.extend(r.prompt.text for r in requests) or [output] * len(requests)
    )
    return asked


def test_detect_gives_pixels_and_scores(model, pictures, monkeypatch):
    answer = "<loc0000><loc0000><loc1023><loc0341> cat ; <loc0001><loc0002><loc0003><loc0004> a dog"
    asked = _answering(model, monkeypatch, answer)
    cat, dog = model.detect(pictures[0], "cat ; a dog")
    assert asked == ["detect cat ; a dog"]
    assert (cat.label, dog.label) == ("cat", "a dog")
    np.testing.assert_allclose(cat.box, (0, 0, 10, 20))
    assert (cat.score, dog.score) == (1.0, 1.0)


def test_detect_in_several_pictures_and_one_prompt_per_class(model, pictures, monkeypatch):
    asked = _answering(model, monkeypatch, "<loc0000><loc0000><loc1023><loc0341> cat")
    first, second = model.detect([pictures[0], pictures[1]], ["cat", "a  dog"], split_classes=True)
    assert asked == ["detect cat", "detect a dog"] * 2
    assert [item.label for item in first] == ["cat"] == [item.label for item in second]  # said twice, given once
    monkeypatch.setattr(pj.PaliGemma, "objects", lambda *args, **kw: ([Detection("cat", (0, 0, 1, 1), 0.4)], []))
    assert model.detect([pictures[0]], "cat", min_score=0.5) == [[]]
    with pytest.raises(PromptError, match="min_score=3"):
        model.detect(pictures[0], "cat", min_score=3)
    assert model.detect([], "cat") == []
    for classes in ("", " ; ", [], ["cat ; dog"], [" "], "<loc0001>"):
        with pytest.raises(PromptError, match="give names"):
            model.detect(pictures[0], classes)


def test_what_is_detected_is_never_malformed(model, pictures):
    for item in model.detect(pictures[0], "cat ; a dog", max_new_tokens=64, sampling=HOT, nms=0.5):
        assert item.label in ("cat", "a dog") and 0 <= item.score <= 1
        assert len(item.side_probabilities) == 4 and item.expected_box[0] <= item.expected_box[2]


def test_segment_decodes_masks(model, pictures, monkeypatch, tmp_path):
    small = mask_vae.MaskVAEConfig((4, 4, 4, 4), (4, 4, 4, 4, 4), 8, 128)
    save_mask_vae(tmp_path / "vae.npz", mask_vae.init_params(jax.random.key(0), small))
    with_masks = pj.PaliGemma(model.config, model.params, model.processor, tmp_path / "vae.npz")
    codes = "".join(SEG_TOKENS[:16])
    asked = _answering(with_masks, monkeypatch, f"<loc0000><loc0000><loc1023><loc0511>{codes} cat")
    [cat] = with_masks.segment(pictures[0], "cat")
    assert asked == ["segment cat"]
    assert cat.codes == tuple(range(16))
    assert cat.mask.shape == (20, 30) and cat.mask.dtype == bool
    assert not cat.mask[:, 15:].any()
    with pytest.raises(CheckpointError, match="mask_vae=FILE"):
        model.segment(pictures[0], "cat")


def test_impossible_requests_are_named(model, pictures):
    limit = model.config.text.max_positions
    with pytest.raises(PromptError, match=rf"max_new_tokens={limit} .* {limit} positions"):
        model.generate(pictures[0], PROMPTS[0], limit)
    with pytest.raises(PromptError, match="positions"):
        model.score(pictures[0], PROMPTS[0], "cat dog " * limit)
    with pytest.raises(PromptError, match="3 images and 2 prompts"):
        model.generate(pictures, PROMPTS[:2])
    for value in (0, -1, 2.5):
        with pytest.raises(SamplingError, match=f"max_new_tokens={value}"):
            model.generate(pictures[0], PROMPTS[0], value)
    with pytest.raises(SamplingError, match="batch_size=0"):
        model.generate(pictures, PROMPTS, batch_size=0)
    with pytest.raises(PromptError, match="not list"):
        model.stream(pictures[0], PROMPTS)
    with pytest.raises(SamplingError, match="num_beams=2 with speculation"):
        model.generate(pictures[0], PROMPTS[0], sampling=pj.Sampling(num_beams=2), speculate=True)
    with pytest.raises(SamplingError, match="num_beams=2 cannot stream"):
        model.stream(pictures[0], PROMPTS[0], sampling=pj.Sampling(num_beams=2))
    with pytest.raises(ImageError, match=r"\(2, 4, 31\).*4, 32"):
        model.generate(None, PROMPTS[:2], image_embeddings=np.zeros((2, 4, 31)))
    with pytest.raises(ImageError, match="1 pictures, images 0"):
        model.generate([], PROMPTS[0], image_embeddings=np.zeros((1, 4, 32)))
    with pytest.raises(ImageError, match="2 pictures, images 3"):
        model.generate(pictures, PROMPTS, image_embeddings=np.zeros((2, 4, 32)))
    with pytest.raises(ImageError):
        model.detect("no such picture.png", "cat")


def test_a_pil_image_and_its_array_are_the_same(model, pictures):
    image = Image.fromarray(pictures[0])
    assert same(model.generate(image, PROMPTS[0], 4)[0], model.generate(pictures[0], PROMPTS[0], 4)[0])


def test_no_requests_have_no_answers(model):
    assert model.answer([]) == [] and model.detect([], "cat") == []


def test_requests_that_differ_in_everything_are_answered_as_if_alone(model, pictures):
    """One batch for all; rows with another number of beams are apart."""
    requests = [
        pj.Request.of(pictures[0], PROMPTS[0], max_new_tokens=5),
        pj.Request.of(pictures[:2], PROMPTS[1], max_new_tokens=12, constrain=True),
        pj.Request.of(pictures[1], PROMPTS[2], max_new_tokens=7, sampling=HOT),
        pj.Request.of(pictures[2], PROMPTS[0], max_new_tokens=8, sampling=pj.Sampling(num_beams=2)),
    ]
    outputs = model.answer(requests)
    for request, output in zip(requests, outputs, strict=True):
        images, options = [list(request.images)], request.options
        assert same(output, model.generate(images, request.prompt.text, options=options)[0])
        assert len(output.tokens) <= options.max_new_tokens
