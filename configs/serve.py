"""A server: OpenAI's API, moondream's and Label Studio's, for many clients at once."""

from ml_collections import ConfigDict

from paligemma_jax.runs import base


def get_config() -> ConfigDict:
    config = base.common()
    config.run = "serve"
    config.checkpoint = base.shipped("tiny")
    config.dtype = "float32"  # of weights and activations; bfloat16 for the released models
    config.mesh = ""  # of devices: "data=2,tensor=4" divides rows over 2 and weights over 4; auto takes all there are
    config.adapter = ""  # directory or hub id of a PEFT adapter (LoRA), merged into the checkpoint while it is read
    config.quantization = "none"  # of the weights: none, int8 (half of bfloat16) or int4 (under a third)
    config.resample = "auto"  # how pictures are resized: bicubic, bilinear, or auto, as the checkpoint says
    config.mask_vae = ""  # file of the mask decoder, if vae-oid.npz is not beside the weights
    config.loc_scale = 1023  # location token of the far edge: 1023, or 1024 for models that were trained so
    config.seed = 0  # of requests that bring none

    config.host = "127.0.0.1"  # where to listen; another one than this machine's own needs a key
    config.port = 8000  # 0 takes a free one
    config.model_name = ""  # what clients call the model; by default the last part of `checkpoint`
    config.api_key = ""  # that clients must send; better in a file
    config.api_key_file = ""  # text file with a key per line
    config.trusted_proxies = ""  # addresses, with commas, of proxies whose X-Forwarded-For is believed
    config.cors_origins = ""  # web pages of other origins that may call, with commas: https://example.org
    config.image_hosts = ""  # hosts, with commas, that pictures are fetched from; empty: data URIs only

    config.num_slots = 16  # answers that are generated at once
    config.max_waiting = 256  # requests that may wait for a slot; more are told to come again
    config.max_new_tokens = 512  # longest answer
    config.max_prompt_tokens = 512  # longest prompt, pictures apart
    config.max_images = 4  # pictures of a request
    config.max_n = 8  # answers to one request (`n`)
    config.cache_bytes = 2**28  # memory for embeddings of pictures that are asked about again
    config.num_steps = 0  # tokens between two looks for new requests; 0 leaves it to the engine

    config.max_body_bytes = 32 * 2**20  # of a request
    config.max_pixels = 50_000_000  # of a picture
    config.body_timeout_s = 30.0  # for sending a request
    config.request_timeout_s = 120.0  # for answering it
    config.requests_per_minute = 0  # of one client; 0 is without limit
    config.drain_s = 30.0  # for running requests to finish after SIGTERM or Ctrl-C
    return config
