"""The group form launches the kernels of lora_fa_linear, with its tile sizes."""

from kore_kernels.lora_fa_linear.configs import HALF, NARROW_HALF, SINGLE

__all__ = ["HALF", "NARROW_HALF", "SINGLE"]
