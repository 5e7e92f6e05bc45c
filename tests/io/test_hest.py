"""Samples of HEST-1k, in the layout of the public data set."""

from __future__ import annotations

import json
import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import pixnet as px

tifffile = pytest.importorskip("tifffile")


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes a sample as HEST-1k has it."""

    def write(sample_id, technology, pitch_um, **metadata):
        for name in ("wsis", "st", "metadata"):
            (tmp_path / name).mkdir(exist_ok=True)
        rng, mpp = np.random.default_rng(0), 0.5
        picture = rng.integers(150, 255, (1024, 1280, 3), dtype=np.uint8)
        with tifffile.TiffWriter(tmp_path / "wsis" / f"{sample_id}.tif") as file:  # a pyramidal generic TIFF
            options = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg"}
            resolution = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
            file.write(picture, **options, **resolution)
            file.write(picture[::2, ::2], subfiletype=1, **options)
        x, y = (places.ravel() for places in np.meshgrid(*[150 + np.arange(4) * pitch_um / mpp] * 2))
        obs = pd.DataFrame({"in_tissue": 1, "pxl_col_in_fullres": x, "pxl_row_in_fullres": y})
        obs.index = [f"{i:03d}x{i:03d}" for i in range(len(x))]
        counts = sparse.csr_matrix(rng.poisson(3, (len(x), 5)).astype(np.float32))
        adata = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=list("ABCDE")))
        adata.obsm["spatial"] = np.column_stack([x, y])
        images = {"downscaled_fullres": picture[::8, ::8]}
        factors = {"spot_diameter_fullres": 110.0, "tissue_downscaled_fullres_scalef": 0.125}
        adata.uns["spatial"] = {"ST": {"images": images, "scalefactors": factors}}
        adata.write_h5ad(tmp_path / "st" / f"{sample_id}.h5ad")
        about = {
            "id": sample_id, "st_technology": technology, "pixel_size_um_embedded": 0.26,
            "pixel_size_um_estimated": mpp, "inter_spot_dist": 2.0, "spot_diameter": 2.0, "organ": "Bowel",
            "patient": float("nan"), **metadata,
        }  # fmt: skip
        (tmp_path / "metadata" / f"{sample_id}.json").write_text(json.dumps(about))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("technology", "pitch_um", "stated", "area_um2"),
    [
        ("Visium", 100, 55.0, np.pi * 27.5**2),
        ("Spatial Transcriptomics", 130, float("nan"), np.pi * 50**2),
        ("Visium HD", 128, 2.0, 128**2),
        ("Xenium", 100, float("nan"), 100**2),
    ],
)
def test_samples_of_each_technology(folder, tmp_path, technology, pitch_um, stated, area_um2):
    root = folder("NCBI1", technology, pitch_um, spot_diameter=stated)
    sdata = px.io.hest(root, "NCBI1")
    found = px.tl.aggregate(sdata, "spots", image_key="he", inplace=False)
    np.testing.assert_allclose(found.obs["area"], area_um2, rtol=1e-6)
    assert sdata["spots_counts"].shape == (16, 5)
    np.testing.assert_allclose(found.obsm["spatial"], sdata["spots_counts"].obsm["spatial"])
    assert sdata.attrs["hest"]["organ"] == "Bowel"
    assert sdata.attrs["hest"]["patient"] is None
    sdata.write(tmp_path / "store.zarr")


def test_known_duplicates_are_named(folder, caplog):
    root = folder("TENX155", "Visium HD", 128)
    logging.getLogger("pixnet").addHandler(caplog.handler)
    px.io.hest(root, "TENX155")
    logging.getLogger("pixnet").removeHandler(caplog.handler)
    assert "this section twice, as TENX155 and as TENX128" in caplog.text
    assert "to one patient, and their study to several" in caplog.text


def test_refusals(folder, tmp_path):
    root = folder("NCBI1", "MERFISH", 100)
    with pytest.raises(ValueError, match=r"'MERFISH'; known: 'Visium'"):
        px.io.hest(root, "NCBI1")
    with pytest.raises(FileNotFoundError, match=r"NCBI2.json is missing; metadata holds 'NCBI1'"):
        px.io.hest(root, "NCBI2")
    with pytest.raises(FileNotFoundError, match="no folder 'metadata'"):
        px.io.hest(tmp_path / "st", "NCBI1")
    folder("NCBI1", "Visium", 100, pixel_size_um_estimated=None, pixel_size_um_embedded=float("nan"))
    with pytest.raises(ValueError, match="no pixel size"):
        px.io.hest(root, "NCBI1")
