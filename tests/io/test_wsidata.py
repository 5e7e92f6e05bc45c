"""LazySlide's WSIData is a SpatialData object: it goes through `predict` and `aggregate` once its slide is an element."""

from __future__ import annotations

import geopandas
import numpy as np
import pytest
import shapely
from spatialdata.models import ShapesModel

import pixnet as px

wsidata = pytest.importorskip("wsidata")
tifffile = pytest.importorskip("tifffile")


@pytest.mark.parametrize("stored", [False, True])
def test_predict_and_aggregate(tmp_path, stored):
    path, store = tmp_path / "slide.tif", str(tmp_path / "slide.zarr")
    picture = np.random.default_rng(0).integers(0, 255, (512, 640, 3), dtype=np.uint8)
    options = {"tile": (256, 256), "resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, picture, photometric="rgb", **options)
    wsi = wsidata.open_wsi(path, store=store if stored else None)
    boxes = [shapely.box(x, y, x + 128, y + 128) for x in (0, 128) for y in (0, 128)]
    wsi["tiles"] = ShapesModel.parse(geopandas.GeoDataFrame(geometry=boxes))
    wsi.images["he"] = px.io.slide(path).images["he"]  # WSIData holds no image but a thumbnail
    if stored:
        wsi.write(store)
        wsi = wsidata.open_wsi(path, store=store)
    px.tl.predict(wsi, px.models.PixNet(["A", "B"], pretrained=False), image_key="he", mask_key=False)
    px.tl.aggregate(wsi, "tiles")
    assert np.isfinite(wsi.tables["tiles_genes"].X).all()
    if stored:
        assert "tables/tiles_genes" in wsi.elements_paths_on_disk()


def test_without_its_slide_the_error_says_how_to_add_it(tmp_path):
    path = tmp_path / "slide.tif"
    options = {"tile": (256, 256), "resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, np.full((512, 512, 3), 200, dtype=np.uint8), photometric="rgb", **options)
    wsi = wsidata.open_wsi(path, store=None)
    for image_key, error in ((None, ValueError), ("he", KeyError)):
        with pytest.raises(error, match=r"add it with wsi.images\['he'\] = pixnet.io.slide"):
            px.tl.predict(wsi, px.models.PixNet(["A"], pretrained=False), image_key=image_key)
