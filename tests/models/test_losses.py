"""The loss over shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from pixnet.models._losses import LOSSES, log_expression, nb_deviance, pearson, shape_loss
from pixnet.models._quantity import QUANTITIES


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
    counts = {"umi": torch.full((40,), 2e3), "dispersion": torch.ones(3)} if kind == "nb+pcc" else {}
    found = shape_loss(sums, covered, cp10k, depth, kind, **counts)
    (found["expression"] + found["total"]).backward()
    assert sums.grad.isfinite().all()


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_what_is_right_is_least(kind, quantity):
    """Whatever the loss and the quantity: of predictions scaled up and down, the measurement itself is best."""
    torch.manual_seed(1)
    area, pixel = torch.full((60,), 20.0), 4.0
    cp10k = torch.rand(60, 3) * 30 + 5
    counts = {"umi": torch.full((60,), 1e4), "dispersion": torch.full((3,), 0.2)}

    def loss(factor):
        values = cp10k.mean(0) + (cp10k - cp10k.mean(0)) * factor
        logs = torch.log1p(values)
        sums = {"density": values * 20, "log_sum": logs / pixel, "log_mean": logs * 20}[quantity]
        sums = torch.cat([sums, torch.full((60, 1), 20e4)], dim=1)
        torch.testing.assert_close(log_expression(sums, area, quantity, pixel), logs)
        depth = torch.full((60,), 1e4)
        return shape_loss(sums, area, cp10k, depth, kind, quantity=quantity, pixel_um2=pixel, **counts)

    best = loss(1.0)
    assert best["pcc"].item() == pytest.approx(1, abs=1e-4)
    assert best["total"].item() == pytest.approx(0, abs=1e-8)
    for factor in (0.3, 0.8, -0.5):
        # log1p is no straight line: correlation alone sees a wrong scale only faintly
        assert loss(factor)["expression"] > best["expression"] + (0 if kind == "pcc" else 1e-4)


def test_the_negative_binomial_is_that_of_scipy():
    counts, mean, dispersion = (
        torch.tensor([[0.0, 3.0, 2000.0]]),
        torch.tensor([[0.5, 8.0, 1900.0]]),
        torch.tensor([2.0, 0.5, 0.1]),
    )
    size = 1 / dispersion.double().numpy()

    def logpmf(mu):
        return stats.nbinom.logpmf(counts.numpy(), size, size / (size + mu))

    expected = logpmf(np.maximum(counts.numpy(), 1e-12)) - logpmf(mean.double().numpy())
    np.testing.assert_allclose(nb_deviance(counts, mean, dispersion).numpy(), expected, rtol=1e-4, atol=2e-4)


def test_shallow_shapes_say_less_to_the_negative_binomial():
    """Four times off costs more where 1e5 transcripts were seen than where 100 were."""
    sums, covered, _, depth = case()
    cp10k = torch.full((40, 3), 20.0)
    found = [
        shape_loss(sums, covered, cp10k, depth, "nb+pcc", umi=torch.full((40,), umi), dispersion=torch.full((3,), 0.1))
        for umi in (1e2, 1e5)
    ]
    assert found[0]["expression"] < 0.5 * found[1]["expression"]


def test_an_unknown_loss():
    with pytest.raises(ValueError, match="'mse\\+pcc'"):
        shape_loss(*case(), "huber")
