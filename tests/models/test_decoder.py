"""The decoder leaves out what a crop does not need, and gives the same map."""

from __future__ import annotations

import pytest
import torch

from pixnet.models import PixNet

HALO = 320


@pytest.mark.parametrize("stride", [4, 1])
def test_a_crop_is_the_inner_part_of_the_whole_map(stride):
    torch.manual_seed(0)
    model = PixNet(["A", "B"], stride=stride, pretrained=False).eval()
    torch.nn.init.normal_(model.members[0].last.weight, std=0.5)
    seen = []
    model.members[0].decoder.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    with torch.no_grad():
        features = model.encode(torch.rand(1, 3, 64 + 2 * HALO, 64 + 2 * HALO))
        whole = model.decode(features)
        for crop in (HALO // stride, 3):
            found, expected = model.decode(features, None, crop), whole[..., crop:-crop, crop:-crop]
            assert found.shape == expected.shape
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert seen == [whole.shape[-1], 64 // stride, whole.shape[-1] - 6]
