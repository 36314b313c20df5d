"""The group form launches the kernels of lora_fa_linear, with its tile sizes."""

from kore_kernels.lora_fa_linear.configs import ADDED, DROPPED, SINGLE

__all__ = ["ADDED", "DROPPED", "SINGLE"]
