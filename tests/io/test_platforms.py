"""Objects as spatialdata-io reads them work unchanged, and the guides' scripts run as they are printed."""

from __future__ import annotations

import importlib.util
import re
import warnings
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import shapely
from PIL import Image

import pixnet as px
from pixnet._sdata.keys import resolve_image
from pixnet._sdata.shapes import read_shapes

spatialdata_io = pytest.importorskip("spatialdata_io")
pytest.importorskip("tifffile")


def _load(name: str):
    # tests are not a package (importmode importlib), so a helper beside this file is loaded by its path
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


platforms = _load("platforms")
mpl.use("agg")
GUIDES = Path(__file__).parents[2] / "docs" / "guides"
# One pass over coarse pixels: that it runs is what is tested here.
QUICK = {"max_epochs": 1, "variants": 1, "mpp": 1.0}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def source():
    return px.datasets.synthetic_tissue(500, n_genes=26, shapes=("spots", "cells", "bins"))


@pytest.fixture(scope="module")
def model(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "my_model.safetensors"
    px.tl.train(source, genes=["TUM1", "FIB1"], **QUICK).save(path)
    return path


@pytest.fixture(scope="module")
def folders(source, tmp_path_factory):
    root = tmp_path_factory.mktemp("platforms")
    platforms.visium(root / "my_visium", source)
    platforms.visium_hd(root / "my_visium_hd", source)
    platforms.xenium(root / "my_xenium", source)
    return root


def centres(sdata, shapes, image_key):
    bounds = read_shapes(sdata, shapes, image_key).geometries.bounds
    return (bounds[:, :2] + bounds[:, 2:]) / 2


def true_centres(source, shapes):
    bounds = shapely.bounds(source[shapes].geometry.to_numpy())
    return (bounds[:, :2] + bounds[:, 2:]) / 2


@pytest.mark.parametrize(("image", "mpp"), [("full", 0.5), ("hires", 1.0), ("lowres", 4.0)])
def test_visium(folders, source, image, mpp):
    sdata = spatialdata_io.visium(folders / "my_visium", dataset_id="sample", fullres_image_file="he.tif")
    assert "global" not in sdata.coordinate_systems
    key = f"sample_{image}_image"
    found = px.pp.infer_mpp(sdata, "sample", image_key=key, pitch_um=100)
    assert found == pytest.approx(mpp, rel=1e-3)
    np.testing.assert_allclose(centres(sdata, "sample", key) * mpp, true_centres(source, "spots") * 0.5, atol=0.01)
    # the recorded pixel size settles which of the three images is meant, and the only table is found
    assert resolve_image(sdata) == key
    genes = px.pp.select_genes(sdata, n_top=5)
    assert genes == px.pp.select_genes(source, n_top=5)
    if image == "full":
        assert px.pp.check_spots(sdata)["on_tissue"].iloc[0] > 0.9


def test_visium_needs_its_resolution(folders):
    sdata = spatialdata_io.visium(folders / "my_visium", dataset_id="sample", fullres_image_file="he.tif")
    with pytest.raises(ValueError, match="several elements .*sample_full_image.*image_key"):
        px.pp.tissue_mask(sdata)
    with pytest.raises(ValueError, match="set_mpp.*infer_mpp"):
        px.pp.tissue_mask(sdata, "sample_full_image")


def test_visium_hd(folders, source):
    sdata = spatialdata_io.visium_hd(folders / "my_visium_hd", load_segmentations_only=False)
    key = "sample_full_image"
    assert px.pp.infer_mpp(sdata, "sample_square_008um", image_key=key, edge_um=8) == pytest.approx(0.5)
    assert px.pp.infer_mpp(sdata, "sample_square_008um", image_key=key, pitch_um=8) == pytest.approx(0.5)
    np.testing.assert_allclose(centres(sdata, "sample_square_008um", key), true_centres(source, "bins"), atol=0.01)
    assert px.pp.select_genes(sdata, n_top=5) == px.pp.select_genes(source, table_key="bins_counts", n_top=5)


def test_xenium(folders, source):
    sdata = spatialdata_io.xenium(folders / "my_xenium")
    assert px.pp.infer_mpp(sdata, "cell_boundaries", image_key="he_image", unit_um=1) == pytest.approx(0.5)
    side = 1000
    # the H&E was turned by 180 degrees
    turned = side - centres(sdata, "cell_boundaries", "he_image")
    np.testing.assert_allclose(turned, true_centres(source, "cells"), atol=0.02)
    assert resolve_image(sdata) == "he_image"  # not the DAPI picture
    # labels and polygons of the same cells have the same mean colour
    for shapes in ("cell_boundaries", "cell_labels"):
        px.tl.aggregate(sdata, shapes, image_key="he_image", key_added=f"{shapes}_colour")
    px.tl.aggregate(source, "cells", image_key="he", key_added="colour", overwrite=True)
    expected = source["colour"].X
    assert np.abs(sdata["cell_boundaries_colour"].X - expected).max() < 0.5
    assert np.abs(sdata["cell_labels_colour"].X - expected).mean() < 2.5


def script(name: str) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", (GUIDES / f"{name}.md").read_text(), flags=re.S | re.M)
    assert blocks
    return "\n".join(blocks)


@pytest.mark.parametrize(
    "name",
    ["visium", "many-visium", "visium-hd", "xenium", "slides", "legacy-st", "cells", "synthetic", "anndata", "qupath"],
)
def test_guides_run_as_printed(name, folders, source, model, tmp_path, monkeypatch, request):
    """Only the length of training differs from what a reader runs."""
    for link in ("my_visium", "my_visium_hd", "my_xenium"):
        (tmp_path / link).symlink_to(folders / link)
    (tmp_path / "my_model.safetensors").symlink_to(model)
    if name == "many-visium":
        for sample in ("a1", "a2", "b1"):
            (tmp_path / "visium" / sample).mkdir(parents=True)
            for file in (folders / "my_visium").iterdir():
                (tmp_path / "visium" / sample / file.name).symlink_to(file)
    if name == "slides":
        shared = request.getfixturevalue("shared_data")
        (tmp_path / "my_slide.svs").symlink_to(shared / "wsi" / "CMU-1-Small-Region.svs")
    if name in {"cells", "qupath"}:
        Image.fromarray(platforms.pixels_of(source)).save(tmp_path / "my_slide.png")
        px.io.write_geojson(source, "cells", tmp_path / "cells.geojson", object_type="cell", table_key=False)
        px.io.write_geojson(source, "spots", tmp_path / "annotations.geojson", table_key=False)
    if name == "anndata":
        visium = spatialdata_io.visium(folders / "my_visium", dataset_id="sample", fullres_image_file="he.tif")
        adata = visium["table"].copy()
        adata.uns["spatial"] = {"sample": {"scalefactors": {"spot_diameter_fullres": 130.0}}}
        adata.write_h5ad(tmp_path / "my_visium.h5ad")
    if name == "legacy-st":
        legacy(tmp_path / "my_st", px.datasets.synthetic_tissue(1000, mpp=1.0, n_genes=26, shapes=("spots_legacy",)))
    monkeypatch.chdir(tmp_path)
    for function in ("train", "cross_validate"):
        monkeypatch.setattr(px.tl, function, partial(getattr(px.tl, function), **QUICK))
    namespace: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(script(name), f"{name}.md", "exec"), namespace)
    if name == "many-visium":
        adata = namespace["adata"]
        assert adata.obs["sample"].value_counts().tolist() == [namespace["sdata"]["b1"].shape[0]] * 3
        assert set(namespace["scores"]["group"]) == {"A", "B"}
    sdata = namespace["sdata"]
    tables = [key for key in sdata.tables if key.endswith("_genes")]
    assert tables
    for key in tables:
        assert np.isfinite(sdata[key].X).any()
    if name == "cells":
        n_true = len(source["cells"])
        assert 0.4 * n_true < sdata["cells_genes"].n_obs < 1.6 * n_true


def legacy(folder, source):
    folder.mkdir()
    table, spots = source["spots_legacy_counts"], source["spots_legacy"]
    x, y = ((values.to_numpy() / 200).astype(int) for values in (spots.geometry.x, spots.geometry.y))
    counts = table.to_df().astype(int)
    counts.index = [f"{a}x{b}" for a, b in zip(x, y)]
    counts.to_csv(folder / "counts.tsv.gz", sep="\t")
    spots = spots.drop(columns="geometry").assign(x=x, y=y, pixel_x=spots.geometry.x, pixel_y=spots.geometry.y)
    spots.to_csv(folder / "spots.tsv", sep="\t", index=False)
    Image.fromarray(platforms.pixels_of(source)).save(folder / "he.jpg", quality=95)
