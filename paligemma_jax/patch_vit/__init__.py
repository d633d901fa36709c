"""The multimodal patch-embedding ViT: patches in CLIP's text space, so that any phrase has a heat map.

from paligemma_jax import patch_vit

student, clip = patch_vit.load("student"), patch_vit.load_clip("clip")
patches = student.embed_patches(student.preprocess("picture.jpg"))  # [1, 64, 512]
likeness = patches @ clip.embed_text(["a cat"])[0]  # [1, 64]
"""

from paligemma_jax.patch_vit.config import ClipConfig, ClipTextConfig, ClipVisionConfig, StudentConfig
from paligemma_jax.patch_vit.models import Clip, Student, check_pair, load, load_clip

__all__ = [
    "Clip",
    "ClipConfig",
    "ClipTextConfig",
    "ClipVisionConfig",
    "Student",
    "StudentConfig",
    "check_pair",
    "load",
    "load_clip",
]
