"""Nothing in the hooks waits for the device.

The meta device has no values: whatever would wait for one on a GPU (``item``, ``cpu``, ``nonzero``, a tensor as a
condition or as a boolean index) raises there. The test runs whole captures on it.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kore.capture import rows as capture_rows
from kore.capture.accumulator import Accumulator
from kore.capture.hooks import HookedModel
from kore.capture.input_groups import InputGroups
from kore.capture.selection import TOKENS, Selector
from kore.capture.storage import Storage


class Layers(nn.Module):
    config = type("Config", (), {"image_token_id": 4})()

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6, device="meta")
        self.a, self.b, self.c = (nn.Linear(6, 6, device="meta") for _ in range(3))

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        return self.c(self.a(x) + self.b(x))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("batch_device", ["cpu", "meta"])
@pytest.mark.parametrize("scale", [None, "rows", "samples"])
def test_hooks_and_token_buffers_run_where_nothing_has_a_value(tokens, batch_device, scale, monkeypatch):
    monkeypatch.setattr(capture_rows, "LONG_SAMPLE", 1 if scale == "samples" else 256)
    model = Layers()
    storage = Storage("packed", torch.float32)
    groups = InputGroups(set("abc"), lambda dim, device: Accumulator(dim, device, storage, buffer_rows=16))
    hooked = HookedModel(model, dict(model.named_children()), set("abc"), Selector(tokens, model), scale is not None)
    hooked.targets.pop("embed")
    with hooked.hooked(groups):
        for number in range(4):
            ids = torch.tensor([[4, 4, 2, 3, 5, 6, 7, 1], [4, 8, 8, 8, 4, 0, 0, 0], [4, 4, 4, 4, 4, 4, 1, 2]])
            batch = {"input_ids": ids, "attention_mask": ids != 0, "labels": torch.where(ids % 3 == 0, -100, ids)}
            hooked.forward({key: value.to(batch_device) for key, value in batch.items()}, number)
            groups.end_pass()
            for group in groups.groups:
                group.accumulator.place()
    assert [group.modules for group in groups.groups] == [["a", "b"], ["c"]]
    assert all(group.accumulator.triangle.matrix.is_meta for group in groups.groups)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: bool((x > 0).all()),
        lambda x: torch.isfinite(x).all().tolist(),
    ],
)
def test_the_meta_device_notices_who_waits(waits):
    with pytest.raises((RuntimeError, NotImplementedError)):
        waits(torch.ones(3, device="meta"))
