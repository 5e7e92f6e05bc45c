"""Figures of the shipped model on a real section that it never saw: a change that moves them is noticed."""

from __future__ import annotations

import numpy as np
import pytest

import pixnet as px

# Measured in float32. bfloat16 moves the mean by less than .001.
PCC_MEAN, PCC_MEDIAN = 0.277, 0.320
TOTAL = 1.059  # mean of obs["total"]: the depth of C5 as the model sees it, 1 over its training shapes
MEASURED_OVER_PREDICTED = 1.0  # summed counts of the 250 genes


@pytest.mark.data
def test_the_shipped_model_scores_as_before_on_her2st_c5(shared_data):
    sdata = px.datasets.her2st("C5", path=shared_data / "her2st")
    px.tl.predict(sdata)
    px.tl.aggregate(sdata, "spots")
    panel = px.pp.select_genes([px.datasets.her2st(name, path=shared_data / "her2st") for name in ("C2", "C3")])
    scores = px.tl.evaluate(sdata, table_key="spots_genes", reference_key="spots_counts", genes=panel)
    assert sdata["spots_genes"].n_vars == 13898
    summary = scores.attrs["summary"]
    assert summary["n_genes"] == 250
    assert summary["pcc_mean"] == pytest.approx(PCC_MEAN, abs=0.005)
    assert summary["pcc_median"] == pytest.approx(PCC_MEDIAN, abs=0.01)

    predicted, measured = sdata["spots_genes"][:, panel], sdata["spots_counts"]
    assert predicted.obs["total"].mean() == pytest.approx(TOTAL, rel=0.01)
    common = predicted.obs["instance_id"].isin(measured.obs["instance_id"]).to_numpy()
    measured = measured[measured.obs.set_index("instance_id").index.get_indexer(predicted.obs["instance_id"][common])]
    depth = np.asarray(measured.X.sum(axis=1)).ravel()
    counts = measured[:, predicted.var_names].X.sum()
    expected = (predicted.X[common] * depth[:, None] / 1e4).sum()
    assert counts / expected == pytest.approx(MEASURED_OVER_PREDICTED, abs=0.03)
