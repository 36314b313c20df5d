"""What in covariance_update_ only its Triton code has: tiles cut along the rows, two ways to load, copies of x."""

from __future__ import annotations

import pytest
import torch

import kore_kernels as kk

from .conftest import INTERPRETER

if not INTERPRETER:
    pytest.skip("runs under TRITON_INTERPRET=1", allow_module_level=True)

from kore_kernels import gpu
from kore_kernels.covariance_update import configs
from kore_kernels.covariance_update import triton as backend_module

from .numbers import bits, laid_out
from .test_covariance_update import check, start


@pytest.fixture(params=["tma", "pointers"])
def loads(request, monkeypatch) -> str:
    if request.param == "pointers":
        monkeypatch.setattr(gpu, "has_tma", lambda tensor: False)
    elif not gpu.has_tma(torch.empty(1)):
        pytest.skip("this Triton has no descriptors")
    return request.param


def launched(monkeypatch) -> list[dict]:
    """Fills with name, programs and arguments of the kernels that run from here on."""
    calls: list[dict] = []
    run = gpu._run

    def record(kernel, grid, *arguments, **options):
        calls.append({"name": kernel.fn.__name__, "programs": grid[0], "arguments": arguments})
        run(kernel, grid, *arguments, **options)

    monkeypatch.setattr(gpu, "_run", record)
    return calls


@pytest.mark.parametrize("triangle", ["lower", "upper"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "d"), [(200, 20), (130, 190)])
def test_tiles_of_the_last_wave_are_cut(backend, loads, monkeypatch, n, d, dtype, triangle):
    calls = launched(monkeypatch)
    check(start(d, triangle=triangle), torch.randn(n, d).to(dtype), triangle=triangle, alpha=torch.tensor(0.5))
    assert [call["name"] for call in calls] == ["_covariance", "_add_parts"]


def test_cut_tiles_with_mask_and_weights(backend):
    x, mask, weight = torch.randn(330, 50), torch.rand(330) > 0.3, torch.randn(330)
    x[~mask] = torch.nan
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check(start(50), x.to(dtype), mask=mask, weight=weight, alpha=-1.5)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "columns", "rows", "expanded"])
@pytest.mark.parametrize("d", [32, 40, 37])
def test_strides(backend, loads, layout, d):
    check(start(d), laid_out(torch.randn(70, d).bfloat16(), layout))


def test_x_is_copied_only_where_no_load_can_read_it(backend, loads, monkeypatch):
    calls = launched(monkeypatch)
    flat = torch.randn(20 * 48 + 8)
    in_place = {"tma": [flat[: 20 * 48].view(20, 48)[:, :44], flat[4 : 4 + 20 * 48].view(20, 48)], "pointers": []}
    in_place["pointers"] = [
        flat[: 20 * 48].view(20, 48),
        flat[: 20 * 48].view(20, 48)[:, :32],
        flat[:32].expand(20, 32),
    ]
    for x in in_place[loads]:
        check(start(x.shape[1]), x)
        assert calls[-1]["arguments"][8].data_ptr() == x.data_ptr()
    for x in (flat[1 : 1 + 20 * 48].view(20, 48), flat[: 20 * 37].view(20, 37), flat[: 20 * 48].view(48, 20).T):
        check(start(x.shape[1]), x)
        assert calls[-1]["arguments"][8].data_ptr() != x.data_ptr()


def test_both_ways_to_load_give_the_same_bits(backend, monkeypatch):
    if not gpu.has_tma(torch.empty(1)):
        pytest.skip("this Triton has no descriptors")
    x = torch.randn(260, 90)
    through_tma = kk.covariance_update_(torch.zeros(90, 90), x)
    monkeypatch.setattr(gpu, "has_tma", lambda tensor: False)
    assert torch.equal(bits(kk.covariance_update_(torch.zeros(90, 90), x)), bits(through_tma))


def test_values_near_the_largest_stay_finite(backend):
    """A piece rounded up would be infinite: 3.4e38 is above the largest bfloat16."""
    x = torch.tensor([[torch.finfo(torch.float32).max, 1e-6, -1e-15]]).expand(3, 3).contiguous()
    C = kk.covariance_update_(torch.zeros(3, 3), x)
    exact = x.double().T @ x.double()
    assert C[0, 0].isinf() and C.tril()[1:].isfinite().all()
    torch.testing.assert_close(C[1:].tril(1).double(), exact[1:].tril(1), rtol=1e-6, atol=0)


class TestLastWave:
    config = configs.TritonConfig(128, 128, 64, 8, 4, 2, part_rows=512)

    def cut(self, tiles: int, n: int, d: int = 4096) -> tuple[int, int, int]:
        x = torch.empty(n, d, dtype=torch.bfloat16, device="meta")
        return backend_module.last_wave(tiles, x, self.config, 132)

    def test_even_waves_and_short_inputs_are_not_cut(self):
        assert self.cut(528, 2048) == (528, 1, 0)
        assert self.cut(406, 600) == (406, 1, 0)
        assert self.cut(131, 100_000) == (131, 1, 0)

    @pytest.mark.parametrize(
        ("tiles", "n"), [(1, 2048), (3, 20_000), (36, 2048), (406, 8192), (820, 2000), (3741, 8192)]
    )
    def test_parts_cover_the_rows_and_the_workspace_is_bounded(self, tiles, n):
        whole, parts, rows = self.cut(tiles, n)
        cut = tiles - whole
        assert 0 < cut == tiles % 132 and parts > 1
        assert rows % self.config.block_n == 0 and (parts - 1) * rows < n <= parts * rows
        assert cut * parts * 128 * 128 * 4 <= configs.WORKSPACE + n * 4096 * 2


@pytest.mark.parametrize(("dtype", "updates"), [(torch.bfloat16, 3), (torch.float32, 1)])
def test_two_byte_rows_are_added_to_C_in_portions(backend, monkeypatch, dtype, updates):
    monkeypatch.setattr(configs, "MOST_ROWS", 100)
    calls = launched(monkeypatch)
    x, mask = torch.randn(250, 40).to(dtype), torch.rand(250) > 0.3
    for portion in (None, mask):
        check(start(40), x, mask=portion, alpha=torch.tensor(0.5))
    assert [call["name"] for call in calls].count("_covariance") == 2 * updates
