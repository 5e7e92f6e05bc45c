"""The public kidney, from folders of both kinds in its formats."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import shapely
from PIL import Image

import pixnet as px
from pixnet._sdata.pixel_size import find_mpp

pytestmark = pytest.mark.filterwarnings("ignore")

COL, ROW = np.array([-3.9, 0.1]), np.array([0.1, 3.9])
"""Bins of the part that the documentation uses lie nearly mirrored."""


def platforms():
    # tests are not a package (importmode importlib), so the helper beside the tests of io is loaded by its path
    spec = importlib.util.spec_from_file_location("platforms", Path(__file__).parents[1] / "io" / "platforms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """The part that the documentation uses, with 8 x 8 bins of 3 genes, of which one bin is missing."""
    folder = tmp_path_factory.mktemp("data") / "visium_hd_kidney"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 48, 3), dtype=np.uint8)).save(folder / "he.jpg")
    basis = {"col": COL.tolist(), "row": ROW.tolist()}
    about = {"microns_per_pixel": 2.05, "bin_um": 8, "spot_diameter_um": 55, "bin_basis_px": basis}
    (folder / "meta.json").write_text(json.dumps(about))
    row, col = (index.ravel()[:-1] for index in np.indices((8, 8)))
    counts = rng.poisson(2, (63, 3)).astype(np.float32)
    obs = pd.DataFrame({"array_row": row, "array_col": col, "total_counts_all_genes": counts.sum(axis=1) + 7})
    obs.index = [f"s_008um_{r:05d}_{c:05d}-1" for r, c in zip(row, col)]
    xy = np.array([40, 10]) + col[:, None] * COL + row[:, None] * ROW
    names = ["NPHS2", "UMOD", "ALDOB"]
    bins = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=names), obsm={"spatial": xy})
    bins.write_h5ad(folder / "bins_008um.h5ad")
    obs = pd.DataFrame({"total_counts_all_genes": [90, 80]}, index=["spot_3", "spot_5"])
    spots = ad.AnnData(rng.poisson(9, (2, 4)).astype(np.float32), obs=obs, var=pd.DataFrame(index=[*names, "ACTB"]))
    spots.obsm["spatial"] = xy[[9, 40]]
    spots.write_h5ad(folder / "spots_055um.h5ad")
    return folder


@pytest.fixture(scope="module")
def space_ranger(tmp_path_factory):
    """Space Ranger's output for a synthetic tissue of 0.5 µm/px; and that tissue."""
    pytest.importorskip("spatialdata_io")
    pytest.importorskip("tifffile")
    source = px.datasets.synthetic_tissue(400, n_genes=6, shapes=("bins",))
    return platforms().visium_hd(tmp_path_factory.mktemp("kidney"), source), source


def test_the_part_of_the_documentation(part, monkeypatch):
    """Blocks are sums of whole bins and lie around them; totals count genes that the table lacks."""
    monkeypatch.setenv("PIXNET_DATA_DIR", str(part.parent))
    sdata = px.datasets.kidney()
    assert set(sdata.shapes) == {"spots", "bins_008um", "bins_016um", "bins_032um", "bins_056um"}
    assert find_mpp(sdata, "he") == pytest.approx(2.05)
    assert len(sdata["he"]) > 1
    bins = ad.read_h5ad(part / "bins_008um.h5ad")
    row, col = bins.obs["array_row"], bins.obs["array_col"]
    for name, k, n in (("bins_008um", 1, 63), ("bins_016um", 2, 15), ("bins_032um", 4, 3), ("bins_056um", 7, 1)):
        table, frame = sdata[f"{name}_counts"], sdata[name]
        assert len(table) == len(frame) == n  # a block without its last bin is not there
        assert f"{name}_{7 // k}_{7 // k}" not in frame.index
        for i, square in enumerate(frame.geometry):
            r, c = map(int, frame.index[i].split("_")[2:])
            inside = ((row // k == r) & (col // k == c)).to_numpy()
            assert inside.sum() == k * k
            np.testing.assert_array_equal(table[i].X.toarray()[0], bins.X[inside].sum(axis=0))
            assert table.obs["total_counts"].iloc[i] == bins.obs["total_counts_all_genes"][inside].sum()
            middle = bins.obsm["spatial"][inside].mean(axis=0)
            np.testing.assert_allclose(shapely.get_coordinates(square.centroid)[0], middle)
            assert square.area == pytest.approx(k * k * abs(np.linalg.det([COL, ROW])))
    spots = ad.read_h5ad(part / "spots_055um.h5ad")
    assert list(sdata["spots"].index) == ["spot_3", "spot_5"]
    np.testing.assert_allclose(sdata["spots"]["radius"] * 2.05, 27.5)
    np.testing.assert_allclose(shapely.get_coordinates(sdata["spots"].geometry), spots.obsm["spatial"])
    np.testing.assert_array_equal(sdata["spots_counts"].X.toarray(), spots.X)
    assert list(sdata["spots_counts"].obs["total_counts"]) == [90, 80]


def test_space_rangers_output(space_ranger):
    """Pixel size, squares of bins, and discs on Visium's pitch follow from the bins."""
    folder, source = space_ranger
    sdata = px.datasets.kidney(folder, shapes=("spots", "bins_016um"))
    assert set(sdata.shapes) == {"spots", "bins_016um"}
    assert set(sdata.coordinate_systems) == {"global", "pixnet_um"}
    assert find_mpp(sdata, "he") == pytest.approx(0.5, rel=1e-3)
    np.testing.assert_array_equal(sdata["he"]["scale0"]["image"].values, source["he"]["scale0"]["image"].values)

    bins, genes = source["bins_counts"], list(source["bins_counts"].var_names)
    centre = shapely.centroid(source["bins"].geometry.to_numpy())
    squares = ("bins_016um", 4 * 16**2, {4})
    discs = ("spots", None, range(30, 45))
    for name, area, sizes in (squares, discs):
        frame, table = sdata[name], sdata[f"{name}_counts"]
        shapes = (
            frame.geometry.to_numpy()
            if area
            else shapely.buffer(frame.geometry.to_numpy(), frame["radius"].to_numpy(), quad_segs=64)
        )
        assert area is None or np.allclose(shapely.area(shapes), area, rtol=1e-3)
        for i in (0, len(table) // 2, len(table) - 1):
            inside = shapely.contains(shapes[i], centre)
            assert inside.sum() in sizes
            expected = np.asarray(bins[inside].X.sum(axis=0)).ravel()
            np.testing.assert_array_equal(table[i, genes].X.toarray()[0], expected)
            assert table.obs["total_counts"].iloc[i] == expected.sum()
    np.testing.assert_allclose(sdata["spots"]["radius"] * 0.5, 27.5, rtol=1e-3)
    xy = shapely.get_coordinates(sdata["spots"].geometry) * 0.5
    nearest = np.sort(np.linalg.norm(xy[:, None] - xy[None], axis=-1), axis=1)[:, 1]
    np.testing.assert_allclose(nearest, 100, rtol=1e-3)


def test_the_tissue_image_is_found_or_named(space_ranger, tmp_path):
    folder, source = space_ranger
    picture = next((folder / "microscope_image").iterdir())
    other = shutil.copytree(folder, tmp_path / "output", ignore=shutil.ignore_patterns("microscope_image"))
    with pytest.raises(FileNotFoundError, match="has 0 tissue images"):
        px.datasets.kidney(other)
    with pytest.raises(FileNotFoundError, match=r"no file 'away\.tif'"):
        px.datasets.kidney(other, image="away.tif")
    expected = source["he"]["scale0"]["image"].values
    named = px.datasets.kidney(other, image=picture, shapes=())
    np.testing.assert_array_equal(named["he"]["scale0"]["image"].values, expected)
    (other / "sample_tissue_image.tif").symlink_to(picture)
    found = px.datasets.kidney(other, shapes=())
    np.testing.assert_array_equal(found["he"]["scale0"]["image"].values, expected)


def test_errors_say_what_is_needed(part, space_ranger, tmp_path, monkeypatch):
    monkeypatch.delenv("PIXNET_DATA_DIR", raising=False)
    with pytest.raises(FileNotFoundError, match=r"PIXNET_DATA_DIR is not set.*Human Kidney \(FFPE\).*kidney\(folder\)"):
        px.datasets.kidney()
    monkeypatch.setenv("PIXNET_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no folder .*visium_hd_kidney'.*10xgenomics.com/datasets"):
        px.datasets.kidney()
    (tmp_path / "he.jpg").touch()
    with pytest.raises(
        FileNotFoundError, match=r"feature_slice\.h5, binned_outputs/.*lacks meta\.json, bins_008um\.h5ad, spots"
    ):
        px.datasets.kidney(tmp_path)
    with pytest.raises(ValueError, match=r"'cells'; valid: 'spots', 'bins_008um'"):
        px.datasets.kidney(part, shapes=("spots", "cells"))
    with pytest.raises(ValueError, match=r"has its own image, he\.jpg"):
        px.datasets.kidney(part, image="he.tif")
    monkeypatch.setitem(sys.modules, "spatialdata_io", None)
    with pytest.raises(ImportError, match="pip install spatialdata-io"):
        px.datasets.kidney(space_ranger[0])
