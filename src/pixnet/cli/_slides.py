"""Slides from files to stores: one, or all of a table, each with a record of how it was made."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

import pixnet as px
from pixnet._logging import logger
from pixnet._names import listed
from pixnet._sdata.gene_map import GeneMap, all_maps
from pixnet._sdata.keys import resolve_image, tissue_key
from pixnet._sdata.novelty import find_novelty, rare_share
from pixnet._sdata.record import find_entry

COLUMNS = ("sample", "image")
OPTIONAL = ("mpp", "shapes")


@dataclass(frozen=True)
class Sample:
    """A slide to predict.

    Attributes
    ----------
    image
        A slide, or a SpatialData store.
    out
        The store to write; None extends the store that ``image`` is.
    mpp
        Pixel size (µm/px), where the file does not state it.
    shapes
        GeoJSON files, or names of elements of the store.
    report
        The page to write, if any.
    """

    image: Path
    out: Path | None
    mpp: float | None = None
    shapes: list[str] = field(default_factory=list)
    report: Path | None = None

    @property
    def store(self) -> Path:
        """Where the results go."""
        return self.image if self.out is None else self.out

    @property
    def record(self) -> Path:
        """The file that says how they were made."""
        return _record_of(self.store)


@dataclass(frozen=True)
class Request:
    """What is done with each slide.

    Attributes
    ----------
    model
        Path or name of the model.
    grids
        Sizes of grids to sum over (µm).
    resume, overwrite
        Go on where an earlier run ended; replace what an earlier run made.
    options
        Keywords of `pixnet.tl.predict`.
    """

    model: str
    grids: list[float]
    resume: bool
    overwrite: bool
    options: Mapping[str, Any]


def _record_of(store: Path) -> Path:
    return store.with_name(store.name.removesuffix(".zarr") + ".run.json")


def logged_warnings(store: Path) -> list[str]:
    """Return what the run that made a store logged as warnings, where its record is there."""
    try:
        found = json.loads(_record_of(store).read_text(encoding="utf-8"))["warnings"]
    except (OSError, ValueError, KeyError):
        return []
    return [str(one) for one in found]


def read_samples(table: Path, out: Path, reports: Path | None = None) -> list[Sample]:
    """Read a table of slides; all of it is checked before anything runs.

    Raises
    ------
    FileNotFoundError
        If there is no such table.
    ValueError
        If columns are missing or unknown, or a sample or slide is named twice.
    """
    if not table.is_file():
        raise FileNotFoundError(f"no table of samples {table}")
    frame = pd.read_csv(table, dtype={"sample": str, "image": str, "shapes": str})
    missing = [name for name in COLUMNS if name not in frame.columns]
    unknown = [name for name in frame.columns if name not in (*COLUMNS, *OPTIONAL)]
    if missing or unknown:
        what = f"lacks the column {listed(missing)}" if missing else f"has columns that mean nothing: {listed(unknown)}"
        raise ValueError(f"{table} {what}; needed are {listed(COLUMNS)}, and {listed(OPTIONAL)} may be there")
    if frame.empty:
        raise ValueError(f"{table} names no sample")
    for name in COLUMNS:
        empty = frame[name].isna()
        if empty.any():
            raise ValueError(f"{table} has no {name} in line {int(empty.to_numpy().argmax()) + 2}")
        twice = frame[name][frame[name].duplicated()]
        if len(twice):
            raise ValueError(f"{table} names the {name} {twice.iloc[0]!r} more than once")
    wrong = [name for name in frame["sample"] if Path(name).name != name or name.startswith(".")]
    if wrong:
        raise ValueError(f"{table} names a sample {wrong[0]!r}; a name becomes that of a folder")

    def one(row: pd.Series) -> Sample:
        mpp, shapes = row.get("mpp"), row.get("shapes")
        names = [] if not isinstance(shapes, str) else [part.strip() for part in shapes.split(";")]
        size = None if pd.isna(mpp) else float(mpp)
        page = None if reports is None else reports / f"{row['sample']}.html"
        return Sample(Path(row["image"]), out / f"{row['sample']}.zarr", size, names, page)

    return [one(row) for _, row in frame.iterrows()]


def run_all(samples: list[Sample], request: Request) -> int:
    """Predict slide after slide; one that fails does not stop the others. Returns the number that failed."""
    failed = []
    for i, sample in enumerate(samples, 1):
        name = sample.store.stem
        if request.resume and _is_done(sample, request):
            logger.info("%s (%d of %d) is done", name, i, len(samples))
            continue
        logger.info("%s (%d of %d)", name, i, len(samples))
        try:
            run_one(sample, request)
        except Exception as error:  # noqa: BLE001  whatever it is, the others are not to suffer
            failed.append(name)
            logger.error("%s failed: %s: %s", name, type(error).__name__, told(error))
    if failed:
        logger.error("%d of %d slides failed: %s", len(failed), len(samples), ", ".join(failed))
    return len(failed)


def run_one(sample: Sample, request: Request) -> None:
    """Predict a slide and sum the map over its shapes; leave a record beside the store, also of a failure."""
    record: dict[str, Any] = {
        "state": "running",
        "image": str(sample.image),
        "out": str(sample.store),
        "asked": _asked(sample, request),
        "command": sys.argv,
        "versions": {name: version(name) for name in ("pixnet", "torch", "spatialdata", "zarr", "dask")},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "warnings": [],
    }
    start = time.perf_counter()
    with _warnings_into(record["warnings"]):
        try:
            _run(sample, request, record)
            record["state"] = "done"
        except BaseException as error:
            record.update(state="failed", error=f"{type(error).__name__}: {told(error)}")
            raise
        finally:
            record["seconds"] = round(time.perf_counter() - start, 1)
            if sample.record.parent.is_dir():
                partial = sample.record.with_suffix(".partial")
                partial.write_text(json.dumps(record, indent=2, default=str), encoding="utf-8")
                os.replace(partial, sample.record)


def _run(sample: Sample, request: Request, record: dict[str, Any]) -> None:
    from pixnet.models._load import file_of, load

    if sample.report is not None:
        _check_report(sample.report, request)
    model = load(request.model)
    record["model"] = {
        "name": request.model,
        "sha256": hashlib.sha256(file_of(request.model).read_bytes()).hexdigest(),
        "genes": len(model.genes),
        "provenance": model.provenance,
    }
    sdata = _opened(sample, request)
    image = resolve_image(sdata, request.options.get("image_key"))
    if "mask_key" not in request.options and tissue_key(sdata, image, None) is None:
        px.pp.tissue_mask(sdata, image)  # once for all steps
    replace = request.overwrite or request.resume
    names = [_element(sdata, given, sample, replace) for given in sample.shapes]
    options = dict(request.options)
    if "region" in options:
        options["region"] = _element(sdata, options["region"], sample, replace)
    there = [f"{name}_genes" for name in [*names, *map(_grid_key, request.grids)] if f"{name}_genes" in sdata.tables]
    if there and not replace:
        raise ValueError(f"{sample.store} has the tables {listed(there)}; pass --overwrite to replace them")
    before = set(sdata.images)
    made = _map_of(sdata, image, request.options) if request.resume else None
    if made is not None:
        _check_made_by(sdata, made, model, sample)
        logger.info("the map %r is there and is kept", made)
    else:
        px.tl.predict(sdata, request.model, overwrite=request.overwrite, resume=request.resume, **options)
        new = [one.key for one in all_maps(sdata) if one.key not in before]
        made = new[0] if new else _map_of(sdata, image, request.options)
    for size in request.grids:
        key = _grid_key(size)
        px.pp.make_grid(sdata, size, key_added=key, overwrite=replace)
        names.append(key)
    if names:
        px.tl.aggregate(sdata, names, image_key=made, overwrite=replace)
    record["made"] = {"map": made, "tables": sorted(sdata.tables)}
    if made is not None:
        record["trust"] = _trust(sdata, made)
    if sample.report is not None:
        px.pl.report(sdata, sample.report, image_key=made, warnings=record["warnings"], overwrite=replace)
        record["made"]["report"] = str(sample.report)


def _trust(sdata: Any, map_key: str) -> dict[str, Any]:
    """Say which genes of a map, and which part of the tissue, can be believed."""
    opened = GeneMap.open(sdata, map_key)
    novelty = find_novelty(sdata, opened.made)
    trusted = None if opened.evidence is None else len(opened.evidence.trusted())
    far = None if novelty is None else round(rare_share(sdata, novelty), 4)
    if trusted is not None:
        logger.info("%d of the %d genes were shown to be predictable on held-out tissue", trusted, len(opened.genes))
    return {"genes": len(opened.genes), "trusted_genes": trusted, "tissue_above_99": far}


def _check_report(path: Path, request: Request) -> None:
    """Refuse a page that could not be written, before the model runs."""
    if path.suffix.lower() != ".html":
        raise ValueError(f"--report is {str(path)!r}; the page needs a name that ends in .html")
    if path.exists() and not (request.overwrite or request.resume):
        raise FileExistsError(f"{path} exists; pass --overwrite to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)


def _element(sdata: Any, given: str, sample: Sample, replace: bool) -> str:
    """Return the name of an element of the store; a GeoJSON file becomes one."""
    if given in sdata:
        return given
    path = Path(given)
    if not path.exists():
        raise FileNotFoundError(f"{given!r} is neither a file nor an element of {sample.store}")
    key = path.name.split(".")[0]
    px.io.read_geojson(sdata, path, key_added=key, overwrite=replace)
    return key


def _grid_key(size_um: float) -> str:
    return f"grid_{size_um:g}um"


def _opened(sample: Sample, request: Request) -> Any:
    """Return the slide as an object in its store; a slide is copied there first."""
    import spatialdata

    if sample.out is None:
        sdata = spatialdata.read_zarr(sample.image)
    else:
        if sample.out.exists():
            if request.resume:
                return spatialdata.read_zarr(sample.out)
            if not request.overwrite:
                raise FileExistsError(
                    f"{sample.out} exists; pass --overwrite to replace it, or --resume to complete it"
                )
        sample.out.parent.mkdir(parents=True, exist_ok=True)
        slide = px.io.slide(sample.image, mpp=sample.mpp)
        partial = sample.out.with_name(f".{sample.out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        slide.write(partial)
        if sample.out.exists():
            shutil.rmtree(sample.out)
        os.replace(partial, sample.out)
        return spatialdata.read_zarr(sample.out)
    if sample.mpp is not None:
        px.pp.set_mpp(sdata, resolve_image(sdata), sample.mpp)
    return sdata


def _map_of(sdata: Any, image: str, options: Mapping[str, Any]) -> str | None:
    """Return the name of the map that an earlier run completed."""
    names = [options["key_added"]] if "key_added" in options else [f"{image}_genes", f"{image}_programs"]
    return next((name for name in names if name in sdata.images), None)


def _check_made_by(sdata: Any, map_key: str, model: Any, sample: Sample) -> None:
    """Refuse to keep a map of another model."""
    from pixnet._core.predict.portable_model import model_hash

    entry = find_entry(sdata, "images", map_key)
    if entry is not None and entry.get("model_hash") != model_hash(model):
        raise ValueError(
            f"the map {map_key!r} in {sample.store} was made by another model; pass --overwrite to make it again, or give the "
            "same --model"
        )


def _asked(sample: Sample, request: Request) -> Any:
    """Return what a run is asked for, as its record holds it."""
    asked = {
        "shapes": sample.shapes, "mpp": sample.mpp, "model": request.model, "grids": request.grids,
        "options": dict(request.options), **({} if sample.report is None else {"report": sample.report}),
    }  # fmt: skip
    return json.loads(json.dumps(asked, default=str))


def _is_done(sample: Sample, request: Request) -> bool:
    """Whether an earlier run that was asked for the same completed this slide."""
    try:
        record = json.loads(sample.record.read_text(encoding="utf-8"))
        return bool(record["state"] == "done" and record["asked"] == _asked(sample, request) and sample.store.exists())
    except (OSError, ValueError, KeyError):
        return False


def told(error: BaseException) -> str:
    """Return the message of an error on one line, with the command line's words for arguments."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    line = " ".join(str(text).split())
    return re.sub(r"\bkey_added=(?=\s|$)", "--key-added", re.sub(r"\b(overwrite|resume)=True\b", r"--\1", line))


@contextmanager
def _warnings_into(found: list[str]) -> Iterator[None]:
    """Collect what is logged as a warning."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
