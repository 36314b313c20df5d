"""KORE's kernels: the two products that knowledge injection spends its time in.

=====================  ===============================================================  =====================
public function        computes                                                         folder
=====================  ===============================================================  =====================
``covariance_update_`` one triangle of ``C += alpha * Σ w_i x_iᵀ x_i``, in place        ``covariance_update/``
``symmetrize_``        mirrors one triangle of ``C`` onto the other, in place           ``symmetrize/``
``lora_fa_linear``     ``y = x Wᵀ + b + s (x Aᵀ) Bᵀ``, gradients of ``x`` and ``B``     ``lora_fa_linear/``
``lora_fa_linears``    the same for layers that share ``x`` and a basis, A_i = R_i Uᵀ   ``lora_fa_linears/``
``backends``           what can run here, and why not                                   ``dispatch.py``
=====================  ===============================================================  =====================

``lora_fa_linear`` has dropout on its second term and a merged mode.

In each folder: ``op.py`` (public function, argument checks, torch.library registration), ``reference.py`` (the
definition in plain PyTorch), ``products.py`` (PyTorch's products in place, any device), ``native.py`` (compiled, CPUs),
``cuda.py`` (compiled, NVIDIA GPUs), ``triton.py`` (NVIDIA GPUs) and ``configs.py`` (its tile sizes).
``KORE_BACKEND=auto|native|triton|torch|reference`` chooses, at each call; ``dispatch.py`` says how ``auto`` decides.
``extension.py`` loads what was compiled from ``csrc/``, ``cuda.py`` calls the part of it that runs on GPUs; without it
the CPU backends use BLAS and torch.

The package knows torch and nothing of models. Importing it registers the operations under ``torch.ops.kore`` and
loads neither Triton nor SciPy.
"""

from kore_kernels.covariance_update.op import covariance_update_
from kore_kernels.dispatch import BackendInfo, backends
from kore_kernels.lora_fa_linear.op import lora_fa_linear
from kore_kernels.lora_fa_linears.op import lora_fa_linears
from kore_kernels.symmetrize.op import symmetrize_

__all__ = ["BackendInfo", "backends", "covariance_update_", "lora_fa_linear", "lora_fa_linears", "symmetrize_"]
