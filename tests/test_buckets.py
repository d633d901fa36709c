"""Few sizes, and little padding."""

from paligemma_jax.buckets import power_of_two, sequence


def test_powers_of_two():
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 17)] == [1, 2, 4, 4, 8, 32]


def test_sequences_are_padded_little_to_few_lengths():
    lengths = range(1, 5000)
    padded_lengths = [sequence(length) for length in lengths]
    assert all(padded >= length for length, padded in zip(lengths, padded_lengths, strict=True))
    assert padded_lengths == sorted(padded_lengths)
    assert all(sequence(padded) == padded for padded in padded_lengths)
    assert all(
        padded < length * 17 / 16 for length, padded in zip(lengths, padded_lengths, strict=True) if length > 256
    )
    assert len(set(padded_lengths[256:512])) <= 16
