"""Arithmetic: the only place that knows platforms, kernels, number formats and library versions."""

from paligemma_jax.ops.attention import (
    Cache,
    KeyValues,
    attend,
    attention_probabilities,
    num_cache_slots,
    pad_cache,
    soft_cap,
    write_cache,
)
from paligemma_jax.ops.autotune import Table, relative_cost
from paligemma_jax.ops.compilation import compile_traced, compiled
from paligemma_jax.ops.lora import Lora, row_norms
from paligemma_jax.ops.norms import along_last, layer_norm, rms_norm
from paligemma_jax.ops.quantization import FORMATS, quantize, quantized_shape
from paligemma_jax.ops.reductions import argmax
from paligemma_jax.ops.selection import FUSED, prepare, prepare_leaf, tune, unprepare
from paligemma_jax.ops.target import Target, processor
from paligemma_jax.ops.weights import (
    Int4,
    Int8,
    Weight,
    dequantize,
    is_weight,
    linear,
    materialize,
    take_rows,
    with_zero_point,
)
