"""Right amounts, evidence of each gene, and intervals of each value."""

from __future__ import annotations

import numpy as np
import pytest
import spatialdata as sd
from scipy import stats

import pixnet as px
from pixnet._core.train.evidence import HeldOut, assess, most_shapes
from pixnet._core.uncertainty import at_area, count_cdf, gamma_quantile, mean_correlation, randomised_pit
from pixnet._evidence import COLUMNS
from pixnet._sdata.evidence import GeneEvidence

from .conftest import QUICK, coloured_slide, with_cells


@pytest.fixture(scope="module")
def models():
    slides = [coloured_slide(1), coloured_slide(2)]
    every = QUICK | {"genes": ["PINK", "BLUE", "FLAT", "REST"]}
    return {
        "genes": px.tl.train(slides, max_epochs=20, **every),
        "programs": px.tl.train(slides, max_epochs=30, n_programs=4, **every),
    }


@pytest.fixture(scope="module", params=["genes", "programs"])
def predicted(request, models):
    slide = with_cells(coloured_slide(7))
    px.tl.predict(slide, models[request.param], store=request.param, mask_key=False)
    px.tl.aggregate(slide, ["spots", "cells"], interval=0.9)
    return slide


class TestAmounts:
    def test_sums_of_an_unseen_slide_are_those_that_were_measured(self, predicted):
        scores = px.tl.evaluate(predicted, table_key="spots_genes", reference_key="spots_counts")
        assert scores.attrs["summary"]["ratio"] == pytest.approx(1, abs=0.02)
        np.testing.assert_allclose(scores["ratio"], 1, atol=0.06)

    def test_the_ratio_is_that_of_sums(self, predicted):
        scores = px.tl.evaluate(predicted, table_key="spots_genes", reference_key="spots_counts", genes=["BLUE"])
        measured = predicted["spots_counts"].to_df()
        mean = predicted["spots_genes"].to_df()["BLUE"] * measured.sum(axis=1).to_numpy() / 1e4
        assert scores.loc["BLUE", "ratio"] == pytest.approx(measured["BLUE"].sum() / mean.sum(), rel=1e-5)

    @pytest.mark.parametrize("kind", ["genes", "programs"])
    def test_balancing_multiplies_the_amount_of_each_gene(self, models, kind):
        import torch

        model = models[kind].copy()
        sums = torch.rand(20, len(model.channels)) * 100
        if kind == "genes":
            sums[:, -1] = sums[:, :-1].sum(dim=1) * 1.5
        before = torch.expm1(model.head.log_expression(sums, 1.0)).mean(dim=0)
        ratio = torch.tensor([0.95, 0.8, 0.9, 0.7])
        usage = (sums / model.head.total(sums)[:, None]).sum(dim=0)
        shift = model.head.balance(ratio, usage)
        if kind == "genes":
            torch.testing.assert_close(shift.exp(), ratio)
        else:
            after = torch.expm1(model.head.log_expression(sums, 1.0)).mean(dim=0)
            torch.testing.assert_close(after / before, ratio, rtol=1e-3, atol=1e-3)
            assert (model.head.loadings.sum(dim=1) <= 1).all()


class TestEvidence:
    def test_it_tells_genes_that_are_predicted_from_those_that_are_not(self, models):
        frame = models["genes"].evidence.frame(models["genes"].genes)
        assert frame.loc[["PINK", "BLUE"], "validation_pearson_low"].min() > 0.5
        assert frame.loc["FLAT", "validation_pearson_low"] < 0.2
        assert (frame["validation_pearson_low"] <= frame["validation_pearson"]).all()
        assert (frame["validation_pearson"] <= frame["validation_pearson_high"]).all()
        assert (frame.loc[["PINK", "BLUE"], "noise_ceiling"] > frame.loc["FLAT", "noise_ceiling"]).all()
        assert (frame["dispersion"] >= 0).all()

    def test_it_travels_with_the_file_the_map_and_its_tables(self, models, predicted, tmp_path):
        model = models["programs"]
        model.save(tmp_path / "m.safetensors")
        again = px.models.load(tmp_path / "m.safetensors")
        assert again.evidence == model.evidence
        genes = model.genes[:2]
        assert model.with_genes(genes).evidence.frame(genes).equals(model.evidence.frame(model.genes).loc[genes])

        predicted.write(tmp_path / "s.zarr")
        stored = sd.read_zarr(tmp_path / "s.zarr")
        px.tl.aggregate(stored, "cells", key_added="again", interval=0.9)
        for table in (predicted["cells_genes"], stored["cells_genes"], stored["again"]):
            assert set(COLUMNS) <= set(table.var)
            assert np.isfinite(table.var["validation_pearson"][["PINK", "BLUE"]]).all()
        np.testing.assert_array_equal(stored["again"].layers["lower"], predicted["cells_genes"].layers["lower"])
        assert GeneEvidence.of_table(stored["again"]).correlation_um > 0

    def test_trusted_genes_alone(self, predicted):
        px.tl.aggregate(predicted, "spots", genes="trusted", key_added="trusted", overwrite=True)
        names = predicted["trusted"].var_names
        assert {"PINK", "BLUE"} <= set(names)
        assert (predicted["trusted"].var["validation_pearson_low"] > 0).all()

    def test_a_map_of_trusted_genes_alone(self, models):
        slide = coloured_slide(7)
        model = models["genes"].copy()
        px.tl.predict(slide, model, genes="trusted", mask_key=False)
        frame = model.evidence.frame(model.genes)
        trusted = [gene for gene in model.genes if frame["validation_pearson_low"][gene] > 0]
        assert list(slide["he_genes"]["scale0"]["image"].coords["c"].values[:-1]) == trusted
        model.evidence = None
        with pytest.raises(ValueError, match="genes is 'trusted', and this model has no evidence"):
            px.tl.predict(slide, model, genes="trusted", mask_key=False, overwrite=True)

    def test_a_header_whose_evidence_is_of_other_genes_is_refused(self, models, tmp_path):
        model = models["genes"].copy()
        model.evidence = model.evidence.take([0, 1])
        with pytest.raises(ValueError, match=r"evidence is of \[2\] genes, and the model has 4"):
            model.save(tmp_path / "m.safetensors")


class TestIntervals:
    def test_counts_fall_into_them_as_often_as_they_should(self, predicted):
        scores = px.tl.evaluate(predicted, table_key="spots_genes", reference_key="spots_counts", interval=0.8)
        # Of a gene that is most of all transcripts, counts vary less than a negative binomial says.
        assert scores["coverage"].drop("REST").between(0.6, 0.97).all()
        assert (scores["width"] > 0).all()
        assert (scores["marginal_width"] > 0).all()

    def test_they_hold_the_prediction_and_are_wider_in_smaller_shapes(self, predicted):
        width = {}
        for key in ("spots", "cells"):
            table = predicted[f"{key}_genes"]
            lower, upper = table.layers["lower"], table.layers["upper"]
            assert (lower <= table.X * 1.0001).all()
            assert (upper >= table.X * 0.9999).all()
            width[key] = np.median((upper - lower) / table.X, axis=0)
        assert (width["cells"] >= width["spots"] * 0.9999).all()
        assert (width["spots"] > 0).all()

    def test_bad_requests_are_refused(self, slide, predicted):
        with pytest.raises(ValueError, match="interval is 90; a probability"):
            px.tl.aggregate(predicted, "spots", interval=90, overwrite=True)
        with pytest.raises(ValueError, match="interval= is for gene maps"):
            px.tl.aggregate(slide, "spots", image_key="he", interval=0.9)
        model = px.models.PixNet(["A"], encoder="patch-test", hidden=8, mpp=0.5, window=256, halo=64)
        px.tl.predict(slide, model, mask_key=False)
        for asked in ({"interval": 0.9}, {"genes": "trusted"}):
            with pytest.raises(ValueError, match="needs what held-out shapes showed"):
                px.tl.aggregate(slide, "spots", **asked)


def held_out(rng, dispersion, length, n=30, pitch=100.0, area=2376.0):
    """Shapes on a grid whose true expression differs from the prediction by a field that is alike over a length."""
    x, y = np.meshgrid(np.arange(n) * pitch, np.arange(n) * pitch)
    centre = np.stack([x.ravel(), y.ravel()], axis=1)
    distance = np.hypot(*(centre[:, None] - centre[None]).transpose(2, 0, 1))
    alike = np.exp(-distance / length)
    np.fill_diagonal(alike, float(mean_correlation(area, length)))
    root = np.linalg.cholesky(alike + 1e-3 * np.eye(len(alike)))
    predicted = np.exp(rng.normal(3, 0.4, (len(centre), len(dispersion))))
    field = root @ rng.normal(size=predicted.shape) * np.sqrt(dispersion)
    umi = rng.uniform(2000, 6000, len(centre))
    counts = rng.poisson(predicted * np.maximum(1 + field, 0) * umi[:, None] / 1e4).astype(float)
    return HeldOut(predicted, counts, np.zeros(1), umi, np.full(len(umi), area), centre)


def test_tables_of_whole_transcriptomes_stay_small():
    assert most_shapes(250) == 4000
    assert most_shapes(20_000) * 20_000 <= 2e7
    assert most_shapes(100_000) == 500, "fewer say too little"


def test_what_held_out_shapes_show_is_what_they_were_made_with():
    rng = np.random.default_rng(0)
    dispersion = np.array([0.02, 0.05, 0.1, 0.1, 0.05, 0.02])
    shapes = held_out(rng, dispersion, 150.0)
    evidence = assess([shapes], np.ones(6), seed=0)
    own = dispersion * float(mean_correlation(2376.0, 150.0))
    found = evidence.column("dispersion") / own
    assert found.mean() == pytest.approx(1, abs=0.3)
    assert found.min() > 0.5
    assert found.max() < 2
    assert 90 < evidence.correlation_um < 250
    assert evidence.n_shapes == 900
    mean = shapes.mean
    pit = randomised_pit(shapes.counts, mean, np.broadcast_to(evidence.column("dispersion"), mean.shape), rng)
    assert ((pit > 0.05) & (pit < 0.95)).mean() == pytest.approx(0.9, abs=0.02)
    # A perfect prediction reaches the ceiling of thinning.
    perfect = held_out(rng, np.full(6, 1e-9), 150.0)
    found = assess([perfect], np.ones(6), seed=0)
    np.testing.assert_allclose(found.column("validation_pearson"), found.column("noise_ceiling"), atol=0.1)
    assert (found.column("validation_pearson_low") < found.column("validation_pearson_high")).all()


class TestDistributions:
    def test_the_mean_correlation_is_that_of_pairs_of_points_in_a_disc(self):
        rng = np.random.default_rng(0)
        radius, length = 30.0, 20.0
        r, angle = radius * np.sqrt(rng.random((2, 200_000))), 2 * np.pi * rng.random((2, 200_000))
        x, y = r * np.cos(angle), r * np.sin(angle)
        expected = np.exp(-np.hypot(x[0] - x[1], y[0] - y[1]) / length).mean()
        assert float(mean_correlation(np.pi * radius**2, length)) == pytest.approx(expected, rel=5e-3)

    def test_a_field_averaged_over_shapes_has_the_dispersion_that_is_stated(self):
        """Squares of 20 and of 100 um of a field with an exponential correlation of 40 um."""
        rng = np.random.default_rng(1)
        n, um, length = 512, 5.0, 40.0
        k = np.fft.fftfreq(n, um) * 2 * np.pi
        power = (1 + (length**2) * (k[:, None] ** 2 + k[None] ** 2)) ** -1.5
        fields = [np.fft.ifft2(np.fft.fft2(rng.normal(size=(n, n))) * np.sqrt(power)).real for _ in range(8)]
        own = np.mean([f.var() for f in fields])
        variance = {}
        for side in (20, 100):
            m = int(side / um)
            blocks = [f[: n // m * m, : n // m * m].reshape(n // m, m, n // m, m).mean(axis=(1, 3)) for f in fields]
            variance[side] = np.mean([b.var() for b in blocks]) / own
        found = at_area(np.array([variance[100]]), np.array([20.0**2]), 100.0**2, length)
        assert float(found[0, 0]) == pytest.approx(variance[20], rel=0.1)

    def test_negative_binomial_and_gamma_are_scipys(self):
        rng = np.random.default_rng(0)
        mean, dispersion, counts = rng.random(50) * 20, rng.random(50) * 2 + 0.01, rng.poisson(8, 50).astype(float)
        size = 1 / dispersion
        np.testing.assert_allclose(
            count_cdf(counts, mean, dispersion), stats.nbinom.cdf(counts, size, size / (size + mean)), atol=1e-9
        )
        np.testing.assert_allclose(
            gamma_quantile(0.3, dispersion), stats.gamma.ppf(0.3, size, scale=dispersion), rtol=1e-6, atol=1e-12
        )
        drawn = rng.negative_binomial(2, 2 / (2 + 0.3), 20_000).astype(float)
        pit = randomised_pit(drawn, np.full(20_000, 0.3), np.full(20_000, 0.5), rng)
        assert stats.kstest(pit, "uniform").statistic < 0.015
