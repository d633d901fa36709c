"""Every argument of the public API does what it says: another value than the default changes what it should."""

import dataclasses
import inspect
import time

import jax
import numpy as np
import pytest

import paligemma_jax as pj
from paligemma_jax.checkpoints.mask_vae import save_mask_vae
from paligemma_jax.models import mask_vae
from paligemma_jax.tasks.prompts import class_prompts
from tests.covered import unknown

PROMPTS = ["caption en", "detect a red circle", "answer en how many"]
# Filters that leave all tokens there, so that those of the tests are values of the same program.
HOT = pj.Sampling(temperature=1.0, top_k=10**6, top_p=1 - 1e-6, min_p=1e-9, seed=5)
BOX = "<loc0000><loc0000><loc1023><loc0512>"
OVERLAPS = "<loc0000><loc0219><loc1023><loc0731>"  # an IoU of 0.4 with BOX
MASK = "".join(f"<seg{i:03d}>" for i in range(16))


@pytest.fixture(scope="module")
def model(make_model) -> pj.PaliGemma:
    return make_model("gemma2")


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8))


@pytest.fixture(scope="module")
def hot(model, pictures) -> list[list[int]]:
    """Tokens that are drawn with HOT."""
    return tokens_of(model.generate(pictures, PROMPTS, 8, HOT))


def tokens_of(outputs: list[pj.Output]) -> list[list[int]]:
    return [output.tokens.tolist() for output in outputs]


_HERE = "test_api_options.py"
_FEATURES = "models/test_inside.py::test_features_and_their_projection_are_those_of_the_formulas"
_STREAM = f"{_HERE}::test_a_stream_takes_what_generate_takes"
_EMBEDDINGS = f"{_HERE}::test_given_embeddings_stand_for_the_picture_everywhere"
_SCORES = f"{_HERE}::test_scores_of_several_rows_are_of_their_own_prefix_and_suffix"
_OBJECTS = f"{_HERE}::test_objects_have_masks_unless_told_otherwise"
_DETECT = f"{_HERE}::test_detect_and_segment_ask_and_keep_as_they_are_told"
_ANSWER = {
    "max_new_tokens": f"{_HERE}::test_max_new_tokens_is_the_longest_answer",
    **dict.fromkeys(("sampling", "image_embeddings"), _STREAM),
}
_FOUND = dict.fromkeys(
    ("max_new_tokens", "sampling", "constrain", "split_classes", "loc_scale", "nms", "min_score"), _DETECT
) | {"prompt_form": f"{_HERE}::test_classes_are_asked_for_in_another_form"}
COVERED = {
    pj.PaliGemma.generate: _ANSWER,
    pj.PaliGemma.stream: _ANSWER,
    pj.PaliGemma.score: dict.fromkeys(("images", "prefixes", "suffixes"), _SCORES) | {"image_embeddings": _EMBEDDINGS},
    pj.PaliGemma.trace: {"image_embeddings": _EMBEDDINGS},
    pj.PaliGemma.embed_image: {"projected": _FEATURES},
    pj.PaliGemma.objects: dict.fromkeys(("output", "loc_scale", "masks", "labels"), _OBJECTS),
    pj.PaliGemma.locate: _FOUND,
    pj.load: {
        "mask_vae": f"{_HERE}::test_load_takes_the_mask_decoder_that_is_named",
        "dtype": f"{_HERE}::test_load_gives_the_dtype_that_is_named",
        "mesh": "sharding/test_devices.py::test_answers_are_those_of_one_device",
        "adapter": "test_loading.py::test_an_adapter_is_loaded_over_its_base",
        "compilation_cache": "test_loading.py::test_compiled_programs_are_kept_unless_told_not_to",
    },
    pj.parse: {
        "loc_scale": "tasks/test_detection.py::test_loc_scale",
        "labels": "tasks/test_detection.py::test_the_classes_asked_for_are_labels_of_what_has_none",
    },
    pj.Sampling: {
        **dict.fromkeys(("top_k", "top_p", "min_p"), f"{_HERE}::test_filters_that_leave_one_token_are_greedy"),
        **dict.fromkeys(("seed", "temperature"), f"{_HERE}::test_seed_and_temperature_change_what_is_drawn"),
    },
}
# What every test gives, what changes no answer, and what has a file of its own: tests of generation, grammar and beams.
ELSEWHERE = {"self", "options", "classes", "image", "images", "prompt", "prompts", "answer", "path", "text", "size"}
ELSEWHERE |= {
    "batch_size",
    "speculate",
    "prepare",
    "warm_up",
    "target",
    "constrain",
    "num_beams",
    "quantization",
    "task",
}


def test_every_argument_has_a_test_that_knows_it():
    for function, table in COVERED.items():
        assert not unknown(table)
        left = set(inspect.signature(function).parameters) - set(table) - ELSEWHERE
        assert not left, f"{function.__qualname__} takes {left}: show in a test what it changes, and name the test here"


# generate and stream


def test_filters_that_leave_one_token_are_greedy(model, pictures, hot):
    """top_k, top_p and min_p, each alone, with the temperature and the seed of other answers."""
    greedy = tokens_of(model.generate(pictures, PROMPTS, 8))
    assert greedy != hot
    for alone in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert tokens_of(model.generate(pictures, PROMPTS, 8, dataclasses.replace(HOT, **alone))) == greedy


def test_seed_and_temperature_change_what_is_drawn(model, pictures, hot):
    for other in (dataclasses.replace(HOT, seed=6), dataclasses.replace(HOT, temperature=3.0)):
        drawn = tokens_of(model.generate(pictures, PROMPTS, 8, other))
        assert drawn != hot and tokens_of(model.generate(pictures, PROMPTS, 8, other)) == drawn
    cold = model.generate(pictures, PROMPTS, 8, dataclasses.replace(HOT, temperature=1e-4))
    assert tokens_of(cold) == tokens_of(model.generate(pictures, PROMPTS, 8))


def test_max_new_tokens_is_the_longest_answer(model, pictures, hot):
    """A smaller max_new_tokens cuts the same answer off sooner."""
    for limit in (1, 3, 8):
        outputs = model.generate(pictures, PROMPTS, limit, HOT)
        assert tokens_of(outputs) == [tokens[:limit] for tokens in hot]
        for output in outputs:
            assert (output.finish_reason == "eos") == (output.tokens[-1] == model.config.eos_token_id)
        assert model.stream(pictures[0], PROMPTS[0], limit, HOT).output is None


def test_a_stream_takes_what_generate_takes(model, pictures):
    """max_new_tokens, sampling and image_embeddings; speculate and constrain have tests of their own."""
    names = [set(inspect.signature(getattr(pj.PaliGemma, name)).parameters) for name in ("generate", "stream")]
    assert names[0] - names[1] == {"images", "prompts", "batch_size"} and names[1] - names[0] == {"image", "prompt"}
    embeddings = model.embed_image(pictures[1])
    options = {"max_new_tokens": 12, "sampling": HOT, "image_embeddings": embeddings}
    [whole] = model.generate(None, PROMPTS[1], **options)
    stream = model.stream(None, PROMPTS[1], **options)
    assert "".join(stream) == whole.text and stream.output.tokens.tolist() == whole.tokens.tolist()
    assert len(whole.tokens) <= 12 and whole.text != model.generate(pictures[0], PROMPTS[1], 12, HOT)[0].text


def test_times_are_in_their_units(model, pictures):
    """Once its programs are there, the milliseconds of a call add up to no more than it took, and not to far less."""
    call = lambda: model.generate(pictures, PROMPTS, 8, HOT)  # noqa: E731
    call()
    start = time.perf_counter()
    outputs = call()
    took_ms = 1e3 * (time.perf_counter() - start)
    for output in outputs:
        assert output.timing.compile_s < took_ms / 1e3
        assert output.timing.new_tokens == len(output.tokens)
    steps = max(len(output.tokens) for output in outputs) - 1
    told_ms = outputs[0].timing.prefill_ms + steps * outputs[0].timing.decode_ms_per_token
    assert took_ms / 50 < told_ms <= took_ms
    assert outputs[0].timing.prefill_ms > took_ms / 1000 and outputs[0].timing.decode_ms_per_token > took_ms / 10_000
    [one] = model.generate(pictures[0], PROMPTS[0], 1, HOT)
    assert one.timing.decode_ms_per_token is None


# score, logits, embed_image, trace


def test_given_embeddings_stand_for_the_picture_everywhere(model, pictures):
    """image_embeddings of score and trace, as of generate."""
    embeddings = model.embed_image(pictures[1])
    own, other = (model.score(picture, PROMPTS[0], "a cat")[0] for picture in pictures[:2])
    assert np.abs(own - other).max() > 1e-3
    np.testing.assert_allclose(model.score(None, [PROMPTS[0]], ["a cat"], embeddings)[0], other, atol=1e-5)
    np.testing.assert_allclose(model.score(pictures[0], PROMPTS[0], "a cat", embeddings)[0], other, atol=1e-5)
    trace = model.trace(pictures[0], PROMPTS[0], "a cat", embeddings)
    np.testing.assert_allclose(trace.logprobs, other, atol=1e-4)
    np.testing.assert_array_equal(trace.soft_tokens, embeddings)


def test_scores_of_several_rows_are_of_their_own_prefix_and_suffix(model, pictures):
    """None of images, prefixes and suffixes is without effect, and none goes to another row."""
    suffixes = ["a cat", "two blue squares", "yes"]
    rows = list(zip(pictures, PROMPTS, suffixes, strict=True))
    scores = model.score(pictures, PROMPTS, suffixes)
    for found, (picture, prompt, suffix) in zip(scores, rows, strict=True):
        np.testing.assert_allclose(found, model.score(picture, prompt, suffix)[0], atol=1e-4)
    turned = model.score(pictures[1:] + pictures[:1], PROMPTS, suffixes)
    others = model.score(pictures, PROMPTS[1:] + PROMPTS[:1], suffixes)
    for found, first, second in zip(scores, turned, others, strict=True):
        assert np.abs(found - first).max() > 1e-3 and np.abs(found - second).max() > 1e-3


# detect, segment, objects


@pytest.fixture
def answer_with(monkeypatch):
    """answer_with(text): what models say from now on; returns the lists of requests to come."""

    def patch(text: str) -> list[list[pj.Request]]:
        calls = []

        def answer(model: pj.PaliGemma, requests: list[pj.Request]) -> list[pj.Output]:
            calls.append(requests)
            tokens = np.array([*model.processor.tokenizer.encode(text), model.config.eos_token_id])
            even = np.full(len(tokens), 0.5)
            output = pj.Output(text, tokens, np.log(even), "eos", pj.Timing(0.0, 1.0, 1.0, 1), even, even)
            return [output] * len(requests)

        monkeypatch.setattr(pj.PaliGemma, "answer", answer)
        return calls

    return patch


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """Files of two mask VQ-VAEs: one says yes everywhere, one no."""
    sizes = mask_vae.MaskVAEConfig((4, 4, 4, 4), (4, 4, 4, 4, 4), 8, 128)
    params = mask_vae.init_params(jax.random.key(0, impl="rbg"), sizes)
    files = {}
    for word, value in (("yes", 1.0), ("no", -1.0)):
        leaf = params["decoder"]["exit"]
        last = {"kernel": leaf["kernel"] * 0, "bias": leaf["bias"] * 0 + value}
        files[word] = tmp_path_factory.mktemp("masks") / f"{word}.npz"
        save_mask_vae(files[word], params | {"decoder": params["decoder"] | {"exit": last}})
    return files


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_detect_and_segment_ask_and_keep_as_they_are_told(model, pictures, decoders, answer_with, task):
    """max_new_tokens, sampling, constrain, split_classes, loc_scale, nms and min_score, for one picture and for two."""
    masks = MASK if task == "segment" else ""
    calls = answer_with(f"{BOX}{masks} circle ; {OVERLAPS}{masks} circle")
    with_masks = pj.PaliGemma(model.config, model.params, model.processor, decoders["yes"])
    find = getattr(with_masks, task)
    plain = find(pictures[0], "circle")
    assert [round(item.box[2], 2) for item in plain] == [15.01, 21.44] and len({item.score for item in plain}) == 1
    assert all((item.mask is not None) == (task == "segment") for item in plain)
    [asked] = calls.pop()
    assert asked.options == pj.GenerateOptions(256, pj.Sampling(), constrain=True)
    assert asked.prompt.text == f"{task} circle"
    find(pictures[0], "circle", max_new_tokens=9, sampling=HOT, constrain=False)
    [asked] = calls.pop()
    assert asked.options == pj.GenerateOptions(9, HOT, constrain=False)
    assert [len(find(pictures[0], "circle", nms=nms)) for nms in (0.3, 0.5)] == [1, 2]
    assert [len(found) for found in find(pictures[:2], "circle", nms=0.3)] == [1, 1]
    score = plain[0].score
    assert [len(find(pictures[0], "circle", min_score=value)) for value in (score / 2, score * 1.5)] == [2, 0]
    scaled = find(pictures[0], "circle", loc_scale=1024)
    assert [round(item.box[2], 2) for item in scaled] == [15.0, 21.42]
    assert scaled[0].expected_box[0] == pytest.approx(0.5 / 1024 * 30)
    calls.clear()
    find(pictures[:2], ["circle", "star"], split_classes=True)
    [requests] = calls
    assert [request.prompt.text for request in requests] == [f"{task} circle", f"{task} star"] * 2
    assert [[image.size for image in request.images] for request in requests] == [[(30, 20)]] * 4


@pytest.mark.parametrize(
    "form, asked",
    [
        ("bare", ["left man", "dog"]),
        ("{task} {phrase}", ["segment left man", "segment dog"]),
        ("find {classes}", ["find left man ; dog"]),
    ],
)
def test_classes_are_asked_for_in_another_form(model, pictures, decoders, answer_with, form, asked):
    """prompt_form: answers may do without labels; objects have that of their prompt, if it names one class."""
    calls = answer_with(f"{BOX}{MASK}")
    with_masks = pj.PaliGemma(model.config, model.params, model.processor, decoders["yes"])
    found = with_masks.segment(pictures[0], ["left man", "dog"], prompt_form=form)
    [requests] = calls
    assert [request.prompt.text for request in requests] == asked
    assert all(request.prompt.is_bare and request.options.constrain for request in requests)
    assert [item.label for item in found] == (["left man", "dog"] if len(asked) == 2 else [""])
    assert all(item.mask.sum() == 15 * 20 and 0 < item.score < 1 for item in found)
    with pytest.raises(pj.UserError, match=r"^prompt_form='\{name\}' is not possible"):
        with_masks.detect(pictures[0], "dog", prompt_form="{name}")


def test_a_prompt_in_another_form_keeps_its_grammar(model, pictures, monkeypatch):
    """It is not read again from its text, in which no task stands."""
    [prompt] = class_prompts("segment", ["a circle"], "bare")
    asked = []

    def tables(tokenizer: object, prompts: list, config: object) -> None:
        asked.extend(prompts)
        raise pj.UserError("enough")

    monkeypatch.setattr("paligemma_jax.engine.constraints.grammar.tables", tables)
    for ask in (
        lambda: model.answer([pj.Request((pictures[0],), prompt, pj.GenerateOptions(8, constrain=True))]),
        lambda: model.generate(pictures[0], prompt, 8, constrain=True),
        lambda: model.stream(pictures[0], prompt, 8, constrain=True),
        lambda: model.detect(pictures[0], "a circle", 8, prompt_form="bare"),
    ):
        with pytest.raises(pj.UserError, match="enough"):
            ask()
    assert asked == [prompt] * 3 + class_prompts("detect", ["a circle"], "bare")
    [output] = model.generate(pictures[0], prompt, 8)
    assert output.tokens.tolist() == model.generate(pictures[0], "a circle", 8)[0].tokens.tolist()


def test_the_mean_log_probability_is_over_all_tokens(model, pictures):
    [output] = model.generate(pictures[0], PROMPTS[0], 5)
    assert output.mean_logprob == pytest.approx(float(np.mean(output.logprobs)), abs=1e-6)
    assert type(output.mean_logprob) is float and dataclasses.replace(output, logprobs=np.zeros(0)).mean_logprob is None


@pytest.mark.parametrize("prompt", ["<image>caption en", "<image><bos>caption en\n", "caption en\\n"])
def test_placeholders_make_no_difference_anywhere(model, pictures, prompt):
    """In generate, stream, answer and score; what is laid out is the same."""
    laid_out = model.processor(pictures[0], "caption en", "a circle")
    np.testing.assert_array_equal(model.processor(pictures[0], prompt, "a circle").tokens, laid_out.tokens)
    request = pj.Request.of(pictures[0], prompt)
    assert request.prompt.canonical == "caption en" and request.prompt.task.name == "caption"
    [plain] = model.generate(pictures[0], "caption en", 8)
    for output in (
        *model.generate(pictures[0], prompt, 8),
        *model.answer([pj.Request.of(pictures[0], prompt, max_new_tokens=8)]),
    ):
        assert output.tokens.tolist() == plain.tokens.tolist()
    assert "".join(model.stream(pictures[0], prompt, 8)) == plain.text
    np.testing.assert_array_equal(model.score(pictures[0], prompt, "a"), model.score(pictures[0], "caption en", "a"))
    with pytest.raises(pj.UserError, match=r"begins with \d <image> and has 1 image"):
        pj.Request.of(pictures[0], f"<image><image>{prompt}")


def test_objects_have_masks_unless_told_otherwise(model, decoders):
    text = f"{BOX}{MASK} circle"
    tokens = np.array([*model.processor.tokenizer.encode(text), model.config.eos_token_id])
    even = np.full(len(tokens), 0.5)
    output = pj.Output(text, tokens, np.log(even), "eos", pj.Timing(0.0, 1.0, 1.0, 1), even, even)
    with_masks = pj.PaliGemma(model.config, model.params, model.processor, decoders["yes"])
    [plain], [] = with_masks.objects(output, (30, 20))
    [bare], [] = with_masks.objects(output, (30, 20), masks=False)
    assert plain.mask.sum() == 15 * 20 and bare.mask is None
    assert with_masks.objects(output, (30, 20), loc_scale=1024)[0][0].box[2] == 15.0
    unnamed = dataclasses.replace(output, text=f"{BOX}{MASK}", tokens=output.tokens[:20])
    assert [with_masks.objects(unnamed, (30, 20), labels=names)[0][0].label for names in ((), ["star"])] == ["", "star"]


def test_unequal_sides_make_a_score(model):
    """The four locations, the label's tokens and the end each have their own numbers: each goes where it belongs."""
    encode = model.processor.tokenizer.encode
    text = "<loc0100><loc0300><loc0600><loc1000> red circle"
    label = len(encode(text)) - 4
    assert label > 1
    tokens = np.array([*encode(text), model.config.eos_token_id])
    chances = np.array([0.1, 0.2, 0.3, 0.4, *np.linspace(0.5, 0.9, label), 0.05])
    near = np.array([0.9, 0.7, 0.5, 0.3, *np.full(label, 0.01), 0.02])
    expected = np.array([110.0, 330.0, 660.0, 990.0, *np.full(label, 500.0), 5.0])
    output = pj.Output(text, tokens, np.log(chances), "eos", pj.Timing(0.0, 1.0, 1.0, 1), near, expected)
    [item], [] = model.objects(output, (1023, 2046))
    assert item.box == pytest.approx((300, 200, 1000, 1200))
    assert item.side_probabilities == pytest.approx((0.2, 0.1, 0.4, 0.3))
    assert item.expected_box == pytest.approx((330, 220, 990, 1320))
    assert item.score == pytest.approx((0.9 * 0.7 * 0.5 * 0.3) ** 0.25 * np.prod(np.linspace(0.5, 0.9, label)))


# load


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory, decoders):
    """A directory whose own mask decoder says no."""
    directory = tmp_path_factory.mktemp("api") / "saved"
    pj.PaliGemma(model.config, model.params, model.processor, decoders["no"]).save(directory)
    return directory


def test_load_takes_the_mask_decoder_that_is_named(saved, decoders, answer_with, pictures, monkeypatch):
    """mask_vae: the argument before what is beside the model, and that before the environment."""
    answer_with(f"{BOX}{MASK} circle")
    monkeypatch.setenv("PALIGEMMA_MASK_VAE", str(decoders["yes"]))
    for named, count in ((None, 0), (decoders["yes"], 300)):
        [item] = pj.load(saved, mask_vae=named).segment(pictures[0], "circle")
        assert int(item.mask.sum()) == count
    (saved / "vae-oid.npz").rename(saved / "aside.npz")
    [item] = pj.load(saved).segment(pictures[0], "circle")
    (saved / "aside.npz").rename(saved / "vae-oid.npz")
    assert int(item.mask.sum()) == 300


def test_load_gives_the_dtype_that_is_named(saved):
    sizes = {}
    for dtype in ("float32", "float16", "bfloat16"):
        loaded = pj.load(saved, dtype=dtype)
        leaves = jax.tree.leaves(loaded.params)
        assert {leaf.dtype.name for leaf in leaves} == {dtype}
        sizes[dtype] = sum(leaf.nbytes for leaf in leaves)
    assert sizes["float32"] == 2 * sizes["float16"] == 2 * sizes["bfloat16"]
    assert 0 < pj.load(saved).load_s < 60
