"""The computed ceiling of the Triton covariance: it never promises more than the roofline."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import covariance_geometry as geometry
from kore_kernels.covariance_update import configs


@pytest.mark.parametrize("d", [1, 235, 1024, 4096, 11008])
@pytest.mark.parametrize("n", [1, 600, 20_000])
def test_a_fraction_of_the_roofline(d, n):
    for dtype, config, products in (
        (torch.bfloat16, configs.AS_IS_TMA[90], 1),
        (torch.float32, configs.IN_PIECES[90], 6),
    ):
        roofline, overlapped, in_turn = geometry.fractions(d, n, dtype, config, products)
        assert roofline > 0 and 0 < in_turn < overlapped <= 1


def test_an_even_wave_loses_only_what_tiles_reach_over_the_diagonal():
    """d = 4096: 528 tiles of 128 x 128 are four for each of 132 multiprocessors."""
    config = configs.TritonConfig(128, 128, 64, 8, 4, 2)
    _, overlapped, _ = geometry.fractions(4096, 8192, torch.bfloat16, config, 1)
    assert overlapped == pytest.approx(4096 * 4097 / 2 / (528 * 128 * 128))


def test_prints_every_shape(capsys):
    geometry.main()
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * 7 * 3
