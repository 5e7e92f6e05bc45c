"""An AnnData and a picture become an object that trains, aggregates and plots."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import sparse

import pixnet as px
from pixnet._sdata.pixel_size import get_mpp


def hexagonal(pitch=100.0, n=8):
    row, col = (index.ravel() for index in np.indices((n, n)))
    return np.column_stack([(col + 0.5 * (row % 2)) * pitch + 60, row * pitch * np.sqrt(3) / 2 + 60])


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    xy = hexagonal()
    adata = ad.AnnData(sparse.csr_matrix(rng.poisson(2, (len(xy), 5)).astype(np.float32)))
    adata.var_names = [f"G{i}" for i in range(5)]
    adata.obs_names = [f"spot-{i}" for i in range(len(xy))]
    adata.obs["leiden"] = pd.Categorical(["0"] * len(xy))
    adata.obsm["spatial"] = xy
    return adata


PICTURE = np.random.default_rng(0).integers(60, 220, (801, 1001, 3)).astype(np.uint8)


def visium(adata, **images):
    """What scanpy keeps of a Visium sample."""
    factors = {"tissue_hires_scalef": 0.1, "tissue_lowres_scalef": 0.03, "spot_diameter_fullres": 65.0}
    adata.uns["spatial"] = {"sample": {"images": images, "scalefactors": factors}}
    return adata


def test_stated_pixel_size(adata):
    sdata = px.io.from_anndata(adata, PICTURE, mpp=0.5, diameter_um=55)
    assert get_mpp(sdata, "he") == 0.5
    assert sdata["spots"].radius.iloc[0] == 55
    np.testing.assert_allclose(np.column_stack([sdata["spots"].geometry.x, sdata["spots"].geometry.y]), hexagonal())
    table = sdata["spots_counts"]
    assert (table.X != adata.X).nnz == 0
    assert list(table.obs["instance_id"]) == list(sdata["spots"].index) == list(adata.obs_names)
    assert "leiden" in table.obs
    assert "region" not in adata.obs  # what was given stays as it is
    assert len(sdata["he"].children) == 2
    px.tl.aggregate(sdata, "spots", image_key="he")
    assert sdata["spots_he"].n_obs == len(adata)


def test_the_pixel_size_is_measured_for_visium(adata):
    sdata = px.io.from_anndata(visium(adata), PICTURE)
    assert get_mpp(sdata, "he") == pytest.approx(1.0)
    assert sdata["spots"].radius.iloc[0] == pytest.approx(27.5)


def test_files(adata, tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "he.png")
    sdata = px.io.from_anndata(adata, tmp_path / "he.png", pitch_um=200, diameter_um=100, image_key="slide")
    assert get_mpp(sdata, "slide") == pytest.approx(2.0)
    sdata = px.io.from_anndata(adata, str(tmp_path / "he.png"), mpp=0.4, diameter_um=55, shapes_key="cells")
    assert get_mpp(sdata, "he") == 0.4
    assert "cells_counts" in sdata


def test_reduced_picture_of_a_visium_sample(adata):
    adata.obsm["spatial"] = hexagonal() * 10
    small = PICTURE.astype(np.float32) / 255
    sdata = px.io.from_anndata(visium(adata, hires=small), PICTURE)
    np.testing.assert_allclose(sdata["spots"].geometry.x, hexagonal()[:, 0])
    assert get_mpp(sdata, "he") == pytest.approx(1.0)


def test_positions_in_um(adata):
    adata.obsm["spatial"] = hexagonal() * 4
    with pytest.raises(ValueError, match="they look like µm: pass scale=0.25"):
        px.io.from_anndata(adata, PICTURE, mpp=4.0, diameter_um=55)
    sdata = px.io.from_anndata(adata, PICTURE, mpp=4.0, diameter_um=55, scale=0.25)
    np.testing.assert_allclose(sdata["spots"].geometry.x, hexagonal()[:, 0])


def test_without_genes(adata):
    sdata = px.io.from_anndata(adata[:, :0], PICTURE, mpp=0.5, diameter_um=55)
    assert len(sdata.tables) == 0
    assert len(sdata["spots"]) == len(adata)


def test_real_space_ranger_folder_without_counts(shared_data):
    """As the guide says."""
    folder = shared_data / "visium_spatial" / "cytassist_mouse_brain_rep1" / "spatial"
    places = pd.read_csv(folder / "tissue_positions.csv", index_col="barcode").query("in_tissue == 1")
    adata = ad.AnnData(obs=places)
    adata.obsm["spatial"] = places[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()
    sdata = px.io.from_anndata(adata, folder / "tissue_hires_image.png", pitch_um=100, diameter_um=55, scale=0.05793743)
    assert 3 < get_mpp(sdata, "he") < 9
    assert px.pp.check_spots(sdata).loc["as given", "on_tissue"] > 0.5


@pytest.mark.parametrize(
    ("change", "arguments", "error", "message"),
    [
        (lambda a: a.obsm.clear(), {}, KeyError, r"no positions obsm\['spatial'\]"),
        (lambda a: a.obsm.update(spatial=np.full((64, 2), np.nan)), {}, ValueError, "NaN"),
        (lambda a: a.obsm.update(spatial=hexagonal() + 5000), {}, ValueError, "100% of the 64 positions lie outside"),
        (lambda a: setattr(a, "obs_names", ["a"] * 64), {}, ValueError, "obs_names repeat"),
        (lambda a: None, {"diameter_um": None}, ValueError, "give diameter_um="),
        (lambda a: None, {"mpp": None}, ValueError, "the pixel size is unknown"),
        (lambda a: None, {"mpp": -1}, ValueError, "mpp is -1"),
        (lambda a: None, {"image": PICTURE[..., 0]}, ValueError, r"uint8 \(y, x, 3\) is needed"),
        (lambda a: None, {"image": 5}, TypeError, "image is int"),
        (lambda a: None, {"image": "none.png"}, FileNotFoundError, "no file"),
        (lambda a: a.uns.update(spatial={"a": {}, "b": {}}), {}, ValueError, "several samples"),
    ],
)
@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_refusals(adata, change, arguments, error, message):
    change(adata)
    with pytest.raises(error, match=message):
        px.io.from_anndata(**{"adata": adata, "image": PICTURE, "mpp": 0.5, "diameter_um": 55.0, **arguments})


def test_functions_name_the_reader(adata):
    for call in (px.pp.tissue_mask, px.tl.predict, px.tl.train, px.pl.gene_map, px.tl.cross_validate):
        arguments = (
            {"genes": "A"} if call is px.pl.gene_map else {"groups": "p"} if call is px.tl.cross_validate else {}
        )
        with pytest.raises(TypeError, match=r"SpatialData.*pixnet.io.from_anndata\(adata, image\)"):
            call(adata, **arguments)
    with pytest.raises(TypeError, match=r"read_zarr"):
        px.tl.predict("slide.zarr")
    with pytest.raises(TypeError, match="AnnData object is needed"):
        px.io.from_anndata("a.h5ad", PICTURE)
