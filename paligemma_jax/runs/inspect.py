"""config.run=inspect: what one answer rests on, as pictures, arrays and a page to explore."""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.errors import CheckpointError, ConfigError, ImageError
from paligemma_jax.files import expanded, replacing, write_array, write_json, write_text
from paligemma_jax.inspection import embeddings, rendering
from paligemma_jax.inspection.figures import Figure, figures
from paligemma_jax.inspection.findings import KINDS, Findings, TopTokens, inspect_answer
from paligemma_jax.inspection.maps import head_name, layer_name, select_head, select_layer
from paligemma_jax.inspection.occlusion import WAYS, squares
from paligemma_jax.inspection.report import report
from paligemma_jax.models import mask_vae
from paligemma_jax.processing.fetch import label
from paligemma_jax.processing.find import find_images
from paligemma_jax.processing.image import load_image
from paligemma_jax.runs import environment, settings
from paligemma_jax.runs import model as models
from paligemma_jax.runs.drawings import Drawings, claim
from paligemma_jax.runs.notes import note
from paligemma_jax.tasks.prompts import plain, read_prompt
from paligemma_jax.tasks.segmentation import attach_masks

_MAX_WORDS = 100
_UNUSED = ("prompts_file", "split_classes", "prompt_form", "stream", "export", "save_embeddings", "load_embeddings")


def run(config: ConfigDict) -> int:
    """Answer, look inside, and write what was seen."""
    alone, directory = config.embeddings_file, expanded(config.output_dir)
    if not config.output_dir:
        raise ConfigError("output_dir is empty: give a folder for the maps")
    if alone:
        return _draw_embeddings(config, expanded(alone), directory)
    kinds = _kinds(config)
    settings.refuse(config, _UNUSED, "inspect looks into one answer to one prompt about one picture")
    layer, head, scale = _number(config, "layer"), _number(config, "head"), settings.loc_scale(config)
    options = settings.generate_options(config)
    text = _text(config) if "similarity" in kinds else config.text
    models.check_weights(config)
    name, picture = _picture(config)
    drawings = claim(config, directory)  # a bad place is known before the work
    profile = environment.profiled(config)

    warm_up = [] if config.answer else [pj.Request((picture,), read_prompt(config.prompt), options)]
    model = models.load(config, warm_up)
    _check(model.config, kinds, layer, head, config.occlusion_size)
    with profile:
        answer = config.answer or model.generate(picture, config.prompt, options=options)[0].text
        hiding = (config.occlusion_size or None, config.occlusion_way)
        findings = inspect_answer(model, picture, config.prompt, answer, text, kinds, config.words, *hiding)
    made = [figure for figure in figures(findings, layer, head) if figure.name.partition("_")[0] in kinds]
    drawings.begin()
    files = [_write(figure, drawings) for figure in made]
    if "lens" in kinds:
        files.append(drawings.own([directory / "lens.json"]))
        write_json(files[-1][0], _lens(findings))
    if config.report:
        files.append(drawings.own([directory / "report.html"]))
        titled = {figure.title: figure.image for figure in made}
        objects = _objects(model, findings, scale)
        page = report(findings, titled, f"{config.checkpoint}, {name}", head, objects, scale)
        write_text(files[-1][0], page)
    print("\n".join([answer, *_summary(findings, layer, head), *map(_wrote, files)]), flush=True)
    return 0


def _objects(model: pj.PaliGemma, findings: Findings, loc_scale: int) -> list[pj.Detection]:
    """The objects of the answer, with masks if they can be decoded."""
    size = findings.image.size
    found, _ = pj.parse(findings.answer, size, loc_scale, read_prompt(findings.prompt).labels)
    try:
        return attach_masks(found, size, lambda codes: mask_vae.decode(model.mask_decoder(), codes))
    except CheckpointError as error:
        note(f"note: boxes only, {error}")
        return found


def _kinds(config: ConfigDict) -> list[str]:
    """What is asked for, and that its settings are possible."""
    kinds = [kind.strip() for kind in config.maps.split(",") if kind.strip()]
    for kind in kinds:
        if kind not in KINDS:
            hint = settings.did_you_mean(kind, KINDS)
            raise ConfigError(f"maps={config.maps!r} names {kind!r}, which is not known{hint}")
    if not kinds:
        raise ConfigError(f"maps is empty: give some of {', '.join(KINDS)}, with commas between")
    if not 1 <= config.words <= _MAX_WORDS:
        raise ConfigError(f"words={config.words} is not possible: give an integer from 1 to {_MAX_WORDS}")
    if config.occlusion_size < 0:
        raise ConfigError(f"occlusion_size={config.occlusion_size} is not possible: give a side in patches, or 0")
    settings.one_of(config, "occlusion_way", WAYS)
    if settings.one_of(config, "format", ("text", "json")) == "json":
        raise ConfigError("inspect writes files and prints text: set format=text")
    return kinds


def _number(config: ConfigDict, key: str) -> int | None:
    """A number from 1 on as one from 0 on; None for the mean."""
    value = str(config[key]).strip()
    if value == "mean":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{key}={value!r} is not possible: give mean, or an integer of at least 1")
    return int(value) - 1


def _check(geometry: pj.PaliGemmaConfig, kinds: list[str], layer: int | None, head: int | None, size: int) -> None:
    """What is asked for is there in this model."""
    for key, value, count in (("layer", layer, geometry.text.num_layers), ("head", head, geometry.text.num_heads)):
        if value is not None and value >= count:
            raise ConfigError(f"{key}={value + 1} is not possible: this model has {count}, give mean or 1 to {count}")
    if "occlusion" in kinds:
        squares(embeddings.grid_side(geometry.vision.num_tokens), size or None)


def _text(config: ConfigDict) -> str:
    """What patches are compared with: as given, or the first thing that the prompt names after its first word."""
    words = plain(config.prompt, num_images=1).strip().partition(" ")
    text = config.text.strip() or words[2].partition(";")[0].strip() or words[0]
    if not text:
        raise ConfigError("there is no text to compare patches with: give text or a prompt, or leave similarity out")
    return text


def _picture(config: ConfigDict) -> tuple[str, Image.Image]:
    passed_over: list[str] = []
    names = find_images(config.image, tell=passed_over.append)
    if len(names) > 1:
        raise ImageError(f"{config.image} holds {len(names)} pictures: inspect looks at one, give its path")
    for line in passed_over:
        note(line)
    return label(names[0]), load_image(names[0])


def _write(figure: Figure, drawings: Drawings) -> list[Path]:
    """Write a plate as a picture and its arrays as plain .npy; returns the files."""
    names = [f"{figure.name}.png", *(f"{name}.npy" for name in figure.arrays)]
    files = drawings.own(drawings.directory / name for name in names)
    with replacing(files[0]) as temporary:
        figure.image.save(temporary, format="PNG")
    for file, values in zip(files[1:], figure.arrays.values(), strict=True):
        write_array(file, values)
    return files


def _wrote(files: list[Path]) -> str:
    return f"wrote {', '.join([str(files[0]), *(file.name for file in files[1:])])}"


def _lens(findings: Findings) -> dict[str, Any]:
    """Words for every patch, and after every token of the prompt and the answer."""
    side = embeddings.grid_side(len(findings.norms))
    in_prompt = len(findings.text_pieces) - len(
        findings.answer_pieces
    )  # the prompt's last token gives the answer's first

    def ranked(words: TopTokens, name: str, place: Any) -> list[dict[str, Any]]:
        pairs = zip(words.texts[place], words.scores[place], strict=True)
        return [{"text": text, name: round(float(score), 5)} for text, score in pairs]

    def layers(words: TopTokens, place: int) -> list[list[dict[str, Any]]]:
        return [ranked(words, "probability", (layer, place)) for layer in range(findings.num_layers + 1)]

    return {
        "prompt": findings.prompt,
        "answer": findings.answer,
        "patches": [
            {
                "row": i // side,
                "column": i % side,
                "norm": round(float(findings.norms[i]), 5),
                "nearest": ranked(findings.nearest_tokens, "cosine", i),
                "layers": layers(findings.patch_lens, i),
            }
            for i in range(len(findings.norms))
        ],
        "prompt_tokens": [
            {"after": text, "layers": layers(findings.text_lens, i)}
            for i, text in enumerate(findings.text_pieces[: in_prompt + 1])
        ],
        "tokens": [
            {"text": text, "logprob": round(float(logprob), 5), "layers": layers(findings.text_lens, in_prompt + i)}
            for i, (text, logprob) in enumerate(zip(findings.answer_pieces, findings.logprobs, strict=True))
        ],
    }


def _summary(findings: Findings, layer: int | None, head: int | None) -> list[str]:
    """Where each map that is shown is highest."""
    which = layer_name(layer)
    lines = [
        f"log-probability of the answer: {findings.logprobs.sum():.3g}",
        _peak("norm of a soft token", findings.norms),
    ]
    if findings.hidden_similarity is not None:
        lines.append(_peak(f'similarity to "{findings.text}" in the table', findings.table_similarity))
        shown = select_layer(findings.hidden_similarity, findings.num_layers, layer)
        lines.append(_peak(f'similarity to "{findings.text}", {which}', shown))
    if findings.attention is not None:
        shown = select_layer(select_head(findings.attention, head), findings.num_layers, layer).mean(axis=0)
        lines.append(_peak(f"attention of the answer, {which}, {head_name(head)}", shown))
    if findings.occlusion is not None:
        lines.append(_peak("log-probability lost where hidden", findings.occlusion.sum(axis=0)))
    return lines


def _peak(name: str, values: np.ndarray) -> str:
    row, column = divmod(int(values.argmax()), embeddings.grid_side(len(values)))
    return f"{name}: highest in row {row + 1}, column {column + 1}: {values.max():.3g}"


def _draw_embeddings(config: ConfigDict, path: Path, directory: Path) -> int:
    """The heat map of a file of embeddings."""
    values = embeddings.load(path)
    drawings = claim(config, directory)
    drawings.begin()
    files = _write(Figure(path.stem, path.stem, rendering.embeddings(values, path.name)), drawings)
    low, high = rendering.extremes(values)
    print(f"{' x '.join(map(str, values.shape))} numbers from {low:.3g} to {high:.3g}\n{_wrote(files)}", flush=True)
    return 0
