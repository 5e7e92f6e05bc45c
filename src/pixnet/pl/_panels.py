"""Parts of the figures of tables: the frame that holds the shapes, and a panel of shapes filled by their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from pandas import Series
from spatialdata import SpatialData

from pixnet._names import listed
from pixnet.pl._frame import Frame, make_frame
from pixnet.pl._he import draw_he
from pixnet.pl._shapes import draw_filled, shown_box
from pixnet.pl._style import bare, colour_bar


def shapes_frame(sdata: SpatialData, shapes: str, he_key: str | None, box: Sequence[float] | None) -> Frame:
    """Return the frame of shapes on the H&E, or else on another raster of the object.

    Raises
    ------
    ValueError
        If there is no raster, or ``box`` is wrong.
    """
    anchor = he_key or next(iter([*sdata.images, *(key for key in sdata.labels if key != shapes)]), None)
    anchor = anchor or (shapes if shapes in sdata.labels else None)
    if anchor is None:
        raise ValueError(f"there is no image to place {shapes!r} on; this object has {listed(sdata.images)}")
    frame = make_frame(sdata, anchor, box)
    if box is not None:
        return frame
    return replace(frame, box=shown_box(frame, shapes))


def unit(log: bool) -> str:
    """Return the unit of a table's values."""
    return "log1p CP10k" if log else "CP10k"


def table_panel(
    ax: Axes,
    frame: Frame,
    he_key: str | None,
    shapes: str,
    values: Series,
    *,
    cmap: Colormap,
    norm: Normalize,
    title: str,
    bar: str | None,
) -> ScalarMappable:
    """Draw shapes filled by their values, over faint H&E where there is one.

    Parameters
    ----------
    ax, frame
        Axes to draw in, and the frame that they show.
    he_key
        The H&E image; ``None``: none.
    shapes, values
        The element, and a value for each of its instances.
    cmap, norm
        Colours.
    title
        Title of the panel.
    bar
        Label of the colour bar; ``None``: no bar.

    Returns
    -------
    ScalarMappable
        The drawing that a colour bar is made from.
    """
    if he_key is not None:
        draw_he(ax, frame, he_key, faint=True)
    drawn = draw_filled(ax, frame, shapes, values, cmap, norm)
    ax.set_title(title)
    frame.show(ax)
    bare(ax)
    if bar is not None:
        colour_bar(ax, drawn, values.to_numpy(), bar)
    return drawn
