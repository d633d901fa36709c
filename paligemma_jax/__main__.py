"""`python -m paligemma_jax` and the command `paligemma-jax`: PaliGemma from the command line."""

import os
import sys
import warnings

from paligemma_jax.errors import Stopped
from paligemma_jax.runs import command_line


def main() -> int:
    """Run the command line of this process; returns the exit status."""
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":  # as jax sets it
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # no remarks of XLA
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # what libraries say to developers
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # an answer that this terminal cannot show is no reason to stop
    try:
        status = command_line.main(sys.argv[1:])
        sys.stdout.flush()
        return status
    except Stopped as error:
        return 128 + error.signal
    except KeyboardInterrupt:
        return 130  # as shells say it: 128 + SIGINT
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return 141  # 128 + SIGPIPE


if __name__ == "__main__":
    sys.exit(main())
