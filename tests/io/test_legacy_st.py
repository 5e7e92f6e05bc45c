"""Legacy ST tables and pictures: joins, resolution, refusals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pixnet._sdata.pixel_size import find_mpp
from pixnet.io import legacy_st


@pytest.fixture
def tables():
    x, y = (index.ravel() for index in np.meshgrid(np.arange(2, 7), np.arange(3, 8)))
    spots = pd.DataFrame({"x": x, "y": y, "pixel_x": 40.0 * x + 7, "pixel_y": 40.0 * y - 3})
    rng = np.random.default_rng(0)
    ids = [f"{a}x{b}" for a, b in zip(x, y)]
    counts = pd.DataFrame(rng.poisson(2, (25, 6)), index=ids, columns=[f"G{i}" for i in range(6)])
    return counts.sample(frac=1, random_state=0), spots


IMAGE = np.full((400, 380, 3), 230, dtype=np.uint8)


def test_order_counts_and_resolution(tables):
    counts, spots = tables
    sdata = legacy_st(counts, spots, IMAGE)
    ids = [f"{a}x{b}" for a, b in zip(spots.x, spots.y)]
    assert list(sdata["spots"].index) == ids
    assert list(sdata["spots_counts"].obs["instance_id"]) == ids
    assert (sdata["spots_counts"].X.toarray() == counts.loc[ids].to_numpy()).all()
    assert find_mpp(sdata, "he") == pytest.approx(5.0)
    assert sdata["spots"]["radius"].to_numpy() == pytest.approx(10.0)
    assert sdata["spots"].geometry.iloc[0].x == 87


def test_rotated_array_and_given_mpp(tables):
    counts, spots = tables
    turned = spots.assign(pixel_x=200 + 3 * spots.x - 9 * spots.y, pixel_y=100 + 9 * spots.x + 3 * spots.y)
    sdata = legacy_st(counts, turned, IMAGE)
    assert find_mpp(sdata, "he") == pytest.approx(200 / np.hypot(3, 9))
    assert find_mpp(legacy_st(counts, spots, IMAGE, mpp=4), "he") == 4


def test_from_files(tables, tmp_path):
    counts, spots = tables
    counts.to_csv(tmp_path / "c.csv.gz")
    spots.to_csv(tmp_path / "s.tsv", sep="\t", index=False)
    Image.fromarray(IMAGE).save(tmp_path / "i.png")
    sdata = legacy_st(
        tmp_path / "c.csv.gz", tmp_path / "s.tsv", tmp_path / "i.png", image_key="a", shapes_key="b", table_key="c"
    )
    assert set(sdata.images) | set(sdata.shapes) | set(sdata.tables) == {"a", "b", "c"}


def test_repeated_genes_are_summed(tables):
    counts, spots = tables
    repeated = counts.set_axis(["A", "B", "A", "C", "D", "B"], axis=1)
    table = legacy_st(repeated, spots, IMAGE)["spots_counts"]
    assert list(table.var_names) == ["A", "B", "C", "D"]
    expected = counts.loc[table.obs_names].to_numpy()[:, [0, 2]].sum(axis=1)
    assert (table[:, "A"].X.toarray().ravel() == expected).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, s: (c.T, s), "pass it transposed"),
        (lambda c, s: (c.astype(float).mask(c == 3), s), "NaN"),
        (lambda c, s: (c * 0.5, s), "fractions"),
        (lambda c, s: (c - 1, s), "negative"),
        (lambda c, s: (pd.concat([c, c[:1]]), s), "more than once"),
        (lambda c, s: (c.assign(G0="x"), s), "not numbers: 'G0'"),
        (lambda c, s: (c, s.drop(columns="pixel_x")), "no column 'pixel_x'"),
        (lambda c, s: (c, pd.concat([s, s[:1]])), "more than once"),
        (lambda c, s: (c, s.assign(selected=0)), "no spot is selected"),
        (lambda c, s: (c, s.assign(pixel_x=np.nan)), "NaN"),
        (lambda c, s: (c, s.assign(pixel_x=s.pixel_x + 5000)), "all 25 spots lie outside"),
        (lambda c, s: (c, s.assign(pixel_x=s.pixel_x * 0.5)), "square array is expected"),
        (lambda c, s: (c, s[:2]), "too few"),
    ],
)
def test_refusals(tables, change, message):
    counts, spots = change(*tables)
    with pytest.raises(ValueError, match=message):
        legacy_st(counts, spots, IMAGE)


@pytest.mark.parametrize("image", [IMAGE[..., 0], IMAGE.astype(np.uint16), np.zeros((9, 9, 4), np.uint8)])
def test_wrong_images(tables, image):
    with pytest.raises(ValueError, match=r"uint8 \(y, x, 3\) is needed"):
        legacy_st(*tables, image)


def test_missing_files(tables, tmp_path):
    with pytest.raises(FileNotFoundError, match="counts: no file"):
        legacy_st(tmp_path / "none.tsv", tables[1], IMAGE)
    with pytest.raises(FileNotFoundError, match="image: no file"):
        legacy_st(*tables, tmp_path / "none.jpg")
