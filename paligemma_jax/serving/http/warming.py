"""What routes run beside the engine, run once before the server is ready, so that no request waits for a compiler."""

import numpy as np
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.errors import CheckpointError
from paligemma_jax.serving.http import logs

_MASKS = (1, 2, 4, 8)  # objects of an answer; more are seldom
_MASKED = "<loc0000><loc0000><loc1023><loc1023>" + "".join(f"<seg{i:03d}>" for i in range(16))
_SIDE = 8


def warm_up(model: pj.PaliGemma) -> None:
    """Embed a picture and decode masks; what goes wrong here would in a request, and stops nothing now."""
    try:
        model.embed_image([Image.new("RGB", (_SIDE, _SIDE))])
        for count in _MASKS:
            text = " ; ".join([_MASKED] * count)
            tokens = np.array(model.processor.tokenizer.encode(text), np.int32)
            zeros = np.zeros(len(tokens), np.float32)
            timing = pj.Timing(0.0, 0.0, None, len(tokens))
            model.objects(pj.Output(text, tokens, zeros, "length", timing, zeros, zeros), (_SIDE, _SIDE))
    except CheckpointError:  # there is no mask decoder
        pass
    except Exception as error:
        logs.log("failed", error=type(error).__name__, trace=logs.trace_of(error.__traceback__))
