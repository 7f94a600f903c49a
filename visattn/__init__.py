"""Self-attention for feature maps: a drop-in layer on fused Triton kernels, with a PyTorch path for every other machine."""

from . import convert, functional, reference
from .dispatch import use_backend
from .modules import Attention, ChannelAttention, SelfAttention2d, attention_rows, explain
from .patching import PatchReport, patch_model, unpatch_model

__version__ = "0.1.0"
__all__ = [
    "Attention",
    "ChannelAttention",
    "PatchReport",
    "SelfAttention2d",
    "attention_rows",
    "convert",
    "explain",
    "functional",
    "patch_model",
    "reference",
    "unpatch_model",
    "use_backend",
]
