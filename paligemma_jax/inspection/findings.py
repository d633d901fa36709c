"""All that inspection computes for one image, prompt and answer; figures and report only show it.

Axes: N patches of the image, G of a side, L layers, P tokens of the prompt's text with <bos>, n answer tokens with
<eos>, D decoder width, k words.
"""

import dataclasses
from collections.abc import Collection

import numpy as np
from PIL import Image

from paligemma_jax.api import PaliGemma
from paligemma_jax.errors import PromptError
from paligemma_jax.inspection import logit_lens, maps
from paligemma_jax.inspection.occlusion import occlusion
from paligemma_jax.inspection.words import Word, pieces, words

KINDS = ("norms", "similarity", "attention", "occlusion", "lens", "embeddings")


@dataclasses.dataclass(frozen=True)
class TopTokens:
    """The k best tokens of the vocabulary at each position, best first: ids i32, texts and scores, all [..., k]."""

    ids: np.ndarray
    texts: np.ndarray
    scores: np.ndarray


@dataclasses.dataclass(frozen=True)
class Findings:
    """Results; None where a kind was not asked for.

    image, prompt, answer, text: the inputs; `text` is what the patches are compared with.
    answer_pieces: text of each answer token [n]. words: the answer's words as spans of these, <eos> last.
    text_pieces: text of each token after the patches [P + n - 1], from <bos> to the last one before <eos>.
    logprobs: log-probability of each answer token, f32 [n].
    soft_tokens: f32 [N, D]. norms: f32 [N].
    table_similarity: f32 [N]. hidden_similarity: f32 [L + 1, N]. patch_similarity: f32 [N, N]. See `maps`.
    attention: attention probabilities of each token, renormalized over the patches, f32 [L, heads, n, N].
    occlusion: f32 [n, N]; see `occlusion`.
    nearest_tokens: tokens nearest to each soft token [N, k], with cosine similarities.
    patch_lens: logit lens at each patch [L + 1, N, k], with probabilities. text_lens: the same at each of `text_pieces`
      [L + 1, P + n - 1, k]; the last n of them predict the answer.
    """

    image: Image.Image
    prompt: str
    answer: str
    text: str
    answer_pieces: list[str]
    text_pieces: list[str]
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
    nearest_tokens: TopTokens | None = None
    patch_lens: TopTokens | None = None
    text_lens: TopTokens | None = None

    def grid(self, values: np.ndarray) -> np.ndarray:
        """Values of patches [..., N] as grids [..., G, G]."""
        return maps.grid(values, len(self.norms))[..., 0, :, :]

    def word_means(self, values: np.ndarray) -> np.ndarray:
        """Means over each word's tokens of values [..., n, N]: [..., words, N]."""
        return np.stack([values[..., word.start : word.stop, :].mean(axis=-2) for word in self.words], axis=-2)


def inspect_answer(
    model: PaliGemma,
    image: Image.Image,
    prompt: str,
    answer: str,
    text: str,
    kinds: Collection[str] = KINDS,
    num_words: int = 5,
    occlusion_size: int | None = None,
    occlusion_way: str = "pixels",
) -> Findings:
    """Compute the findings of one prompt with its answer.

    Args:
      answer: the model's own, or another one (teacher forcing).
      text: what patches are compared with. Its hidden states are those of its words in the prompt where it occurs
        there, else those it has as a prompt of its own.
      kinds: which of KINDS; `norms` and `embeddings` cost nothing.
      num_words: how many tokens of the vocabulary are listed for each position, k.
      occlusion_size, occlusion_way: see `occlusion`.

    Raises:
      PromptError, ConfigError: see the message.
    """
    tokenizer, num_layers = model.processor.tokenizer, model.config.text.num_layers
    trace = model.trace(image, prompt, answer)
    said_ids = trace.tokens[trace.prefix_length :].tolist()
    at_patches = np.flatnonzero(trace.patches >= 0)
    at_text = np.arange(at_patches[-1] + 1, len(trace.tokens) - 1)
    soft_tokens = np.asarray(trace.soft_tokens[0], np.float32)
    found: dict[str, object] = {}
    if "similarity" in kinds:
        found["table_similarity"] = maps.table_similarity(model, soft_tokens, text)
        try:
            source, span = trace, maps.find_in_prompt(trace, tokenizer, text)
        except PromptError:
            source = model.trace(None, text, "", image_embeddings=trace.soft_tokens)
            span = maps.find_in_prompt(source, tokenizer, text)
        found["hidden_similarity"] = maps.hidden_similarity(source, span)
        found["patch_similarity"] = maps.patch_similarity(trace)
    if "attention" in kinds:
        found["attention"] = maps.attention(trace, renormalize=True)
    if "occlusion" in kinds:
        found["occlusion"] = occlusion(model, image, prompt, answer, occlusion_size, occlusion_way)
    if "lens" in kinds:
        found["nearest_tokens"] = _decode(model, *logit_lens.nearest_tokens(model, soft_tokens, num_words))
        for key, positions in (("patch_lens", at_patches), ("text_lens", at_text)):
            found[key] = _decode(model, *logit_lens.top_tokens(model, trace.hidden[:, positions], num_words))
    end = Word("<eos>", len(said_ids) - 1, len(said_ids))
    return Findings(
        image=image,
        prompt=prompt,
        answer=answer,
        text=text,
        answer_pieces=[*pieces(tokenizer, said_ids[:-1]), "<eos>"],
        text_pieces=["<bos>", *pieces(tokenizer, trace.tokens[at_text[1:]].tolist())],
        words=[*words(tokenizer, said_ids), end],
        logprobs=trace.logprobs,
        num_layers=num_layers,
        soft_tokens=soft_tokens,
        norms=maps.norms(soft_tokens),
        **found,
    )


def _decode(model: PaliGemma, ids: np.ndarray, scores: np.ndarray) -> TopTokens:
    """Top tokens with their texts; <bos> and <eos>, which decode to nothing, are named."""
    named = {model.config.bos_token_id: "<bos>"} | dict.fromkeys(model.config.eos_token_ids, "<eos>")
    known, inverse = np.unique(ids, return_inverse=True)
    texts = np.array([named.get(int(id_)) or model.processor.tokenizer.decode([id_]) for id_ in known], object)
    return TopTokens(ids, texts[inverse].reshape(ids.shape), scores)
