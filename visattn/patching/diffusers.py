"""The attention of the diffusers library, which takes a processor to compute with; the library itself is not imported."""

from typing import Any

from torch import Tensor, nn

from ..projections import Unsuitable
from .families import DIFFUSERS, Recipe, input_channels, recipes_of
from .probing import matching_recipe
from .running import run

REPLACED_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor")


class SelfAttention2dProcessor:
    """Computes self-attention over the pixels of a map on this layer.

    Args:
        recipe: how the module it is set on computes.
        original: the processor that was there before.
    """

    def __init__(self, recipe: Recipe, original: Any) -> None:
        self.recipe = recipe
        self.original = original

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(N, C, H, W) to (N, C, H, W). `temb` is taken, and of no use, where there is no spatial norm.

        Raises:
            ValueError: hidden_states are not a map, or come with other keys or a mask.
        """
        if hidden_states.ndim != 4 or encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError(
                f"this attention runs on visattn and takes a map (N, C, H, W) alone, got hidden_states {tuple(hidden_states.shape)}"
                f"{' with encoder_hidden_states' if encoder_hidden_states is not None else ''}"
                f"{' with attention_mask' if attention_mask is not None else ''}; call visattn.unpatch_model first"
            )
        return run(attn, self.recipe, hidden_states)


def is_attention(module: nn.Module) -> bool:
    """Whether the module is attention that takes a processor."""
    return callable(getattr(module, "set_processor", None)) and hasattr(module, "to_q") and hasattr(module, "processor")


def is_patched(module: nn.Module) -> bool:
    return is_attention(module) and isinstance(module.processor, SelfAttention2dProcessor)


def recipe_of(module: Any) -> Recipe:
    """How the module computes, from its configuration and a probe.

    Raises:
        Unsuitable: not as self-attention over the pixels of a map.
    """
    for attribute, reason in (
        ("is_cross_attention", "cross-attention: its keys come from another input"),
        ("added_kv_proj_dim", "it has keys and values from another input"),
        ("spatial_norm", "its normalisation depends on another input"),
        ("norm_cross", "cross-attention: it normalises another input"),
        ("norm_q", "it normalises its queries"),
        ("norm_k", "it normalises its keys"),
        ("fused_projections", "its projections are fused; unfuse them first"),
        ("is_causal", "its attention is causal"),
        ("dropout", "it drops part of its output at random"),
    ):
        if getattr(module, attribute, None):
            raise Unsuitable(reason)
    if getattr(module, "inner_kv_dim", None) != getattr(module, "inner_dim", None):
        raise Unsuitable("it has fewer heads of keys than of queries")
    if getattr(module, "group_norm", None) is None:
        raise Unsuitable("it takes tokens, not maps: it has no group norm")
    processor = type(module.processor)
    if processor.__name__ not in REPLACED_PROCESSORS or not processor.__module__.startswith("diffusers."):
        raise Unsuitable(f"it has a processor of its own, {processor.__name__}")
    factor = 1.0 / float(module.rescale_output_factor)
    recipes = (recipe._replace(res_scale=factor) for recipe in recipes_of(module, DIFFUSERS))
    return matching_recipe(module, recipes, input_channels(module, DIFFUSERS))


def set_processor(module: Any, recipe: Recipe) -> None:
    module.set_processor(SelfAttention2dProcessor(recipe, module.processor))


def restore_processor(module: Any) -> None:
    module.set_processor(module.processor.original)
