"""Models and maps of programs: the whole transcriptome for a few channels, exactly."""

from __future__ import annotations

import anndata as ad
import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from spatialdata import SpatialData

import pixnet as px
from pixnet._programs import fingerprint, program_names
from pixnet._sdata import tables as tables_module
from pixnet._sdata.gene_map import GeneMap
from pixnet._sdata.rasters import full_resolution
from pixnet.models._heads import GeneHead, MeasuredShapes, ProgramHead, factorise

from .conftest import QUICK, coloured_slide

pytestmark = pytest.mark.usefixtures("float32")

GENES = [f"G{i}" for i in range(12)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = px.models.PixNet(GENES, n_programs=5, encoder="patch-test", hidden=16, mpp=0.5, window=256, halo=64)
    torch.nn.init.normal_(net.members[0].last.weight, std=1.0)
    torch.nn.init.normal_(net.head.loading_logits)
    return net.eval()


@pytest.fixture
def predicted(model):
    sdata = coloured_slide(size=384)
    px.tl.predict(sdata, model, store="programs", mask_key=False)
    return sdata


def values(sdata, key="he_genes"):
    return full_resolution(sdata[key]).values


class TestHead:
    def test_programs_add_up_to_the_total_and_genes_are_their_mixture(self, model):
        image = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            programs, genes = model(image), model(image, torch.tensor([3, 0, len(GENES)]))
        assert (programs >= 0).all()
        torch.testing.assert_close(programs.sum(dim=1), genes[:, -1])
        expected = torch.einsum("nkyx,kg->ngyx", programs, model.head.loadings[:, [3, 0]])
        torch.testing.assert_close(genes[:, :-1], expected)
        assert (model.head.loadings.sum(dim=1) < 1).all()

    def test_sums_multiplied_are_the_sums_of_each_gene(self, model):
        sums = torch.rand(7, 5) * 100
        genes = GeneHead(GENES).log_expression(
            torch.cat([sums @ model.head.loadings, sums.sum(1, keepdim=True)], dim=1), 1.0
        )
        torch.testing.assert_close(model.head.log_expression(sums, 1.0), genes)

    def test_within_a_panel_a_gene_is_its_share_of_the_panel(self, model):
        sums, panel = torch.rand(7, 5) * 100, torch.tensor([1, 4, 5])
        for head, channels in (
            (model.head, sums),
            (GeneHead(GENES), torch.cat([sums @ model.head.loadings, sums.sum(1, keepdim=True)], dim=1)),
        ):
            found = torch.expm1(head.log_expression(channels, 1.0, panel))
            assert found.shape == (7, 3)
            torch.testing.assert_close(found.sum(dim=1), torch.full((7,), 1e4))

    def test_it_starts_from_what_makes_up_the_shapes(self):
        rng = np.random.default_rng(0)
        usage = rng.dirichlet([0.3] * 3, 200)
        loadings = rng.dirichlet([0.2] * 30, 3)
        counts = rng.poisson(20_000 * usage @ loadings)
        head = ProgramHead([f"G{i}" for i in range(25)], 3)  # five genes are not named
        biases, total = head.start(
            MeasuredShapes(sparse.csr_array(counts[:, :25] / counts.sum(1, keepdims=True)), 1.0, 0)
        )
        found = head.loadings.detach().numpy()
        best = np.corrcoef(found, loadings[:, :25])[:3, 3:].max(axis=0)
        assert (best > 0.97).all()
        share = torch.softmax(biases, dim=0) @ head.loadings
        np.testing.assert_allclose(share.detach(), (counts[:, :25].sum(0) / counts.sum()), atol=0.01)
        assert total == 0

    def test_large_tables_are_factorised_in_batches(self, monkeypatch):
        monkeypatch.setattr("pixnet.models._heads.LARGE_TABLE", 100)
        rng = np.random.default_rng(0)
        usage, loadings = rng.dirichlet([0.3] * 3, 300), rng.dirichlet([0.2] * 30, 3)
        _, found = factorise(sparse.csr_array(rng.poisson(20_000 * usage @ loadings) / 20_000), 3, 0)
        assert (np.corrcoef(found, loadings)[:3, 3:].max(axis=0) > 0.9).all()

    def test_other_genes_are_taken_over(self, model):
        new = model.with_genes(["G3", "NEW", "G0"])
        np.testing.assert_allclose(
            new.head.loadings[:, [0, 2]].detach(), model.head.loadings[:, [3, 0]].detach(), rtol=1e-5
        )
        assert (new.head.loadings[:, 1] > 0).all()
        assert (new.head.loadings.sum(dim=1) < 1).all()
        image = torch.rand(1, 3, 64, 64)
        with torch.inference_mode():
            torch.testing.assert_close(new(image), model(image))

    def test_a_file_keeps_it(self, model, tmp_path):
        model.save(tmp_path / "m.safetensors")
        found = px.models.load(tmp_path / "m.safetensors")
        assert found.channels == model.channels
        assert found.loadings.equals(model.loadings)
        assert "12 genes in 5 programs" in repr(found)
        assert px.models.load("her2st").loadings.shape == (64, 13898)

    @pytest.mark.parametrize("n", [0, 1, 5000, 2.5, "many"])
    def test_wrong_numbers(self, n):
        with pytest.raises((TypeError, ValueError), match="n_programs"):
            px.models.PixNet(GENES, n_programs=n, encoder="patch-test")
        with pytest.raises(ValueError, match="n_programs is 4; programs hold densities"):
            px.models.PixNet(GENES, n_programs=4, quantity="log_sum", encoder="patch-test")


class TestTraining:
    def test_it_learns_what_a_head_of_genes_learns(self, quick_model):
        options = {k: v for k, v in QUICK.items() if k != "genes"}
        net = px.tl.train([coloured_slide(1), coloured_slide(2)], n_programs=4, max_epochs=12, **options)
        assert sorted(net.genes) == ["BLUE", "FLAT", "PINK", "REST"]
        r = {}
        for name, one in {"programs": net, "genes": quick_model}.items():
            sdata = coloured_slide(5)
            px.tl.predict(sdata, one, mask_key=False)
            px.tl.aggregate(sdata, "spots")
            scores = px.tl.evaluate(
                sdata, table_key="spots_genes", reference_key="spots_counts", genes=["PINK", "BLUE"]
            )
            r[name] = scores.attrs["summary"]["pcc_mean"]
        assert r["programs"] > 0.9
        assert r["programs"] > r["genes"] - 0.04

    def test_more_programs_than_shapes_are_refused(self, slide):
        with pytest.raises(ValueError, match="n_programs is 1000, and there are 225 shapes"):
            px.tl.train(slide, n_programs=1000, **QUICK)

    def test_genes_weigh_by_their_signal(self, slide):
        from pixnet._core.train.dataset import CropDataset
        from pixnet._sdata.sections import open_measured, open_section

        (measured,) = open_measured({"0": slide}, mask_key=False)
        section = open_section(measured, measured.tables(["PINK", "BLUE", "FLAT"]), 0.5, 4)
        pink, blue, flat = CropDataset.of([section], 512).signal()["spots"].tolist()
        assert min(pink, blue) > 0.9
        assert flat < 0.2


class TestMap:
    def test_what_is_stored(self, predicted, model):
        assert list(full_resolution(predicted["he_programs"]).c.values) == model.channels
        table = predicted["he_loadings"]
        assert list(table.var_names) == GENES
        np.testing.assert_array_equal(table.X, model.loadings)
        assert all(len(name.split()) == 4 for name in table.obs["top_genes"])

    def test_genes_or_programs_by_their_number(self, model, monkeypatch):
        sdata = coloured_slide(size=384)
        px.tl.predict(sdata, model, mask_key=False)
        assert "he_genes" in sdata
        monkeypatch.setattr("pixnet.tl._map_request.MOST_CHANNELS", 5)
        px.tl.predict(sdata, model, mask_key=False)
        assert {"he_programs", "he_loadings"} <= {name for _, name, _ in sdata.gen_elements()}
        px.tl.predict(sdata, model, genes=GENES[:3], mask_key=False, key_added="some")
        assert list(full_resolution(sdata["some"]).c.values) == [*GENES[:3], "__total__"]

    def test_tables_equal_those_of_gene_channels(self, predicted, model):
        px.tl.predict(predicted, model, store="genes", mask_key=False)
        tables = {
            key: px.tl.aggregate(predicted, "spots", image_key=key, agg_func=["mean", "sum"], inplace=False)
            for key in ("he_programs", "he_genes")
        }
        found, expected = tables.values()
        for a, b in ((found.X, expected.X), *((found.layers[k], expected.layers[k]) for k in ("density", "sum"))):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.ptp(b))
        np.testing.assert_allclose(found.obs["total"], expected.obs["total"], rtol=1e-5)
        np.testing.assert_allclose(found.obsm["X_programs"] @ found.varm["loadings"].T, found.X, rtol=1e-4)
        np.testing.assert_allclose(found.obsm["X_programs"].sum(axis=1), 1e4, rtol=1e-5)

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 40))
    def test_a_table_of_programs_is_that_of_materialised_genes(self, seed, n_programs, n_genes):
        """Means over any pixels, with any loadings."""
        from pixnet._sdata.selection import GeneSelection, ProgramSelection

        rng = np.random.default_rng(seed)
        loadings = rng.dirichlet(np.full(n_genes + 1, 0.1), n_programs)[:, :-1].astype(np.float32)
        pixels = rng.gamma(0.3, 1e4, (500, n_programs)).astype(np.float32)
        weights = rng.random((6, 500)).astype(np.float32)
        programs = ProgramSelection([], list(range(n_programs)), loadings)
        genes = GeneSelection([], list(range(n_genes + 1)))
        channels = np.concatenate([pixels @ loadings, pixels.sum(axis=1, keepdims=True)], axis=1)
        found, expected = programs.pixel_cp10k(weights @ pixels), genes.pixel_cp10k(weights @ channels)
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(np.ptp(expected), 1e-3), rtol=1e-4)

    def test_bins_added_up_are_the_spot(self, predicted):
        import geopandas as gpd
        import shapely
        from spatialdata.models import ShapesModel

        row, col = np.indices((4, 4)).reshape(2, -1) * 13.7
        bins = gpd.GeoDataFrame(geometry=shapely.box(col + 40, row + 50, col + 53.7, row + 63.7))
        predicted["bins"] = ShapesModel.parse(bins)
        predicted["whole"] = ShapesModel.parse(gpd.GeoDataFrame(geometry=[shapely.box(40, 50, 94.8, 104.8)]))
        px.tl.aggregate(predicted, ["bins", "whole"], agg_func="sum")
        np.testing.assert_allclose(
            predicted["bins_genes"].layers["sum"].sum(axis=0), predicted["whole_genes"].layers["sum"][0], rtol=1e-4
        )

    def test_gene_channels_are_what_predict_writes(self, predicted, model, tmp_path):
        predicted.write(tmp_path / "s.zarr")
        stored = sd.read_zarr(tmp_path / "s.zarr")
        px.tl.gene_channels(stored, ["G7", "G2"])
        px.tl.predict(stored, model, genes=["G7", "G2"], mask_key=False, key_added="direct")
        for one, other in zip(stored["he_genes"].children, stored["direct"].children, strict=True):
            a, b = stored["he_genes"][one]["image"], stored["direct"][other]["image"]
            assert list(a.c.values) == ["G7", "G2", "__total__"]
            np.testing.assert_allclose(a.values, b.values, rtol=1e-5)
        lazy = px.tl.gene_channels(stored, "G2", inplace=False)
        assert isinstance(lazy.data, da.Array)
        np.testing.assert_allclose(lazy.values[0], stored["direct"]["scale0"]["image"].values[1], rtol=1e-5)
        del stored["direct"]
        # The map that a call means that names none is still the one that has all genes.
        assert px.tl.aggregate(stored, "spots", inplace=False).n_vars == len(GENES)
        again = sd.read_zarr(tmp_path / "s.zarr")
        del again["direct"]
        assert px.tl.aggregate(again, "spots", inplace=False).n_vars == len(GENES)

    def test_a_lazy_map_comes_with_its_loadings(self, model, predicted):
        sdata = coloured_slide(size=384)
        found = px.tl.predict(sdata, model, store="programs", mask_key=False, inplace=False)
        assert list(found) == ["he_programs", "he_loadings"]
        for name, element in found.items():
            sdata[name] = element
        a, b = (px.tl.aggregate(one, "spots", inplace=False) for one in (sdata, predicted))
        np.testing.assert_allclose(a.X, b.X, rtol=1e-4)

    def test_large_tables_are_lazy_and_are_stored_in_pieces(self, predicted, tmp_path, monkeypatch):
        dense = px.tl.aggregate(predicted, "spots", inplace=False)
        predicted.write(tmp_path / "s.zarr")
        stored = sd.read_zarr(tmp_path / "s.zarr")
        monkeypatch.setattr(tables_module, "LARGEST_DENSE", 100)
        monkeypatch.setattr(tables_module, "BLOCK_BYTES", 4 * len(GENES) * 10)
        px.tl.aggregate(stored, "spots")
        assert isinstance(stored["spots_genes"].X, da.Array)
        assert stored["spots_genes"].X.numblocks == (-(-dense.n_obs // 10), 1)
        np.testing.assert_array_equal(stored["spots_genes"].X.compute(), dense.X)
        np.testing.assert_array_equal(ad.read_zarr(tmp_path / "s.zarr" / "tables" / "spots_genes").X, dense.X)
        scores = (
            px.tl.evaluate(stored, table_key="spots_genes", reference_key="spots_genes_counts", genes=["G1"])
            if "spots_genes_counts" in stored
            else None
        )
        assert scores is None

    def test_pictures_of_genes(self, predicted, model):
        px.tl.predict(predicted, model, store="genes", mask_key=False)
        for show in ("density", "cp10k"):
            pictures = [
                px.pl.gene_map(predicted, ["G4", "__total__"], image_key=key, he_key=False, show=show)
                for key in ("he_programs", "he_genes")
            ]
            for a, b in zip(*pictures, strict=True):
                np.testing.assert_allclose(a.images[0].get_array(), b.images[0].get_array(), rtol=1e-4)


class TestRefusals:
    def refused(self, sdata, error, match):
        for call in (
            lambda: px.tl.aggregate(sdata, "spots", image_key="he_programs"),
            lambda: px.tl.gene_channels(sdata, "G1", image_key="he_programs"),
            lambda: px.pl.gene_map(sdata, "G1", image_key="he_programs"),
        ):
            with pytest.raises(error, match=match):
                call()

    def test_loadings_that_are_missing(self, predicted):
        del predicted["he_loadings"]
        self.refused(predicted, KeyError, "loadings of program map 'he_programs' are missing.*predict again")

    def test_those_of_another_model(self, predicted, model):
        other = model.copy()
        torch.nn.init.normal_(other.head.loading_logits)
        made = coloured_slide(size=384)
        px.tl.predict(made, other, store="programs", mask_key=False)
        del predicted["he_loadings"]
        predicted["he_loadings"] = made["he_loadings"]
        self.refused(predicted, KeyError, "'he_loadings' are those of another model")

    @pytest.mark.parametrize(
        "change",
        [
            lambda t: t[:, 1:].copy(),
            lambda t: ad.AnnData(t.X * 2, t.obs, t.var, uns=t.uns),
            lambda t: ad.AnnData(t.X, t.obs, t.var.rename(index={"G1": "X"}), uns=t.uns),
            lambda t: ad.AnnData(t.X[:, ::-1].copy(), t.obs, t.var, uns=t.uns),
        ],
        ids=["a gene less", "other values", "a gene renamed", "columns swapped"],
    )
    def test_those_that_were_changed(self, predicted, change):
        table = change(predicted["he_loadings"])
        predicted.tables["he_loadings"] = table
        self.refused(predicted, ValueError, "was changed since program map 'he_programs' was made")

    def test_a_program_less(self, predicted):
        predicted.tables["he_loadings"] = predicted["he_loadings"][1:].copy()
        self.refused(predicted, ValueError, "has 5 programs and its loadings, table 'he_loadings', 4")

    def test_channels_taken_out_of_the_map(self, predicted):
        data = full_resolution(predicted["he_programs"]).isel(c=[0, 2])
        del predicted["he_programs"]
        predicted["he_programs"] = data
        self.refused(predicted, ValueError, "has 2 programs and its loadings, table 'he_loadings', 5")

    def test_what_is_only_in_another_order_or_of_another_name_is_found(self, predicted):
        expected = px.tl.aggregate(predicted, "spots", inplace=False)
        table = predicted["he_loadings"][::-1, ::-1].copy()
        del predicted["he_loadings"]
        predicted["mine"] = table
        data = full_resolution(predicted["he_programs"]).isel(c=[3, 1, 0, 4, 2])
        del predicted["he_programs"]
        predicted["he_programs"] = data
        found = px.tl.aggregate(predicted, "spots", inplace=False)[:, GENES]
        np.testing.assert_allclose(found.X, expected.X, rtol=1e-5)

    def test_statistics_that_are_not_linear(self, predicted):
        for function in ("std", "median", "max"):
            with pytest.raises(ValueError, match=rf"{function}.*gene_channels"):
                px.tl.aggregate(predicted, "spots", agg_func=function)

    def test_genes_that_the_model_does_not_name(self, predicted):
        with pytest.raises(KeyError, match="'NOPE' is not in gene map 'he_programs'"):
            px.tl.aggregate(predicted, "spots", genes="NOPE")

    def test_programs_of_a_model_that_has_none_and_of_some_genes(self, slide, model, quick_model):
        with pytest.raises(ValueError, match="this model has a channel for each gene"):
            px.tl.predict(slide, quick_model, store="programs", mask_key=False)
        with pytest.raises(ValueError, match="leave out genes="):
            px.tl.predict(slide, model, genes="G1", store="programs", mask_key=False)
        with pytest.raises(ValueError, match="store is 'both'; valid"):
            px.tl.predict(slide, model, store="both", mask_key=False)

    def test_gene_channels_of_what_is_not_a_program_map(self, slide, quick_model):
        with pytest.raises(ValueError, match="no program map; make one"):
            px.tl.gene_channels(slide, "PINK")
        px.tl.predict(slide, quick_model, mask_key=False)
        with pytest.raises(ValueError, match=r"no program map \(its gene maps 'he_genes'"):
            px.tl.gene_channels(slide, "PINK")

    def test_a_table_or_a_map_that_exists(self, predicted, model):
        with pytest.raises(ValueError, match="'he_programs' exists"):
            px.tl.predict(predicted, model, store="programs", mask_key=False)
        del predicted["he_programs"]
        with pytest.raises(ValueError, match="'he_loadings' exists"):
            px.tl.predict(predicted, model, store="programs", mask_key=False)


def test_names_tell_the_loadings():
    loadings = np.random.default_rng(0).random((3, 4)).astype(np.float32)
    names = program_names(loadings, "abcd")
    assert [name[:4] for name in names] == ["P01.", "P02.", "P03."]
    assert fingerprint(loadings[:, [2, 0, 1, 3]], "cabd") == fingerprint(loadings, "abcd")
    assert fingerprint(loadings + 1e-6, "abcd") != fingerprint(loadings, "abcd")


def test_a_map_answers_for_genes(predicted):
    opened = GeneMap.open(predicted, "he_programs")
    assert opened.genes == GENES
    assert opened.select("G3").genes == ["G3"]
    assert isinstance(predicted, SpatialData)


class TestPanels:
    """Tables that measured different genes train together."""

    OPTIONS = {k: v for k, v in QUICK.items() if k != "genes"} | {"max_epochs": 10, "batch_shapes": 24, "refit": False}

    @staticmethod
    def panel(seed, genes):
        """A slide of which only some genes were measured."""
        sdata = coloured_slide(seed)
        sdata.tables["spots_counts"] = sdata["spots_counts"][:, genes].copy()
        return sdata

    @staticmethod
    def scores(model, **options):
        sdata = coloured_slide(5)
        px.tl.predict(sdata, model, mask_key=False)
        px.tl.aggregate(sdata, "spots")
        return px.tl.evaluate(sdata, table_key="spots_genes", reference_key="spots_counts", **options)

    @pytest.mark.parametrize("n_programs", [None, 6])
    def test_each_gene_is_learned_where_it_was_measured(self, n_programs):
        slides = {"a": self.panel(1, ["PINK", "FLAT", "REST"]), "b": self.panel(2, ["BLUE", "FLAT", "REST"])}
        options = self.OPTIONS | {"validation": {"v": self.panel(3, ["PINK", "BLUE"])}, "n_programs": n_programs}
        genes = ["PINK", "BLUE", "FLAT", "REST"]
        net = px.tl.train(slides, totals="panel", genes=genes, **options)
        assert sorted(net.genes) == ["BLUE", "FLAT", "PINK", "REST"]
        whole = {"a": coloured_slide(1), "b": coloured_slide(2)}
        both = px.tl.train(whole, totals={"v": "panel"}, genes=genes, **options)
        found, expected = (self.scores(one)["pearson"][["PINK", "BLUE"]] for one in (net, both))
        assert (found > 0.8).all()
        assert (found > expected - 0.08).all()

    @pytest.mark.parametrize("n_programs", [None, 3])
    def test_of_panels_alone_the_total_is_that_of_all_genes_of_the_model(self, n_programs):
        """Nothing else was measured: a value is a share of the genes of all panels together."""
        slides = {"a": self.panel(1, ["PINK", "FLAT", "REST"]), "b": self.panel(2, ["BLUE", "FLAT", "REST"])}
        net = px.tl.train(slides, totals="panel", n_programs=n_programs, **self.OPTIONS)
        sdata = coloured_slide(5)
        px.tl.predict(sdata, net, mask_key=False)
        px.tl.aggregate(sdata, "spots")
        found, truth = sdata["spots_genes"].to_df(), sdata["spots_counts"].to_df()
        assert found.sum(axis=1).to_numpy() == pytest.approx(10_000, rel=1e-4)
        expected = 1e4 * truth[found.columns].div(truth[found.columns].sum(axis=1), axis=0)
        np.testing.assert_allclose(found.mean(), expected.mean(), rtol=0.1)

    def test_a_block_of_each_panel_validates(self):
        """Had the last slide validated alone, genes that it alone measured would have been left out."""
        slides = {"a": self.panel(1, ["PINK", "FLAT", "REST"]), "b": self.panel(2, ["BLUE", "FLAT", "REST"])}
        net = px.tl.train(slides, totals="panel", **self.OPTIONS)
        assert sorted(net.genes) == ["BLUE", "FLAT", "PINK", "REST"]
        assert sorted(net.provenance["validation"]) == ["a (held-out block)", "b (held-out block)"]
        assert (self.scores(net)["pearson"][["PINK", "BLUE"]] > 0.8).all()
        known = net.evidence.frame(net.genes)["validation_pearson"]
        assert (known[["PINK", "BLUE"]] > 0.5).all()

    def test_a_total_that_no_table_tells_is_refused(self):
        a, whole = self.panel(1, ["PINK", "FLAT"]), coloured_slide(2)
        with pytest.raises(ValueError, match="all tables are of panels .* take quantity='panel_density'"):
            px.tl.train(a, totals="panel", quantity="density", **self.OPTIONS)
        untrained = px.models.PixNet(["PINK", "FLAT"], encoder="patch-test", mpp=0.5)
        options = {k: v for k, v in self.OPTIONS.items() if k not in {"encoder", "hidden", "window", "halo"}}
        with pytest.raises(ValueError, match="take quantity='panel_density'"):
            px.tl.train(a, model=untrained, totals="panel", **options)
        with pytest.raises(ValueError, match="is for tables that are all of panels"):
            px.tl.train({"a": a, "b": whole}, totals={"a": "panel"}, quantity="panel_density", **self.OPTIONS)

    def test_the_last_slide_validates_where_its_panel_is_that_of_others(self):
        slides = {name: self.panel(seed, ["PINK", "FLAT"]) for seed, name in enumerate("ab")}
        net = px.tl.train(slides, totals="panel", **self.OPTIONS | {"max_epochs": 1})
        assert list(net.provenance["validation"]) == ["b"]

    def test_a_panel_beside_a_whole_transcriptome(self):
        slides = {"a": self.panel(1, ["PINK", "BLUE"]), "b": coloured_slide(2)}
        options = self.OPTIONS | {"validation": {"v": coloured_slide(3)}, "genes": ["PINK", "BLUE", "FLAT"]}
        net = px.tl.train(slides, totals={"a": "panel"}, **options)
        within = self.scores(net, totals="panel", genes=["PINK", "BLUE"])
        assert (within["pearson"] > 0.8).all()
        # In amounts: FLAT is a tenth of all transcripts, as b says, not a tenth of a panel.
        sdata = coloured_slide(5)
        px.tl.predict(sdata, net, mask_key=False)
        px.tl.aggregate(sdata, "spots")
        assert sdata["spots_genes"].to_df()["FLAT"].mean() == pytest.approx(1000, rel=0.15)

    def test_a_table_of_few_of_many_genes_stays_sparse(self):
        from pixnet._sdata.measured import MeasuredTable

        genes = [f"G{i}" for i in range(30_000)]  # as a dense matrix of genes by genes it would take 3.6 GB
        table = coloured_slide(1)["spots_counts"].copy()
        table.var_names = ["G7", "G29999", "G3", "OTHER"]
        found = MeasuredTable.read(table, "t", None, None, within_panel=True).select(genes, partial=True)
        np.testing.assert_array_equal(found.panel, [3, 7, 29_999])
        np.testing.assert_array_equal(found.counts[:, [7, 29_999, 3]].toarray(), table.X[:, :3])
        np.testing.assert_array_equal(found.total, table.X[:, :3].sum(axis=1))

    def test_refusals(self):
        a, b = self.panel(1, ["PINK"]), coloured_slide(2)
        with pytest.raises(ValueError, match=r"too different sets of genes.*totals=\{name: 'panel'\}"):
            px.tl.train({"a": a, "b": b}, **self.OPTIONS)
        with pytest.raises(KeyError, match="totals names 'c', which is neither an object nor a table: 'a', 'b'"):
            px.tl.train({"a": a, "b": b}, totals={"c": "panel"}, **self.OPTIONS)
        with pytest.raises(ValueError, match="totals has 'some'; valid"):
            px.tl.train(b, totals="some", **self.OPTIONS)
        slides = {"a": a, "b": b, "c": coloured_slide(3)}
        with pytest.raises(KeyError, match="no training table has 1 of the 2 genes: 'NOPE'"):
            px.tl.train(slides, totals={"a": "panel"}, genes=["PINK", "NOPE"], **self.OPTIONS)
        with pytest.raises(ValueError, match="has 1 of the genes to predict, and totals='panel'"):
            px.tl.train(b, totals="panel", genes="PINK", **self.OPTIONS)
        with pytest.raises(ValueError, match="quantity='log_sum' predicts logs, which do not add up"):
            px.tl.train(b, totals="panel", quantity="log_sum", **self.OPTIONS)
        with pytest.raises(KeyError, match="lacks 1 of the 1 genes: 'BLUE'"):
            px.tl.train({"a": a, "b": b}, totals="panel", validation="a", genes="BLUE", **self.OPTIONS)


class TestPictures:
    def test_maps_and_bars(self, predicted, model):
        axes = px.pl.programs(predicted, ncols=3)
        assert len(axes) == 6
        assert axes[0].get_title() == "H&E"
        drawn = {ax.get_title().split(":")[0]: ax.images[0].get_array() for ax in axes[1:]}
        assert sorted(drawn) == ["P01", "P02", "P03", "P04", "P05"]
        np.testing.assert_allclose(np.ma.sum([drawn[name] for name in drawn], axis=0), 1e4, rtol=1e-4)
        one = px.pl.programs(predicted, ["P04", 2], he_key=False)
        assert [ax.get_title().split(":")[0] for ax in one] == ["P04", "P02"]
        bars = px.pl.programs(predicted, [1], kind="genes", n_genes=3)
        loadings = model.loadings.to_numpy()
        lift = np.where(loadings[0] >= loadings[0].mean(), loadings[0] / loadings.mean(axis=0), 0)
        np.testing.assert_allclose([bar.get_width() for bar in bars.patches], np.sort(lift)[::-1][:3], rtol=1e-5)

    def test_refusals(self, predicted, slide):
        with pytest.raises(KeyError, match="has no program 'P09', '0'; it has 5, from 'P01' on"):
            px.pl.programs(predicted, ["P09", 0])
        with pytest.raises(ValueError, match="kind is 'list'; valid"):
            px.pl.programs(predicted, kind="list")
        with pytest.raises(ValueError, match="no program map"):
            px.pl.programs(slide)
