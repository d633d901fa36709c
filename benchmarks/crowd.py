"""How far distributions of the next token of rows among others are from those of the same rows alone."""

import dataclasses
from typing import Any

import jax
import numpy as np

import paligemma_jax as pj
from paligemma_jax.engine import steps
from paligemma_jax.serving.job import lay_out
from paligemma_jax.serving.programs import Programs
from paligemma_jax.serving.settings import EngineSettings

_KL_STEPS = 4  # decode calls before distributions are compared


def compare_distributions(
    model: pj.PaliGemma, programs: Programs, requests: list[pj.Request], settings: EngineSettings
) -> list[float]:
    """KL divergences of next-token distributions of rows in a crowd from those of the same rows alone.

    Rows whose tokens differ before are left out.
    """
    laid = [lay_out(model, programs, request, settings) for request in requests]
    alone = Programs(model, dataclasses.replace(settings, num_slots=1))
    crowd = _logits(model, programs, laid)
    divergences = []
    for each, (said, logits) in zip(laid, crowd, strict=True):
        [(same, reference)] = _logits(model, alone, [each])
        if np.array_equal(said, same):
            divergences.append(divergence(reference, logits))
    return divergences


def divergence(reference: np.ndarray, logits: np.ndarray) -> float:
    """KL divergence of the distribution that some logits [V] stand for from that of a reference."""
    p, q = (_log_softmax(x.astype(np.float64)) for x in (reference, logits))
    return float(np.sum(np.exp(p) * (p - q)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """In numpy, as float32 has errors of the size that is measured."""
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def _logits(model: pj.PaliGemma, programs: Programs, laid: list[Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens of each row so far and logits [V] of the next one, all rows being in one state."""
    size = programs.usual if all(each.usual for each in laid) else programs.largest
    state = programs.blank(size)
    for slot, each in enumerate(laid):
        soft = [programs.embed(pixels[None])[0] for _, pixels in each.images]
        state, _ = programs.admit(state, size, [slot], [each.prompt], [soft], [each.options], [each.table])
    needs = frozenset().union(*(each.needs for each in laid))
    for _ in range(_KL_STEPS):
        state, _ = programs.decode(state, size, needs)
    logits, _ = _next(model.params, model.config, state.last, state.next_position, state)
    tokens, step, logits = jax.device_get((state.tokens, state.step, logits))
    return [(tokens[row, : step[row]], logits[row, 0]) for row in range(len(laid))]


_next = jax.jit(steps.next_logits, static_argnums=1)
