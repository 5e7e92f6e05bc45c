"""Methods to compare with: the same frozen features and the same splits, but shape to vector instead of a dense map.

Features of a shape are those of the encoder as PixNet uses it, all levels brought to the map's grid and averaged over the shape's tissue.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from spatialdata import SpatialData
from spatialdata.models import ShapesModel
from torch import Tensor, nn

import pixnet as px
from pixnet._core.train.crops import crop_size
from pixnet._core.train.dataset import CropDataset
from pixnet._core.train.features import adapt_norms, with_features
from pixnet._correlation import pearson as correlation
from pixnet._sdata.sections import open_measured, open_section
from pixnet._sdata.slide import Slide
from pixnet.models import PixNet
from pixnet.models._losses import shape_loss


@dataclass
class Pooled:
    """Shapes of one element of one section: mean features, CP10k, all UMI and centres (um)."""

    features: np.ndarray
    cp10k: np.ndarray
    total: np.ndarray
    centres: np.ndarray

    @property
    def target(self) -> np.ndarray:
        """log1p of CP10k."""
        return np.log1p(self.cp10k)

    def take(self, rows) -> Pooled:
        """Return some of the shapes."""
        return Pooled(self.features[rows], self.cp10k[rows], self.total[rows], self.centres[rows])


def pool(
    net: PixNet, sdata: SpatialData, shapes: list[str], genes: list[str], total_key: str | None
) -> dict[str, Pooled]:
    """Return mean features and measurement of each shapes element that has a table ``{shapes}_counts``."""
    (dataset,) = with_features([_dataset(net, sdata, shapes, genes, total_key)], net, [1], 0.0, "cpu")
    (section,) = dataset.sections
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {s: [] for s in shapes}
    for i, crop in enumerate(dataset.crops):
        side = dataset.size // net.stride
        columns = [
            F.interpolate(level[None], size=(side, side), mode="bilinear", antialias=level.shape[-1] > side)
            for level in dataset.crop_features(i, net.levels)
        ]
        flat = torch.cat(columns, dim=1)[0].flatten(1).T.numpy()[crop.pixels]
        for name, targets in crop.targets.items():
            mean = (targets.weights @ flat) / np.asarray(targets.weights.sum(axis=1)).reshape(-1, 1)
            found[name].append((targets.rows, mean.astype(np.float32)))
    out = {}
    for targets in section.targets:
        rows = np.concatenate([r for r, _ in found[targets.name]])
        box = targets.shapes.bounds[rows] * net.mpp * net.stride
        centres = np.stack([box[:, [0, 2]].mean(axis=1), box[:, [1, 3]].mean(axis=1)], axis=1)
        features = np.concatenate([f for _, f in found[targets.name]])
        out[targets.name] = Pooled(features, targets.cp10k[rows], targets.umi[rows], centres)
    return out


def predicted_rows(sdata: SpatialData, model: PixNet, image_key: str, pooled: Pooled, genes: list[str]) -> np.ndarray:
    """Predict from an image and return log1p of the CP10k of the pooled spots, which are told by their centres."""
    px.tl.predict(sdata, model, image_key=image_key, key_added="map", overwrite=True)
    px.tl.aggregate(sdata, "spots", image_key="map", genes=genes, overwrite=True)
    centres = np.stack([sdata["spots"].geometry.x, sdata["spots"].geometry.y], axis=1) * Slide.open(sdata, "he").mpp
    distance, rows = cKDTree(centres).query(pooled.centres)
    assert distance.max() < 10, "the pooled spots are not those of the table"
    return np.log1p(sdata["spots_genes"].X[rows])


def adapt(net: PixNet, sdata: SpatialData, shapes: str, genes: list[str], total_key: str | None) -> None:
    """Give the encoder the statistics of the training tissue, as `pixnet.tl.train` does where images are enlarged."""
    adapt_norms(net, _dataset(net, sdata, [shapes], genes, total_key), torch.Generator().manual_seed(0), "cpu")


def _dataset(
    net: PixNet, sdata: SpatialData, shapes: list[str], genes: list[str], total_key: str | None
) -> CropDataset:
    (slide,) = open_measured({"": sdata}, None, shapes, [f"{s}_counts" for s in shapes], total_key)
    section = open_section(slide, slide.tables(genes, total_key=total_key), net.mpp, net.stride)
    return CropDataset.of([section], crop_size([section]))


def add_discs(sdata: SpatialData, shapes: str, diameter_um: float, mpp: float) -> str:
    """Add discs of a spot's size around the centres of shapes, with their counts: where a spot network slides."""
    import geopandas as gpd

    key = f"{shapes}_disc"
    frame = sdata.shapes[shapes]
    discs = gpd.GeoDataFrame({"radius": diameter_um / 2 / mpp}, geometry=frame.geometry.centroid, index=frame.index)
    sdata.shapes[key] = ShapesModel.parse(discs)
    table = sdata.tables[f"{shapes}_counts"].copy()
    table.obs["region"] = key
    table.obs["region"] = table.obs["region"].astype("category")
    table.uns["spatialdata_attrs"] = {**table.uns["spatialdata_attrs"], "region": key}
    sdata.tables[f"{key}_counts"] = table
    return key


# methods: each takes training and test shapes and returns log1p CP10k predicted for the test shapes --------------------


class Standard:
    """Features with the training shapes' mean and standard deviation taken off."""

    def __init__(self, x: np.ndarray) -> None:
        self.mean, self.sd = x.mean(axis=0), x.std(axis=0) + 1e-6

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return (x - self.mean) / self.sd


def ridge(train: list[Pooled], valid: list[Pooled], seed: int = 0):
    """Fit ridge regression; the penalty is chosen on the validation shapes."""
    x, y = np.concatenate([p.features for p in train]), np.concatenate([p.target for p in train])
    xv, yv = np.concatenate([p.features for p in valid]), np.concatenate([p.target for p in valid])
    scale = Standard(x)
    x, xv, mean = scale(x).astype(np.float64), scale(xv), y.mean(axis=0)
    gram, right = x.T @ x, x.T @ (y - mean)
    best = None
    for penalty in 10.0 ** np.arange(1, 6.1, 0.5):
        weights = np.linalg.solve(gram + penalty * np.eye(len(gram)), right)
        score = np.nanmean(pearson(xv @ weights, yv))
        if best is None or score > best[0]:
            best = (score, weights)
    return lambda p: scale(p.features) @ best[1] + mean


def mlp(train: list[Pooled], valid: list[Pooled], seed: int = 0):
    """Fit a two-layer perceptron with PixNet's loss; validation chooses the pass."""
    torch.manual_seed(seed)
    scale = Standard(np.concatenate([p.features for p in train]))
    sections = [(torch.from_numpy(scale(p.features)), torch.from_numpy(p.cp10k)) for p in train]
    held = [(torch.from_numpy(scale(p.features)), torch.from_numpy(p.cp10k)) for p in valid]
    genes = train[0].cp10k.shape[1]
    net = nn.Sequential(nn.Linear(scale.mean.size, 256), nn.GELU(), nn.Dropout(0.3), nn.Linear(256, genes))
    nn.init.zeros_(net[-1].weight)
    net[-1].bias.data = torch.cat([torch.log1p(y).mean(dim=0, keepdim=True) for _, y in sections]).mean(dim=0)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
    best, state, since = np.inf, None, 0
    for _ in range(200):
        net.train()
        for x, y in sections:
            for rows in torch.randperm(len(x)).split(256):
                if len(rows) > 16:
                    optimiser.zero_grad()
                    _log_loss(net(x[rows]), y[rows]).backward()
                    optimiser.step()
        net.eval()
        with torch.no_grad():
            loss = float(np.mean([_log_loss(net(x), y) for x, y in held]))
        if loss < best - 1e-4:
            best, state, since = loss, {k: v.clone() for k, v in net.state_dict().items()}, 0
        else:
            since += 1
        if since == 10:
            break
    net.load_state_dict(state)
    net.eval()

    @torch.no_grad()
    def predict(p: Pooled) -> np.ndarray:
        return torch.cat([net(part) for part in torch.from_numpy(scale(p.features)).split(65536)]).numpy()

    return predict


def _log_loss(log_cp10k: Tensor, cp10k: Tensor) -> Tensor:
    """Return PixNet's loss of predicted log1p CP10k."""
    one = torch.ones(len(log_cp10k))
    return shape_loss(log_cp10k.clamp(max=9.2), one, cp10k, one)["expression"]


def neighbours(test: Pooled, pitch_um: float, n: int = 8) -> np.ndarray:
    """Return the mean of what was measured in the (up to ``n``) shapes next to each; NaN without any."""
    distance, index = cKDTree(test.centres).query(test.centres, k=n + 1)
    near = (distance[:, 1:] < 1.6 * pitch_um) & (index[:, 1:] < len(test.centres))
    index = np.where(near, index[:, 1:], 0)
    out = np.zeros_like(test.cp10k)
    for k in range(n):
        out += near[:, k, None] * test.cp10k[index[:, k]]
    count = near.sum(axis=1)[:, None]
    return np.log1p(np.where(count > 0, out / np.maximum(count, 1), np.nan))


def smoothed(test: Pooled, pitch_um: float) -> np.ndarray:
    """Return the 3 x 3 mean of the measured CP10k: each shape and its neighbours (TRIPLEX's targets)."""
    pairs = cKDTree(test.centres).query_ball_point(test.centres, 1.6 * pitch_um)
    return np.stack([test.cp10k[near].mean(axis=0) for near in pairs])


def pearson(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Return the correlation of each gene over the shapes that have a prediction; NaN for constant genes."""
    known = np.isfinite(predicted).all(axis=1)
    return correlation(predicted[known], measured[known])


def ceiling(counts: np.ndarray, total: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the correlation that a perfect prediction could have with the measurement, per gene.

    Counts are split in two by binomial thinning; the halves' correlation gives the reliability of the whole
    (Spearman-Brown), whose root is the ceiling.
    """
    rng = np.random.default_rng(seed)
    half = rng.binomial(np.round(counts).astype(np.int64), 0.5)
    logs = [np.log1p(1e4 * part / np.maximum(total[:, None] / 2, 1)) for part in (half, counts - half)]
    r = np.clip(pearson(*logs), 0, 1)
    return np.sqrt(2 * r / (1 + r))
