"""PaliGemma from the command line: python main.py --config=configs/mix224.py --config.prompt="detect cat"."""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's own remarks; it looks when jax is imported

try:
    from paligemma_jax.__main__ import main
except KeyboardInterrupt:
    sys.exit(130)
except ModuleNotFoundError as error:
    if (error.name or "").startswith("paligemma_jax"):
        raise
    sys.exit(f"error: {error.name} is missing: pip install -r requirements.txt")

if __name__ == "__main__":
    sys.exit(main())
