"""GeoJSON of QuPath: read and written, with classes and measurements; other programs read what is written."""

from __future__ import annotations

import gzip
import json
import logging

import anndata as ad
import geopandas
import jsonschema
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel
from spatialdata.transformations import Affine, get_transformation, set_transformation

import pixnet as px
from pixnet._core import geojson
from pixnet._sdata.raster_element import pyramid, raster_element

POINT = {"type": "array", "minItems": 2, "items": {"type": "number"}}
RING = {"type": "array", "minItems": 4, "items": POINT}
POLYGON = {"type": "array", "items": RING}
# RFC 7946, as far as polygons go, and what QuPath adds to it
SCHEMA = {
    "type": "object",
    "required": ["type", "features"],
    "properties": {
        "type": {"const": "FeatureCollection"},
        "features": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "geometry", "properties"],
                "properties": {
                    "type": {"const": "Feature"},
                    "id": {"type": ["string", "number"]},
                    "geometry": {
                        "oneOf": [
                            {
                                "type": "object",
                                "required": ["type", "coordinates"],
                                "properties": {"type": {"const": kind}, "coordinates": coordinates},
                            }
                            for kind, coordinates in (
                                ("Polygon", POLYGON),
                                ("MultiPolygon", {"type": "array", "items": POLYGON}),
                            )
                        ]
                    },
                    "properties": {
                        "type": "object",
                        "required": ["objectType"],
                        "properties": {
                            "objectType": {"enum": ["annotation", "detection", "cell", "tile"]},
                            "name": {"type": "string"},
                            "classification": {"type": "object", "properties": {"name": {"type": "string"}}},
                            "measurements": {"type": "object", "additionalProperties": {"type": "number"}},
                        },
                    },
                },
            },
        },
    },
}


@pytest.fixture
def sdata():
    """Tissue in the upper left of a slide."""
    pixels = np.full((3, 600, 1000), 245, dtype=np.uint8)
    pixels[:, 30:330, 40:540] = np.random.default_rng(0).integers(60, 200, (3, 75, 125)).repeat(4, 1).repeat(4, 2)
    sdata = SpatialData(images={"he": raster_element(*pyramid(pixels))})
    px.pp.set_mpp(sdata, "he", 2.0)
    return sdata


@pytest.fixture
def warnings():
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage()) if record.levelno >= logging.WARNING else None
    logger = logging.getLogger("pixnet")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def feature(coordinates, kind="Polygon", identity=None, **properties):
    geometry = {"type": kind, "coordinates": coordinates}
    one = {"type": "Feature", "geometry": geometry, "properties": {"objectType": "annotation", **properties}}
    return one if identity is None else {**one, "id": identity}


def square(x=100.0, y=100.0, size=40.0):
    return [[x, y], [x + size, y], [x + size, y + size], [x, y + size], [x, y]]


def save(path, features, collection=True):
    content = {"type": "FeatureCollection", "features": features} if collection else features
    path.write_text(json.dumps(content))
    return path


def test_read(sdata, tmp_path, warnings):
    file = save(
        tmp_path / "regions.geojson",
        [
            feature(
                [square(), square(110, 110, 10)[::-1]],
                identity="a",
                classification={"name": "Tumor", "color": [200, 0, 0]},
                measurements={"Area µm^2": 64.0, "Circularity": 0.8},
                name="ROI 1",
            ),
            feature(
                [[square(200)], [square(300)]],
                "MultiPolygon",
                identity="b",
                measurements=[{"name": "Area µm^2", "value": 5}],
            ),
        ],
    )
    px.io.read_geojson(sdata, file)
    found = sdata["regions"]
    assert list(found.index) == ["a", "b"]
    assert found.area.tolist() == [1500, 3200]
    assert found["classification"].tolist()[0] == "Tumor"
    assert pd.isna(found["classification"].tolist()[1])
    assert found["name"].tolist() == ["ROI 1", None]
    assert found["object_type"].tolist() == ["annotation"] * 2
    assert found["Area µm^2"].tolist() == [64, 5]
    np.testing.assert_array_equal(found["Circularity"], [0.8, np.nan])
    assert set(get_transformation(found, get_all=True)) == {"global"}
    assert warnings == []


def test_read_into_a_store_and_sum_over_it(sdata, tmp_path):
    sdata.write(tmp_path / "a.zarr")
    file = save(
        tmp_path / "f.geojson",
        [
            feature([square()], identity="a", measurements={"x": 1.5}, classification={"name": "Tumor"}),
            feature([square(200)], identity="b", name="n"),
        ],
    )
    px.io.read_geojson(sdata, file, key_added="regions")
    again = spatialdata.read_zarr(tmp_path / "a.zarr")
    np.testing.assert_array_equal(again["regions"]["x"], [1.5, np.nan])
    assert again["regions"]["classification"].tolist()[0] == "Tumor"
    assert list(again["regions"].index) == ["a", "b"]
    px.tl.aggregate(again, "regions", image_key="he", genes=["r"])
    pixels = np.asarray(sdata["he"]["scale0"]["image"][0, 100:140, 100:140])
    assert again["regions_he"].X[0, 0] == pytest.approx(pixels.mean(), rel=1e-5)


@pytest.mark.parametrize("pack", [False, True])
def test_older_files(sdata, tmp_path, pack):
    """A list of features, ids that name a type, nested objects, packed with gzip whatever the name."""
    nested = feature([square()], classification={"names": ["Immune", "CD8"]})
    nested["properties"]["childObjects"] = [feature([square(150)], object_type="cell")]
    file = save(tmp_path / "a.json", [{**nested, "id": "PathAnnotationObject"}], collection=False)
    if pack:
        file.write_bytes(gzip.compress(file.read_bytes()))
    found = px.io.read_geojson(sdata, file, inplace=False)
    assert list(found.index) == [1, 2]
    assert found["classification"].tolist()[0] == "Immune: CD8"
    assert len(found) == 2


def test_one_feature(sdata, tmp_path):
    (tmp_path / "a.geojson").write_text(json.dumps(feature([square()])))
    assert len(px.io.read_geojson(sdata, tmp_path / "a.geojson", inplace=False)) == 1


def test_invalid_rings_are_repaired_and_named(sdata, tmp_path, warnings):
    bow = [[100, 100], [140, 140], [140, 100], [100, 140], [100, 100]]
    file = save(
        tmp_path / "a.geojson",
        [
            feature([bow], identity="bow"),
            feature([square()[:-1]], identity="open"),
            feature([[[100, 100, 5], [140, 100, 5], [140, 140, 5], [100, 100, 5]]], identity="height"),
            feature([[[1, 1], [2, 2], [1, 1]]], identity="line"),
            feature([square(), [[1, 1], [2, 2]]], identity="hole"),
            feature([3, 4], "Point", identity="point"),
            feature([square(200)], identity="good"),
        ],
    )
    found = px.io.read_geojson(sdata, file, inplace=False)
    assert list(found.index) == ["bow", "open", "height", "hole", "good"]
    assert found.geometry.is_valid.all()
    assert found.area.tolist() == [800, 1600, 800, 1600, 1600]
    assert "1 objects without an area are left out (1 Point)" in warnings[0]
    assert "their rings enclose nothing: line" in warnings[1]
    assert "3 objects had invalid rings and were repaired: bow, open, hole" in warnings[2]


def test_repeated_ids_are_numbered(sdata, tmp_path, warnings):
    file = save(tmp_path / "a.geojson", [feature([square()], identity="a"), feature([square(200)], identity="a")])
    assert list(px.io.read_geojson(sdata, file, inplace=False).index) == [1, 2]
    assert "missing or repeated" in warnings[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "damaged or truncated"),
        ('{"type": "FeatureCollection", "features": []}', "no feature"),
        ('{"type": "Topology", "objects": {}}', "'Topology'"),
        ('{"type": "FeatureCollection", "features": [{"type": "Feature"', "damaged or truncated"),
        ("<html>", "damaged or truncated"),
        (b"\x1f\x8b\x08\x00cut", "damaged or truncated"),
        ('[{"type": "Feature"}]', r"feature 1 \(no id\) is not a GeoJSON feature"),
        ("[5]", "is not a GeoJSON feature"),
        (json.dumps([feature([[[1, 2], [3], [4, 5], [1, 2]]], identity="x")]), r"feature 1 \(x\)"),
        (json.dumps([feature([3, 4], "Point")]), "nothing with an area"),
    ],
)
def test_damaged_files_are_refused(sdata, tmp_path, content, message):
    (tmp_path / "a.geojson").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        px.io.read_geojson(sdata, tmp_path / "a.geojson")
    assert "a" not in sdata


def test_files_of_another_slide_or_in_um_are_refused(sdata, tmp_path, warnings):
    rng = np.random.default_rng(0)
    x, y = rng.uniform(60, 500, 50), rng.uniform(50, 300, 50)
    far = save(tmp_path / "far.geojson", [feature([square(a + 900, b + 500, 5)]) for a, b in zip(x, y)])
    with pytest.raises(ValueError, match="lie outside image 'he' of 1000 x 600 px.*unit='um'"):
        px.io.read_geojson(sdata, far)
    # at 0.5 µm/px, µm would lie in the upper left quarter of the slide
    px.pp.set_mpp(sdata, "he", 0.5)
    sdata["he_tissue"] = raster_element(
        [np.pad(np.ones((300, 500), np.uint8), ((250, 50), (400, 100)))], [(1.0, 1.0)], channels=None
    )
    right = [feature([square(a + 360, b + 220, 5)], identity=str(i)) for i, (a, b) in enumerate(zip(x, y))]
    small = [feature([(0.5 * np.array(one["geometry"]["coordinates"][0])).tolist()]) for one in right]
    with pytest.raises(ValueError, match="would if their coordinates were µm: pass unit='um'"):
        px.io.read_geojson(sdata, save(tmp_path / "um.geojson", small))
    px.io.read_geojson(sdata, tmp_path / "um.geojson", unit="um")
    px.io.read_geojson(sdata, save(tmp_path / "px.geojson", right))
    assert warnings == []
    np.testing.assert_allclose(sdata["um"].bounds, sdata["px"].bounds)
    px.io.read_geojson(sdata, tmp_path / "um.geojson", unit="px", key_added="wrong")
    assert "are they of this slide?" in warnings[0]


def test_refusals_of_read(sdata, tmp_path):
    file = save(tmp_path / "a b.geojson", [feature([square()])])
    with pytest.raises(FileNotFoundError):
        px.io.read_geojson(sdata, tmp_path / "none.geojson")
    with pytest.raises(ValueError, match="key_added is 'a b'"):
        px.io.read_geojson(sdata, file)
    with pytest.raises(ValueError, match="'he' exists"):
        px.io.read_geojson(sdata, file, key_added="he")
    with pytest.raises(ValueError, match="unit is 'mm'"):
        px.io.read_geojson(sdata, file, unit="mm")
    with pytest.raises(KeyError, match="'he'"):
        px.io.read_geojson(sdata, file, image_key="other", key_added="a")


# writing -------------------------------------------------------------------------------------------------------------


def with_cells(sdata, n=7, matrix=np.asarray):
    boxes = shapely.box(np.arange(n) * 50.0 + 60, 50, np.arange(n) * 50.0 + 90, 80.5)
    frame = geopandas.GeoDataFrame({"size": np.arange(n) + 0.5}, geometry=boxes, index=[f"c{i}" for i in range(n)])
    sdata["cells"] = ShapesModel.parse(frame)
    values = np.arange(2.0 * (n - 1), dtype=np.float32).reshape(n - 1, 2) / 10
    obs = pd.DataFrame({"region": pd.Categorical(["cells"] * (n - 1)), "instance_id": frame.index[:0:-1]})
    obs["leiden"] = pd.Categorical([str(i % 2) for i in range(n - 1)])
    obs.index = obs.index.astype(str)
    table = ad.AnnData(matrix(values), obs=obs, var=pd.DataFrame(index=["CD3E", 'odd "name" µ']))
    sdata["cells_genes"] = TableModel.parse(table, region="cells", region_key="region", instance_key="instance_id")
    return sdata


@pytest.mark.parametrize("matrix", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize("name", ["cells.geojson", "cells.geojson.gz"])
def test_write(sdata, tmp_path, monkeypatch, name, matrix):
    monkeypatch.setattr("pixnet.io._write_geojson.BATCH", 3)
    with_cells(sdata, matrix=matrix)
    path = tmp_path / name
    px.io.write_geojson(sdata, "cells", path, classification="leiden", object_type="cell")
    text = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    content = json.loads(text)
    jsonschema.validate(content, SCHEMA)
    first, second, *_ = content["features"]
    assert first["id"] == "c0"
    assert "classification" not in first["properties"]  # no row in the table
    assert first["properties"]["measurements"] == {"size": 0.5}
    # c1 is the last row of the table
    assert second["properties"]["measurements"] == {"size": 1.5, "CD3E": 1.0, 'odd "name" µ': 1.1}
    assert second["properties"]["classification"] == {"name": "1"}
    assert second["properties"]["objectType"] == "cell"
    ring = shapely.LinearRing(second["geometry"]["coordinates"][0])
    assert ring.is_ccw
    found = geopandas.read_file(f"/vsigzip/{path}" if name.endswith("gz") else path)
    assert found.geometry.geom_equals(sdata["cells"].geometry.reset_index(drop=True)).all()
    assert len(list(tmp_path.iterdir())) == 1
    px.io.read_geojson(sdata, path, key_added="again")
    pd.testing.assert_series_equal(sdata["again"]["size"], sdata["cells"]["size"])
    assert sdata["again"]["CD3E"].iloc[1] == 1.0


def test_round_trip_keeps_everything(sdata, tmp_path):
    file = save(
        tmp_path / "a.geojson",
        [
            feature([square()], identity="a", classification={"name": "Tumor"}, measurements={"m": 0.1}, name="x"),
            feature([[square(200)], [square(300)]], "MultiPolygon", identity="b"),
        ],
    )
    px.io.read_geojson(sdata, file)
    px.io.write_geojson(sdata, "a", tmp_path / "b.geojson")
    px.io.read_geojson(sdata, tmp_path / "b.geojson")
    assert sdata["b"].geometry.geom_equals(sdata["a"].geometry).all()
    pd.testing.assert_frame_equal(
        pd.DataFrame(sdata["a"].drop(columns="geometry")), pd.DataFrame(sdata["b"].drop(columns="geometry"))
    )


def test_circles_through_a_transformation(sdata, tmp_path):
    sdata["spots"] = ShapesModel.parse(np.array([[10.0, 20.0], [30.0, 20.0]]), geometry=0, radius=4.0)
    turn = Affine(np.array([[0, 3, 50], [3, 0, 60], [0, 0, 1.0]]), input_axes=("x", "y"), output_axes=("x", "y"))
    set_transformation(sdata["spots"], turn, "global")
    px.io.write_geojson(sdata, "spots", tmp_path / "a.geojson")
    found = geopandas.read_file(tmp_path / "a.geojson")
    np.testing.assert_allclose(found.bounds.iloc[0], [98, 78, 122, 102])  # (110, 90) and 12 around it
    assert found.area.iloc[0] == pytest.approx(np.pi * 12**2, rel=0.01)


def test_a_million_squares_are_written_in_batches(sdata, tmp_path, monkeypatch):
    """Nothing that is written is held: one batch at a time is made."""
    sizes = []
    original = geojson.measured
    monkeypatch.setattr("pixnet.io._write_geojson.measured", lambda n, v: sizes.append(len(v)) or original(n, v))
    monkeypatch.setattr("pixnet.io._write_geojson.BATCH", 100)
    row, col = (index.ravel() for index in np.indices((50, 50)))
    frame = geopandas.GeoDataFrame({"v": row * 1.0}, geometry=shapely.box(col, row, col + 1, row + 1))
    sdata["bins"] = ShapesModel.parse(frame)
    px.io.write_geojson(sdata, "bins", tmp_path / "a.geojson")
    assert sizes == [100] * 25
    assert len(json.loads((tmp_path / "a.geojson").read_text())["features"]) == 2500


def test_refusals_of_write(sdata, tmp_path, monkeypatch):
    with_cells(sdata)
    file = tmp_path / "a.geojson"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        px.io.write_geojson(sdata, "cells", file)
    with pytest.raises(FileNotFoundError, match="no folder"):
        px.io.write_geojson(sdata, "cells", tmp_path / "none" / "a.geojson")
    new = tmp_path / "new.geojson"
    for arguments, error, message in (
        ({"shapes": "he"}, KeyError, "'he'"),
        ({"table_key": "none"}, KeyError, "no table 'none'"),
        ({"genes": ["cd3e"]}, KeyError, "did you mean"),
        ({"layer": "raw"}, KeyError, "no layer 'raw'"),
        ({"table_key": False, "genes": ["CD3E"]}, ValueError, "belong to a table"),
        ({"classification": "kind"}, KeyError, "no column 'kind'"),
        ({"object_type": "blob"}, ValueError, "object_type is 'blob'"),
    ):
        with pytest.raises(error, match=message):
            px.io.write_geojson(**{"sdata": sdata, "shapes": "cells", "path": new, **arguments})
    monkeypatch.setattr("pixnet.io._write_geojson.MAX_MEASUREMENTS", 2)
    with pytest.raises(ValueError, match="3 measurements, more than 2; choose genes"):
        px.io.write_geojson(sdata, "cells", new)
    # an error while it is written leaves the old file
    monkeypatch.setattr("pixnet.io._write_geojson.MAX_MEASUREMENTS", 9)
    monkeypatch.setattr("pixnet.io._write_geojson.measured", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        px.io.write_geojson(sdata, "cells", file, overwrite=True)
    assert file.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["a.geojson"]
