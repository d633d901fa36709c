"""Log-probabilities of tokens as OpenAI's APIs write them."""

from collections.abc import Sequence
from typing import Any

from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.serving.shown import TopLogprobs

_LEAST = -9999.0  # for what is impossible; JSON has no infinity


def written(
    tokenizer: Tokenizer, tokens: Sequence[int], logprobs: Sequence[float], top: TopLogprobs | None
) -> list[dict[str, Any]]:
    """Each token with a text, which <eos> has not, and the most likely ones in its place [n, K], those without too."""
    found = []
    for number, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
        if tokenizer.token_bytes(token):
            best = [] if top is None else zip(top.ids[number], top.logprobs[number], strict=True)
            others = [_token(tokenizer, *each) for each in best]
            found.append(_token(tokenizer, token, logprob) | {"top_logprobs": others})
    return found


def _token(tokenizer: Tokenizer, id_: int, logprob: float) -> dict[str, Any]:
    """A token; one without text, such as <eos>, has its name and no bytes."""
    text = tokenizer.token_bytes(id_)
    name = text.decode("utf-8", "replace") if text else tokenizer.name(id_)
    return {"token": name, "bytes": list(text), "logprob": max(float(logprob), _LEAST)}
