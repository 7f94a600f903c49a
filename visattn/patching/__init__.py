"""Other people's attention blocks made to run on this layer, in place and without importing their libraries."""

from .model import PatchReport, patch_model, unpatch_model

__all__ = ["PatchReport", "patch_model", "unpatch_model"]
