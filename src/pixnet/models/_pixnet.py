"""PixNet: H&E in, dense densities of transcripts out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixnet._names import TOTAL, check_genes
from pixnet.models._decoder import DECODERS, fitted_widths
from pixnet.models._encoders import Enlarged, build_encoder, check_encoder
from pixnet.models._member import Member
from pixnet.models._paper import FILTERS, RECIPE, n_levels
from pixnet.models._quantity import LINKS, QUANTITIES, baseline, linked

MAX_MAP_UM = 4.0
"""A map is kept at this many um per pixel or finer."""


def default_stride(mpp: float) -> int:
    """Return the largest of 4, 2, 1 that keeps the map at 4 um per pixel or finer (1 where none does)."""
    return next((s for s in (4, 2) if s * mpp <= MAX_MAP_UM * 1.02), 1)


def default_zoom(mpp: float) -> int:
    """Return how many times images are enlarged for the encoder: to 1 um per pixel or so where they are coarse."""
    return 2 if mpp >= 1.5 else 1


class PixNet(nn.Module):
    """Dense prediction of gene expression from H&E: encoder, decoder, and one density channel per gene.

    The densities are those of transcripts in linear space, so they add up over any shape. The last channel,
    ``__total__``, is the density of all transcripts; it averages 10,000 over the training shapes. A gene's density is the
    product of the total and the gene's share.

    Parameters
    ----------
    genes
        Names of the genes, the channels of the map.
    mpp
        um per pixel of the images it sees.
    stride
        Image pixels per map pixel: 4, 2 or 1. None: the largest that keeps the map at 4 um per pixel or finer.
    encoder
        A registered encoder's name (`encoders`), ``"timm/NAME"``, or a module that follows the encoder protocol.
    decoder
        ``"none"``: no U-Net; all maps of the encoder are stacked at the output stride and a perceptron runs on each pixel.
        ``"safb"``: beside that, a U-Net with separable attention fusion; ``"plain"``: the same with concatenation in place of
        attention; ``"paper"``: the published one (see `paper`).
    widths
        Channels of the U-Net at each of the encoder's levels, finest first; one number for all. Of ``decoder="paper"``: of its
        levels, from the output stride to 32. None: 16 to 128, for any number of levels. With ``decoder="none"`` leave it at
        None.
    hidden
        Channels of the decoded map, and of the layer after it that sees one pixel at a time.
    members
        Decoders side by side on the one encoder; the map is their mean.
    link
        ``"exp"`` or ``"softplus"``: what makes densities nonnegative.
    quantity
        What a gene's channel holds. ``"density"``: the linear density of its transcripts. ``"log_sum"``: a value per um^2 whose
        sum over a shape is the shape's log1p CP10k (the published way; it holds at the size of shape it was trained on).
        ``"log_mean"``: a value whose mean over a shape is. Gene channels of logs have no link and may be negative; the total
        is a linear density whatever this says.
    zoom
        How many times an image is enlarged before the encoder sees it: 1, 2 or 4. Encoders know tissue at 0.25 to 1 um/px.
        None: 2 where ``mpp`` is 1.5 or coarser, else 1.
    window
        Size in image pixels of the windows, anchored at the slide's origin, in which a slide is predicted. None: 1024 /
        ``zoom``.
    halo
        Image pixels that a window sees beyond each of its edges. None: 320 / ``zoom``, rounded up to a multiple of 64.
    pretrained
        Load the encoder's pretrained weights.

    Raises
    ------
    ValueError
        If an argument is out of range, if genes repeat or one is named ``__total__``, or if ``widths`` are given without a U-Net.

    References
    ----------
    Zhang, Yang & Pan, "From Spots to Pixels", arXiv 2503.01347: the dense map, the decoder and the sum over shapes.

    Examples
    --------
    >>> import torch, pixnet as px
    >>> model = px.models.PixNet(["ERBB2", "CD74"], mpp=0.5)
    >>> model(torch.rand(1, 3, 128, 128)).shape  # two genes and the total, at stride 4
    torch.Size([1, 3, 32, 32])
    """

    def __init__(
        self,
        genes: Sequence[str],
        *,
        mpp: float = 0.5,
        stride: int | None = None,
        encoder: str | nn.Module = "efficientnet_lite0",
        decoder: str = "none",
        widths: int | Sequence[int] | None = None,
        hidden: int = 128,
        members: int = 1,
        link: str = "exp",
        quantity: str = "density",
        zoom: int | None = None,
        window: int | None = None,
        halo: int | None = None,
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        genes = check_genes(genes)
        if not mpp > 0:
            raise ValueError(f"mpp is {mpp!r}; um per pixel must be positive")
        stride = default_stride(mpp) if stride is None else stride
        if stride not in {1, 2, 4}:
            raise ValueError(f"stride is {stride!r}; valid: 4, 2, 1")
        if decoder not in DECODERS:
            raise ValueError(f"decoder is {decoder!r}; valid: {', '.join(map(repr, DECODERS))}")
        if link not in LINKS:
            raise ValueError(f"link is {link!r}; valid: {', '.join(map(repr, LINKS))}")
        if quantity not in QUANTITIES:
            raise ValueError(f"quantity is {quantity!r}; valid: {', '.join(map(repr, QUANTITIES))}")
        if members < 1:
            raise ValueError(f"members is {members!r}; at least 1 is needed")
        if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
            raise ValueError(f"hidden is {hidden!r}; a positive whole number is needed")
        zoom = default_zoom(mpp) if zoom is None else zoom
        if zoom not in {1, 2, 4}:
            raise ValueError(f"zoom is {zoom!r}; valid: 1, 2, 4")
        # An enlarged image brings the encoder's reach, and the memory of a window, down to fewer of its own pixels.
        window = 1024 // zoom if window is None else window
        halo = -(-320 // (64 * zoom)) * 64 if halo is None else halo
        for name, value in (("window", window), ("halo", halo)):
            if value % 64 or value < (64 if name == "window" else 0):
                raise ValueError(f"{name} is {value!r}; a multiple of 64 is needed")
        name, module = build_encoder(encoder, pretrained)
        check_encoder(name, module)
        if zoom > 1:
            module = Enlarged(module, zoom)
        if decoder == "paper":
            widths = fitted_widths(widths, n_levels(stride), f"the published decoder at stride {stride}")
        elif decoder != "none":
            widths = fitted_widths(widths, len(module.channels), f"encoder {name!r}")
        elif widths is not None:
            raise ValueError("widths are those of a U-Net, which decoder='none' lacks; pass decoder='safb' or hidden=")

        self.config: dict[str, Any] = {
            "genes": genes,
            "mpp": float(mpp),
            "stride": stride,
            "encoder": name,
            "decoder": decoder,
            "widths": widths,
            "hidden": hidden,
            "zoom": zoom,
            "members": members,
            "link": link,
            "window": window,
            "halo": halo,
            "quantity": quantity,
            "unit": QUANTITIES[quantity],
        }
        if quantity == "log_sum":
            # What the head's values are divided by, so that they are of the size of logs; training sets it.
            self.config["area_um2"] = 1000.0
        self.history: list[dict[str, float]] = []
        self.encoder = module
        self.members = nn.ModuleList(
            Member(module.channels, module.strides, widths, hidden, stride, decoder, len(genes)) for _ in range(members)
        )
        for i, channels in enumerate(module.channels):
            self.register_buffer(f"feature_mean_{i}", torch.zeros(channels))
            self.register_buffer(f"feature_sd_{i}", torch.ones(channels))

    @classmethod
    def paper(
        cls,
        genes: Sequence[str],
        *,
        encoder: str | nn.Module = "timm/hf-hub:MahmoodLab/UNI2-h",
        mpp: float = 0.5,
        stride: int = 1,
        widths: Sequence[int] = FILTERS,
        quantity: str = "log_sum",
        window: int = 512,
        halo: int = 128,
        pretrained: bool = True,
        **options: Any,
    ) -> PixNet:
        """Build PixNet as published, to be trained with ``pixnet.tl.train(sdata, model=...)``.

        A ViT's tokens after its groups of blocks 2, 4 and 6 of 8 and after the last become a pyramid. The last is unfolded by
        depth-to-space blocks, the three intermediate ones are fused in by separable attention at the three finest levels,
        and a 1x1 convolution gives the map, whose sum over a shape is compared with the log of the shape's
        library-normalised counts: ``MSE + 0.5 (1 - PCC)``, AdamW at 5e-4 with weight decay 1e-4. The model carries these
        settings in ``config["recipe"]``; `pixnet.tl.train` uses them unless told otherwise.

        Parameters
        ----------
        genes
            Names of the genes (the paper takes the 250 of highest mean: `pixnet.pp.select_genes`).
        encoder
            As for `PixNet`. The published one is UNI2-h: it needs ``pixnet[timm]`` and access to its weights, which Hugging
            Face gives to whoever accepts their terms. Any other works too.
        mpp
            um per pixel of the images it sees.
        stride
            Image pixels per map pixel: 1 as published. 4 takes a sixteenth of the memory and time: the decoder then has the
            levels from 4 to 32 in place of those from 1 to 32, the first filters of the list, and the same three fusions.
        widths
            Filters of the levels, finest first; as many of them as there are levels are used.
        quantity
            ``"log_sum"`` as published, else as for `PixNet`.
        window, halo
            As for `PixNet`; here windows with their halo are whole blocks of the ViT.
        pretrained
            Load the encoder's pretrained weights.
        **options
            Passed on to `PixNet`: ``members``, ``link``.

        Returns
        -------
        PixNet
            Untrained.

        Raises
        ------
        FileNotFoundError
            If the encoder's weights cannot be had; the message says how to supply them.
        ImportError
            If the encoder needs timm, which is not there.
        ValueError
            As for `PixNet`.

        Notes
        -----
        The authors' code is not public and third-party notes disagree in places. Where the paper is silent or ambiguous, this
        was chosen:

        - *Pyramid.* Tokens are reshaped, brought to their level's number of filters by a 1x1 convolution, and interpolated to
          its size. Features are standardised by their mean and deviation over the training crops. The encoder is frozen
          (``tune_encoder=True`` trains it). A pyramid of a CNN serves as it is, from the map nearest to the output stride.
        - *Fusion* is ``D = U + A``, as in the paper's figure. Attention runs along image rows inside segments of 64 px, not
          whole rows, so that a prediction does not depend on how a slide is tiled.
        - *Sum.* A log summed over an area fits shapes of one size: the target is the same for a shape twice as large. Shapes
          weigh their edge pixels by exact area, and values are per um^2, divided by the mean area of the training shapes.
        - *Target.* log1p of CP10k, the total being all UMI of the shape.
        - *Total.* The paper predicts none; here it has a channel and a term of its own as in every PixNet.
        - *Batches* are those of the package, of one section each; 8 crops at stride 1. The published 200 passes are the most
          that are made: validation chooses their number. The rate rises and falls as in the package. Crops are flipped and
          turned, not restained.

        Examples
        --------
        >>> import pixnet as px
        >>> model = px.models.PixNet.paper(["ERBB2", "CD74"], encoder="efficientnet_lite0", stride=4)
        >>> model.config["quantity"], model.config["recipe"]["lr"]
        ('log_sum', 0.0005)
        """
        if stride not in {1, 2, 4}:
            raise ValueError(f"stride is {stride!r}; valid: 4, 2, 1")
        model = cls(
            genes, mpp=mpp, stride=stride, encoder=encoder, decoder="paper", widths=list(widths)[: n_levels(stride)],
            quantity=quantity, window=window, halo=halo, pretrained=pretrained, **options,
        )  # fmt: skip
        model.config["recipe"] = RECIPE | {"batch_crops": 8 * stride}
        return model

    # what it is --------------------------------------------------------------------------------------------------

    @property
    def genes(self) -> list[str]:
        """Names of the gene channels; ``__total__`` follows them."""
        return self.config["genes"]

    @property
    def channels(self) -> list[str]:
        """Names of all channels of the map."""
        return [*self.genes, TOTAL]

    @property
    def mpp(self) -> float:
        """Return the um per pixel of the images it sees."""
        return self.config["mpp"]

    @property
    def stride(self) -> int:
        """Image pixels per map pixel."""
        return self.config["stride"]

    @property
    def quantity(self) -> str:
        """What a gene's channel holds: ``"density"``, ``"log_sum"`` or ``"log_mean"``."""
        return self.config["quantity"]

    @property
    def window(self) -> int:
        """Size of its windows in image pixels."""
        return self.config["window"]

    @property
    def halo(self) -> int:
        """Image pixels seen beyond each edge of a window."""
        return self.config["halo"]

    def extra_repr(self) -> str:
        """Return the line that `print` shows first."""
        c = self.config
        return (
            f"{len(self.genes)} genes, {c['mpp']:g} um/px in, {c['mpp'] * c['stride']:g} um/px out, "
            f"encoder={c['encoder']}, decoder={c['decoder']}, members={c['members']}"
        )

    def __repr__(self) -> str:
        n = sum(p.numel() for p in self.parameters()) / 1e6
        return f"PixNet({self.extra_repr()}, {n:.1f} M parameters)"

    def copy(self) -> PixNet:
        """Return a copy that shares nothing with this model."""
        return copy.deepcopy(self)

    def with_genes(self, genes: Sequence[str]) -> PixNet:
        """Return a copy that predicts other genes: heads of genes it knows are kept, those of others start anew.

        Parameters
        ----------
        genes
            Names of the genes.
        """
        genes = check_genes(genes)
        new = self.copy()
        if genes == self.genes:
            return new
        known = {gene: i for i, gene in enumerate(self.channels)}
        new.config["genes"] = genes
        for member in new.members:
            old = member.head
            member.head = nn.Conv2d(old.in_channels, len(genes) + 1, 1)
            nn.init.normal_(member.head.weight, std=0.01)
            # A gene that is new starts from the composition of the average gene.
            nn.init.constant_(member.head.bias, float(old.bias.data[:-1].mean()))
            for i, gene in enumerate([*genes, TOTAL]):
                if gene in known:
                    member.head.weight.data[i] = old.weight.data[known[gene]]
                    member.head.bias.data[i] = old.bias.data[known[gene]]
        return new

    # what it does ------------------------------------------------------------------------------------------------

    def forward(self, image: Tensor, channels: Tensor | None = None, crop: int = 0) -> Tensor:
        """Predict the map.

        Parameters
        ----------
        image
            RGB in 0 to 1, ``(N, 3, H, W)``; H and W multiples of 64.
        channels
            Indices of the wanted channels (of `channels`), the total's last; None: all.
        crop
            Map pixels to leave out at each edge: those of a halo, most of which is needed by the encoder alone.

        Returns
        -------
        Tensor
            ``(N, channels, H / stride, W / stride)``: nonnegative densities, or the logs that `quantity` says.
        """
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % 64 or image.shape[3] % 64:
            raise ValueError(
                f"the image has shape {tuple(image.shape)}; (N, 3, H, W) with H and W multiples of 64 is needed"
            )
        return self.decode(self.encode(image), channels, crop)

    def encode(self, image: Tensor) -> list[Tensor]:
        """Return the encoder's features, standardised by their statistics over the training tissue."""
        return self.standardise(self.encoder(image))

    @property
    def levels(self) -> list[int]:
        """Positions of the encoder's maps that the decoder uses; standardised features of others are None."""
        return self.members[0].decoder.used

    def standardise(self, features: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return features with the mean and standard deviation of the training tissue taken off."""
        out: list[Tensor | None] = [None] * len(features)
        for i in self.levels:
            mean, sd = getattr(self, f"feature_mean_{i}"), getattr(self, f"feature_sd_{i}")
            f = features[i]
            out[i] = (f - mean.to(f.dtype)[:, None, None]) / sd.to(f.dtype)[:, None, None]
        return out

    def decode(self, features: Sequence[Tensor], channels: Tensor | None = None, crop: int = 0) -> Tensor:
        """Return the map ``(N, channels, h, w)`` of standardised features: the mean over the members."""
        maps = [self.density(member(features, channels, crop)) for member in self.members]
        return maps[0] if len(maps) == 1 else torch.stack(maps).mean(dim=0)

    def density(self, logits: Tensor) -> Tensor:
        """Return the map of logits, whose last channel is the total's and the others the genes'."""
        return linked(logits, self.quantity, self.config["link"], self.config.get("area_um2", 1.0))

    def set_baseline(self, level: Tensor, area_um2: float | None = None) -> None:
        """Start from what is the same everywhere.

        Parameters
        ----------
        level
            Of densities, each gene's mean share of all transcripts, ``(G,)``; of logs, its mean log1p CP10k.
        area_um2
            Mean area of the training shapes; needed for ``"log_sum"``.
        """
        if self.quantity == "log_sum":
            if area_um2 is None or not area_um2 > 0:
                raise ValueError(f"area_um2 is {area_um2!r}; a map of log sums needs the mean area of its shapes")
            self.config["area_um2"] = float(area_um2)
        for member in self.members:
            genes, total = baseline(level, self.quantity, self.config["link"])
            member.head.bias.data[:-1].copy_(genes)
            member.head.bias.data[-1] = total

    def save(self, path: str | Path, *, dtype: str = "float32", overwrite: bool = False) -> None:
        """Write the model to one ``.safetensors`` file: weights, genes, um/px, configuration and history.

        Parameters
        ----------
        path
            The file.
        dtype
            ``"float16"`` halves the file; the weights are loaded as float32 either way.
        overwrite
            Replace an existing file.

        Raises
        ------
        FileExistsError
            If the file exists and ``overwrite`` is False.
        ValueError
            If the path does not end in ``.safetensors``.
        """
        from pixnet.models._checkpoint import save

        save(self, path, dtype=dtype, overwrite=overwrite)
