"""Kernels that XLA on CPU needs spelt out, each with what it gains and when it can go."""
