"""The loss over shapes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from scipy import stats

from pixnet._core.train.options import TrainingOptions
from pixnet.models._heads import GeneHead, LogSumHead, ProgramHead
from pixnet.models._losses import LOSSES, correlation, nb_deviance, shape_loss


def case(n=40, genes=3):
    """Predicted log1p CP10k, density of the total, measured CP10k, depth."""
    torch.manual_seed(0)
    predicted = torch.rand(n, genes) * 3
    return predicted.requires_grad_(), torch.full((n,), 1e4), torch.rand(n, genes) * 30, torch.rand(n) * 1e4 + 100


COUNTS = {"umi": torch.full((40,), 2e3), "dispersion": torch.ones(3)}


def test_the_losses_that_training_offers_are_there():
    for name in LOSSES:
        assert TrainingOptions(loss=name).loss == name
    with pytest.raises(ValueError, match=re.escape(f"it should be {' or '.join(map(repr, LOSSES))}")):
        TrainingOptions(loss="mse")


def test_pearson_is_that_of_numpy_and_nan_where_constant():
    a, b = torch.randn(30, 2), torch.randn(30, 2)
    b[:, 1] = 5
    found = correlation(a, b)
    assert found[0].item() == pytest.approx(np.corrcoef(a[:, 0], b[:, 0])[0, 1], rel=1e-4)
    assert found[1].isnan()


def test_the_published_loss():
    predicted, density, cp10k, depth = case()
    found = shape_loss(predicted, density, cp10k, depth)
    measured = torch.log1p(cp10k)
    expected = (predicted - measured).square().mean() + 0.5 * (1 - correlation(predicted, measured).mean())
    torch.testing.assert_close(found["expression"], expected)
    torch.testing.assert_close(found["total"], (density.log() - depth.log()).square().mean())


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_genes_that_are_constant_in_a_batch_do_not_spoil_the_gradients(loss):
    predicted, density, cp10k, depth = case()
    cp10k[:, 1] = 0
    shape_loss(predicted, density, cp10k, depth, loss, **COUNTS)["expression"].backward()
    assert predicted.grad.isfinite().all()


def sums_of(head, cp10k, pixel_um2):
    """Sums of a map over shapes of which each has the total 20e4."""
    if isinstance(head, ProgramHead):  # a program for each gene, and what is left in the total
        head.loading_logits.data = torch.cat([torch.eye(3) * 40, torch.zeros(3, 1)], dim=1)
        rest = (1e4 - cp10k.sum(dim=1, keepdim=True)) * 20
        head.loading_logits.data = torch.cat([head.loading_logits, torch.tensor([[0.0, 0, 0, 40]])])
        return torch.cat([cp10k * 20, rest], dim=1)
    genes = torch.log1p(cp10k) / pixel_um2 if isinstance(head, LogSumHead) else cp10k * 20
    return torch.cat([genes, torch.full((len(cp10k), 1), 20e4)], dim=1)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(
    "head", [GeneHead("abc"), LogSumHead("abc"), ProgramHead("abc", 3)], ids=["genes", "logs", "programs"]
)
def test_what_is_right_is_least(loss, head):
    """Whatever the loss and the head: of predictions scaled up and down, the measurement itself is best."""
    torch.manual_seed(1)
    pixel = 4.0
    cp10k = torch.rand(60, 3) * 30 + 5
    counts = {"umi": torch.full((60,), 1e4), "dispersion": torch.full((3,), 0.2)}

    def compared(factor):
        values = cp10k.mean(0) + (cp10k - cp10k.mean(0)) * factor
        logs = torch.log1p(values)
        predicted = head.log_expression(sums_of(head, values, pixel), pixel)
        torch.testing.assert_close(predicted, logs)
        return shape_loss(predicted, torch.full((60,), 1e4), cp10k, torch.full((60,), 1e4), loss, **counts)

    best = compared(1.0)
    assert best["pcc"].item() == pytest.approx(1, abs=1e-4)
    assert best["total"].item() == pytest.approx(0, abs=1e-8)
    for factor in (0.3, 0.8, -0.5):
        assert compared(factor)["expression"] > best["expression"] + 1e-4


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


def test_genes_weigh_as_they_are_told():
    predicted, density, cp10k, depth = case()
    alone = shape_loss(predicted[:, :1], density, cp10k[:, :1], depth)["expression"]
    weights = torch.tensor([0.4, 0.0, 0.0])
    torch.testing.assert_close(shape_loss(predicted, density, cp10k, depth, weights=weights)["expression"], alone)


def test_shallow_shapes_weigh_less_in_the_negative_binomial():
    """Four times off costs more where 1e5 transcripts were seen than where 100 were."""
    predicted, density, _, depth = case()
    cp10k = torch.full((40, 3), 20.0)
    found = [
        shape_loss(
            predicted,
            density,
            cp10k,
            depth,
            LOSSES["nb+pcc"],
            umi=torch.full((40,), umi),
            dispersion=torch.full((3,), 0.1),
        )
        for umi in (1e2, 1e5)
    ]
    assert found[0]["expression"] < 0.5 * found[1]["expression"]
    with pytest.raises(ValueError, match="needs umi= and dispersion="):
        shape_loss(predicted, density, cp10k, depth, LOSSES["nb+pcc"])
