"""tl.evaluate and tl.cross_validate."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr

import pixnet as px

from .conftest import QUICK, coloured_slide, table_for

GENES = ["PINK", "BLUE", "FLAT"]


def predicted(sdata, noise: float = 0.0, seed: int = 0):
    """Add a predicted table: measured CP10k with noise, rows shuffled, ids kept."""
    rng = np.random.default_rng(seed)
    counts = sdata["spots_counts"]
    cp10k = 1e4 * counts.X / counts.X.sum(axis=1, keepdims=True)
    order = rng.permutation(len(cp10k))
    values = (cp10k[:, :3] * np.exp(noise * rng.normal(size=(len(cp10k), 3))))[order]
    sdata["spots_genes"] = table_for("spots", counts.obs["instance_id"].to_numpy()[order], values, GENES)
    sdata["spots_genes"].uns["pixnet"] = {"kind": "aggregate"}
    return sdata


def score(sdata, **options):
    return px.tl.evaluate(sdata, table_key="spots_genes", reference_key="spots_counts", **options)


def test_figures_are_those_of_scipy():
    sdata = predicted(coloured_slide(), 0.3)
    found = score(sdata)
    counts, table = sdata["spots_counts"], sdata["spots_genes"]
    order = pd.Index(table.obs["instance_id"]).get_indexer(counts.obs["instance_id"])
    p = np.log1p(table.X[order])
    m = np.log1p(1e4 * counts.X[:, :3] / counts.X.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found["pearson"], [pearsonr(p[:, i], m[:, i])[0] for i in range(3)], rtol=1e-5)
    np.testing.assert_allclose(found["mse"], ((p - m) ** 2).mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found["mae"], np.abs(p - m).mean(axis=0), rtol=1e-4)
    assert list(found.columns) == ["pearson", "mse", "mae", "ratio", "n"]
    assert (found["n"] == 225).all()
    summary = found.attrs["summary"]
    assert summary["pcc_mean"] == pytest.approx(found["pearson"].mean())
    assert summary["pcc_q1"] == pytest.approx(found["pearson"].quantile(0.25))
    assert set(summary) == {"pcc_mean", "pcc_median", "pcc_q1", "n_genes", "mse", "mae", "ratio", "ratio_median"}


def test_a_perfect_prediction():
    found = score(predicted(coloured_slide()))
    np.testing.assert_allclose(found["pearson"], 1, rtol=1e-6)
    np.testing.assert_allclose(found["mse"], 0, atol=1e-8)


def test_genes_that_were_not_measured_are_left_out_and_named(caplog, monkeypatch):
    monkeypatch.setattr("pixnet._logging.logger.propagate", True)
    sdata = predicted(coloured_slide())
    whole = score(sdata)
    counts = sdata["spots_counts"]
    counts.obs["total"] = counts.X.sum(axis=1)
    assert "are not scored" not in caplog.text
    sdata["spots_counts"] = counts[:, [name for name in counts.var_names if name != "BLUE"]].copy()
    found = score(sdata, total_key="total")
    assert list(found.index) == ["PINK", "FLAT"]
    assert "1 of the 3 predicted genes are not in every table and are not scored: 'BLUE'" in caplog.text
    pd.testing.assert_frame_equal(found, whole.loc[["PINK", "FLAT"]])
    with pytest.raises(KeyError, match="'BLUE'"):
        score(sdata, genes=GENES, total_key="total")


def test_rows_without_prediction_or_counts_are_left_out():
    sdata = predicted(coloured_slide())
    sdata["spots_genes"].X[:7] = np.nan
    lost = set(sdata["spots_genes"].obs["instance_id"][:7])
    zero = [i for i, k in enumerate(sdata["spots_counts"].obs["instance_id"]) if k not in lost][:4]
    sdata["spots_counts"].X[zero] = 0
    assert (score(sdata)["n"] == 225 - 7 - 4).all()


def test_constant_genes_are_nan_and_not_in_the_summary():
    sdata = predicted(coloured_slide())
    sdata["spots_genes"].X[:, 2] = 123.456
    found = score(sdata)
    assert np.isnan(found.loc["FLAT", "pearson"])
    assert found.attrs["summary"]["n_genes"] == 2
    assert np.isfinite(found.attrs["summary"]["pcc_mean"])


def test_several_objects_are_scored_each_and_pooled():
    objects = {"a": predicted(coloured_slide(1), 0.2), "b": predicted(coloured_slide(2), 0.2)}
    found = score(objects)
    assert list(found["section"].unique()) == ["a", "b", "pooled"]
    assert set(found.attrs["summary"]) == {"a", "b", "pooled"}
    alone = score(objects["a"])
    np.testing.assert_allclose(found[found["section"] == "a"]["pearson"], alone["pearson"])
    assert (found[found["section"] == "pooled"]["n"] == 450).all()


def test_totals_from_obs():
    sdata = predicted(coloured_slide())
    counts = sdata["spots_counts"]
    counts.obs["umi"] = 2.0 * counts.X.sum(axis=1)
    assert score(sdata, total_key="umi")["mse"].iloc[0] == pytest.approx(np.log(2) ** 2, rel=0.01)


def test_wrong_input():
    sdata = predicted(coloured_slide())
    with pytest.raises(KeyError, match="no table 'x'.*'spots_genes'"):
        px.tl.evaluate(sdata, table_key="x", reference_key="spots_counts")
    with pytest.raises(KeyError, match="'NOPE'"):
        score(sdata, genes=["NOPE"])
    sdata["spots_genes"].X[0] = -1
    with pytest.raises(ValueError, match="negative"):
        score(sdata)
    other = predicted(coloured_slide())
    other["spots_genes"].obs["instance_id"] = [f"x{i}" for i in range(225)]
    with pytest.raises(ValueError, match="no rows in common"):
        score(other)
    fraction = predicted(coloured_slide())
    fraction["spots_counts"].X[0, 0] = 0.5
    with pytest.raises(ValueError, match="looks normalised"):
        score(fraction)


def test_sums_of_logs_may_lie_below_zero():
    sdata = predicted(coloured_slide())
    sdata["spots_genes"].X[0] = -0.01
    sdata["spots_genes"].uns["pixnet"]["quantity"] = "log_sum"
    assert score(sdata)["n"].min() == 225


class TestCrossValidate:
    options = dict(QUICK.items()) | {"max_epochs": 3}

    def test_every_group_is_held_out_once(self, monkeypatch):
        seen = []
        original = px.tl._cross_validate.train

        def train(sdata, **options):
            seen.append((sorted(sdata) if isinstance(sdata, dict) else ["single"], options["validation"]))
            return original(sdata, **options)

        monkeypatch.setattr(px.tl._cross_validate, "train", train)
        objects = {"a": coloured_slide(1), "b": coloured_slide(2), "c": coloured_slide(3), "d": coloured_slide(4)}
        before = {name: set(one.images) | set(one.tables) for name, one in objects.items()}
        frame = px.tl.cross_validate(objects, groups={"a": "P", "b": "P", "c": "Q", "d": "R"}, **self.options)
        assert list(frame.columns) == ["fold", "group", "section", "gene", "metric", "value"]
        assert set(frame["group"]) == {"P", "Q", "R"}
        for (training, validation), test in zip(seen, (["a", "b"], ["c"], ["d"])):
            assert not set(training) & set(test)
            assert set(validation) < set(training), "the epoch is chosen on a training group"
        pearson = frame[(frame["metric"] == "pearson") & (frame["gene"] == "BLUE")]
        assert len(pearson) == 4
        assert pearson["value"].min() > 0.5
        assert {name: set(one.images) | set(one.tables) for name, one in objects.items()} == before

    def test_blocks_of_a_single_object(self):
        frame = px.tl.cross_validate(coloured_slide(1), groups=2, **self.options)
        assert list(frame.columns) == ["fold", "group", "gene", "metric", "value"]
        assert set(frame["group"]) == {"block 0", "block 1"}
        assert set(frame["metric"]) == {"pearson", "mse", "mae"}

    @pytest.mark.parametrize("gap_um", [0.0, 30.0])
    def test_blocks_keep_their_distance(self, gap_um):
        """What trains and what chooses the epoch lies a gap away from what is tested; every shape is tested once."""
        slide = coloured_slide(1)
        sources = px.tl._cross_validate.open_measured({"0": slide})
        folds = px.tl._cross_validate._blocks(sources, 3, gap_um)
        places = slide["spots"].geometry.get_coordinates()
        axis = next(a for a in "xy" if places.loc[folds[0].test["0"]["spots"].index, a].max() < 400)
        tested = []
        for fold in folds:
            training, test = (part["0"]["spots"].index for part in (fold.training, fold.test))
            assert list(fold.test["0"]["spots_counts"].obs["instance_id"]) == list(test)
            assert list(fold.training["0"]["spots_counts"].obs["instance_id"]) == list(training)
            apart = places.loc[training, axis].to_numpy()[:, None] - places.loc[test, axis].to_numpy()
            assert np.abs(apart).min() * 0.5 >= gap_um + 2 * 12 * 0.5 - 1e-6, "from edge to edge, at 0.5 µm/px"
            tested += list(test)
        assert sorted(tested) == sorted(slide["spots"].index)

    def test_a_paper_model_is_scored_by_its_own_quantity(self):
        model = px.models.PixNet.paper(
            QUICK["genes"], encoder="patch-test", stride=4, widths=(16, 16, 16, 16), window=256, halo=64
        )
        objects = [coloured_slide(1), coloured_slide(2)]
        options = {"mask_key": False, "max_epochs": 7, "variants": 1, "lr": 2e-2, "refit": False}
        before = [dict(one.attrs) for one in objects]
        frame = px.tl.cross_validate(objects, groups=["P", "Q"], model=model, **options)
        values = frame[frame["metric"] == "mse"].groupby("gene")["value"].mean()
        assert values.max() < 0.5, "spots of the size trained on have the right values, not only the right order"
        assert frame[(frame["metric"] == "pearson") & (frame["gene"] == "BLUE")]["value"].min() > 0.5
        assert not model.history
        assert [dict(one.attrs) for one in objects] == before

    def test_a_trained_model_is_refused(self, quick_model):
        with pytest.raises(ValueError, match="was trained before"):
            px.tl.cross_validate(coloured_slide(1), groups=2, model=quick_model)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"groups": 1}, "at least two blocks"),
            ({"groups": 113}, "225 shapes of 'spots' into blocks of fewer than two"),
            ({"groups": 2, "gap_um": 1000}, "leaves no shapes of 'spots' to train on at gap_um=1000"),
            ({"groups": 2, "gap_um": -1}, "gap_um is -1"),
        ],
    )
    def test_blocks_that_cannot_be(self, options, match):
        with pytest.raises(ValueError, match=match):
            px.tl.cross_validate(coloured_slide(1), **options)

    def test_a_group_of_one_shape_has_no_correlation(self, capsys):
        small = coloured_slide(2)
        small["spots_counts"] = small["spots_counts"][:1].copy()
        objects, options = [coloured_slide(1), coloured_slide(3), small], self.options | {"max_epochs": 1}
        frame = px.tl.cross_validate(objects, groups=["P", "R", "Q"], **options)
        of_one = frame[(frame["group"] == "Q") & (frame["metric"] == "pearson")]
        assert of_one["value"].isna().all()
        assert "1 shapes to test on" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("groups", "error", "match"),
        [
            (["P"], ValueError, "1 labels for 2 objects"),
            (["P", "P"], ValueError, "one group"),
            (2, ValueError, "a single object"),
            ({"0": "P"}, ValueError, "no label for object '1'"),
            ("PQ", TypeError, "label for each"),
        ],
    )
    def test_wrong_groups(self, groups, error, match):
        with pytest.raises(error, match=match):
            px.tl.cross_validate([coloured_slide(1), coloured_slide(2)], groups=groups)

    def test_what_it_chooses_itself(self):
        with pytest.raises(TypeError, match="validation"):
            px.tl.cross_validate(coloured_slide(1), groups=2, validation="0")
