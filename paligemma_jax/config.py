"""Geometry of the networks as frozen dataclasses, and the table of released variants.

Every size comes from here; a checkpoint's config.json is the only place where one is typed.
"""

import dataclasses

MASK_SIZE = 64  # pixels of the side of a mask in the mask VQ-VAE
PADDING_ID = 0  # in slots that nothing sees; any row of a table will do, whatever a file has as pad_token_id


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """SigLIP encoder."""

    image_size: int = 224  # pixels, the input is square
    patch_size: int = 14
    width: int = 1152
    num_layers: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    layer_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Gemma (version 1) or Gemma 2 (version 2) decoder."""

    version: int = 1
    vocab_size: int = 257216  # rows of the embedding table, reserved rows included
    width: int = 2048
    num_layers: int = 18
    mlp_dim: int = 16384
    num_heads: int = 8
    num_kv_heads: int = 1
    head_dim: int = 256
    query_scalar: float = 256.0  # queries are multiplied by query_scalar ** -0.5
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    attn_softcap: float | None = None
    final_softcap: float | None = None
    sliding_window: int | None = None  # layers 0, 2, 4, ... are local when set
    max_positions: int = 8192
    tied: bool = True  # the output head is the embedding table; else it has a table of its own

    def window(self, layer: int) -> int | None:
        """Sliding window of one layer; layers alternate, starting with a local one (Gemma 2)."""
        return self.sliding_window if layer % 2 == 0 else None


@dataclasses.dataclass(frozen=True)
class PaliGemmaConfig:
    """A whole model: image encoder, projector, decoder and the ids that join them."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    image_token_id: int = 257152  # placeholder id, never generated; nor are higher ones that are not in `added_ids`
    bos_token_id: int = 2
    eos_token_id: int = 1
    pad_token_id: int = 0  # what the file says, to be saved again; unused slots hold PADDING_ID
    more_eos_ids: tuple[int, ...] = ()  # that end an answer too
    added_ids: tuple[tuple[int, int], ...] = ()  # ranges [first, end) behind image_token_id that the tokenizer names

    @property
    def version(self) -> int:
        return self.text.version

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All ids that end an answer."""
        return self.eos_token_id, *self.more_eos_ids

    @property
    def text_ids(self) -> tuple[tuple[int, int], ...]:
        """Ranges [first, end) of the ids that may be generated; the other rows of the table are spare."""
        return (0, self.image_token_id), *self.added_ids


def _gemma2(width: int, num_layers: int, mlp_dim: int, heads: int, kv_heads: int, head_dim: int, scalar: float):
    return TextConfig(
        version=2,
        width=width,
        num_layers=num_layers,
        mlp_dim=mlp_dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        query_scalar=scalar,
        attn_softcap=50.0,
        final_softcap=30.0,
        sliding_window=4096,
    )


_DECODERS = {
    "paligemma-3b": TextConfig(),
    "paligemma2-3b": _gemma2(2304, 26, 9216, 8, 4, 256, 256.0),
    "paligemma2-10b": _gemma2(3584, 42, 14336, 16, 8, 256, 256.0),
    "paligemma2-28b": _gemma2(4608, 46, 36864, 32, 16, 128, 144.0),
}

VARIANTS: dict[str, PaliGemmaConfig] = {
    f"{name}-{size}": PaliGemmaConfig(vision=VisionConfig(image_size=size), text=decoder)
    for name, decoder in _DECODERS.items()
    for size in (224, 448, 896)
}


def _sizes(text: TextConfig) -> tuple[float, ...]:
    """What tells one released decoder from another; rows of the table, softcaps and ids may differ in a fine-tune."""
    return (text.version, text.width, text.num_layers, text.mlp_dim, text.num_heads, text.num_kv_heads, text.head_dim)


def find_decoder(text: TextConfig) -> TextConfig | None:
    """The released decoder with the sizes of `text`, None when there is none."""
    return next((decoder for decoder in _DECODERS.values() if _sizes(decoder) == _sizes(text)), None)


def variant_name(config: PaliGemmaConfig) -> str | None:
    """Name of the released variant with this geometry ("paligemma2-3b-224"), None when there is none."""
    for name, variant in VARIANTS.items():
        same_text = (
            _sizes(variant.text) == _sizes(config.text) and variant.text.query_scalar == config.text.query_scalar
        )
        if same_text and variant.vision == config.vision:
            return name
    return None
