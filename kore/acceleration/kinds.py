"""The sorts of layers that can run fused, in the order in which they are tried."""

from __future__ import annotations

from kore.acceleration import linear, official, quantized
from kore.acceleration.fused import Kind

KINDS: tuple[Kind, ...] = (linear.KIND, official.KIND, quantized.KIND)
