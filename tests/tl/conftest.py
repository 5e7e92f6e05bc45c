"""A slide whose expression is written in its colours: quick to learn, with a truth that is known."""

from __future__ import annotations

import anndata as ad
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import torch
from shapely import Point
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from torch import nn

import pixnet as px


class PatchEncoder(nn.Module):
    """Mean colour of 4 and 8 px patches: enough to read colours."""

    strides, channels = (4, 8), (3, 3)

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, image):
        a = nn.functional.avg_pool2d(image, 4)
        return [a, nn.functional.avg_pool2d(a, 2)]


px.models.register_encoder("patch-test", PatchEncoder)


def table_for(shapes: str, ids, counts, genes, **obs) -> ad.AnnData:
    """Return a table of counts that annotates an element."""
    frame = pd.DataFrame({"region": pd.Categorical([shapes] * len(ids)), "instance_id": ids, **obs})
    frame.index = [str(i) for i in range(len(ids))]
    table = ad.AnnData(np.asarray(counts, dtype=np.float32), obs=frame, var=pd.DataFrame(index=genes))
    return TableModel.parse(table, region=shapes, region_key="region", instance_key="instance_id")


def coloured_slide(seed: int = 0, size: int = 768, pitch: float = 48.0) -> SpatialData:
    """Return a slide of smoothly varying colour; PINK and BLUE follow it, FLAT does not, depth follows brightness."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    phase = rng.uniform(0, 2 * np.pi, 2)
    blue = 0.5 + 0.5 * np.sin(7 * x + phase[0]) * np.cos(5 * y + phase[1])
    image = np.stack([200 - 110 * blue, 90 + 40 * blue, 150 + 60 * blue])
    image = (image + rng.normal(0, 4, image.shape)).clip(0, 255).astype(np.uint8)
    centres = np.arange(pitch, size - pitch / 2, pitch)
    points = np.array([(a, b) for b in centres for a in centres])
    local = blue[points[:, 1].astype(int), points[:, 0].astype(int)]
    depth = 3000 * (0.5 + local)
    share = np.stack([0.05 + 0.25 * (1 - local), 0.05 + 0.25 * local, np.full_like(local, 0.1)], axis=1)
    share = np.concatenate([share, 1 - share.sum(axis=1, keepdims=True)], axis=1)
    counts = rng.poisson(share * depth[:, None])
    ids = [f"s{i}" for i in range(len(points))]
    spots = gpd.GeoDataFrame({"radius": 12.0}, geometry=[Point(p) for p in points], index=ids)
    sdata = SpatialData(
        images={"he": Image2DModel.parse(image, dims=("c", "y", "x"), c_coords=["r", "g", "b"])},
        shapes={"spots": ShapesModel.parse(spots)},
        tables={"spots_counts": table_for("spots", ids, counts, ["PINK", "BLUE", "FLAT", "REST"])},
    )
    px.pp.set_mpp(sdata, "he", 0.5)
    return sdata


def with_cells(slide: SpatialData, shift: float = 9.0) -> SpatialData:
    """Add an element of smaller circles beside the spots, and their counts."""
    rng = np.random.default_rng(0)
    cells = slide["spots"].copy()
    cells["geometry"] = [Point(p.x + shift, p.y - 7) for p in slide["spots"].geometry]
    cells["radius"] = 4.0
    slide["cells"] = cells
    counts = rng.poisson(2, (len(cells), 4))
    slide["cells_counts"] = table_for("cells", list(cells.index), counts, ["PINK", "BLUE", "FLAT", "REST"])
    return slide


QUICK = {"encoder": "patch-test", "hidden": 16, "window": 256, "halo": 64, "mask_key": False, "variants": 1, "lr": 1e-2,
         "genes": ["PINK", "BLUE", "FLAT"]}  # fmt: skip


@pytest.fixture
def slide() -> SpatialData:
    return coloured_slide()


@pytest.fixture(scope="session")
def quick_model():
    return px.tl.train([coloured_slide(1), coloured_slide(2)], max_epochs=12, seed=1, **QUICK)
