"""Folders in the formats of the platforms, small, made from a synthetic tissue; readers of spatialdata-io open them."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import shapely
import tifffile
import zarr
from PIL import Image
from spatialdata import SpatialData

PIXEL = 0.2125  # µm/px of Xenium's morphology images


def pixels_of(sdata: SpatialData) -> np.ndarray:
    return sdata["he"]["scale0"]["image"].values.transpose(1, 2, 0)


def write_10x_h5(path: Path, counts, barcodes, genes) -> None:
    """A feature-barcode matrix as Cell Ranger 3 and later write it, with gene ids beside the symbols."""
    matrix = counts.tocsr()
    matrix.sort_indices()
    with h5py.File(path, "w") as file:
        file.attrs["library_ids"] = np.array([b"sample"])
        file.attrs["chemistry_description"] = "Spatial 3' v1"
        file.attrs["software_version"] = "spaceranger-2.1.0"
        group = file.create_group("matrix")
        group["barcodes"] = np.array(barcodes, dtype="S")
        group["data"] = matrix.data.astype(np.int32)
        group["indices"] = matrix.indices.astype(np.int64)
        group["indptr"] = matrix.indptr.astype(np.int64)
        group["shape"] = np.array([len(genes), len(barcodes)], dtype=np.int32)
        features = group.create_group("features")
        features["_all_tag_keys"] = np.array([b"genome"])
        features["feature_type"] = np.array([b"Gene Expression"] * len(genes))
        features["genome"] = np.array([b"synthetic"] * len(genes))
        features["id"] = np.array([f"ENSG{i:011d}" for i in range(len(genes))], dtype="S")
        features["name"] = np.array(genes, dtype="S")


def _spatial(folder: Path, sdata: SpatialData, diameter_px: float, extra: dict | None = None) -> None:
    folder.mkdir(parents=True)
    picture = Image.fromarray(pixels_of(sdata))
    factors = {"tissue_hires_scalef": 0.5, "tissue_lowres_scalef": 0.125}
    for name in ("hires", "lowres"):
        side = round(picture.width * factors[f"tissue_{name}_scalef"])
        picture.resize((side, side), Image.Resampling.BOX).save(folder / f"tissue_{name}_image.png")
    factors |= {"spot_diameter_fullres": diameter_px, "fiducial_diameter_fullres": diameter_px * 1.6} | (extra or {})
    (folder / "scalefactors_json.json").write_text(json.dumps(factors))


def visium(folder: Path, sdata: SpatialData) -> Path:
    """What Space Ranger 2 writes for Visium, and the picture that went into it."""
    folder.mkdir(parents=True, exist_ok=True)
    table, spots = sdata["spots_counts"], sdata["spots"]
    barcodes = [f"{'ACGT'[i % 4]}{i:015d}-1" for i in range(len(spots))]
    # Space Ranger reports spots of 55 µm a little larger than the pitch suggests
    _spatial(folder / "spatial", sdata, 2 * spots["radius"].iloc[0] * 1.18)
    positions = pd.DataFrame(
        {
            "barcode": barcodes,
            "in_tissue": 1,
            "array_row": range(len(spots)),
            "array_col": range(len(spots)),
            "pxl_row_in_fullres": spots.geometry.y.to_numpy(),
            "pxl_col_in_fullres": spots.geometry.x.to_numpy(),
        }
    )
    positions.sample(frac=1, random_state=0).to_csv(folder / "spatial" / "tissue_positions.csv", index=False)
    write_10x_h5(folder / "filtered_feature_bc_matrix.h5", table.X, barcodes, list(table.var_names))
    tifffile.imwrite(folder / "he.tif", pixels_of(sdata), photometric="rgb", tile=(256, 256), compression="deflate")
    return folder


def visium_hd(folder: Path, sdata: SpatialData) -> Path:
    """What Space Ranger 3 writes for Visium HD: 8 µm bins."""
    folder.mkdir(parents=True, exist_ok=True)
    table, bins = sdata["bins_counts"], sdata["bins"]
    edge = 8 / 0.5
    root = folder / "binned_outputs" / "square_008um"
    _spatial(root / "spatial", sdata, edge, {"bin_size_um": 8.0, "microns_per_pixel": 0.5})
    x, y = (f(shapely.centroid(bins.geometry.to_numpy())) for f in (shapely.get_x, shapely.get_y))
    row, col = (np.floor(v / edge).astype(int) for v in (y, x))
    barcodes = [f"s_008um_{r:05d}_{c:05d}-1" for r, c in zip(row, col)]
    positions = pd.DataFrame(
        {
            "barcode": barcodes,
            "in_tissue": 1,
            "array_row": row,
            "array_col": col,
            "pxl_row_in_fullres": y,
            "pxl_col_in_fullres": x,
        }
    )
    positions.to_parquet(root / "spatial" / "tissue_positions.parquet", index=False)
    write_10x_h5(root / "filtered_feature_bc_matrix.h5", table.X, barcodes, list(table.var_names))
    layout = {"file_format": "1.0", "transform": np.eye(3).tolist()}
    with h5py.File(folder / "sample_feature_slice.h5", "w") as file:
        file.attrs["metadata_json"] = json.dumps({"hd_layout_json": json.dumps(layout), "transform_matrices": {}})
    (folder / "microscope_image").mkdir()
    tifffile.imwrite(folder / "microscope_image" / "he.tif", pixels_of(sdata), photometric="rgb")
    return folder


def xenium(folder: Path, sdata: SpatialData) -> Path:
    """What Xenium Onboard Analysis 3 writes, and an H&E picture that was aligned to it, turned by 180 degrees."""
    from spatialdata_io.readers.xenium import cell_id_str_from_prefix_suffix_uint32

    folder.mkdir(parents=True)
    table, cells = sdata["cells_counts"], sdata["cells"]
    n = len(cells)
    um = shapely.transform(cells.geometry.to_numpy(), lambda xy: xy * 0.5)
    numbers = np.column_stack([np.arange(n) + 17, np.ones(n, dtype=int)]).astype(np.uint32)
    ids = cell_id_str_from_prefix_suffix_uint32(numbers[:, 0], numbers[:, 1])
    specs = {"analysis_sw_version": "xenium-3.1.0.0", "pixel_size": PIXEL, "region_name": "r", "panel_name": "p"}
    (folder / "experiment.xenium").write_text(json.dumps(specs))

    coordinates, owner = shapely.get_coordinates(um, return_index=True)
    outlines = pd.DataFrame({"cell_id": np.asarray(ids)[owner], "label_id": (owner + 1).astype(np.int32)})
    outlines["vertex_x"], outlines["vertex_y"] = coordinates.astype(np.float32).T
    outlines.to_parquet(folder / "cell_boundaries.parquet", index=False)
    centre = shapely.get_coordinates(shapely.centroid(um))
    near = centre[owner] + 0.5 * (coordinates - centre[owner])
    outlines.assign(vertex_x=near[:, 0], vertex_y=near[:, 1]).to_parquet(
        folder / "nucleus_boundaries.parquet", index=False
    )
    about = {"cell_id": ids, "x_centroid": centre[:, 0], "y_centroid": centre[:, 1], "cell_area": shapely.area(um)}
    about |= {
        "transcript_counts": np.asarray(table.X.sum(axis=1)).ravel().astype(int),
        "nucleus_area": shapely.area(um) / 4,
    }
    pd.DataFrame(about).to_parquet(folder / "cells.parquet", index=False)
    write_10x_h5(folder / "cell_feature_matrix.h5", table.X, ids, list(table.var_names))
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, n, 500)
    transcripts = pd.DataFrame(
        {
            "transcript_id": np.arange(500),
            "cell_id": np.asarray(ids)[chosen],
            "overlaps_nucleus": 1,
            "feature_name": rng.choice(list(table.var_names), 500),
            "x_location": centre[chosen, 0],
            "y_location": centre[chosen, 1],
            "z_location": 10.0,
            "qv": 30.0,
        }
    )
    transcripts.to_parquet(folder / "transcripts.parquet", index=False)

    side = int(np.ceil(sdata["he"]["scale0"]["image"].shape[1] * 0.5 / PIXEL))
    labels = np.zeros((side, side), dtype=np.uint32)
    from skimage.draw import polygon

    for i, shape in enumerate(um):
        x, y = shapely.get_coordinates(shape).T / PIXEL
        rows, cols = polygon(y - 0.5, x - 0.5, labels.shape)
        labels[rows, cols] = i + 1
    with zarr.storage.ZipStore(folder / "cells.zarr.zip", mode="w") as store:
        root = zarr.open_group(store, mode="w", zarr_format=2)
        root.create_array("cell_id", data=numbers)
        summary = root.create_array("cell_summary", data=np.column_stack([centre, np.zeros((n, 6))]))
        names = ["cell_centroid_x", "cell_centroid_y", "cell_area", "nucleus_centroid_x", "nucleus_centroid_y"]
        summary.attrs["column_names"] = [*names, "nucleus_area", "z_level", "nucleus_count"]
        masks = root.create_group("masks")
        sets = root.create_group("polygon_sets")
        for i in range(2):
            masks.create_array(str(i), data=labels, chunks=(512, 512))
            sets.create_group(str(i)).create_array("cell_index", data=np.arange(n, dtype=np.uint32))
    (folder / "morphology_focus").mkdir()
    dapi = (labels > 0).astype(np.uint16) * 900
    tifffile.imwrite(folder / "morphology_focus" / "morphology_focus_0000.ome.tif", dapi, ome=True)

    turned = np.ascontiguousarray(pixels_of(sdata)[::-1, ::-1])
    tifffile.imwrite(folder / "s_he_image.ome.tif", turned, photometric="rgb", ome=True, metadata={"axes": "YXS"})
    scale = 0.5 / PIXEL
    alignment = np.array([[-scale, 0, scale * turned.shape[1]], [0, -scale, scale * turned.shape[0]], [0, 0, 1]])
    pd.DataFrame(alignment).to_csv(folder / "s_he_imagealignment.csv", header=False, index=False)
    return folder
