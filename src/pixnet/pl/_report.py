"""A page in which any gene of a map can be looked at."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from spatialdata import SpatialData

from pixnet._logging import logger
from pixnet._sdata.gene_map import GeneMap, ProgramMap
from pixnet._sdata.novelty import find_novelty
from pixnet._sdata.store.bound import check_bound
from pixnet._sdata.tables import mean_novelty
from pixnet.pl._frame import make_frame, predicted_box
from pixnet.pl._he import shown_he
from pixnet.pl._page.picture import picture_of
from pixnet.pl._page.squares import (
    FEWEST_SQUARES,
    USUAL_BYTES,
    Squares,
    coded,
    coded_finely,
    compressed,
    squares_of,
)
from pixnet.pl._page.words import by_trust, evidence_of, provenance_of, warnings_of

MOST_BYTES = 15_000_000
"""Size of a page."""
PICTURE_BYTES, MAP_BYTES = 3_000_000, 6_200_000
"""Size of its H&E and, at most, of its map, before they are written as text, which takes a third more."""


def report(
    sdata: SpatialData,
    path: str | Path,
    *,
    image_key: str | None = None,
    he_key: str | Literal[False] | None = None,
    genes: str | Sequence[str] | None = None,
    title: str | None = None,
    warnings: Sequence[str] = (),
    overwrite: bool = False,
) -> None:
    """Write a page (HTML) in which any gene of a map can be typed and seen over the slide.

    The page is one file of at most 15 MB that needs no network: the H&E with pan and zoom, over it the map of the gene
    that is typed, which the page computes from the programs and their loadings. It lists the most trusted genes first,
    each with its evidence from held-out tissue, and shows the novelty of the tissue as a layer where
    `pixnet.tl.predict` wrote one. What to beware of comes first, in plain words.

    Values are CP10k in squares as small as the size of the file allows. Each square is summed as `pixnet.tl.aggregate`
    sums a shape. The page states how far rounding may have moved them.

    Parameters
    ----------
    sdata
        Object with a gene or program map (`pixnet.tl.predict`).
    path
        The file to write (``.html``).
    image_key
        The map. None: the one that pixnet made, or the only one.
    he_key
        The H&E image. None: the one that the map was predicted from, or the object's only one. False: none.
    genes
        Genes that can be typed; ``"trusted"``: those that held-out shapes showed to be predicted. None: all genes of a
        program map; of a map with a channel for each gene the most trusted ones, as many as fit (about 200).
    title
        Title of the page. None: the name of the store, or of the slide.
    warnings
        Further warnings to show, such as those that a run logged.
    overwrite
        Replace the file if it exists.

    Raises
    ------
    FileExistsError
        If the file exists.
    FileNotFoundError
        If its folder does not.
    KeyError
        If an element or a gene is not in the object.
    TypeError
        If an argument is of the wrong type.
    ValueError
        If the object has no map, the image is not one, nothing is predicted in it, or the file is not called ``.html``.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300)
    >>> px.pl.report(sdata, "slide.html", image_key="truth")  # doctest: +SKIP
    """
    path = _checked(path, overwrite)
    opened = GeneMap.open(sdata, image_key)
    he_key = shown_he(sdata, opened.source, he_key)
    evidence = evidence_of(opened)
    order = by_trust(evidence)
    if genes is not None:
        chosen = set(opened.select(genes).genes)
        order = [gene for gene in order if gene in chosen]
    if isinstance(warnings, str) or not all(isinstance(one, str) for one in warnings):
        raise TypeError(f"warnings is {warnings!r}; a list of sentences is needed")
    check_bound(opened.data, f"image {opened.key!r}")
    wanted = len(order)

    blobs: dict[str, bytes] = {}
    coding: dict[str, Any] = {}
    if isinstance(opened, ProgramMap):
        high, low, tops = coded_finely(opened.loadings[:, pd.Index(opened.genes).get_indexer(order)].T)
        blobs |= {"high": compressed(high), "low": compressed(low)}
        coding["loading_tops"] = _short(tops)
        left = MOST_BYTES * 3 // 4 - PICTURE_BYTES - len(blobs["high"]) - len(blobs["low"]) - 1_200_000
        squares = squares_of(sdata, opened, None, min(MAP_BYTES, left))
    else:
        order = order[: int(MAP_BYTES / USUAL_BYTES / FEWEST_SQUARES)]
        squares = squares_of(sdata, opened, order, MAP_BYTES)
    blobs["map"] = squares.packed
    blobs["known"] = compressed(np.packbits(squares.known))
    total, total_top = coded(squares.total[None])
    blobs["total"] = compressed(total)

    novelty = None
    novelty_key = find_novelty(sdata, opened.made)
    if novelty_key is not None:
        novelty = mean_novelty(sdata, opened.key, novelty_key, squares.grid.shapes)[squares.known]
        blobs["novelty"] = compressed(np.nan_to_num(np.rint(2 * novelty), nan=255).astype(np.uint8))

    frame = make_frame(sdata, he_key or opened.key)
    frame = replace(frame, box=predicted_box(frame, opened.key))
    picture = None if he_key is None else picture_of(frame, he_key, PICTURE_BYTES)
    side = np.diag([squares.grid.side] * 2 + [1.0]) + np.array(
        [[0, 0, squares.grid.left], [0, 0, squares.grid.top], [0] * 3]
    )
    to_frame = frame.affine(opened.key) @ side
    side_um = float(np.sqrt(abs(np.linalg.det(to_frame[:2, :2]))))
    meta = {
        "genes": order,
        "programs": _programs(opened, squares),
        "evidence": {name: _short(evidence.loc[order, name]) for name in evidence},
        "rows": squares.grid.rows,
        "cols": squares.grid.cols,
        "n": int(squares.known.sum()),
        "tops": _short(squares.tops),
        "total_top": float(total_top[0]),
        **coding,
        "box": list(frame.box),
        "unit": frame.unit,
        "side": side_um,
        "map_matrix": _matrix(to_frame),
        "picture_matrix": None if picture is None else _matrix(picture.affine),
        "colours": _colours(),
    }
    provenance = provenance_of(sdata, opened, he_key, frame)
    provenance.append(
        ("Squares", f"{meta['n']:,} of {side_um:.3g} {frame.unit}, each summed as pixnet.tl.aggregate does")
    )
    _write(
        path,
        title=title or (sdata.path.name.removesuffix(".zarr") if sdata.path is not None else he_key or opened.key),
        warnings=warnings_of(sdata, opened, evidence, novelty, wanted - len(order), warnings),
        provenance=provenance,
        meta=meta,
        blobs={name: base64.b64encode(blob).decode() for name, blob in blobs.items()},
        picture=None if picture is None else base64.b64encode(picture.jpeg).decode(),
        n_genes=len(order),
    )
    logger.info(
        "report written to %s: %d genes, squares of %.3g %s, %.1f MB",
        path, len(order), side_um, frame.unit, path.stat().st_size / 1e6,
    )  # fmt: skip


def _checked(path: str | Path, overwrite: bool) -> Path:
    """Return the path of the page, or refuse it."""
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"path is {str(path)!r}; the page needs a name that ends in .html")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    return path


def _programs(opened: GeneMap, squares: Squares) -> list[dict[str, Any]]:
    """Return name and top genes of each program, the most variable first, with its channel."""
    if not isinstance(opened, ProgramMap):
        return []
    spread = [float(np.std(squares.values(i))) for i in range(len(opened.programs))]
    return [
        {"channel": int(i), "name": opened.short_name(i), "genes": opened.top_genes(i, 6)}
        for i in np.argsort(np.negative(spread), kind="stable")
    ]


def _short(values: Any) -> list[float | None]:
    """Return numbers as a page holds them: five digits, None for what is unknown."""
    numbers = pd.Series(np.asarray(values, dtype=float))
    return [None if not np.isfinite(v) else float(f"{v:.5g}") for v in numbers]


def _matrix(affine: np.ndarray) -> list[float]:
    """Return a 3 x 3 matrix as CSS writes it."""
    (a, c, e), (b, d, f) = affine[:2]
    return [float(v) for v in (a, b, c, d, e, f)]


def _colours() -> list[int]:
    """Return viridis as 256 x RGB."""
    import matplotlib as mpl

    return np.rint(255 * mpl.colormaps["viridis"](np.arange(256))[:, :3]).astype(int).ravel().tolist()


def _write(path: Path, **content: Any) -> None:
    """Render the page beside its place, and move it there."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = files("pixnet.pl") / "_page"
    pages = Environment(loader=FileSystemLoader(str(folder)), autoescape=True, undefined=StrictUndefined)
    pages.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    texts = {name: (folder / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    text = pages.get_template("page.html").render(**texts, **content)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
