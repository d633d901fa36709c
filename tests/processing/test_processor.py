import numpy as np
import pytest
from PIL import Image

from paligemma_jax.config import PaliGemmaConfig, VisionConfig
from paligemma_jax.errors import ImageError, PromptError
from paligemma_jax.processing.image import ImageSettings, to_pixels
from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.tokenizer import LOC_TOKENS, SEG_TOKENS, Tokenizer
from paligemma_jax.tasks.prompts import read_prompt

SIDE, N = 28, 4  # two by two patches of 14
RED, BLUE = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (20, 30), "blue")


@pytest.fixture(scope="session")
def processor(tokenizer):
    config = PaliGemmaConfig(vision=VisionConfig(image_size=SIDE), image_token_id=tokenizer.vocab_size)
    return Processor(config, tokenizer, ImageSettings(SIDE))


def row_ids(batch, row):
    return batch.tokens[row, : batch.length[row]].tolist()


def test_layout_of_one_row(processor, tokenizer):
    batch = processor(RED, "detect circle", "<loc0000> circle")
    prefix = [2, *tokenizer.encode("detect circle"), tokenizer.newline_id]
    suffix = [*tokenizer.encode("<loc0000> circle"), 1]
    assert row_ids(batch, 0) == [tokenizer.vocab_size] * N + prefix + suffix
    assert batch.prefix_length.tolist() == [N + len(prefix)]
    assert batch.length.tolist() == [N + len(prefix) + len(suffix)]
    assert batch.image_slots[0, :N].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(batch.pixels, to_pixels(RED, SIDE)[None])


def test_types(processor):
    batch = processor([RED, [RED, BLUE]], "caption en", "a circle")
    assert batch.pixels.shape == (2, SIDE, SIDE, 3)
    assert batch.pixels.dtype == np.float32
    for array in (batch.tokens, batch.image_slots, batch.prefix_length, batch.length):
        assert array.dtype == np.int32
        assert array.shape[0] == 2


@pytest.mark.parametrize("suffixes", [None, ["no", "two blue squares", ""]])
def test_ragged_batch_equals_single_rows(processor, suffixes):
    images = [RED, [BLUE, RED], BLUE]
    prompts = ["caption en", "", "detect circle ; squares\n"]
    batch = processor(images, prompts, suffixes)
    for row, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        single = processor([image], [prompt], suffixes and [suffixes[row]], pad_to=batch.tokens.shape[1])
        np.testing.assert_array_equal(batch.tokens[row], single.tokens[0])
        assert batch.prefix_length[row] == single.prefix_length[0]
        assert batch.length[row] == single.length[0]
        slots, single_slots = batch.image_slots[row], single.image_slots[0]
        is_image = slots >= 0
        np.testing.assert_array_equal(is_image, single_slots >= 0)
        np.testing.assert_array_equal(slots[is_image] % N, single_slots[is_image] % N)
        np.testing.assert_array_equal(
            batch.pixels[slots[is_image] // N], single.pixels[single_slots[is_image] // N], "the row's own pictures"
        )


def test_padding(processor):
    batch = processor([RED, RED], ["a", "a red circle and two blue squares"], pad_to=64)
    assert batch.tokens.shape == (2, 64)
    for row in range(2):
        assert (batch.tokens[row, batch.length[row] :] == 0).all()
        assert (batch.image_slots[row, N:] == -1).all()
    longest = int(batch.length.max())
    assert processor(RED, "a red circle and two blue squares", pad_to=longest).tokens.shape == (1, longest)
    with pytest.raises(PromptError, match=f"has {longest} tokens, more than {longest - 1}"):
        processor(RED, "a red circle and two blue squares", pad_to=longest - 1)


@pytest.mark.parametrize("prompt", ["", "caption en", "a\nb", "a\n"])
def test_prompt_ends_with_one_line_break(processor, tokenizer, prompt):
    plain, ended = processor(RED, prompt.removesuffix("\n")), processor(RED, prompt.removesuffix("\n") + "\n")
    assert row_ids(plain, 0) == row_ids(ended, 0)
    assert row_ids(plain, 0)[-1] == tokenizer.newline_id


def test_line_breaks_do_not_merge(train_tokenizer, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(("\n", "\n\n", *LOC_TOKENS, *SEG_TOKENS)))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert len(tokenizer.encode("\n\n")) == 1
    processor = Processor(PaliGemmaConfig(VisionConfig(SIDE)), tokenizer, ImageSettings(SIDE))
    for prompt in ("a", "a\n", "a\n\n", "a\\n\n"):
        assert row_ids(processor(RED, prompt), 0)[-2:] == [*tokenizer.encode("a")[-1:], tokenizer.newline_id]


def test_control_text_stays_text(processor, tokenizer):
    ids = row_ids(processor(RED, "<bos><eos><pad><image>"), 0)[N:]
    assert ids[0] == 2
    assert not {0, 1, 2, tokenizer.vocab_size} & set(ids[1:])


@pytest.mark.parametrize(
    "prompt", ["<image><image>caption en", "<image><bos>caption en", "<image> caption en\n", "<bos>caption en\\n"]
)
def test_placeholders_are_taken_off(processor, prompt):
    plain = row_ids(processor([[RED, BLUE]], "caption en", "a circle"), 0)
    assert row_ids(processor([[RED, BLUE]], prompt, "a circle"), 0) == plain
    assert row_ids(processor([[RED, BLUE]], [read_prompt(prompt)], "a circle"), 0) == plain
    mixed = processor([RED, [BLUE, RED]], ["<image>caption en", prompt])
    assert mixed.prefix_length.tolist() == processor([RED, [BLUE, RED]], "caption en").prefix_length.tolist()


def test_placeholders_are_counted(processor):
    with pytest.raises(PromptError, match="begins with 2 <image> and has 1 image: write one for each, or none"):
        processor([[RED, BLUE], RED], "<image><image>caption en")


def test_one_picture_for_all_prompts(processor):
    batch = processor(RED, ["caption en", "detect circle"])
    assert batch.pixels.shape[0] == 1
    assert batch.image_slots[:, :N].tolist() == [[0, 1, 2, 3]] * 2


def test_one_picture_and_prompt_for_all_suffixes(processor):
    batch = processor(RED, "answer how many", ["two", "no", "yes"])
    assert batch.tokens.shape[0] == 3
    assert len(set(batch.prefix_length.tolist())) == 1


def test_repeated_pictures_are_loaded_once(processor, tmp_path):
    path = tmp_path / "red.png"
    RED.save(path)
    batch = processor([str(path), BLUE, [BLUE, path], np.asarray(RED)], "caption en")
    assert batch.pixels.shape[0] == 3
    assert [batch.image_slots[row, ::N][:2].tolist() for row in (0, 1, 2, 3)] == [[0, -1], [4, -1], [4, 0], [8, -1]]


def test_tokens_are_counted_as_they_are_laid_out(processor):
    row = processor.layout([[0, 1]], "<image><image>caption en", "a red circle")
    prefix = processor.count_prefix("<image><image>caption en", 2)
    assert prefix + 2 * processor.config.vision.num_tokens == row.prefix_length[0]
    assert processor.count_suffix("a red circle") == row.length[0] - row.prefix_length[0]
    assert processor.count_suffix(None) == 0


def test_layout_needs_no_pixels(processor):
    batch = processor.layout([[0], [1, 0]], "caption en", ["a", "no"])
    assert batch.pixels.shape == (0, SIDE, SIDE, 3)
    same = processor([RED, [BLUE, RED]], "caption en", ["a", "no"])
    np.testing.assert_array_equal(batch.tokens, same.tokens)
    np.testing.assert_array_equal(batch.image_slots, same.image_slots)


@pytest.mark.parametrize(
    ("images", "prompts", "suffixes", "message"),
    [
        ([RED, BLUE], ["a", "b", "c"], None, "2 images and 3 prompts do not match"),
        ([RED], ["a", "b"], None, "1 images and 2 prompts do not match"),
        (RED, ["a", "b"], ["a"], "2 prompts and 1 suffixes do not match"),
        (RED, [], None, "1 images and 0 prompts do not match"),
        ([], "a", None, "no pictures and prompts"),
        ([RED, []], "a", None, "an empty list of pictures"),
        (RED, None, None, "a prompt is a text, not NoneType"),
        (RED, ["a", 3], None, "a prompt is a text, not int: 3"),
        (RED, "a", 3, "an answer is a text, not int: 3"),
    ],
)
def test_errors(processor, images, prompts, suffixes, message):
    with pytest.raises(PromptError, match=message):
        processor(images, prompts, suffixes)


def test_unreadable_picture(processor, tmp_path):
    with pytest.raises(ImageError, match=r"none\.png does not exist"):
        processor([RED, tmp_path / "none.png"], "a")


@pytest.mark.oracle
def test_batch_equals_transformers(processor, tokenizer_dir):
    transformers = pytest.importorskip("transformers")
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    image_processor = SiglipImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    image_processor.image_seq_length = N
    reference = transformers.PaliGemmaProcessor(
        image_processor, transformers.GemmaTokenizer.from_pretrained(tokenizer_dir)
    )
    noise = np.random.default_rng(0).integers(0, 256, (2, 50, 70, 3), np.uint8)
    images = [Image.fromarray(picture) for picture in noise]
    prompts = ["<image>detect circle ; squares", "<image>caption en"]  # as theirs takes them
    suffixes = ["<loc0010><loc1023> circle", "two é"]
    expected = reference(
        text=prompts,
        images=images,
        suffix=suffixes,
        return_tensors="np",
        padding="longest",
        padding_side="right",
    )
    batch = processor(images, prompts, suffixes)
    np.testing.assert_array_equal(batch.pixels, expected["pixel_values"].transpose(0, 2, 3, 1))
    for row in range(2):
        valid = expected["attention_mask"][row] == 1
        assert row_ids(batch, row) == expected["input_ids"][row][valid].tolist()
        assert batch.prefix_length[row] == (expected["token_type_ids"][row][valid] == 0).sum()
    both = reference(text=["<image><image>answer en how many"], images=[images], return_tensors="np")
    for prompt in ("<image><image>answer en how many", "<image><image> answer en how many\\n", "answer en how many\n"):
        assert row_ids(processor([images], prompt), 0) == both["input_ids"][0].tolist()
