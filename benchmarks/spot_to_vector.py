"""A network of the spot-to-vector kind, for comparison: features averaged over a spot in, one vector of expression out.

It shares with PixNet whatever is not the point of the comparison: encoder and features, spots, restained versions, loss, link. The
difference is the order: PixNet turns features into expression at each place and sums that over the spot, this one averages features
over the spot and turns the mean into expression. To answer finer than spots it is slid over the slide.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import shapely
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnet._core.coverage import ShapeArrays, coverage
from pixnet._core.train.crops import crop_size
from pixnet._core.train.dataset import CropDataset
from pixnet._core.train.features import crop_halo, encode_crops, with_features
from pixnet._sdata.sections import open_measured, open_section
from pixnet._sdata.slide import Slide
from pixnet._sdata.tissue import open_mask
from pixnet.models import PixNet
from pixnet.models._heads import GeneHead
from pixnet.models._losses import shape_loss

CORE = 1024  # model pixels of a window, as in prediction


class SpotToVector(nn.Module):
    """Mean features of a spot to densities of genes and of the total.

    Parameters
    ----------
    channels
        Of the encoder's maps in use.
    n_genes
        Number of genes.
    width
        Units of each hidden layer.
    """

    def __init__(self, channels: Sequence[int], n_genes: int, width: int = 128) -> None:
        super().__init__()
        self.channels = list(channels)
        self.register_buffer("mean", torch.zeros(sum(channels)))
        self.register_buffer("sd", torch.ones(sum(channels)))
        self.project = nn.Linear(sum(channels), width)
        self.mix = nn.Sequential(nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.head = nn.Linear(width, n_genes + 1)
        nn.init.normal_(self.head.weight, std=0.01)

    def forward(self, features: Tensor, dropout: float = 0.0) -> Tensor:
        """Return densities ``(n, genes + 1)`` of mean features ``(n, channels)``."""
        x = (features - self.mean) / self.sd
        return self.answer(self.project(F.dropout(x, dropout, self.training)))

    def answer(self, hidden: Tensor) -> Tensor:
        """Return densities of the first layer's values, ``(n, width)``."""
        logits = self.head(self.mix(hidden))
        total = 1e4 * logits[:, -1:].clamp(-10, 4).exp()
        return torch.cat([logits[:, :-1].clamp(max=0).exp() * total, total], dim=1)


# training ----------------------------------------------------------------------------------------------------------


def spot_features(source: PixNet, slides: dict, shapes: str, variants: int, stain: float) -> dict:
    """Return mean features, by a model's encoder, of all spots in several versions, and what was measured there.

    Returns
    -------
    dict
        ``features (variants, spots, channels)``, ``cp10k (spots, genes)``, ``depth``, ``covered`` and ``section (spots,)``.
    """
    sections = [
        open_section(slide, slide.tables(source.genes), source.mpp, source.stride)
        for slide in open_measured(slides, shapes=shapes)
    ]
    dataset = CropDataset.of(sections, crop_size(sections))
    (dataset,) = with_features([dataset], source, [variants], stain, "cpu")
    out: dict[str, list] = {"features": [], "cp10k": [], "depth": [], "covered": [], "section": []}
    for i, crop in enumerate(dataset.crops):
        targets = crop.targets[shapes]
        weights = torch.from_numpy(targets.weights.toarray()).float()
        covered = weights.sum(dim=1, keepdim=True)
        versions = []
        for version in range(variants):
            columns = _hypercolumns([f[None] for f in dataset.crop_features(i, source.levels, version)], source)
            versions.append(weights @ columns[0].flatten(1)[:, torch.from_numpy(crop.pixels)].T / covered)
        out["features"].append(torch.stack(versions))
        out["cp10k"].append(targets.cp10k)
        out["depth"].append(targets.depth)
        out["covered"].append(covered[:, 0])
        out["section"].append(torch.full((len(targets.rows),), crop.section))
    return {key: torch.cat(parts, dim=1 if key == "features" else 0) for key, parts in out.items()}


def train(
    source: PixNet,
    spots: dict,
    held_out: dict,
    seed: int,
    *,
    max_epochs: int,
    batch: int,
    lr: float = 1e-3,
    dropout: float = 0.1,
):
    """Fit the network; validation on the held-out spots chooses the pass, as in `pixnet.tl.train`."""
    torch.manual_seed(seed)
    net = SpotToVector([source.encoder.channels[i] for i in source.levels], spots["cp10k"].shape[1])
    flat = spots["features"].flatten(0, 1)
    net.mean.copy_(flat.mean(dim=0))
    net.sd.copy_(flat.std(dim=0).clamp(min=1e-3))
    net.head.bias.data.copy_(torch.cat([(spots["cp10k"].mean(dim=0) / 1e4).clamp(min=1e-8).log(), torch.zeros(1)]))
    optimiser = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-2)
    steps = len(_batches(spots["section"], batch)) * max_epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    best, best_loss, history = net, np.inf, []
    for epoch in range(1, max_epochs + 1):
        net.train()
        for rows in _batches(spots["section"], batch):
            version = torch.randint(len(spots["features"]), (len(rows),))
            loss = _loss(net(spots["features"][version, rows], dropout), spots, rows)
            optimiser.zero_grad()
            loss["objective"].backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        net.eval()
        with torch.no_grad():
            found = _loss(net(held_out["features"][0]), held_out, torch.arange(len(held_out["depth"])))
        history.append({"epoch": epoch, **{key: float(value) for key, value in found.items()}})
        if history[-1]["objective"] < best_loss:
            best, best_loss = copy.deepcopy(net), history[-1]["objective"]
    return best.eval(), history


def _batches(section: Tensor, size: int) -> list[Tensor]:
    """Shuffle and cut the spots of each section into batches of about that many."""
    found = []
    for one in section.unique():
        rows = torch.nonzero(section == one)[:, 0]
        found += rows[torch.randperm(len(rows))].tensor_split(max(1, len(rows) // size))
    return [found[i] for i in torch.randperm(len(found))]


def _loss(density: Tensor, spots: dict, rows: Tensor) -> dict[str, Tensor]:
    logs = GeneHead(range(density.shape[1] - 1)).log_expression(density * spots["covered"][rows, None], 1.0)
    found = shape_loss(logs, density[:, -1], spots["cp10k"][rows], spots["depth"][rows])
    return found | {"objective": found["expression"] + 0.2 * found["total"]}


# sliding -----------------------------------------------------------------------------------------------------------


def encode_slide(net: PixNet, sdata) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the maps of a model's encoder of a whole slide, float16, and its tissue mask on the 2 µm grid."""
    net.eval()  # batch norms keep their statistics
    slide = Slide.open(sdata)
    grid = slide.grid(net.mpp, net.stride)
    reader = slide.reader(grid)
    halo = crop_halo(net)
    height, width = grid.shape
    rows, cols = -(-height // CORE), -(-width // CORE)
    strides = [net.encoder.strides[i] for i in net.levels]
    maps = [
        np.zeros((net.encoder.channels[i], rows * CORE // s, cols * CORE // s), dtype=np.float16)
        for i, s in zip(net.levels, strides)
    ]
    for row, col in np.ndindex(rows, cols):
        y, x, n = row * CORE - halo, col * CORE - halo, CORE + 2 * halo
        pixels = torch.from_numpy(reader.read(y, x, n, n))[None]
        with torch.no_grad():
            found = encode_crops(net, pixels, halo)
        for stride, out, part in zip(strides, maps, found):
            core = CORE // stride
            out[:, row * core : (row + 1) * core, col * core : (col + 1) * core] = part[0].float().numpy()
    return maps, open_mask(slide, grid.out_px).window(0, 0, *grid.out_shape)


@torch.no_grad()
def first_layer(source: PixNet, net: SpotToVector, maps: list[np.ndarray], shape: tuple[int, int]) -> Tensor:
    """Return the first layer's values at each place of the 2 µm grid, ``(width, y, x)``.

    The layer is linear, so it may come before the mean over a window, with fewer channels to average.
    """
    weight = net.project.weight / net.sd
    hidden = (net.project.bias - weight @ net.mean)[:, None, None]
    strides = [source.encoder.strides[i] for i in source.levels]
    for part, level, stride in zip(weight.split(net.channels, dim=1), maps, strides, strict=True):
        x = torch.einsum("oc,chw->ohw", part, torch.from_numpy(level.astype(np.float32)))
        hidden = hidden + _to_grid(x[None], stride, source.stride)[0]
    return hidden[:, : shape[0], : shape[1]]


@torch.no_grad()
def slide(net: SpotToVector, hidden: Tensor, mask: np.ndarray, diameter_px: float) -> np.ndarray:
    """Ask the network at each place of a slide's grid, with a round window of that size around it.

    Returns
    -------
    numpy.ndarray
        Densities ``(genes + 1, y, x)``, NaN off tissue.
    """
    tissue = torch.from_numpy(mask)
    kernel = _disc(diameter_px)
    share = _smooth(tissue[None].float(), kernel)[0].clamp(min=1e-6)
    mean = torch.empty(hidden.shape[0], int(tissue.sum()))
    for i, channel in enumerate(hidden):
        mean[i] = (_smooth((channel * tissue)[None], kernel)[0] / share)[tissue]
    out = np.full((net.head.out_features, *mask.shape), np.nan, dtype=np.float32)
    out[:, mask] = torch.cat([net.answer(part.T) for part in mean.split(50_000, dim=1)]).T.numpy()
    return out


def _disc(diameter: float) -> Tensor:
    """Exact shares of pixels inside a disc around the centre of the middle one, summing to 1."""
    n = 2 * int(np.ceil(diameter / 2 - 0.5)) + 1
    disc = ShapeArrays.from_geometries(np.array([shapely.Point(n / 2, n / 2)]), diameter / 2)
    weights = coverage(disc, (0, 0, n, n)).toarray().reshape(n, n)
    return torch.from_numpy((weights / weights.sum()).astype(np.float32))


def _smooth(image: Tensor, kernel: Tensor) -> Tensor:
    """Convolve ``(1, y, x)``, zeros outside."""
    n = kernel.shape[0]
    if n <= 11:
        return F.conv2d(image[None], kernel[None, None], padding=n // 2)[0]
    size = [length + n - 1 for length in image.shape[-2:]]
    product = torch.fft.rfft2(image, s=size) * torch.fft.rfft2(kernel, s=size)
    full = torch.fft.irfft2(product, s=size)
    return full[:, n // 2 : n // 2 + image.shape[-2], n // 2 : n // 2 + image.shape[-1]]


# features ----------------------------------------------------------------------------------------------------------


def _hypercolumns(levels: list[Tensor], net: PixNet) -> Tensor:
    """Bring the encoder's maps to the map's grid and stack them, ``(N, channels, y, x)``."""
    return torch.cat([_to_grid(x, net.encoder.strides[i], net.stride) for i, x in zip(net.levels, levels)], dim=1)


def _to_grid(x: Tensor, stride: int, wanted: int) -> Tensor:
    if stride < wanted:
        return F.avg_pool2d(x, wanted // stride)
    if stride > wanted:
        return F.interpolate(x, scale_factor=stride // wanted, mode="bilinear", align_corners=False)
    return x
