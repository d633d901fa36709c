"""A web page: ask a model in a browser."""

from ml_collections import ConfigDict

from paligemma_jax.runs import base


def get_config() -> ConfigDict:
    config = base.common()
    config.run = "ui"
    config.checkpoint = base.shipped("tiny")
    config.dtype = "float32"  # of weights and activations; bfloat16 for the released models
    config.adapter = ""  # directory or hub id of a PEFT adapter (LoRA), merged into the checkpoint while it is read
    config.quantization = "none"  # of the weights: none, int8 (half of bfloat16) or int4 (under a third)
    config.resample = "auto"  # how pictures are resized: bicubic, bilinear, or auto, as the checkpoint says
    config.mask_vae = ""  # file of the mask decoder, if vae-oid.npz is not beside the weights
    config.loc_scale = 1023  # location token of the far edge: 1023, or 1024 for models that were trained so
    config.image = base.shipped("examples/shapes.png")  # picture of the examples
    config.student = base.shipped("patch_vit/student")  # patch ViT for heat maps of phrases; empty: no such tab
    config.clip = base.shipped("patch_vit/teacher")  # its teacher

    config.seed = 0  # that the page begins with
    config.simple = False  # a page with a picture, a prompt and the answer alone
    config.server = ""  # address of a running server (configs/serve.py) that answers; no model is loaded here then
    config.api_key = ""  # of that server
    config.host = "127.0.0.1"  # where to listen; with another one than this machine's own models cannot be chosen
    config.port = 7860  # 0 takes a free one
    config.share = False  # also a public address, through Gradio's servers: whoever knows it can ask

    config.num_slots = 8  # answers that are generated at once
    config.max_waiting = 64  # requests that may wait for a slot; more are told to come again
    config.max_new_tokens = 256  # longest answer
    config.max_prompt_tokens = 64  # longest prompt, the picture apart
    config.cache_bytes = 2**28  # memory for embeddings of pictures that are asked about again
    config.num_steps = 0  # tokens between two looks for new requests; 0 leaves it to the engine
    return config
