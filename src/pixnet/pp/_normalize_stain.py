"""Bring the stain of a slide to that of the slides a model was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pixnet._sdata.record import identity_of
from pixnet._sdata.store.element_store import put
from pixnet._sdata.target import check_target

if TYPE_CHECKING:
    from spatialdata import SpatialData
    from xarray import DataArray, DataTree

    from pixnet.models import PixNet


def normalize_stain(
    sdata: SpatialData,
    model: PixNet | str | Path | None = None,
    *,
    image_key: str | None = None,
    mask_key: str | bool | None = None,
    key_added: str | None = None,
    overwrite: bool = False,
    inplace: bool = True,
) -> DataArray | DataTree | None:
    """Bring the stain of a slide to that of the slides a model was trained on, for slides of another laboratory or patient.

    Mean and standard deviation of the optical density of the tissue, in R, G and B, become those that the model keeps
    of its training slides. Predict from the new image then: ``pixnet.tl.predict(sdata, model,
    image_key="he_normalized")``. The benchmarks say when it helps (a new patient) and when not (a section like those
    trained on). It makes tissue of another organ look familiar, too: how the stain differed before is recorded, and
    `pixnet.tl.predict` warns of it.

    Parameters
    ----------
    sdata
        Object that holds the image; the pixel size must be known.
    model
        The model that will predict, its path or its name; ``None`` is the one that `pixnet.tl.predict` takes.
    image_key
        The H&E image. ``None``: the recorded one, else the only one.
    mask_key
        Where tissue is, as for `pixnet.tl.predict`.
    key_added
        Name of the new image; ``None`` is ``"{image_key}_normalized"``.
    overwrite
        Replace an element of that name.
    inplace
        Add the image to ``sdata`` (and to its store when it is backed) and return None; ``False`` returns it.

    Returns
    -------
    DataArray, DataTree or None
        RGB ``uint8 (c, y, x)`` with the levels and coordinate systems of the image; lazy, unless stored. Its pixel size
        and its tissue mask, if it has one, are those of the image.

    Raises
    ------
    KeyError
        If there is no such image or mask.
    TypeError
        If an argument has the wrong type.
    ValueError
        If the pixel size is unknown, the slide has no tissue, the name is taken, or the model does not know the stain
        of its training slides.

    Notes
    -----
    Reinhard's colour transfer, in optical density in place of Lab: each channel goes through a table of 256 values, so
    nothing depends on how the slide is cut.

    References
    ----------
    Reinhard et al., Color transfer between images, IEEE Computer Graphics and Applications 2001.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300, stain_seed=1)
    >>> px.pp.normalize_stain(sdata)
    >>> sdata["he_normalized"]["scale0"]["image"].dtype
    dtype('uint8')
    """
    import dask.array as da

    from pixnet._core.slide.stain import apply_table, comparable, differences, matching_table, slide_statistics
    from pixnet._sdata.raster_element import raster_element
    from pixnet._sdata.slide import Slide
    from pixnet._sdata.tissue import open_mask
    from pixnet.models._load import resolve_model

    slide = Slide.open(sdata, image_key, mask_key)
    image_key, tissue = slide.key, slide.mask_key
    key_added = f"{image_key}_normalized" if key_added is None else key_added
    if inplace:
        check_target(sdata, key_added, "images", overwrite=overwrite, source=image_key)
    model, name = resolve_model(model)
    training = model.stain
    if not comparable({"masked": tissue is not False}, training):
        raise ValueError(
            f"model {name!r} does not know the stain of its training slides"
            f"{' without a mask' if tissue is False else ''}; models that pixnet.tl.train made know it, with mask_key as in training"
        )

    grid = slide.grid(model.mpp, model.stride)
    found = slide_statistics(slide.reader(grid), open_mask(slide, grid.out_px))
    if found is None:
        raise ValueError(
            f"no tissue on image {image_key!r}: there is no stain to normalise; check its mask (mask_key=)"
        )
    table = matching_table(found, comparable(found, training))
    # a block holds all three channels, since each has its own row of the table
    whole = [da.asarray(level.data.data).rechunk({0: -1}) for level in slide.levels]
    element = raster_element(
        [pixels.map_blocks(apply_table, table, dtype=np.uint8) for pixels in whole],
        [level.scale for level in slide.levels],
        transformations=slide.transformations,
        channels=slide.channels,
    )
    if not inplace:
        return element
    about = {"identity": identity_of(element)}
    mask = {"mask_key": tissue, **about} if isinstance(tissue, str) else None
    made = {
        "kind": "stain_normalized",
        "from": image_key,
        "model": name,
        "differed": differences(found, training),
        **about,
    }
    put(
        sdata,
        key_added,
        element,
        overwrite=overwrite,
        entries={"images": {key_added: made}, "masks": {key_added: mask}},
    )
    return None
