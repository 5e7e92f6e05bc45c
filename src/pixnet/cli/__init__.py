"""The command line: each command is a public function, with files in place of objects."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

import pixnet as px
from pixnet._logging import logger
from pixnet._names import listed
from pixnet._sdata.counts import annotated_regions
from pixnet.cli._options import given, options_of
from pixnet.cli._slides import Request, Sample, logged_warnings, read_samples, run_all, run_one, told

app = App(
    name="pixnet",
    version=px.__version__,
    help="Dense maps of gene expression from H&E slides, summed over any shape.",
    help_format="plaintext",
)

_Several = Parameter(consume_multiple=True, negative=())
_Flag = Parameter(negative=())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 only if all went well."""
    warnings.filterwarnings("ignore", message="zarr v3 autosharding")  # for developers, and once for each array
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        found = app(arguments, exit_on_error=False, print_error=True, result_action="return_value")
    except CycloptsError:
        return 2
    except KeyboardInterrupt:
        logger.error("interrupted; the same command with --resume goes on")
        return 130
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
        logger.error("%s", told(error))
        return 1
    return found if isinstance(found, int) else 0


def run() -> None:
    """Run the command line, and leave with its exit code."""
    sys.exit(main())


@app.command
@options_of(px.tl.predict, leave_out={"overwrite", "resume", "inplace"})
def predict(
    slide: Path | None = None,
    /,
    *,
    samples: Path | None = None,
    out: Path | None = None,
    model: str = "her2st",
    mpp: float | None = None,
    shapes: Annotated[list[str] | None, _Several] = None,
    grid: Annotated[list[float] | None, _Several] = None,
    region: str | None = None,
    resume: Annotated[bool, _Flag] = False,
    overwrite: Annotated[bool, _Flag] = False,
    report: Annotated[Path | None, Parameter(negative=())] = None,
    scheduler: str | None = None,
    **options: Any,
) -> int:
    """Predict the map of a slide, and sum it over shapes.

    Parameters
    ----------
    slide
        A slide (SVS, OME-TIFF, JPEG, ...), or a SpatialData store (.zarr).
    samples
        In place of a slide: a CSV table of slides with columns sample, image and, if wanted, mpp and shapes (several
        separated by ";"). Each goes to OUT/{sample}.zarr, with a record OUT/{sample}.run.json; one that fails does not
        stop the others.
    out
        The store to write, with a copy of the slide in it; for --samples, a folder. A store given as SLIDE is extended
        in place without it.
    model
        Path of a model, or the name of one that ships.
    mpp
        Pixel size of the slide (µm/px), where the file does not state it.
    shapes
        GeoJSON files (of QuPath, say), or elements of the store, to sum over.
    grid
        Edges of square grids to sum over (µm).
    region
        Predict only this part of the slide: a GeoJSON file (of QuPath, say), or an element of the store.
    resume
        Go on where an earlier run ended.
    overwrite
        Replace what an earlier run made.
    report
        Also write this page (.html) in which any gene can be looked at; for --samples, a folder of pages.
    scheduler
        Address of a Dask scheduler; its workers compute the tiles.
    """
    request = Request(model, grid or [], resume, overwrite, given({**options, "region": region}))
    with _client(scheduler):
        if samples is not None:
            if slide is not None or mpp is not None or shapes:
                raise ValueError(
                    "--samples names slides, mpp and shapes in its table; leave SLIDE, --mpp and --shapes out"
                )
            if out is None:
                raise ValueError("--samples needs a folder to write to: give --out")
            table = read_samples(samples, out, report)
            out.mkdir(parents=True, exist_ok=True)
            return 1 if run_all(table, request) else 0
        if slide is None:
            raise ValueError("give a slide, or a table of slides with --samples")
        if not slide.exists():
            raise FileNotFoundError(f"no slide {slide}")
        if not slide.is_dir() and out is None:
            raise ValueError("a slide needs a store to write to: give --out, such as --out slide.zarr")
        if slide.is_dir() and out is not None:
            raise ValueError(f"{slide} is a store and is extended in place; leave --out out")
        run_one(Sample(slide, out, mpp, shapes or [], report), request)
    return 0


@app.command
@options_of(px.tl.aggregate, leave_out={"inplace", "key_added"})
def aggregate(
    store: Path,
    shapes: Annotated[list[str], _Several],
    /,
    *,
    table: Path | None = None,
    geojson: Path | None = None,
    scheduler: str | None = None,
    **options: Any,
) -> None:
    """Sum an image of a store over shapes: a table with a row for each.

    Parameters
    ----------
    store
        A SpatialData store (.zarr), to which the table is added.
    shapes
        Elements of the store, or GeoJSON files.
    table
        Also write the table as this .h5ad file; with several shapes, one for each is written beside it.
    geojson
        Also write the shapes as this GeoJSON (.gz) file, with genes as measurements.
    scheduler
        Address of a Dask scheduler; its workers compute the tiles.
    """
    sdata, names, chosen = _store(store), [], given(options)
    replace = bool(chosen.get("overwrite", False))
    for one in shapes:
        if one not in sdata and Path(one).is_file():
            key = Path(one).name.split(".")[0]
            px.io.read_geojson(sdata, one, key_added=key, overwrite=replace)
            names.append(key)
        else:
            names.append(one)
    before = dict(sdata.tables.items())
    with _client(scheduler):
        px.tl.aggregate(sdata, names, **chosen)
    made = {key: new for key, new in sdata.tables.items() if before.get(key) is not new}
    for key, new in made.items():
        if table is not None:
            new.write_h5ad(table if len(made) == 1 else table.with_name(f"{table.stem}_{key}{table.suffix}"))
        if geojson is not None:
            (name,) = annotated_regions(new)
            path = geojson if len(made) == 1 else geojson.with_name(f"{name}_{geojson.name}")
            px.io.write_geojson(sdata, name, path, table_key=key, overwrite=replace)


@app.command
@options_of(px.tl.train, leave_out={"validation", "model", "options"})
def train(
    stores: Annotated[list[Path], _Several],
    /,
    *,
    out: Path,
    validation: Annotated[list[str] | None, _Several] = None,
    start: str | None = None,
    overwrite: Annotated[bool, _Flag] = False,
    **options: Any,
) -> None:
    """Train a model on measured stores.

    Parameters
    ----------
    stores
        SpatialData stores (.zarr) with slide, shapes and counts; each is called by the name of its folder.
    out
        The model to write (.safetensors).
    validation
        Names of stores that are held out to choose the epoch; without it, the last of several, or a block of one.
    start
        Train this model further: a path, or the name of one that ships.
    overwrite
        Replace OUT if it exists.
    """
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; pass --overwrite to replace it")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no folder {out.parent}")
    objects = {path.name.removesuffix(".zarr"): _store(path) for path in stores}
    if len(objects) < len(stores):
        raise ValueError(f"two stores have the same name: {listed(path.name for path in stores)}")
    model = None if start is None else px.models.load(start)
    px.tl.train(objects, model=model, validation=validation, **given(options)).save(out, overwrite=overwrite)
    logger.info("model written to %s", out)


@app.command
@options_of(px.tl.evaluate)
def evaluate(
    stores: Annotated[list[Path], _Several],
    /,
    *,
    table_key: str,
    reference_key: str,
    out: Path | None = None,
    **options: Any,
) -> None:
    """Score predicted tables of stores against measured ones, gene by gene.

    Parameters
    ----------
    stores
        SpatialData stores (.zarr).
    table_key
        The predicted table.
    reference_key
        The measured table.
    out
        Write the scores of all genes as this CSV file.
    """
    objects = {path.name.removesuffix(".zarr"): _store(path) for path in stores}
    one = next(iter(objects.values()))
    scores = px.tl.evaluate(
        one if len(stores) == 1 else objects, table_key=table_key, reference_key=reference_key, **given(options)
    )
    if out is not None:
        scores.to_csv(out)
    _say(scores.drop(columns="section", errors="ignore").head(10).to_string())
    for name, value in scores.attrs["summary"].items():
        _say(f"{name}: {value}")


@app.command
@options_of(px.pl.report, leave_out={"warnings"})
def report(store: Path, /, *, out: Path, **options: Any) -> None:
    """Write a page (HTML) in which any gene of a store's map can be typed and seen over the slide.

    Parameters
    ----------
    store
        A SpatialData store (.zarr) with a map.
    out
        The page to write (.html).
    """
    px.pl.report(_store(store), out, warnings=logged_warnings(store), **given(options))


@app.command
def info(path: str, /) -> None:
    """Show what a model or a store holds.

    Parameters
    ----------
    path
        A model (.safetensors, the name of one that ships, a URL with a hash, hf://owner/name), or a SpatialData store
        (.zarr).
    """
    if Path(path).is_dir():
        sdata = _store(Path(path))
        _say(repr(sdata))
        for role, entries in sdata.attrs.get("pixnet", {}).items():
            for name, entry in entries.items() if isinstance(entries, dict) else [("", entries)]:
                _say(shorten(f"{role} {name}: {entry}", 400, placeholder=" ..."))
        return
    _say(px.models.load(path).card())


@app.command
def demo(*, out: Path = Path("demo")) -> None:
    """Train, predict and aggregate on a synthetic slide, and compare with the truth.

    Parameters
    ----------
    out
        Folder for the results.
    """
    from pixnet import _demo

    _demo.main(["--out", str(out)])


def _store(path: Path) -> Any:
    """Open a SpatialData store."""
    import spatialdata

    if not path.is_dir():
        raise FileNotFoundError(f"no store {path}")
    return spatialdata.read_zarr(path)


@contextlib.contextmanager
def _client(address: str | None) -> Iterator[None]:
    """Connect to a Dask scheduler, if one is given."""
    if address is None:
        yield
        return
    from distributed import Client

    with Client(address):
        yield


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
