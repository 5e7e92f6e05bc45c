"""What SpatialData does to an object, and what `aggregate` and `predict` make of it: the right number, or a refusal."""

from __future__ import annotations

import functools
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata as sd
import torch
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel
from spatialdata.transformations import Identity, Scale
from spatialdata.transformations import Sequence as Chain

import pixnet as px
from pixnet._names import TOTALS
from pixnet._programs import program_names
from pixnet._sdata.loadings import loadings_table
from pixnet._sdata.pixel_size import find_mpp, set_pixel_size
from pixnet._sdata.rasters import full_resolution

PAGE = Path(__file__).parents[2] / "docs" / "project" / "operations.md"
MPP, SIDE, STRIDE = 0.5, 256, 4
GENES = ["ACTB", "CD3E"]
BOX = {"min": [64, 64], "max": [256, 256]}  # x, y; whole pixels of the slide and of the map

RIGHT, NO_SUMS, REFUSED = "right", "right; sums refused", "refused"
LOST = "refused: SpatialData drops the loadings"


@dataclass(frozen=True)
class Keys:
    """Names of the elements after an operation."""

    slide: str = "he"
    map: str = "he_genes"
    shapes: str = "bins"


@dataclass(frozen=True)
class Operation:
    """An operation, and what is expected of maps of densities, of log sums, of programs, and of a prediction from the slide.

    Attributes
    ----------
    text
        As the page has it.
    do
        Takes an object and gives the object and the names to look at.
    tolerance
        Relative; interpolation changes the values.
    """

    text: str
    do: Callable[[SpatialData], tuple[SpatialData, Keys]]
    density: str = RIGHT
    log_sum: str = RIGHT
    programs: str = ""
    """Empty: the same as of densities."""
    predict: str = RIGHT
    tolerance: float = 1e-5


# the object --------------------------------------------------------------------------------------------------------


def smooth(seed: int, n: int, side: int) -> np.ndarray:
    """Return ``(n, side, side)`` that vary slowly, from 1 to 3."""
    phase = np.random.default_rng(seed).uniform(0, 6, (n, 2, 1, 1))
    y, x = np.mgrid[:side, :side] / side
    return 2 + np.sin(3 * x + phase[:, 0]) * np.cos(2 * y + phase[:, 1])


def build(quantity: str, seed: int = 0) -> SpatialData:
    """Return a slide, its map, its mask, and bins, all in two coordinate systems."""
    return pickle.loads(pickled(quantity, seed))  # 20 times as fast as building


@functools.cache
def truth(quantity: str):
    """Return the table of the untouched object, and which shapes lie in the crop."""
    sdata = build(quantity)
    inside = shapely.box(*BOX["min"], *BOX["max"]).contains(sdata["bins"].geometry)
    return px.tl.aggregate(sdata, "bins", agg_func=["mean", "sum"], inplace=False), inside


@functools.cache
def pickled(quantity: str, seed: int) -> bytes:
    systems = {"global": Identity(), "half": Scale([0.5, 0.5], axes=("x", "y"))}
    pixels = (60 * smooth(seed, 3, SIDE)).astype(np.uint8)
    slide = Image2DModel.parse(pixels, dims=("c", "y", "x"), scale_factors=[2], transformations=dict(systems))
    set_pixel_size(slide, MPP)
    placed = {**systems, "pixnet_um": Scale([MPP, MPP], axes=("x", "y"))}
    to_slide = Scale([STRIDE, STRIDE], axes=("x", "y"))
    values = smooth(seed + 1, 3, SIDE // STRIDE).astype(np.float32)
    values *= np.float32([[[0.002]], [[0.001]], [[5000]]]) if quantity == "log_sum" else np.float32(1000)
    tables = {}
    names = [*GENES, TOTALS["density" if quantity == "programs" else quantity]]
    if quantity == "programs":
        shares = np.random.default_rng(seed).dirichlet([1, 1, 3], 3)[:, :2]
        loadings = pd.DataFrame(shares.astype(np.float32), columns=GENES)
        loadings.index = names = program_names(loadings.to_numpy(), GENES)
        tables["he_loadings"] = loadings_table(loadings, "he_genes")
    genes = Image2DModel.parse(
        values,
        dims=("c", "y", "x"),
        c_coords=names,
        scale_factors=[2],
        transformations={name: Chain([to_slide, system]) for name, system in placed.items()},
    )
    row, col = np.indices((SIDE // 32, SIDE // 32)).reshape(2, -1) * 32
    bins = gpd.GeoDataFrame({"geometry": shapely.box(col + 8, row + 8, col + 24, row + 24)})
    bins.index = [f"b{i}" for i in range(len(bins))]
    sdata = SpatialData(
        images={"he": slide, "he_genes": genes},
        labels={
            "he_tissue": Labels2DModel.parse(
                np.ones((SIDE // 8, SIDE // 8), np.uint8),
                dims=("y", "x"),
                transformations={name: Chain([Scale([8, 8], axes=("x", "y")), t]) for name, t in systems.items()},
            )
        },
        shapes={"bins": ShapesModel.parse(bins, transformations=dict(systems))},
        tables=tables,
    )
    return pickle.dumps(sdata)


# the operations ----------------------------------------------------------------------------------------------------


def box_crop(sdata, **options):
    found = sdata.query.bounding_box(
        axes=("x", "y"),
        min_coordinate=BOX["min"],
        max_coordinate=BOX["max"],
        target_coordinate_system="global",
        **options,
    )
    return found, Keys()


def polygon_crop(sdata):
    return sdata.query.polygon(shapely.box(*BOX["min"], *BOX["max"]), target_coordinate_system="global"), Keys()


def transformed(sdata, system: str, keep: bool = False):
    return sdata.transform_to_coordinate_system(system, maintain_positioning=keep), Keys()


def images_made_anew(sdata, make):
    """Both images by a function of SpatialData that takes an element."""
    for key in ("he", "he_genes"):
        element = sdata[key]
        del sdata[key]
        sdata[key] = make(element)
    return sdata, Keys()


def rasterized(sdata):
    box = {"axes": ("x", "y"), "min_coordinate": [0, 0], "max_coordinate": [SIDE, SIDE]}
    return images_made_anew(
        sdata,
        lambda element: sd.rasterize(element, **box, target_coordinate_system="global", target_unit_to_pixels=0.5),
    )


def concatenated(sdata, **options):
    other = build("density", seed=7)
    if TOTALS["density"] in full_resolution(sdata["he_genes"]).coords["c"].values:
        other = build("log_sum", seed=7)
    if "he_loadings" in sdata:
        other = build("programs", seed=7)
    for _ in range(2):  # once more, as projects grow
        sdata = sd.concatenate({"a": sdata, "b": other}, **options)
        other = build("density", seed=8)
    return sdata, Keys("he-a-a", "he_genes-a-a", "bins-a-a")


def parent_of_a_concatenation(sdata):
    sd.concatenate({"a": sdata, "b": build("density", seed=7)})
    return sdata, Keys()


def renamed(sdata):
    for old, new in (
        ("he", "slide"),
        ("he_genes", "picture"),
        ("bins", "squares"),
        ("he_tissue", "mask"),
        ("he_loadings", "table"),
    ):
        if old not in sdata:
            continue
        element = sdata[old]
        del sdata[old]
        sdata[new] = element
    return sdata, Keys("slide", "picture", "squares")


def replaced(sdata):
    """Another slide and the map of another quantity take the names of those that pixnet has recorded."""
    ours = full_resolution(sdata["he_genes"]).coords["c"].values[-1]
    before = build("log_sum" if ours == TOTALS["density"] else "density", seed=9)
    px.tl.aggregate(before, "bins")
    for key in ("he", "he_genes", *sdata.tables):
        if key in before:
            del before[key]
        before[key] = sdata[key]
    return before, Keys()


def replaced_by_another(sdata):
    """An image without a pixel size takes the name of one that has it; the map is left out."""
    for key in ("he", "he_genes"):
        element = full_resolution(sdata[key])
        names = element.coords["c"].values
        del sdata[key]
        scale = Scale([SIDE / element.sizes["x"]] * 2, axes=("x", "y"))
        sdata[key] = Image2DModel.parse(
            element.values, dims=("c", "y", "x"), c_coords=names, transformations={"global": scale}
        )
    return sdata, Keys()


def renamed_systems(sdata):
    sdata.rename_coordinate_systems({"pixnet_um": "micrometres", "global": "slide"})
    return sdata, Keys()


def without_record(sdata):
    sdata.attrs = {}
    return sdata, Keys()


OPERATIONS = {
    "subset": Operation(
        "`subset` that names the loadings, where there are any",
        lambda sdata: (sdata.subset(["he", "he_genes", "he_tissue", "bins", *sdata.tables]), Keys()),
    ),
    "box": Operation("`query.bounding_box`", box_crop, programs=LOST),
    "polygon": Operation("`query.polygon`", polygon_crop, programs=LOST),
    "box-tables": Operation(
        "`query.bounding_box(..., filter_table=False)`", lambda sdata: box_crop(sdata, filter_table=False)
    ),
    "filter": Operation(
        "`filter_by_coordinate_system(..., filter_tables=False)`",
        lambda sdata: (sdata.filter_by_coordinate_system("global", filter_tables=False), Keys()),
    ),
    "transform": Operation(
        "`transform_to_coordinate_system`: images are resampled, their pixel size is gone",
        lambda sdata: transformed(sdata, "half"),
        density=NO_SUMS,
        log_sum=REFUSED,
        predict=REFUSED,
        tolerance=0.03,
    ),
    "transform-keep": Operation(
        "`transform_to_coordinate_system(..., maintain_positioning=True)`",
        lambda sdata: transformed(sdata, "half", True),
        tolerance=0.03,
    ),
    "rasterize": Operation(
        "`rasterize` of the images: they are resampled, their pixel size is gone",
        rasterized,
        density=NO_SUMS,
        log_sum=REFUSED,
        predict=REFUSED,
        tolerance=0.04,
    ),
    "map_raster": Operation(
        "`map_raster` with a function that changes nothing",
        lambda sdata: images_made_anew(sdata, lambda element: sd.map_raster(element, lambda block: block)),
    ),
    "concatenate": Operation("`concatenate`, twice", concatenated),
    "concatenate-merge": Operation(
        "`concatenate(..., merge_coordinate_systems_on_name=True)`, twice",
        lambda sdata: concatenated(sdata, merge_coordinate_systems_on_name=True),
    ),
    "concatenate-parent": Operation(
        "`concatenate`, then the object that went in (its coordinate systems are renamed)", parent_of_a_concatenation
    ),
    "rename": Operation("elements renamed by hand", renamed),
    "replace": Operation("elements deleted, others of their own pixel size and quantity in their place", replaced),
    "replace-unknown": Operation(
        "elements deleted, others without a pixel size in their place",
        replaced_by_another,
        density=NO_SUMS,
        log_sum=REFUSED,
        predict=REFUSED,
    ),
    "rename-systems": Operation(
        "`rename_coordinate_systems`, `pixnet_um` among them",
        renamed_systems,
        density=NO_SUMS,
        log_sum=REFUSED,
        predict=REFUSED,
    ),
    "deepcopy": Operation("`deepcopy`", lambda sdata: (sd.deepcopy(sdata), Keys())),
    "attrs": Operation("`sdata.attrs` lost", without_record),
    "store": Operation("`write` and `read_zarr`", lambda sdata: (sdata, Keys())),
}
CROP = re.compile("box|polygon")
STORES = ["memory", "store before", "store after"]


def operate(operation: Operation, quantity: str, store: str, folder: Path) -> tuple[SpatialData, Keys]:
    """Do an operation on an object in memory or read from a store, or store what it gives and read that."""
    sdata = build(quantity)
    if store == "store before":
        sdata.write(folder / "before.zarr")
        sdata = sd.read_zarr(folder / "before.zarr")
    sdata, keys = operation.do(sdata)
    if store == "store after":
        sdata.write(folder / "after.zarr")
        sdata = sd.read_zarr(folder / "after.zarr")
    return sdata, keys


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("quantity", ["density", "log_sum", "programs"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_aggregate(name, quantity, store, tmp_path):
    operation = OPERATIONS[name]
    sdata, keys = operate(operation, quantity, store, tmp_path)
    expected = getattr(operation, quantity) or operation.density

    def aggregated(functions):
        return px.tl.aggregate(sdata, keys.shapes, image_key=keys.map, agg_func=functions, inplace=False)

    if expected == LOST:
        with pytest.raises(KeyError, match="loadings of program map .* are missing.*filter_table=False"):
            aggregated("mean")
        return
    if expected != RIGHT:
        with pytest.raises(ValueError, match=r"pixel size is unknown.*set_mpp"):
            aggregated(["mean", "sum"])
    if expected == REFUSED:
        with pytest.raises(ValueError, match=r"pixel size is unknown.*set_mpp"):
            aggregated("mean")
        return
    found = aggregated(["mean", "sum"] if expected == RIGHT else "mean")
    right, inside = truth(quantity)
    ids = [i for i in right.obs_names if i in found.obs_names and (inside[i] or not CROP.match(name))]
    assert len(ids) == (36 if CROP.match(name) else 64)
    found, right = found[ids], right[ids]
    close = {"rtol": operation.tolerance}
    np.testing.assert_allclose(found.X, right.X, **close)
    np.testing.assert_allclose(found.layers["density"], right.layers["density"], **close)
    np.testing.assert_allclose(found.obs["total"], right.obs["total"], **close)
    np.testing.assert_allclose(found.obs["coverage"], 1)
    if expected == RIGHT:
        np.testing.assert_allclose(found.layers["sum"], right.layers["sum"], **close)
        np.testing.assert_allclose(found.obs["area"], right.obs["area"])
    else:
        assert found.uns["pixnet"]["area_unit"] == "pixel"


class Encoder(torch.nn.Module):
    """Two convolutions: quick."""

    strides, channels = (4, 8), (6, 8)

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = torch.nn.Conv2d(3, 6, 8, 4, padding=2), torch.nn.Conv2d(6, 8, 2, 2)

    def forward(self, image):
        fine = self.fine(image)
        return [fine, self.coarse(fine)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = px.models.PixNet(GENES, encoder=Encoder(), mpp=MPP, stride=STRIDE, window=64, halo=64)
    torch.nn.init.normal_(net.members[0].last.weight, std=0.5)
    return net.eval()


@pytest.fixture(scope="module")
def predicted(model):
    return px.tl.predict(build("density"), model, mask_key=False, inplace=False).values


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_predict(name, store, tmp_path, model, predicted):
    operation = OPERATIONS[name]
    sdata, keys = operate(operation, "density", store, tmp_path)
    if operation.predict == REFUSED:
        with pytest.raises(ValueError, match=r"pixel size .* is unknown.*set_mpp"):
            px.tl.predict(sdata, model, image_key=keys.slide, mask_key=False, inplace=False)
        return
    found = px.tl.predict(sdata, model, image_key=keys.slide, mask_key=False, inplace=False)
    assert find_mpp(SpatialData(images={"map": found}), "map") == pytest.approx(MPP * STRIDE, rel=1e-9)
    if name == "transform-keep":  # pixels of 1 µm, enlarged for the model
        assert found.shape[1:] == predicted.shape[1:]
    elif CROP.match(name):
        assert found.shape[1:] == (192 // STRIDE, 192 // STRIDE)
        # the window whose surroundings are all in the crop
        np.testing.assert_allclose(found.values[:, 16:32, 16:32], predicted[:, 32:48, 32:48], rtol=1e-5)
    else:
        np.testing.assert_array_equal(found.values, predicted)


@pytest.mark.filterwarnings("ignore")
def test_an_object_resampled_to_pixels_of_1_um(model):
    """Pixels of the coordinate system that tells pixel sizes: known, and no way to place shapes on them."""
    sdata = build("density").transform_to_coordinate_system("pixnet_um")
    assert [find_mpp(sdata, key) for key in ("he", "he_genes")] == [1.0, 1.0]
    found = px.tl.predict(sdata, model, mask_key=False, inplace=False)
    assert find_mpp(SpatialData(images={"map": found}), "map") == MPP * STRIDE
    assert "bins" not in sdata
    sdata["bins"] = build("density")["bins"]
    with pytest.raises(ValueError, match="share no coordinate system"):
        px.tl.aggregate(sdata, "bins")


def table() -> str:
    """Return the page's table."""
    rows = [
        "| operation | `aggregate`, densities | `aggregate`, log sums | `aggregate`, programs | `predict` |",
        "|---|---|---|---|---|",
    ]
    rows += [
        f"| {o.text} | {o.density} | {o.log_sum} | {o.programs or o.density} | {o.predict} |"
        for o in OPERATIONS.values()
    ]
    return "\n".join(rows)


def test_the_page_has_this_table():
    assert table() in PAGE.read_text()
