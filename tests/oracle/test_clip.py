"""CLIP's towers, tokens and pixels beside transformers', and the student's files beside torch's."""

import enum
import random
import sys
import types

import numpy as np
import pytest
from PIL import Image

from paligemma_jax import patch_vit
from paligemma_jax.errors import CheckpointError
from paligemma_jax.patch_vit.pt_file import EnumMember, PtFile
from paligemma_jax.patch_vit.tokenizer import ClipTokenizer
from tests.patch_vit.small import VARIANTS, small_clip, small_student, train_bpe
from tests.patch_vit.test_clip_tokenizer import write_pair
from tests.patch_vit.test_student import state_of

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

_TEXTS = ["a red circle", "two blue stars, one very long caption " * 20, "", "it's 3 o'clock", "star <|endoftext|> x"]
_RANGES = [  # first and last code point of scripts and signs
    *((0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x5FF), (0x600, 0x6FF)),
    *((0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x2000, 0x206F), (0x3000, 0x30FF), (0x4E00, 0x4FFF)),
    *((0xAC00, 0xADFF), (0xFF00, 0xFFEF), (0x1F300, 0x1F64F), (0x1F1E6, 0x1F1FF), (0x10FFF0, 0x10FFFF)),
]
_WORDS = [
    *(
        "a",
        "Red",
        "circle",
        "it's",
        "DON'T",
        "we'll",
        "x1y2",
        "3.14",
        "&amp;",
        "&lt;b&gt;",
        "“curly”",
        "‘q’",
        "ｆｕｌｌ",
    ),
    *("<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "e\u0301", "é", "ﬁ", "İ", "ß", "½", "²", "👨‍👩‍👧", "🇩🇪"),
    *(
        "\t",
        "\n\n",
        "\u3000",
        "\u200b",
        "\ufeff",
        "漢字",
        "한국어",
        "العربية",
        "עִבְרִית",
        "हिन्दी",
        "ไทย",
        "!!!",
        "--",
        "_",
        "/",
    ),
]


def odd_texts(count: int) -> list[str]:
    draw = random.Random(0)

    def text() -> str:
        if draw.random() < 0.5:
            first, last = draw.choice(_RANGES)
            return "".join(chr(draw.randint(first, last)) for _ in range(draw.randint(1, 40)))
        return draw.choice(("", " ")).join(draw.choice(_WORDS) for _ in range(draw.randint(1, 60)))

    return ["", " ", *_WORDS, *(text() for _ in range(count))][:count]


@pytest.fixture(scope="module")
def vocabulary():
    return train_bpe(odd_texts(3000), 2000)


@pytest.mark.parametrize("kind", ["vocab.json", "tokenizer.json"])
def test_ids_are_those_of_transformers(vocabulary, tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    if kind == "vocab.json":
        write_pair(tmp_path, *vocabulary)
    else:
        ClipTokenizer(*vocabulary, context=77).save(tmp_path)
    reference = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    texts = odd_texts(5000)
    options = {"padding": "max_length", "truncation": True, "max_length": 77}
    expected = np.array(reference(texts, **options).input_ids)
    found = ClipTokenizer.from_dir(tmp_path, 77)(texts)
    wrong = [text for text, a, b in zip(texts, found, expected, strict=True) if list(a) != list(b)]
    assert found.shape == (5000, 77) and not wrong, wrong[:5]
    assert (found[:, -1] == vocabulary[0]["<|endoftext|>"]).all()


def their_clip(directory, end: int, vocab_size: int, hidden_act: str, eos_in_config: int):
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 56, "hidden_act": hidden_act}
    text = {
        **sizes,
        "hidden_size": 24,
        "vocab_size": vocab_size,
        "eos_token_id": eos_in_config,
        "bos_token_id": end - 1,
    }
    vision = {**sizes, "hidden_size": 32, "image_size": 24, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    model = transformers.CLIPModel(config).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("hidden_act, first_release", [("quick_gelu", False), ("gelu", False), ("quick_gelu", True)])
def test_towers_are_those_of_transformers(vocabulary, tmp_path, hidden_act, first_release):
    torch = pytest.importorskip("torch")
    write_pair(tmp_path, *vocabulary)
    end = vocabulary[0]["<|endoftext|>"]
    theirs = their_clip(tmp_path, end, end + 1, hidden_act, 2 if first_release else end)
    ours = patch_vit.load_clip(tmp_path)
    tokens = ours.tokenizer(_TEXTS)
    pixels = np.random.default_rng(0).normal(size=(3, 24, 24, 3)).astype(np.float32)
    with torch.no_grad():
        ids, mask = torch.tensor(tokens, dtype=torch.long), torch.tensor(tokens != end, dtype=torch.long)
        mask[torch.arange(len(mask)), (ids == end).int().argmax(dim=1)] = (
            1  # up to the first end, as the tokenizer says
        )
        text = theirs.text_projection(theirs.text_model(ids, attention_mask=mask).pooler_output).numpy()
        vision = theirs.vision_model(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_attentions=True)
        image = theirs.visual_projection(vision.pooler_output).numpy()
        attention = vision.attentions[-1].mean(dim=1)[:, 0, 1:].numpy()
    np.testing.assert_allclose(ours.embed_text(_TEXTS), text, atol=1e-4)
    np.testing.assert_allclose(ours.embed_image(pixels), image, atol=1e-4)
    np.testing.assert_allclose(ours.cls_attention(pixels), attention, atol=1e-4)


def test_what_we_save_transformers_reads(tmp_path):
    clip = small_clip()
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    clip.save(tmp_path)
    model, processor = (
        transformers.CLIPModel.from_pretrained(tmp_path),
        transformers.CLIPProcessor.from_pretrained(tmp_path),
    )
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8))
    inputs = processor(text=["a red circle"], images=picture, return_tensors="pt", padding="max_length")
    with torch.no_grad():
        out = model(**inputs)
    cosine = clip.embed_text(["a red circle"])
    cosine = cosine / np.linalg.norm(cosine)
    np.testing.assert_allclose(cosine, out.text_embeds.numpy(), atol=1e-4)


def test_pixels_are_those_of_transformers():
    clip = small_clip()
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    rng = np.random.default_rng(0)
    for size in ((24, 24), (40, 61), (61, 40), (24, 25), (25, 24), (7, 100), (333, 77)):
        picture = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
        expected = theirs(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_allclose(clip.preprocess(picture)[0], expected, atol=1e-5, err_msg=str(size))


@pytest.fixture
def enum_member(monkeypatch):
    """A member of an enum of a module `_types`, as the original has it."""
    module = types.ModuleType("_types")
    kind = enum.Enum("TeacherModel", {"B32": "ViT-B/32"}, module="_types")
    module.TeacherModel = kind
    monkeypatch.setitem(sys.modules, "_types", module)
    return kind.B32


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_files_of_torch_save_are_read(variant, enum_member, tmp_path):
    student = small_student(variant)
    torch = pytest.importorskip("torch")
    state = {key: torch.tensor(value) for key, value in state_of(student).items()}
    parameters = [torch.nn.Parameter(value) for value in state.values()]
    optimizer = torch.optim.AdamW(parameters)
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    content = {
        "epoch": 3,
        "model_state_dict": state,
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": scheduler.state_dict(),
        "loss_y_train": [0.5],
        "loss_y_val": [0.25],
        "teacher_model_args": enum_member,
    }
    torch.save(content, tmp_path / "x.pt")
    file = PtFile(tmp_path / "x.pt")
    assert isinstance(file.content["teacher_model_args"], EnumMember)
    moment = file.content["optimizer_state_dict"]["state"][0]["exp_avg"]
    np.testing.assert_array_equal(file.read(moment), optimizer.state_dict()["state"][0]["exp_avg"])
    loaded = patch_vit.load(tmp_path / "x.pt")
    for key, value in state_of(loaded).items():
        np.testing.assert_array_equal(value, state[key])
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"format of torch before 1\.6"):
        patch_vit.load(tmp_path / "old.pt")


def test_every_dtype_and_layout_of_torch_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    whole = torch.arange(24).reshape(2, 3, 4)
    names = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
    saved = {name: whole.to(getattr(torch, name)) for name in names}
    saved |= {"part": whole[:, 1:, ::2], "transposed": whole.transpose(0, 2), "scalar": torch.tensor(3.0)}
    saved |= {"empty": torch.zeros(0, 3), "parameter": torch.nn.Parameter(torch.ones(2))}
    torch.save(saved, tmp_path / "x.pt")
    file = PtFile(tmp_path / "x.pt")
    for name, tensor in saved.items():
        np.testing.assert_array_equal(file.read(file.content[name]), tensor.detach().numpy(), err_msg=name)
    bfloat16 = torch.arange(5).to(torch.bfloat16)
    torch.save({"x": bfloat16}, tmp_path / "x.pt")
    file = PtFile(tmp_path / "x.pt")
    np.testing.assert_array_equal(file.read(file.content["x"]).astype(np.float32), bfloat16.float().numpy())
