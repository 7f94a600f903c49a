"""Triton kernels of visattn and their launchers. Installed as `visattn.kernels`; knows torch and triton only."""

from .alignment import empty_aligned, empty_with_strides_of, readable, writable
from .attention_backward import prepare_backward, query_gradient
from .attention_forward import attention_forward
from .gradient_splits import key_value_gradient_in_splits, split_query_gradient
from .group_norm import group_statistics
from .key_splits import split_attention_forward
from .launch_config import (
    FUSED_CHANNELS,
    BackwardConfigs,
    LaunchConfig,
    ProjectedConfigs,
    ProjectionConfigs,
    Splits,
    Target,
    TokenConfigs,
    WideConfigs,
    attends_normalized,
    backward_configs,
    forward_config,
    gradient_splits,
    has_narrow_queries,
    key_splits,
    projected_configs,
    projection_configs,
    projects_keys,
    single_tile_config,
    token_configs,
    weight_gradients_config,
    weight_product_config,
    wide_configs,
)
from .output_projection import output_projection, output_projection_backward
from .pooling import max_pool, max_pool_backward
from .projected_attention_backward import projected_attention_backward
from .projected_attention_forward import projected_attention_forward
from .projection_gradients import output_gradients, projection_gradients
from .qkv_projection import Projection, qkv_projection, qkv_projection_backward
from .single_tile_backward import single_tile_backward
from .token_attention import token_attention_backward, token_attention_forward
from .token_moments import PartialMoments, partial_moments
from .weight_gradients import weight_gradients
from .weight_product import weight_product
from .wide_attention import wide_attention_forward, wide_query_gradient

__all__ = [
    "FUSED_CHANNELS",
    "BackwardConfigs",
    "LaunchConfig",
    "PartialMoments",
    "ProjectedConfigs",
    "Projection",
    "ProjectionConfigs",
    "Splits",
    "Target",
    "TokenConfigs",
    "WideConfigs",
    "attends_normalized",
    "attention_forward",
    "backward_configs",
    "empty_aligned",
    "empty_with_strides_of",
    "forward_config",
    "gradient_splits",
    "group_statistics",
    "has_narrow_queries",
    "key_splits",
    "key_value_gradient_in_splits",
    "max_pool",
    "max_pool_backward",
    "output_gradients",
    "output_projection",
    "output_projection_backward",
    "partial_moments",
    "prepare_backward",
    "projected_attention_backward",
    "projected_attention_forward",
    "projected_configs",
    "projection_configs",
    "projection_gradients",
    "projects_keys",
    "qkv_projection",
    "qkv_projection_backward",
    "query_gradient",
    "readable",
    "single_tile_backward",
    "single_tile_config",
    "split_attention_forward",
    "split_query_gradient",
    "token_attention_backward",
    "token_attention_forward",
    "token_configs",
    "weight_gradients",
    "weight_gradients_config",
    "weight_product",
    "weight_product_config",
    "wide_attention_forward",
    "wide_configs",
    "wide_query_gradient",
    "writable",
]
