"""PixNet: H&E in, dense densities of transcripts out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pixnet._checked import given
from pixnet._evidence import Evidence
from pixnet._names import check_genes
from pixnet.models._checkpoint import Header, write_checkpoint
from pixnet.models._config import PAPER_FILTERS, Decoder, ModelConfig, Quantity, Stride, Zoom, paper_levels
from pixnet.models._encoders import Encoder, Enlarged, build_encoder, check_encoder, encoder_name
from pixnet.models._heads import Head, MeasuredShapes, ProgramHead, build_head
from pixnet.models._member import Member
from pixnet.models._novelty import Novelty
from pixnet.models._paper import PAPER_TRAINING

if TYPE_CHECKING:
    import pandas as pd


class PixNet(nn.Module):
    """Dense prediction of gene expression from H&E: encoder, decoder, and a head that says what the channels mean.

    The densities are those of transcripts in linear space, so they add up over any shape. A head of genes has a channel
    for each gene, and the last, ``__total__``, is the density of all transcripts, which averages 10,000 over the
    training shapes. A head of programs (``n_programs=``) has a few nonnegative channels that add up to that total, and
    ``loadings`` with the share of each program that every gene has: many genes for the cost of a few channels.

    Parameters
    ----------
    genes
        Name or names of the genes, the channels of the map.
    mpp
        Pixel size (µm/px) of the images that the model sees. None: 0.5.
    stride
        Image pixels per map pixel: 4, 2 or 1. None: the largest that keeps the map at 4 µm/px or finer.
    encoder
        A registered encoder's name (`encoders`), ``"timm/NAME"``, or a module. None: ``"efficientnet_lite0"``.
    decoder
        ``"pixel_mlp"``: all maps of the encoder are stacked at the output stride, and a perceptron runs on each pixel.
        ``"paper"``: the published U-Net (see `paper`). None: ``"pixel_mlp"``.
    widths
        Channels of the published decoder's levels, from the output stride to 32. None: as published.
    hidden
        Channels of the decoded map, and of the layer after it that sees one pixel at a time. None: 128.
    members
        Decoders side by side on the one encoder; the map is their mean. None: 1.
    quantity
        Quantity that a gene's channel holds. ``"density"``: linear density of its transcripts. ``"panel_density"``: the
        same, with the sum of the genes as the total (of tables of panels). ``"log_sum"``: a value per µm² whose sum
        over a shape is its log1p CP10k (as published, at the size of the training shapes). None: ``"density"``.
    n_programs
        Number of programs that the map holds in place of genes; 2 or more. None: a channel for each gene.
    zoom
        Factor by which an image is enlarged for the encoder, which knows tissue at 0.25 to 1 µm/px: 1, 2 or 4. None: 2
        where ``mpp`` is 1.5 or coarser, else 1.
    window, halo
        Size in image pixels of the windows, anchored at the slide's origin, in which a slide is predicted, and what
        they see beyond each edge. None: 1024 / ``zoom``, and 320 / ``zoom`` rounded up to a multiple of 64. An encoder
        that states its reach sees as far as it reaches, whatever the halo.
    pretrained
        Load the encoder's pretrained weights.

    Raises
    ------
    TypeError
        If genes are not strings.
    ValueError
        If an argument is out of range, genes repeat, one is named ``__total__``, or ``widths`` do not fit the decoder.

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

    config: ModelConfig
    """The settings as they were resolved. With the weights they are the function that the model computes."""
    history: list[dict[str, Any]]
    """One dict for each pass of training that was validated; those of one training have the same ``run``."""
    provenance: dict[str, Any]
    """How the model was trained."""
    stain: list[Any]
    """Statistics of the stain of the training slides."""
    evidence: Evidence | None
    """What held-out shapes showed of each gene."""
    training_options: dict[str, Any]
    """Settings of training that `pixnet.tl.train` takes from the model unless they are given."""

    encoder: Encoder
    head: Head
    members: list[Member]  # an nn.ModuleList
    novelty: Novelty

    def __init__(
        self,
        genes: str | Sequence[str],
        *,
        mpp: float | None = None,
        stride: Stride | None = None,
        encoder: str | nn.Module | None = None,
        decoder: Decoder | None = None,
        widths: Sequence[int] | None = None,
        hidden: int | None = None,
        members: int | None = None,
        quantity: Quantity | None = None,
        n_programs: int | None = None,
        zoom: Zoom | None = None,
        window: int | None = None,
        halo: int | None = None,
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        config = ModelConfig(
            **given(
                genes=genes, mpp=mpp, stride=stride, decoder=decoder, widths=widths, hidden=hidden, members=members,
                encoder=None if encoder is None else encoder_name(encoder),
                quantity=quantity, n_programs=n_programs, zoom=zoom, window=window, halo=halo,
            )
        )  # fmt: skip
        module = build_encoder(config.encoder if encoder is None else encoder, pretrained)
        check_encoder(config.encoder, module)
        self.config, self.history, self.provenance, self.stain, self.training_options = config, [], {}, [], {}
        self.evidence = None
        self.encoder = Enlarged(module, config.zoom) if config.zoom > 1 else module
        channels, strides = self.encoder.channels, self.encoder.strides
        self.head = build_head(config)
        members_ = (Member(config, channels, strides, self.head.n_logits) for _ in range(config.members))
        self.members = nn.ModuleList(members_)  # type: ignore[assignment]
        for i, n in enumerate(channels):
            self.register_buffer(f"feature_mean_{i}", torch.zeros(n))
            self.register_buffer(f"feature_sd_{i}", torch.ones(n))
        used = {i: (channels[i], strides[i]) for i in self.levels}
        self.novelty = Novelty(used, self.stride)

    @classmethod
    def paper(
        cls,
        genes: str | Sequence[str],
        *,
        encoder: str | nn.Module = "timm/hf-hub:MahmoodLab/UNI2-h",
        mpp: float | None = None,
        stride: Stride = 1,
        widths: Sequence[int] = PAPER_FILTERS,
        members: int | None = None,
        quantity: Quantity = "log_sum",
        zoom: Zoom | None = None,
        window: int = 512,
        halo: int = 128,
        pretrained: bool = True,
    ) -> PixNet:
        """Build PixNet as published, to be trained with ``pixnet.tl.train(sdata, model=...)``.

        A ViT's tokens after its groups of blocks 2, 4 and 6 of 8 and after the last become a pyramid. The last is
        unfolded by depth-to-space blocks, the three intermediate ones are fused in by separable attention at the three
        finest levels, and a 1x1 convolution gives the map, whose sum over a shape is compared with the log of the
        shape's library-normalised counts: ``MSE + 0.5 (1 - PCC)``, AdamW at 5e-4 with weight decay 1e-4. The model
        carries these settings in ``training_options``, which `pixnet.tl.train` uses and logs.
        :doc:`/concepts/encoders` lists what was chosen where the paper is silent or ambiguous.

        Parameters
        ----------
        genes
            Names of the genes (the paper takes the 250 of highest mean: `pixnet.pp.select_genes`).
        encoder
            As for `PixNet`. The published one is UNI2-h, which needs ``pixnet[timm]`` and access to its weights.
        mpp, members, zoom, window, halo, pretrained
            As for `PixNet` (µm/px, px). Windows with their halo are whole blocks of the ViT.
        stride
            Image pixels per map pixel: 1 as published. 4 takes a sixteenth of the memory and time: the decoder has the
            levels from 4 to 32, the first filters of the list, and the same three fusions.
        widths
            Filters of the levels, finest first; as many of them as there are levels are used.
        quantity
            ``"log_sum"`` as published, else as for `PixNet`.

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

        Examples
        --------
        >>> import pixnet as px
        >>> model = px.models.PixNet.paper(["ERBB2", "CD74"], encoder="efficientnet_lite0", stride=4)
        >>> model.quantity, model.training_options["lr"]
        ('log_sum', 0.0005)
        """
        if stride in {1, 2, 4}:  # any other is refused by the configuration
            widths = list(widths)[: paper_levels(stride)]
        model = cls(
            genes, mpp=mpp, stride=stride, encoder=encoder, decoder="paper", widths=widths, members=members,
            quantity=quantity, zoom=zoom, window=window, halo=halo, pretrained=pretrained,
        )  # fmt: skip
        model.training_options = PAPER_TRAINING | {"batch_crops": 8 * stride}
        return model

    @property
    def genes(self) -> list[str]:
        """Names of the genes."""
        return list(self.config.genes)

    @property
    def channels(self) -> list[str]:
        """Names of all channels of the map."""
        return self.head.channels

    @property
    def mpp(self) -> float:
        """Pixel size (µm/px) of the images that the model sees."""
        return self.config.mpp

    @property
    def stride(self) -> int:
        """Image pixels per map pixel."""
        return self.config.stride

    @property
    def quantity(self) -> str:
        """Quantity that the model predicts for a gene: ``"density"``, ``"panel_density"`` or ``"log_sum"``."""
        return self.config.quantity

    @property
    def loadings(self) -> pd.DataFrame | None:
        """Share of each program's transcripts that each gene has, programs by genes; None for a channel for each gene."""
        if not isinstance(self.head, ProgramHead):
            return None
        import pandas as pd

        return pd.DataFrame(self.head.loadings.detach().cpu().numpy(), index=self.channels, columns=self.genes)

    @property
    def unit(self) -> str:
        """Unit of the map, in words."""
        return self.head.unit

    @property
    def window(self) -> int:
        """Size of its windows in image pixels."""
        return self.config.window

    @property
    def halo(self) -> int:
        """Image pixels seen beyond each edge of a window."""
        return self.config.halo

    def __repr__(self) -> str:
        c, n = self.config, sum(p.numel() for p in self.parameters()) / 1e6
        programs = "" if c.n_programs is None else f" in {c.n_programs} programs"
        return (
            f"PixNet({len(c.genes)} genes{programs}, {c.mpp:g} µm/px in, {c.mpp * c.stride:g} µm/px out, "
            f"encoder={c.encoder}, decoder={c.decoder}, members={c.members}, {n:.1f} M parameters)"
        )

    def copy(self) -> PixNet:
        """Return a copy that shares nothing with this model."""
        return copy.deepcopy(self)

    def with_genes(self, genes: str | Sequence[str]) -> PixNet:
        """Return a copy that predicts other genes: what it knows of genes is kept, others start anew.

        Parameters
        ----------
        genes
            Name or names of the genes.
        """
        genes = check_genes(genes)
        new = self.copy()
        if genes == self.genes:
            return new
        new.config = replace(self.config, genes=tuple(genes))
        new.head = build_head(new.config)
        if self.evidence is not None:
            known = {gene: i for i, gene in enumerate(self.genes)}
            new.evidence = self.evidence.take([known.get(gene) for gene in genes])
        positions = new.head.taking_over(self.head)
        for member in new.members:
            member.take_over(positions)
        return new

    def forward(self, image: Tensor, channels: Tensor | None = None, crop: int = 0) -> Tensor:
        """Predict the map.

        Parameters
        ----------
        image
            RGB in 0 to 1, ``(N, 3, H, W)``; H and W multiples of 64.
        channels
            Indices of the wanted genes (of `genes`), followed by the total's, which is the number of genes; None:
            `channels`.
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

    def encode(self, image: Tensor) -> dict[int, Tensor]:
        """Return the features of an image, standardised."""
        return self.standardise(self.encoder(image))

    @property
    def levels(self) -> list[int]:
        """Positions of the encoder's maps that the decoder uses."""
        return self.members[0].decoder.used

    def standardise(self, features: Sequence[Tensor] | Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return the features in use, by level, with the mean and standard deviation of the training tissue taken off."""
        out = {}
        for i in self.levels:
            f, mean, sd = features[i], getattr(self, f"feature_mean_{i}"), getattr(self, f"feature_sd_{i}")
            out[i] = (f - mean.to(f.dtype)[:, None, None]) / sd.to(f.dtype)[:, None, None]
        return out

    def decode(self, features: Mapping[int, Tensor], channels: Tensor | None = None, crop: int = 0) -> Tensor:
        """Return the map ``(N, channels, h, w)`` of standardised features: the mean over the members."""
        return self.read_out([member.decoder(features, crop) for member in self.members], channels)

    def read_out(self, decoded: Sequence[Tensor], channels: Tensor | None = None) -> Tensor:
        """Return the map of the members' decoded features, each pixel by itself: the mean over the members."""
        wanted = self.head.wanted(channels)
        maps = [self.head(member.logits(x, wanted), channels) for member, x in zip(self.members, decoded)]
        return maps[0] if len(maps) == 1 else torch.stack(maps).mean(dim=0)

    @property
    def reach(self) -> dict[int, int] | None:
        """The encoder's reach, by stage, where the decoder sees one pixel at a time: a slide is then predicted by stages."""
        reach = getattr(self.encoder, "reach", None)
        return None if reach is None or self.config.decoder != "pixel_mlp" else dict(reach)

    def start(self, measured: MeasuredShapes) -> None:
        """Start from a map that is the same everywhere, by what was measured in the training shapes."""
        biases, total = self.head.start(measured)
        for member in self.members:
            member.set_baseline(biases, total)

    def card(self) -> str:
        """Return the model's card in markdown: what it predicts, how it was trained, and its evidence on held-out tissue.

        Examples
        --------
        >>> import pixnet as px
        >>> px.models.load("her2st").card().splitlines()[0]
        '# PixNet model'
        """
        from pixnet.models._card import card

        return card(self)

    def save(self, path: str | Path, *, dtype: str = "float32", overwrite: bool = False) -> None:
        """Write the model to one ``.safetensors`` file: weights, configuration, provenance and history.

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
        header = Header(self.config, self.training_options, self.provenance, self.stain, self.history, self.evidence)
        write_checkpoint(path, header, self.state_dict(), dtype=dtype, overwrite=overwrite)
