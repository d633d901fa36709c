"""Sizes that arrays are padded to, so that few programs are compiled."""


def power_of_two(count: int) -> int:
    """The smallest one that is at least `count`, which is at least 1."""
    return 1 << (int(count) - 1).bit_length()


def sequence(length: int) -> int:
    """Smallest allowed sequence length that holds `length` tokens.

    Allowed are the multiples of 16 up to 512, of 32 up to 1024, of 64 up to 2048 and so on: prompts of like length
    share a program, and beyond 256 tokens padding adds less than 1/16.
    """
    step = 1 << max(4, (length - 1).bit_length() - 5)
    return -(-length // step) * step
