"""What is checked: a build, and the environment that chooses the kernels in it."""

from __future__ import annotations

SUBJECTS: dict[str, tuple[str, dict[str, str]]] = {
    "hopper, debug": ("debug", {}),
    "hopper": ("release", {}),
    "ampere": ("release", {"KORE_CUDA_KERNELS": "sm80"}),
}
FAMILIES = ("forward", "input_gradient", "narrow", "covariance", "covariance_large")
