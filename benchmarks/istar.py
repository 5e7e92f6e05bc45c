"""iStar's way of learning from spots, on the features that pixnet uses: a part of `benchmarks/quality.py kidney --methods istar`.

Zhang et al., Nature Biotechnology 2024: a slide is cut into superpixels of 8 µm. A network takes the features of one superpixel to its
counts, and the mean over the superpixels of a spot is compared with what the spot measured, each gene scaled to 0 to 1. Five networks
are trained for 400 passes, and their median counts. The network and its training are written here anew from the paper. Its features
(HIPT, at two scales) cannot be had without a download, so the features are those of pixnet's encoder, all levels averaged over the
superpixel. All transcripts are one more output, which CP10k need.
"""

from __future__ import annotations

import resource
import time

import kidney
import numpy as np
import references as ref
import torch
from scipy import sparse
from scipy.spatial import cKDTree
from spatialdata import SpatialData
from torch import Tensor, nn

from pixnet._sdata.slide import Slide
from pixnet.models import PixNet

SUPERPIXELS = "bins_008um"
MEMBERS, PASSES, WIDTH, LAYERS, RATE, BATCH = 5, 400, 256, 4, 1e-4, 128
LEAST = 0.01
"""The output layer is an ELU that never falls below zero: its smallest value is -LEAST, and LEAST is added."""


class Network(nn.Module):
    """A perceptron on the features of a superpixel."""

    def __init__(self, n_features: int, n_outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in [n_features] + [WIDTH] * (LAYERS - 1):
            layers += [nn.Linear(width, WIDTH), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(*layers, nn.Linear(WIDTH, n_outputs), nn.ELU(alpha=LEAST))

    def forward(self, x: Tensor) -> Tensor:
        """Return scaled counts, at least 0."""
        return self.layers(x) + LEAST


def inside(sdata: SpatialData, key: str, superpixels: np.ndarray) -> list[np.ndarray]:
    """Return the superpixels whose centres (µm) lie in each spot or bin that the element's table measures, in its order."""
    mpp = Slide.open(sdata).mpp
    frame = sdata.shapes[key].loc[sdata.tables[f"{key}_counts"].obs["instance_id"]]
    middle = frame.geometry.centroid
    at, tree = np.column_stack([middle.x, middle.y]) * mpp, cKDTree(superpixels)
    if key == "spots":
        found = tree.query_ball_point(at, frame["radius"].to_numpy() * mpp)
    else:
        found = tree.query_ball_point(at, 0.499 * 8.0 * kidney.SCALES[key], p=np.inf)
    return [np.asarray(f, dtype=int) for f in found]


def fit(features: Tensor, spots: list[np.ndarray], target: np.ndarray, seed: int) -> Network:
    """Train one network on the mean over the superpixels of each spot."""
    torch.manual_seed(seed)
    net = Network(features.shape[1], target.shape[1])
    optimiser = torch.optim.Adam(net.parameters(), lr=RATE)
    batch = max(1, min(BATCH, len(spots) // 16))
    measured = torch.from_numpy(target)
    for _ in range(PASSES):
        for rows in torch.randperm(len(spots)).split(batch):
            own = [spots[i] for i in rows]
            of = torch.repeat_interleave(torch.arange(len(own)), torch.tensor([len(o) for o in own]))
            seen = net(features[np.concatenate(own)])
            sums = torch.zeros(len(own), seen.shape[1]).index_add(0, of, seen)
            mean = sums / torch.bincount(of, minlength=len(own))[:, None]
            loss = ((mean - measured[rows]) ** 2).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return net.eval()


@torch.no_grad()
def predict(nets: list[Network], features: Tensor) -> np.ndarray:
    """Return the median of the networks."""
    parts = (torch.stack([net(part) for net in nets]).median(dim=0).values for part in features.split(16384))
    return torch.cat(list(parts)).numpy()


def score(
    train: SpatialData, test: SpatialData, whole_test: SpatialData, genes: list[str], keys: list[str], seed: int
) -> dict:
    """Train on the spots of one part and score every scale of the other.

    ``whole_test`` has the superpixels of the test part without the limit on their counts.
    """
    mpp = Slide.open(train).mpp
    net = PixNet(genes, mpp=mpp)
    start = time.perf_counter()
    ref.adapt(net, train, "spots", genes, kidney.TOTAL_KEY)
    seen = ref.pool(net, train, [SUPERPIXELS], genes, kidney.TOTAL_KEY)[SUPERPIXELS]
    standard = ref.Standard(seen.features)
    features = torch.from_numpy(standard(seen.features))
    spots, table = inside(train, "spots", seen.centres), train.tables["spots_counts"]
    known = [i for i, found in enumerate(spots) if len(found)]
    counts = np.column_stack([table[:, genes].X.toarray(), table.obs[kidney.TOTAL_KEY]]).astype(np.float32)[known]
    low, high = counts.min(axis=0), counts.max(axis=0)
    scaled = (counts - low) / np.maximum(high - low, 1e-6)
    features_s = time.perf_counter() - start
    nets = [fit(features, [spots[i] for i in known], scaled, seed * MEMBERS + k) for k in range(MEMBERS)]
    train_s = time.perf_counter() - start - features_s
    start = time.perf_counter()
    own = ref.pool(net, whole_test, [SUPERPIXELS], genes, kidney.TOTAL_KEY)[SUPERPIXELS]
    amounts = predict(nets, torch.from_numpy(standard(own.features))) * (high - low) + low
    found: dict = {
        "features_s": round(features_s),
        "train_s": round(train_s),
        "predict_s": round(time.perf_counter() - start),
    }
    found["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    for key in keys:
        held, table = inside(test, key, own.centres), test.tables[f"{key}_counts"]
        rows = np.repeat(np.arange(len(held)), [len(i) for i in held])
        which = sparse.csr_matrix((np.ones(len(rows)), (rows, np.concatenate(held))), shape=(len(held), len(amounts)))
        sums = which @ amounts
        log = np.log1p(1e4 * sums[:, :-1] / np.maximum(sums[:, -1:], 1e-6))
        total = np.maximum(table.obs[kidney.TOTAL_KEY].to_numpy(dtype=float), 1)
        measured = np.log1p(1e4 * table[:, genes].X.toarray() / total[:, None])
        covered = np.array([len(i) > 0 for i in held])
        r = ref.pearson(log[covered], measured[covered])
        found[key] = {"pcc_mean": round(float(np.nanmean(r)), 4), "shapes": int(covered.sum())}
    return found
