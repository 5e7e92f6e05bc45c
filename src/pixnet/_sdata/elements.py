"""Which element of a SpatialData object a call means, and what pixnet has recorded about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation
from xarray import DataArray, DataTree

from pixnet._names import TOTAL

_ROLES = ("mpp", "defaults", "images", "tables", "masks")


# what pixnet recorded --------------------------------------------------------------------------------------------


def record(sdata: SpatialData) -> dict[str, Any]:
    """``sdata.attrs["pixnet"]``, with every sub-dictionary present: what pixnet knows of this object (JSON-plain)."""
    found = sdata.attrs.setdefault("pixnet", {})
    for role in _ROLES:
        found.setdefault(role, {})
    return found


def _recorded(sdata: SpatialData, role: str) -> dict[str, Any]:
    """Return one part of the record, without creating it."""
    return sdata.attrs.get("pixnet", {}).get(role, {})


def is_predicted_table(sdata: SpatialData, table_key: str) -> bool:
    """Whether a table was aggregated from an image by pixnet, so that it is no measurement."""
    entry = _recorded(sdata, "tables").get(table_key)
    if entry is None:
        entry = sdata.tables[table_key].uns.get("pixnet")
    return isinstance(entry, dict) and entry.get("kind") == "aggregate"


# rasters ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """One level of a raster's pyramid.

    Attributes
    ----------
    data
        Array ``(c, y, x)`` or ``(y, x)``.
    scale
        Level-0 pixels per pixel of this level, ``(y, x)``.
    """

    data: DataArray
    scale: tuple[float, float]


def levels(raster: DataArray | DataTree) -> list[Level]:
    """Return the pyramid of a raster, finest level first, each with the scale that its own transform states."""
    full, *coarser = _arrays(raster)
    return [Level(full, (1.0, 1.0)), *(Level(array, _scale(full, array)) for array in coarser)]


def _arrays(raster: DataArray | DataTree) -> list[DataArray]:
    if isinstance(raster, DataArray):
        return [raster]
    return [next(iter(raster[name].values())) for name in raster.keys()]  # noqa: SIM118 a DataTree iterates over variables too


def _scale(full: DataArray, level: DataArray) -> tuple[float, float]:
    """Return level-0 pixels per pixel of a level, ``(y, x)``.

    The ratio of the shapes is off where a last odd row or column was left out: 4641 px halve to 2320 and 1160, and
    the scale is still 2 and 4. So the level's transform is taken, unless it is none of this level at all: some writers
    repeat that of the finest.
    """
    ratio = tuple(full.sizes[axis] / level.sizes[axis] for axis in ("y", "x"))
    ours, theirs = (get_transformation(array, get_all=True) for array in (full, level))
    shared = [name for name in ours if name in theirs]
    if not shared:
        return ratio
    axes = {"input_axes": ("x", "y"), "output_axes": ("x", "y")}
    try:
        to_full, to_level = (t[shared[0]].to_affine_matrix(**axes) for t in (ours, theirs))
        matrix = np.linalg.solve(to_full, to_level)
    except (ValueError, TypeError, NotImplementedError, np.linalg.LinAlgError):  # who uses them refuses them by name
        return ratio
    stated = (float(matrix[1, 1]), float(matrix[0, 0]))
    plausible = all(abs(s / r - 1) < 0.1 for s, r in zip(stated, ratio))
    return stated if plausible else ratio


def full_resolution(raster: DataArray | DataTree) -> DataArray:
    """Return the finest level of a raster."""
    return _arrays(raster)[0]


def channel_names(image: DataArray | DataTree) -> list[str]:
    """Return the names of an image's channels, as strings."""
    data = full_resolution(image)
    if "c" not in data.dims:
        return []
    if "c" in data.coords:
        return [str(c) for c in data.coords["c"].values]
    return [str(i) for i in range(data.sizes["c"])]


def is_gene_map(image: DataArray | DataTree) -> bool:
    """Whether an image is a gene map: its last channel is ``__total__``."""
    names = channel_names(image)
    return bool(names) and names[-1] == TOTAL


# keys ------------------------------------------------------------------------------------------------------------


def listed(keys: Iterable[str]) -> str:
    """Return keys as the list that an error shows."""
    keys = [repr(str(key)) for key in keys]
    return ", ".join(keys) if keys else "none"


def check_sdata(sdata: Any, function: str) -> None:
    """Refuse anything but a SpatialData object."""
    if not isinstance(sdata, SpatialData):
        raise TypeError(f"pixnet.{function} takes a SpatialData object, got {type(sdata).__name__}")


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
        If its pixels are no uint8.
    ValueError
        If it is no RGB image, is a gene map, or if none is named and none or several could be meant.
    """
    if image_key is not None:
        _check_known(image_key, sdata.images, "image", "image_key")
        _check_he(sdata, image_key)
        return image_key
    default = _recorded(sdata, "defaults").get("image_key")
    if default in sdata.images:
        _check_he(sdata, default)
        return default
    candidates = [key for key in sdata.images if not is_gene_map(sdata.images[key])]
    if len(candidates) > 1:
        looks_rgb = [key for key in candidates if full_resolution(sdata.images[key]).sizes.get("c") == 3]
        known = [key for key in looks_rgb if key in _recorded(sdata, "mpp")]
        candidates = known or looks_rgb or candidates
    key = _only(candidates, "H&E image", "image_key", "add one, for instance with pixnet.io.slide")
    _check_he(sdata, key)
    return key


def _check_he(sdata: SpatialData, key: str) -> None:
    image = sdata.images[key]
    data = full_resolution(image)
    if is_gene_map(image):
        raise ValueError(f"image {key!r} is a gene map (its last channel is {TOTAL!r}); an H&E image is needed")
    n = data.sizes.get("c", 0)
    if "z" in data.dims:
        raise ValueError(f"image {key!r} is three-dimensional; pixnet works on 2D images")
    if n != 3:
        kind = {1: " (greyscale)", 4: " (RGBA?)"}.get(n, "")
        mend = "drop the alpha channel: image.isel(c=slice(0, 3))" if n == 4 else "pass an RGB image"
        raise ValueError(f"image {key!r} has {n} channels{kind}; an H&E image has 3 (R, G, B): {mend}")
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
    recorded = [key for key in _recorded(sdata, "images") if key in sdata.images]
    if len(recorded) == 1:
        return recorded[0]
    maps = recorded or [key for key in sdata.images if is_gene_map(sdata.images[key])]
    return _only(maps, "gene map", "image_key", "call pixnet.tl.predict(sdata) first, or name an image with image_key=")


def resolve_shapes(
    sdata: SpatialData, shapes: str | Sequence[str] | None = None, *, argument: str = "shapes"
) -> list[str]:
    """Return the names of the shapes (or labels) elements that a call means."""
    candidates = [*sdata.shapes, *sdata.labels]
    if shapes is None:
        default = _recorded(sdata, "defaults").get("shapes")
        if default in candidates:
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


def annotated_regions(table: Any) -> list[str]:
    """Return the elements that a table annotates (SpatialData's ``region``)."""
    region = table.uns.get("spatialdata_attrs", {}).get("region")
    if region is None:
        return []
    return [region] if isinstance(region, str) else [str(r) for r in region]


def resolve_table(sdata: SpatialData, table_key: str | None = None, shapes: str | None = None) -> str:
    """Return the name of the measured table, the one that annotates ``shapes`` where that is given."""
    if table_key is not None:
        _check_known(table_key, sdata.tables, "table", "table_key")
        if shapes is not None and shapes not in annotated_regions(sdata.tables[table_key]):
            raise ValueError(
                f"table {table_key!r} does not annotate {shapes!r} but {listed(annotated_regions(sdata.tables[table_key]))}"
            )
        return table_key
    measured = [key for key in sdata.tables if not is_predicted_table(sdata, key)]
    if shapes is not None:
        measured = [key for key in measured if shapes in annotated_regions(sdata.tables[key])]
        if f"{shapes}_counts" in measured:
            return f"{shapes}_counts"
    else:
        default = _recorded(sdata, "defaults").get("table_key")
        if default in measured:
            return default
        shapes_default = _recorded(sdata, "defaults").get("shapes")
        if shapes_default is not None and f"{shapes_default}_counts" in measured:
            return f"{shapes_default}_counts"
    what = "table of measured counts" + (f" that annotates {shapes!r}" if shapes is not None else "")
    return _only(measured, what, "table_key", f"the object's tables: {listed(sdata.tables)}")


def check_key_free(sdata: SpatialData, key: str, overwrite: bool = False) -> None:
    """Refuse a key that is taken (names are unique across element types), unless it may be replaced."""
    if not isinstance(key, str) or not key:
        raise TypeError(f"key_added is {key!r}; a name (str) is needed")
    if not all(c.isalnum() or c in "_-." for c in key) or key.startswith("__") or key in {".", ".."}:
        raise ValueError(
            f"key_added is {key!r}; SpatialData takes letters, digits, '_', '-' and '.', not starting with '__'"
        )
    taken = [name for _, name, _ in sdata.gen_elements()]
    if key in taken and not overwrite:
        raise ValueError(f"{key!r} exists in this object; pass overwrite=True to replace it, or another key_added=")


def check_replaces(sdata: SpatialData, key: str, kind: str) -> None:
    """Refuse to replace an element by one of another type (a table by an image, say)."""
    for element_type, name, _ in sdata.gen_elements():
        if name == key and element_type != kind:
            raise ValueError(
                f"{key!r} exists as one of the object's {element_type}, not {kind}; choose another key_added="
            )


# um per pixel, coordinate systems, masks ---------------------------------------------------------------------------


def get_mpp(sdata: SpatialData, image_key: str) -> float:
    """Return an image's um per pixel (full-resolution level), as recorded.

    Raises
    ------
    ValueError
        If it is unknown; the message names the calls that record it.
    """
    mpp = _recorded(sdata, "mpp").get(image_key)
    if mpp is None:
        raise ValueError(
            f"the um per pixel of image {image_key!r} is unknown; record it with pixnet.pp.set_mpp(sdata, {image_key!r}, mpp) "
            f"or, from shapes of known size, pixnet.pp.infer_mpp(sdata, shapes, image_key={image_key!r}, pitch_um=...)"
        )
    return float(mpp)


def map_mpp(sdata: SpatialData, image_key: str) -> float | None:
    """Return the um per pixel of any image: as recorded for a gene map or a slide, else None."""
    entry = _recorded(sdata, "images").get(image_key)
    if entry is not None and entry.get("mpp") is not None:
        return float(entry["mpp"])
    mpp = _recorded(sdata, "mpp").get(image_key)
    return None if mpp is None else float(mpp)


def shared_coordinate_system(sdata: SpatialData, key_a: str, key_b: str, coordinate_system: str | None = None) -> str:
    """Return the coordinate system in which two elements meet: the one asked for, "global" if shared, else the first shared."""
    systems_a = list(get_transformation(sdata[key_a], get_all=True))
    systems_b = list(get_transformation(sdata[key_b], get_all=True))
    shared = [name for name in systems_a if name in systems_b]
    if coordinate_system is not None:
        if coordinate_system not in shared:
            raise ValueError(
                f"coordinate system {coordinate_system!r} is not shared by {key_a!r} ({listed(systems_a)}) "
                f"and {key_b!r} ({listed(systems_b)})"
            )
        return coordinate_system
    if not shared:
        raise ValueError(
            f"{key_a!r} ({listed(systems_a)}) and {key_b!r} ({listed(systems_b)}) share no coordinate system; "
            "register one of them with spatialdata.transformations.set_transformation"
        )
    return "global" if "global" in shared else shared[0]


def tissue_key(sdata: SpatialData, image_key: str, mask_key: str | bool | None) -> str | bool | None:
    """Return the labels element that marks tissue; ``False``: everything is tissue; ``None``: it has to be computed."""
    if mask_key is False:
        return False
    if mask_key is True:
        raise TypeError("mask_key is True; pass the name of a labels element, None or False")
    if mask_key is not None:
        return _check_known(mask_key, sdata.labels, "labels element", "mask_key")
    recorded = _recorded(sdata, "masks").get(image_key)
    if recorded in sdata.labels:
        return recorded
    usual = f"{image_key}_tissue"
    return usual if usual in sdata.labels else None
