"""Names of elements: which one a call means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from spatialdata import SpatialData

from pixnet._logging import logger
from pixnet._names import listed
from pixnet._sdata.counts import annotated_regions, is_predicted_table, not_annotated
from pixnet._sdata.loadings import is_loadings
from pixnet._sdata.novelty import is_novelty
from pixnet._sdata.pixel_size import find_mpp
from pixnet._sdata.rasters import full_resolution, is_gene_map
from pixnet._sdata.record import find_entry, recorded


def _check_known(key: Any, candidates: Iterable[str], what: str, argument: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{argument} is {key!r}; a name (str) is needed")
    if key not in candidates:
        raise KeyError(f"no {what} {key!r} in this object ({argument}=); it has: {listed(candidates)}")
    return key


def _only(candidates: Sequence[str], what: str, argument: str, hint: str) -> str:
    """Return the only candidate, or raise the error that lists them."""
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise ValueError(f"this object has no {what}; {hint}")
    raise ValueError(f"several elements may be the {what}: {listed(candidates)}; name one with {argument}=")


def resolve_image(sdata: SpatialData, image_key: str | None = None) -> str:
    """Return the name of the H&E image that a call means.

    Raises
    ------
    KeyError
        If the object has no image of that name.
    TypeError
        If its pixels are not uint8.
    ValueError
        If it is not an RGB image, is a gene map, or if none is named and none or several could be meant.
    """
    if image_key is not None:
        if isinstance(image_key, str) and not sdata.images:
            raise KeyError(f"no image {image_key!r} (image_key=): this object has no image; {_how_to_add(sdata)}")
        _check_known(image_key, sdata.images, "image", "image_key")
        _check_he(sdata, image_key)
        return image_key
    default = recorded(sdata, "defaults").get("image_key")
    if isinstance(default, str) and default in sdata.images:
        _check_he(sdata, default)
        return default
    candidates = [key for key, image in sdata.images.items() if not (is_gene_map(image) or is_novelty(image))]
    if len(candidates) > 1:
        looks_rgb = [key for key in candidates if full_resolution(sdata.images[key]).sizes.get("c") == 3]
        known = [key for key in looks_rgb if find_mpp(sdata, key) is not None]
        candidates = known or looks_rgb or candidates
    key = _only(candidates, "H&E image", "image_key", _how_to_add(sdata))
    _check_he(sdata, key)
    return key


def _how_to_add(sdata: SpatialData) -> str:
    """Return how an object gets its slide."""
    add = "images['he'] = pixnet.io.slide(path).images['he']"
    if type(sdata).__name__ == "WSIData":  # of LazySlide
        return f"a WSIData object keeps its slide in a file of its own: add it with wsi.{add}"
    return f"add one, for instance with sdata.{add}"


def _check_he(sdata: SpatialData, key: str) -> None:
    image = sdata.images[key]
    data = full_resolution(image)
    if is_gene_map(image):
        raise ValueError(f"image {key!r} is a map of genes or programs; an H&E image is needed")
    n = data.sizes.get("c", 0)
    if "z" in data.dims:
        raise ValueError(f"image {key!r} is three-dimensional; pixnet works on 2D images")
    if n != 3:
        kind = {1: " (greyscale)", 4: " (RGBA?)"}.get(n, "")
        fix = "drop the alpha channel: image.isel(c=slice(0, 3))" if n == 4 else "pass an RGB image"
        raise ValueError(f"image {key!r} has {n} channels{kind}; an H&E image has 3 (R, G, B): {fix}")
    if data.dtype != np.uint8:
        raise TypeError(
            f"image {key!r} is {data.dtype}; H&E must be uint8 (0 to 255): rescale it, for instance "
            "(image / image.max() * 255).astype('uint8')"
        )
    if 0 in data.shape:
        raise ValueError(f"image {key!r} is empty: its shape (c, y, x) is {data.shape}")


def resolve_any_image(sdata: SpatialData, image_key: str | None = None) -> str:
    """Return the name of the image that is to be summed over shapes: the one named, else the gene map."""
    if image_key is not None:
        return _check_known(image_key, sdata.images, "image", "image_key")
    maps = [key for key in sdata.images if is_gene_map(sdata.images[key])]
    entries = {key: find_entry(sdata, "images", key) for key in maps}
    # A map of some genes of a program map that is here too is not what a call means that names none.
    predicted = [key for key, entry in entries.items() if entry is not None and entry.get("from") not in maps]
    return _only(
        predicted or maps,
        "gene map",
        "image_key",
        "call pixnet.tl.predict(sdata) first, or name an image with image_key=",
    )


def resolve_shapes(
    sdata: SpatialData, shapes: str | Sequence[str] | None = None, *, argument: str = "shapes"
) -> list[str]:
    """Return the names of the shapes (or labels) elements that a call means."""
    candidates = [*sdata.shapes, *sdata.labels]
    if shapes is None:
        default = recorded(sdata, "defaults").get("shapes")
        if isinstance(default, str) and default in candidates:
            return [default]
        return [_only(list(sdata.shapes), "shapes element", argument, "add the spots or cells as a shapes element")]
    names = [shapes] if isinstance(shapes, str) else shapes
    if not isinstance(names, Sequence):
        raise TypeError(f"{argument} is {shapes!r}; a name or a list of names is needed")
    if len(names) == 0:
        raise ValueError(f"{argument} is empty; valid: {listed(candidates)}")
    for name in names:
        if isinstance(name, str) and name in sdata.points:
            raise ValueError(
                f"{name!r} is a points element; points have no area: pass shapes or labels ({listed(candidates)})"
            )
        _check_known(name, candidates, "shapes or labels element", argument)
    if len(set(names)) != len(names):
        raise ValueError(f"{argument} names an element twice: {listed(names)}")
    return list(names)


def resolve_table(sdata: SpatialData, table_key: str | None = None, shapes: str | None = None) -> str:
    """Return the name of the measured table, the one that annotates ``shapes`` where that is given."""
    if table_key is not None:
        _check_known(table_key, sdata.tables, "table", "table_key")
        if shapes is not None and shapes not in annotated_regions(sdata.tables[table_key]):
            raise ValueError(not_annotated(sdata.tables[table_key], table_key, shapes))
        return table_key
    measured = [key for key, t in sdata.tables.items() if not (is_predicted_table(t) or is_loadings(t))]
    if shapes is not None:
        measured = [key for key in measured if shapes in annotated_regions(sdata.tables[key])]
        if f"{shapes}_counts" in measured:
            return f"{shapes}_counts"
    else:
        default = recorded(sdata, "defaults").get("table_key")
        if isinstance(default, str) and default in measured:
            return default
        shapes_default = recorded(sdata, "defaults").get("shapes")
        if shapes_default is not None and f"{shapes_default}_counts" in measured:
            return f"{shapes_default}_counts"
    what = "table of measured counts" + (f" that annotates {shapes!r}" if shapes is not None else "")
    return _only(measured, what, "table_key", f"the object's tables: {listed(sdata.tables)}")


def tissue_key(sdata: SpatialData, image_key: str, mask_key: str | bool | None) -> str | Literal[False] | None:
    """Return the labels element that marks tissue; ``False``: everything is tissue; ``None``: it has to be computed."""
    if mask_key is False:
        return False
    if mask_key is True:
        raise TypeError("mask_key is True; pass the name of a labels element, None or False")
    if isinstance(mask_key, str) and mask_key in sdata.shapes:
        raise ValueError(
            f"mask_key is {mask_key!r}, which is a shapes element; a mask is labels: make one of the tissue in those shapes with "
            f"pixnet.pp.tissue_mask(sdata, {image_key!r}, within={mask_key!r})"
        )
    if mask_key is not None:
        return _check_known(mask_key, sdata.labels, "labels element", "mask_key")
    entry = find_entry(sdata, "masks", image_key)
    if entry is not None and entry["mask_key"] in sdata.labels:
        return entry["mask_key"]
    # "he_tissue"; "he-a_tissue", or "he_tissue-a" where `spatialdata.concatenate` renamed both
    usual = [key for key in sdata.labels if key.replace("_tissue", "", 1) == image_key and key != image_key]
    other = recorded(sdata, "masks").get(image_key)
    if not usual and isinstance(other, dict) and other.get("mask_key") in sdata.labels:
        logger.warning(
            "the mask %r was made for another image %r and is not used; name it with mask_key= if it fits this one",
            other["mask_key"],
            image_key,
        )
    return min(usual, key=len, default=None)
