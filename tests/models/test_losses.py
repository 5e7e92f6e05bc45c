"""The loss over shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pixnet.models._losses import LOSSES, pearson, shape_loss


def case(n=40, genes=3):
    torch.manual_seed(0)
    sums = torch.rand(n, genes + 1) * 100 + 1
    sums[:, -1] = 1e5
    return sums.requires_grad_(), torch.full((n,), 10.0), torch.rand(n, genes) * 30, torch.rand(n) * 1e4 + 100


def test_pearson_is_that_of_numpy_and_nan_where_constant():
    a, b = torch.randn(30, 2), torch.randn(30, 2)
    b[:, 1] = 5
    found = pearson(a, b)
    assert found[0].item() == pytest.approx(np.corrcoef(a[:, 0], b[:, 0])[0, 1], rel=1e-4)
    assert found[1].isnan()


def test_the_published_loss():
    sums, covered, cp10k, depth = case()
    found = shape_loss(sums, covered, cp10k, depth)
    p, m = torch.log1p(1e4 * sums[:, :-1] / sums[:, -1:]), torch.log1p(cp10k)
    expected = (p - m).square().mean() + 0.5 * (1 - pearson(p, m).mean())
    torch.testing.assert_close(found["expression"], expected)
    torch.testing.assert_close(found["total"], ((sums[:, -1] / covered).log() - depth.log()).square().mean())


@pytest.mark.parametrize("kind", LOSSES)
def test_genes_that_are_constant_in_a_batch_do_not_spoil_the_gradients(kind):
    sums, covered, cp10k, depth = case()
    cp10k[:, 1] = 0
    found = shape_loss(sums, covered, cp10k, depth, kind)
    (found["expression"] + found["total"]).backward()
    assert sums.grad.isfinite().all()


def test_an_unknown_loss():
    with pytest.raises(ValueError, match="'mse\\+pcc'"):
        shape_loss(*case(), "huber")
