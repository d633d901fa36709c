"""Everything that can be seen of one prompt about one picture, worked out once and shown in several ways.

Axes: N patches of the picture, G of a side, L layers, P tokens of the prompt's text with <bos>, n answer tokens with
<eos>, D decoder width, k words.
"""

import dataclasses
from collections.abc import Collection

import numpy as np
from PIL import Image

from paligemma_jax.errors import PromptError
from paligemma_jax.inspection import lens, maps
from paligemma_jax.inspection.occlusion import occlusion
from paligemma_jax.inspection.words import Word, pieces, words
from paligemma_jax.pipeline import PaliGemma

KINDS = ("norms", "similarity", "attention", "occlusion", "lens", "embeddings")


@dataclasses.dataclass(frozen=True)
class Ranked:
    """Tokens for something, best first: ids i32, texts and how well they fit, all [..., k]."""

    ids: np.ndarray
    texts: np.ndarray
    scores: np.ndarray


@dataclasses.dataclass(frozen=True)
class Findings:
    """What was seen; None for what was not asked for.

    picture, prompt, answer, text: what was asked, what was said, and what the patches are compared with.
    pieces: text of each answer token [n]. words: the answer's words, as spans of these, and at last <eos>.
    logprobs: f32 [n].
    soft_tokens: f32 [N, D]. norms: f32 [N].
    table_similarity: f32 [N]. hidden_similarity: f32 [L + 1, N]. patch_similarity: f32 [N, N]. See `maps`.
    attention: f32 [L, heads, n, N], of each token over the patches alone, so that it sums to one.
    occlusion: f32 [n, N]; see `occlusion`.
    nearest: words nearest to each soft token [N, k], with cosines.
    said: words that each layer would say at each patch [L + 1, N, k], with probabilities. said_after: the same after
      each token of the prompt's text and of the answer [L + 1, P + n - 1, k]; the last n of them give the answer.
    read: text of these tokens [P + n - 1], from <bos> to the last one before <eos>.
    """

    picture: Image.Image
    prompt: str
    answer: str
    text: str
    pieces: list[str]
    read: list[str]
    words: list[Word]
    logprobs: np.ndarray
    num_layers: int
    soft_tokens: np.ndarray
    norms: np.ndarray
    table_similarity: np.ndarray | None = None
    hidden_similarity: np.ndarray | None = None
    patch_similarity: np.ndarray | None = None
    attention: np.ndarray | None = None
    occlusion: np.ndarray | None = None
    nearest: Ranked | None = None
    said: Ranked | None = None
    said_after: Ranked | None = None

    def grid(self, values: np.ndarray) -> np.ndarray:
        """Values of patches [..., N] as squares [..., G, G]."""
        return maps.grid(values, len(self.norms))[..., 0, :, :]

    def of_words(self, values: np.ndarray) -> np.ndarray:
        """Means over each word's tokens of values [..., n, N]: [..., words, N]."""
        return np.stack([values[..., word.start : word.stop, :].mean(axis=-2) for word in self.words], axis=-2)


def look(
    model: PaliGemma,
    picture: Image.Image,
    prompt: str,
    answer: str,
    text: str,
    kinds: Collection[str] = KINDS,
    num_words: int = 5,
    occlusion_size: int | None = None,
    occlusion_way: str = "pixels",
) -> Findings:
    """Look inside one prompt with its answer.

    Args:
      answer: the model's own, or another one, whose every token is then taken as said.
      text: what patches are compared with. Where the prompt holds it, its hidden states are those of its words there;
        else those it has in a prompt of its own.
      kinds: which of KINDS; `norms` and `embeddings` cost nothing.
      num_words: how many words of the vocabulary are named for each thing.
      occlusion_size, occlusion_way: see `occlusion`.

    Raises:
      PromptError, ConfigError: see the message.
    """
    tokenizer, num_layers = model.processor.tokenizer, model.config.text.num_layers
    trace = model.trace(picture, prompt, answer)
    said_ids = trace.tokens[trace.prefix_length :].tolist()
    at_patches = np.flatnonzero(trace.patches >= 0)
    at_text = np.arange(at_patches[-1] + 1, len(trace.tokens) - 1)
    soft_tokens = np.asarray(trace.soft_tokens[0], np.float32)
    found: dict[str, object] = {}
    if "similarity" in kinds:
        found["table_similarity"] = maps.table_similarity(model, soft_tokens, text)
        try:
            place, where = trace, maps.find_in_prompt(trace, tokenizer, text)
        except PromptError:
            place = model.trace(None, text, "", image_embeddings=trace.soft_tokens)
            where = maps.find_in_prompt(place, tokenizer, text)
        found["hidden_similarity"] = maps.hidden_similarity(place, where)
        found["patch_similarity"] = maps.patch_similarity(trace)
    if "attention" in kinds:
        found["attention"] = maps.attention(trace, renormalise=True)
    if "occlusion" in kinds:
        found["occlusion"] = occlusion(model, picture, prompt, answer, occlusion_size, occlusion_way)
    if "lens" in kinds:
        found["nearest"] = _ranked(model, *lens.nearest(model, soft_tokens, num_words))
        for key, positions in (("said", at_patches), ("said_after", at_text)):
            found[key] = _ranked(model, *lens.layers(model, trace.hidden[:, positions], num_words))
    end = Word("<eos>", len(said_ids) - 1, len(said_ids))
    return Findings(
        picture=picture,
        prompt=prompt,
        answer=answer,
        text=text,
        pieces=[*pieces(tokenizer, said_ids[:-1]), "<eos>"],
        read=["<bos>", *pieces(tokenizer, trace.tokens[at_text[1:]].tolist())],
        words=[*words(tokenizer, said_ids), end],
        logprobs=trace.logprobs,
        num_layers=num_layers,
        soft_tokens=soft_tokens,
        norms=maps.norms(soft_tokens),
        **found,
    )


def _ranked(model: PaliGemma, ids: np.ndarray, scores: np.ndarray) -> Ranked:
    """The texts of some ids; the beginning and the end of a text have none, but names."""
    named = {model.config.bos_token_id: "<bos>", model.config.eos_token_id: "<eos>"}
    known, places = np.unique(ids, return_inverse=True)
    texts = np.array([named.get(int(id_)) or model.processor.tokenizer.decode([id_]) for id_ in known], object)
    return Ranked(ids, texts[places].reshape(ids.shape), scores)
