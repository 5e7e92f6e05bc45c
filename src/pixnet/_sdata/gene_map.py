"""A gene map of an object, opened once: what it holds is told by the element itself."""

from __future__ import annotations

from dataclasses import dataclass

from spatialdata import SpatialData
from xarray import DataArray

from pixnet._names import TOTALS, is_total, listed
from pixnet._sdata.pixel_size import find_mpp
from pixnet._sdata.rasters import channel_names, full_resolution, is_gene_map


@dataclass(frozen=True)
class GeneMap:
    """A gene map.

    Attributes
    ----------
    key
        Name of the image.
    data
        Full-resolution level, ``(c, y, x)``.
    channels
        Names of its channels: the genes, and the total.
    total
        Index of the channel that holds the density of all transcripts.
    quantity
        What the genes are: ``"density"``, or ``"log_sum"`` (log1p of CP10k per µm², which a sum over a shape undoes).
    mpp
        Pixel size (µm/px); None if it is unknown.
    """

    key: str
    data: DataArray
    channels: list[str]
    total: int
    quantity: str
    mpp: float | None

    @classmethod
    def open(cls, sdata: SpatialData, image_key: str) -> GeneMap:
        """Read what a gene map says of itself; reads no pixel.

        Raises
        ------
        ValueError
            If the image is not a gene map, or what it holds is unknown.
        """
        image = sdata.images[image_key]
        names = channel_names(image)
        if not is_gene_map(image):
            raise ValueError(
                f"image {image_key!r} is not a gene map (it has no channel {listed(TOTALS.values())}); make one with "
                "pixnet.tl.predict"
            )
        totals = [name for name in names if is_total(name)]
        if len(totals) > 1:
            raise ValueError(
                f"gene map {image_key!r} has several totals ({listed(totals)}), so that it is not clear what its genes are; "
                "keep the one that belongs to them"
            )
        quantities = {channel: quantity for quantity, channel in TOTALS.items()}
        if totals[0] not in quantities:
            raise ValueError(
                f"gene map {image_key!r} has the total {totals[0]!r}, of a quantity that this version of pixnet does not know; "
                f"it knows {listed(quantities)}"
            )
        return cls(
            image_key,
            full_resolution(image),
            names,
            names.index(totals[0]),
            quantities[totals[0]],
            find_mpp(sdata, image_key),
        )

    @property
    def pixel_um2(self) -> float:
        """Area of a pixel (µm²); NaN if it is unknown."""
        return float("nan") if self.mpp is None else self.mpp**2

    @property
    def genes(self) -> list[str]:
        """Names of the genes, in order."""
        return [name for i, name in enumerate(self.channels) if i != self.total]
