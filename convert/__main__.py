"""`python -m convert`: the same as `paligemma-jax-convert`."""

import sys

from paligemma_jax.runs.convert import main

if __name__ == "__main__":
    sys.exit(main())
