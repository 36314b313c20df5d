"""The group form launches the kernels of lora_fa_linear, with its tile sizes."""

from kore_kernels.lora_fa_linear.configs import GRADIENTS_HALF, GRADIENTS_SINGLE, HALF, SINGLE

__all__ = ["GRADIENTS_HALF", "GRADIENTS_SINGLE", "HALF", "SINGLE"]
