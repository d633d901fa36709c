"""How the next token is chosen from logits: greedily, or at random from a filtered distribution.

Axes: B rows, V vocabulary, C tokens of a row.
"""

import dataclasses
import math
import operator
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from paligemma_jax.errors import SamplingError
from paligemma_jax.generation import grammar as grammars
from paligemma_jax.processing.tokenizer import LOC_TOKENS

NEAR = 32  # locations to both sides that count as the same place: 3% of a picture's side


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of a generation; the defaults are greedy decoding.

    temperature: 0 takes the likeliest token; above, logits are divided by it and a token is drawn.
    top_k: draw among the k likeliest tokens only; 0 means all.
    top_p: draw among the fewest tokens that hold this probability together (arXiv 1904.09751); 1 means all.
    min_p: draw among tokens at least this much as probable as the likeliest (arXiv 2407.01082); 0 means all.
    num_beams: 1, or the number of beams of a beam search, which does not sample.
    seed: of the random draws; the same seed, prompt and picture give the same answer, in whatever batch.

    The filters apply in this order to the distribution after temperature; tokens as likely as the last one kept are
    kept too.

    Raises:
      SamplingError: a value without meaning, or beams together with a temperature.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    num_beams: int = 1
    seed: int = 0

    def __post_init__(self):
        _require(_is_real(self.temperature) and self.temperature >= 0, self, "temperature", "a number of at least 0")
        _require(_is_real(self.top_p) and 0 < self.top_p <= 1, self, "top_p", "above 0 and at most 1 (all)")
        _require(_is_real(self.min_p) and 0 <= self.min_p <= 1, self, "min_p", "between 0 (all) and 1")
        for name, least, most in (("top_k", 0, None), ("num_beams", 1, None), ("seed", 0, 2**32 - 1)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least, most))
        if self.num_beams > 1 and self.temperature > 0:
            raise SamplingError(
                f"num_beams={self.num_beams} with temperature={self.temperature}: beam search does not sample, "
                "set one of them back to its default"
            )

    def rule(self) -> "Rule":
        """The part of the settings that compiled programs take."""
        if self.temperature == 0:
            return Rule()
        smallest = float(jnp.finfo(jnp.float32).tiny)
        return Rule(
            temperature=jnp.float32(max(self.temperature, smallest)),
            top_k=jnp.float32(self.top_k) if self.top_k else None,
            top_p=jnp.float32(max(self.top_p, smallest)) if self.top_p < 1 else None,
            min_p=jnp.float32(self.min_p) if self.min_p else None,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rule:
    """How to choose, as arrays: new values need no new program. None costs nothing; all None is greedy.

    temperature, top_k, top_p, min_p: scalars of `Sampling`.
    loc_start: id of the first location token, for `Odds`.
    grammar: what may come next.
    """

    temperature: jax.Array | None = None
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None
    min_p: jax.Array | None = None
    loc_start: jax.Array | None = None
    grammar: grammars.Grammar | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Odds:
    """What the model thinks of tokens [...], by its own distribution: over all of V, at temperature 1, unfiltered.

    logprobs: f32, log-probability of each.
    near: f32, probability of the locations at most `NEAR` away from one that is a location; else 0.
    expected: f32, mean location under the distribution over locations, in 0..1023; 0 when `Rule.loc_start` is None.
    """

    logprobs: jax.Array
    near: jax.Array
    expected: jax.Array


def whole_number(name: str, value: object, least: int, most: int | None = None) -> int:
    """`value` as an int, which numpy's integers become; SamplingError when it is none or out of range."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise SamplingError(f"{name}={value!r} is not possible: give a whole number {allowed}")
    return number


def row_keys(seed: int, requests: Sequence[Hashable]) -> jax.Array:
    """One random key per row [B], independent of the row's place and neighbours.

    Equal requests in one batch get different keys: the n-th copy folds n into the key of `seed`.
    """
    seen: Counter[Hashable] = Counter()
    copies = []
    for request in requests:
        copies.append(seen[request])
        seen[request] += 1
    return _fold_in_each(jnp.uint32(seed), jnp.array(copies, jnp.uint32))


@jax.jit
def _fold_in_each(seed: jax.Array, numbers: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)


def choose(
    logits: jax.Array,
    keys: jax.Array,
    step: jax.Array,
    rule: Rule,
    num_allowed: int,
    place: grammars.Place | None = None,
) -> tuple[jax.Array, Odds]:
    """The next token of each row, always one below `num_allowed`.

    Args:
      logits: [B, V] float32.
      keys: [B] random keys of the rows.
      step: how many tokens were chosen before, one number or one per row [B]; folded into the keys.
      place: of the rows in the rule's grammar, if it has one.

    Returns:
      tokens i32 [B], and their odds [B].
    """
    allowed = forbid(logits, num_allowed)
    if rule.grammar is not None:
        allowed = grammars.allow(rule.grammar, place, step, allowed)
    if rule.temperature is None:
        tokens = first_largest(allowed)
    else:
        step_keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(step, keys.shape))
        tokens = jax.vmap(jax.random.categorical)(step_keys, filter_logits(allowed, rule))
    tokens = tokens.astype(jnp.int32)
    return tokens, jax.tree.map(lambda x: x[:, 0], odds(logits, tokens[:, None], rule.loc_start))


def first_largest(x: jax.Array) -> jax.Array:
    """What jnp.argmax says of rows [B, V] without NaN, in a tenth of its time: XLA on CPU takes pairs one by one."""
    x = lax.optimization_barrier(x)  # worked out twice, numbers might differ in their last bit
    largest = jnp.max(x, axis=-1, keepdims=True)
    index = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    found = jnp.min(jnp.where(x == largest, index, x.shape[-1]), axis=-1)
    return jnp.where(found == x.shape[-1], 0, found)  # of NaN, nothing is the largest


def move(rule: Rule, place: grammars.Place | None, tokens: jax.Array) -> grammars.Place | None:
    """Where rows stand in the grammar after one more token each [B]; None without a grammar."""
    return None if rule.grammar is None else grammars.move(rule.grammar, place, tokens)


def odds(logits: jax.Array, tokens: jax.Array, loc_start: jax.Array | None) -> Odds:
    """What logits [B, V] say of some tokens [B, C]: odds [B, C]."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    logprobs = jnp.take_along_axis(logits, tokens, axis=-1) - total
    if loc_start is None:
        return Odds(logprobs, jnp.zeros_like(logprobs), jnp.zeros_like(logprobs))
    count = len(LOC_TOKENS)
    locations = lax.dynamic_slice_in_dim(logits, loc_start, count, axis=1)
    probabilities = jnp.exp(locations - total)
    place = jnp.arange(count)[None]
    expected = jnp.sum(jax.nn.softmax(locations, axis=1) * place, axis=1, keepdims=True)
    chosen = (tokens - loc_start)[:, :, None]
    near = jnp.sum(jnp.where(jnp.abs(place[:, None] - chosen) <= NEAR, probabilities[:, None], 0.0), axis=2)
    is_location = (tokens >= loc_start) & (tokens < loc_start + count)
    return Odds(logprobs, jnp.where(is_location, near, 0.0), jnp.broadcast_to(expected, logprobs.shape))


def forbid(logits: jax.Array, num_allowed: int) -> jax.Array:
    """Logits [..., V] with those of the ids from `num_allowed` on set to -inf."""
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(ids < num_allowed, logits, -jnp.inf)


def token_logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probability of `tokens` [...] under `logits` [..., V]."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def filter_logits(logits: jax.Array, rule: Rule) -> jax.Array:
    """Logits [B, V] of the distribution to draw from; -inf for what temperature, top-k, top-p and min-p leave out."""
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / rule.temperature  # at most 0: no overflow
    if rule.top_k is not None:
        logits = _keep_largest(logits, jnp.ones_like, rule.top_k)
    if rule.top_p is not None:
        logits = _keep_largest(logits, lambda x: jax.nn.softmax(x, axis=-1), rule.top_p)
    if rule.min_p is not None:
        logits = jnp.where(logits >= jnp.log(rule.min_p), logits, -jnp.inf)
    return logits


def _keep_largest(logits: jax.Array, weigh: Callable[[jax.Array], jax.Array], target: jax.Array) -> jax.Array:
    """Keep the largest of each row, just as many as weigh `target` together.

    The threshold is built bit by bit in the order of floats: exact, and far cheaper than sorting a vocabulary.
    """
    weights = weigh(logits)
    bits = lax.bitcast_convert_type(logits, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order = jnp.where(bits >= sign, ~bits, bits | sign)  # unsigned integers that sort as the floats do

    def set_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        higher = threshold | (sign >> i.astype(jnp.uint32))
        mass = jnp.sum(jnp.where(order >= higher, weights, 0.0), axis=-1, keepdims=True)
        return jnp.where(mass >= target, higher, threshold)

    threshold = lax.fori_loop(0, 32, set_bit, jnp.zeros((logits.shape[0], 1), jnp.uint32))
    return jnp.where(order >= threshold, logits, -jnp.inf)


def _require(holds: bool, sampling: Sampling, name: str, allowed: str) -> None:
    if not holds:
        raise SamplingError(f"{name}={getattr(sampling, name)!r} is not possible: give {allowed}")


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
