"""Triton kernels of visattn and their launchers. Installed as `visattn.kernels`; knows torch and triton only."""

from .attention_backward import attention_backward
from .attention_forward import attention_forward
from .launch_config import BackwardConfigs, LaunchConfig, Target, backward_configs, forward_config
from .token_moments import token_moments

__all__ = [
    "BackwardConfigs",
    "LaunchConfig",
    "Target",
    "attention_backward",
    "attention_forward",
    "backward_configs",
    "forward_config",
    "token_moments",
]
