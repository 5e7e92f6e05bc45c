"""Heads: what the channels of a map mean, from logits to values, and from sums over shapes to expression.

A head is the only place that knows this. Everything else asks it.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from pixnet._names import TOTALS
from pixnet._programs import program_names
from pixnet.models._config import ModelConfig

LEAST_SHARE = 1e-8
"""Share of all transcripts that a gene has at least where a head starts: its logarithm is finite."""

TOTAL_RANGE = (-10.0, 4.0)
"""Range of the total's logit: densities from 0.5 to 5e5, where the training tissue averages 1e4."""


SMOOTHING = 0.1
"""Part of the mean composition in each program at the start: a gene that a factorisation gave to none of a program's
transcripts could not be learned, since the slope of a softmax is the share itself."""

FITTING_STEPS = 20
"""Rounds of fitting loadings to amounts of genes and to rows that sum to at most 1."""

LARGE_TABLE = 60_000_000
"""Shapes times genes from which on the factorisation works in mini-batches."""


class MeasuredShapes(NamedTuple):
    """What was measured in the training shapes; a head starts from it.

    Attributes
    ----------
    shares
        Each gene's share of a shape's transcripts, ``(shapes, genes)`` CSR.
    area_um2
        Mean area of the shapes in µm².
    seed
        Seed of what is random.
    """

    shares: sparse.csr_array
    area_um2: float
    seed: int


class Head(nn.Module):
    """What the channels of a map mean.

    Attributes
    ----------
    genes
        Names of the genes that the model answers for.
    n_logits
        Number of logits that a decoder gives for each pixel; the last is the total's.
    unit
        Unit of the map, in words.
    total_name
        Name of the channel that holds the density of all transcripts, beside channels of genes.
    gene_weights
        How genes weigh in training, unless it is told (see `TrainingOptions`).
    refit_in_full
        Whether the run on everything makes more passes than the best one's number, so that it learns as much.
    """

    unit: str
    total_name: str
    gene_weights: str = "equal"
    refit_in_full: bool = False

    def __init__(self, genes: Sequence[str], n_logits: int) -> None:
        super().__init__()
        self.genes, self.n_logits = tuple(genes), n_logits

    @property
    @abstractmethod
    def channels(self) -> list[str]:
        """Names of the channels of the map."""

    def gene_channels(self, genes: Sequence[str]) -> list[str]:
        """Return the names of the channels of a map of some genes."""
        return [*genes, self.total_name]

    def wanted(self, channels: Tensor | None) -> Tensor | None:
        """Return the logits that some channels need; None: all."""
        return channels

    @abstractmethod
    def forward(self, logits: Tensor, channels: Tensor | None = None) -> Tensor:
        """Return the map ``(N, channels, ...)`` of logits ``(N, n_logits or those wanted, ...)``.

        ``channels`` are indices of genes with the total's (the number of genes) last; None: the channels of the head.
        """

    @abstractmethod
    def log_expression(self, sums: Tensor, pixel_um2: float, genes: Tensor | None = None) -> Tensor:
        """Return the log1p CP10k of shapes, ``(shapes, genes)``, from sums of the map over their pixels.

        ``sums`` is ``(shapes, channels)``; ``pixel_um2`` is the area of a map pixel in µm². With ``genes``, indices of
        a panel of genes, expression is within the panel: counts per 10,000 transcripts of the panel's genes.
        """

    @abstractmethod
    def total(self, sums: Tensor, genes: Tensor | None = None) -> Tensor:
        """Return sums of the density of all transcripts, or of those of a panel of genes, ``(shapes,)``."""

    @abstractmethod
    def start(self, measured: MeasuredShapes) -> tuple[Tensor, float]:
        """Start from what was measured.

        Returns the biases, ``(n_logits - 1,)`` and the total's, of a map that is the same everywhere.
        """

    @abstractmethod
    def balance(self, ratio: Tensor, usage: Tensor) -> Tensor:
        """Multiply the amount of each gene by a factor ``(genes,)``; return the shift of each logit but the total's.

        ``usage`` is what all shapes together have of each channel, ``(channels,)``.
        """

    @abstractmethod
    def taking_over(self, old: Head) -> list[int | None]:
        """Take over what an earlier head knows; return, for each logit, the old one's position. None: it starts anew."""


class GeneHead(Head):
    """One channel for each gene, and the density of all transcripts: a gene's density is its share of the total."""

    total_name = TOTALS["density"]
    unit = "CP10k density (__total__ averages 1e4 over the training shapes)"

    def __init__(self, genes: Sequence[str]) -> None:
        super().__init__(genes, len(genes) + 1)

    @property
    def channels(self) -> list[str]:
        """Names of the genes, and of the total."""
        return self.gene_channels(self.genes)

    def forward(self, logits: Tensor, channels: Tensor | None = None) -> Tensor:
        """Return densities."""
        genes, total = _split(logits)
        return torch.cat([genes.clamp(max=0).exp() * total, total], dim=1)

    def log_expression(self, sums: Tensor, pixel_um2: float, genes: Tensor | None = None) -> Tensor:
        """Return the log of ratios of sums."""
        if genes is None:
            return torch.log1p(1e4 * sums[:, :-1] / sums[:, -1:].clamp(min=1e-6))
        panel = sums[:, genes]
        return torch.log1p(1e4 * panel / panel.sum(dim=1, keepdim=True).clamp(min=1e-6))

    def total(self, sums: Tensor, genes: Tensor | None = None) -> Tensor:
        """Return the last channel, or the sum of the panel's."""
        return sums[:, -1] if genes is None else sums[:, genes].sum(dim=1)

    def start(self, measured: MeasuredShapes) -> tuple[Tensor, float]:
        """Start from each gene's mean share."""
        share = torch.from_numpy(np.asarray(measured.shares.mean(axis=0), dtype=np.float32).ravel())
        return share.clamp(min=LEAST_SHARE).log(), 0.0

    def balance(self, ratio: Tensor, usage: Tensor) -> Tensor:
        """Shift each gene's logarithm."""
        return ratio.log()

    def taking_over(self, old: Head) -> list[int | None]:
        """Match genes by name."""
        return [*_positions(self.genes, old.genes), old.n_logits - 1]


class PanelHead(GeneHead):
    """One channel for each gene, and their sum: what tables of panels tell, which do not count all transcripts."""

    unit = "density of transcripts of the model's genes (__total__, their sum, averages 1e4 over the training shapes)"

    def wanted(self, channels: Tensor | None) -> Tensor | None:
        """All genes are needed for the share of any."""
        return None

    def forward(self, logits: Tensor, channels: Tensor | None = None) -> Tensor:
        """Return densities, which add up to the total."""
        genes, total = _split(logits)
        found = genes.softmax(dim=1) * total
        return torch.cat([found if channels is None else found[:, channels[:-1]], total], dim=1)


class LogSumHead(GeneHead):
    """The published quantity: a channel whose sum over a shape is the shape's log1p CP10k, per µm².

    It holds for shapes of the size that it was trained on. Logits are divided by their mean area, so that they are of
    the size of logs.
    """

    total_name = TOTALS["log_sum"]
    unit = "log1p CP10k per um2, summed over a shape (__total__: density, averages 1e4 over the training shapes)"

    area_um2: Tensor

    def __init__(self, genes: Sequence[str]) -> None:
        super().__init__(genes)
        self.register_buffer("area_um2", torch.tensor(1000.0))

    def forward(self, logits: Tensor, channels: Tensor | None = None) -> Tensor:
        """Return logs per µm², and the density of all transcripts."""
        genes, total = _split(logits)
        return torch.cat([genes / self.area_um2, total], dim=1)

    def log_expression(self, sums: Tensor, pixel_um2: float, genes: Tensor | None = None) -> Tensor:
        """Return sums times the pixel's area; logs cannot be brought to a panel."""
        if genes is not None:
            raise ValueError("logs of a shape do not add up to the total of a panel; a head of densities is needed")
        return sums[:, :-1] * pixel_um2

    def balance(self, ratio: Tensor, usage: Tensor) -> Tensor:
        """Leave logs as they are: their mean is not the log of an amount."""
        return torch.zeros(len(self.genes))

    def taking_over(self, old: Head) -> list[int | None]:
        """Match genes by name; values stay those of shapes of the same size."""
        if isinstance(old, LogSumHead):
            self.area_um2.copy_(old.area_um2)
        return super().taking_over(old)

    def start(self, measured: MeasuredShapes) -> tuple[Tensor, float]:
        """Start from each gene's mean log."""
        if not measured.area_um2 > 0:
            raise ValueError(f"area_um2 is {measured.area_um2!r}; a map of log sums needs the mean area of its shapes")
        self.area_um2.fill_(measured.area_um2)
        logs = measured.shares * 1e4
        logs.data = np.log1p(logs.data)
        return torch.from_numpy(np.asarray(logs.mean(axis=0), dtype=np.float32).ravel()), 0.0


class ProgramHead(Head):
    """A few nonnegative programs that add up to the density of all transcripts, and each program's share of every gene.

    A gene's density is ``programs @ loadings``. All of it is linear, so sums of the programs over a shape, multiplied
    afterwards, are exactly the sums of each gene.

    Attributes
    ----------
    loading_logits
        ``(programs, genes + 1)``: a softmax over each row gives the loadings; the last column is that of all
        transcripts that the model does not name.
    """

    total_name = TOTALS["density"]
    gene_weights = "signal"  # thousands of genes, most of them with more noise than signal
    refit_in_full = True  # a step moves a gene less through programs than by a logit of its own
    unit = "density of transcripts (the programs add up to a total that averages 1e4 over the training shapes)"

    def __init__(self, genes: Sequence[str], n_programs: int) -> None:
        super().__init__(genes, n_programs + 1)
        self.loading_logits = nn.Parameter(torch.zeros(n_programs, len(genes) + 1))

    @property
    def channels(self) -> list[str]:
        """Names of the programs."""
        return program_names(self.loadings.detach().cpu().numpy(), self.genes)

    @property
    def loadings(self) -> Tensor:
        """Share of each program's transcripts that each gene has, ``(programs, genes)``; rows sum to at most 1."""
        return self.loading_logits.softmax(dim=1)[:, :-1]

    def wanted(self, channels: Tensor | None) -> Tensor | None:
        """All programs are needed for any gene."""
        return None

    def forward(self, logits: Tensor, channels: Tensor | None = None) -> Tensor:
        """Return densities of the programs, or of genes and the total."""
        shares, total = _split(logits)
        programs = shares.softmax(dim=1) * total
        if channels is None:
            return programs
        genes = torch.einsum("nk...,kg->ng...", programs, self.loadings[:, channels[:-1]])
        return torch.cat([genes, total], dim=1)

    def log_expression(self, sums: Tensor, pixel_um2: float, genes: Tensor | None = None) -> Tensor:
        """Return the log of ratios of sums."""
        if genes is None:
            return torch.log1p(1e4 * (sums @ self.loadings) / self.total(sums)[:, None].clamp(min=1e-6))
        panel = sums @ self.loadings[:, genes]
        return torch.log1p(1e4 * panel / panel.sum(dim=1, keepdim=True).clamp(min=1e-6))

    def total(self, sums: Tensor, genes: Tensor | None = None) -> Tensor:
        """Return the sum over the programs, or of their panel's parts."""
        return sums.sum(dim=1) if genes is None else (sums @ self.loadings[:, genes]).sum(dim=1)

    def start(self, measured: MeasuredShapes) -> tuple[Tensor, float]:
        """Start from a nonnegative matrix factorisation of what was measured (see `factorise`)."""
        usage, loadings = factorise(measured.shares, self.n_logits - 1, measured.seed)
        rest = np.maximum(1 - loadings.sum(axis=1, keepdims=True), LEAST_SHARE)
        logits = np.log(np.concatenate([np.maximum(loadings, LEAST_SHARE), rest], axis=1))
        self.loading_logits.data.copy_(torch.from_numpy(logits.astype(np.float32)))
        return torch.from_numpy(np.log(np.maximum(usage, 1e-4)).astype(np.float32)), 0.0

    @torch.no_grad()
    def balance(self, ratio: Tensor, usage: Tensor) -> Tensor:
        """Multiply columns of the loadings, with rows that sum to at most 1 (iterative proportional fitting)."""
        loadings, usage = self.loadings.double(), usage.to(self.loading_logits).double()
        factor = ratio.to(self.loading_logits).double()
        target = factor * (usage @ loadings)
        for _ in range(FITTING_STEPS):
            out = loadings * factor
            out = out / (out.sum(dim=1, keepdim=True) / (1 - LEAST_SHARE)).clamp(min=1)
            factor = factor * (target / (usage @ out).clamp(min=1e-12)).clamp(0.5, 2)
        rest = (1 - out.sum(dim=1, keepdim=True)).clamp(min=LEAST_SHARE)
        self.loading_logits.copy_(torch.cat([out, rest], dim=1).clamp(min=1e-12).log().float())
        return torch.zeros(self.n_logits - 1)

    @torch.no_grad()
    def taking_over(self, old: Head) -> list[int | None]:
        """Keep the loadings of known genes; new genes take theirs out of what the old head did not name."""
        if not isinstance(old, ProgramHead):
            raise TypeError("a head of programs takes over the loadings of another one only")
        shares = old.loading_logits.double().softmax(dim=1)
        known = _positions(self.genes, old.genes)
        new = torch.tensor([position is None for position in known])
        out = torch.zeros(len(shares), len(self.genes), dtype=torch.float64)
        out[:, ~new] = shares[:, [position for position in known if position is not None]]
        rest = (1 - out.sum(dim=1, keepdim=True)).clamp(min=LEAST_SHARE)
        if new.any():
            out[:, new] = torch.minimum(shares[:, :-1].mean(dim=1, keepdim=True), rest / (2 * int(new.sum())))
        rest = (1 - out.sum(dim=1, keepdim=True)).clamp(min=LEAST_SHARE)
        self.loading_logits.copy_(torch.cat([out, rest], dim=1).clamp(min=1e-12).log().float())
        return list(range(self.n_logits))


def build_head(config: ModelConfig) -> Head:
    """Return the head that a configuration asks for."""
    if config.n_programs is not None:
        return ProgramHead(config.genes, config.n_programs)
    heads = {"density": GeneHead, "panel_density": PanelHead, "log_sum": LogSumHead}
    return heads[config.quantity](config.genes)


def factorise(shares: sparse.csr_array, n_programs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Factorise shares of transcripts into programs.

    Genes are divided by the root of their mean first: counting noise then weighs the same in all of them, and a few
    abundant genes do not decide everything.

    Returns
    -------
    usage, loadings
        Mean share of each program, ``(programs,)``, and each program's share of every gene, ``(programs, genes)``.
    """
    from sklearn.decomposition import NMF, MiniBatchNMF
    from sklearn.exceptions import ConvergenceWarning

    mean = np.asarray(shares.mean(axis=0)).ravel()
    scale = np.sqrt(np.maximum(mean, LEAST_SHARE))
    scaled = sparse.csr_matrix(shares @ sparse.diags_array(1 / scale)).astype(np.float32)
    options = {"init": "nndsvda" if n_programs <= min(scaled.shape) else "random", "random_state": seed}
    if scaled.shape[0] * scaled.shape[1] <= LARGE_TABLE:
        nmf = NMF(n_programs, max_iter=200, tol=1e-3, **options)
    else:
        nmf = MiniBatchNMF(n_programs, batch_size=2048, max_iter=20, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a start: training goes on from it
        weights = nmf.fit_transform(scaled).astype(np.float64)
    loadings = nmf.components_.astype(np.float64) * scale
    amount = loadings.sum(axis=1)
    empty = amount <= LEAST_SHARE
    loadings[empty], amount[empty] = mean, mean.sum()
    # Rows sum to the share of all transcripts that the genes have, so that what they do not name is in every program.
    named = min(float(mean.sum()), 1.0)
    loadings = (1 - SMOOTHING) * loadings / amount[:, None] * named + SMOOTHING * mean
    usage = weights.mean(axis=0) * amount
    return usage / max(usage.sum(), LEAST_SHARE), loadings


def _split(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of all channels but the last, and the total's density, in float32."""
    # Logarithms and exponentials in float32: bfloat16 would keep 3 digits of a value that spans decades.
    logits = logits.float()
    return logits[:, :-1], logits[:, -1:].clamp(*TOTAL_RANGE).exp() * 1e4


def _positions(names: Sequence[str], among: Sequence[str]) -> list[int | None]:
    position = {name: i for i, name in enumerate(among)}
    return [position.get(name) for name in names]
