"""Train and test on different patients, sections or parts of a section, in turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from spatialdata import SpatialData

from pixnet._core.train.split import longer_axis
from pixnet._logging import logger
from pixnet._sdata.counts import match_rows
from pixnet._sdata.inputs import SpatialDatas, named_objects
from pixnet._sdata.sections import MeasuredSlide, Total, open_measured
from pixnet._sdata.shapes import pixel_shapes
from pixnet._settings import settings
from pixnet.tl._aggregate import aggregate
from pixnet.tl._evaluate import evaluate, matched
from pixnet.tl._predict import predict
from pixnet.tl._train import train

if TYPE_CHECKING:
    from pixnet._core.train.evidence import HeldOut
    from pixnet.models import PixNet


GAP_UM = 100.0
"""Distance between blocks: about what training sees around its crops at 0.5 µm/px."""


@dataclass(frozen=True)
class _Fold:
    """Objects to train on (``validation`` names some of them; None: as `train` chooses) and objects to test on."""

    group: str
    training: dict[str, SpatialData]
    validation: list[str] | None
    test: dict[str, SpatialData]


def cross_validate(
    sdata: SpatialDatas,
    *,
    groups: Sequence[Any] | Mapping[str, Any] | int,
    image_key: str | None = None,
    shapes: str | Sequence[str] | None = None,
    table_key: str | Sequence[str] | None = None,
    genes: str | Sequence[str] | None = None,
    layer: str | None = None,
    total_key: str | None = None,
    totals: Total = "all",
    mask_key: str | Literal[False] | None = None,
    gap_um: float = GAP_UM,
    model: PixNet | None = None,
    update: PixNet | None = None,
    seed: int | None = None,
    device: str | None = None,
    **train_options: Any,
) -> pd.DataFrame:
    """Measure how well training generalises: each group is held out once, as a whole.

    In each fold the genes are chosen, the model trained and its epoch chosen without the test group: validation is
    another group of the training objects where there are at least two, else the last of them, else a block in space at
    one end of what is left to train on. The test group is looked at once, at the end of its fold.

    Parameters
    ----------
    sdata
        One object, a list or a dict of named ones.
    groups
        A label for each object (patient, section), in order or by name; or, with a single object, the number of blocks
        in space into which its shapes are cut across the longer axis.
    gap_um
        With blocks: shapes closer than this (µm) to a shape of the block that is tested are left out of training. Their
        surroundings may still overlap: training looks 192 of the model's pixels beyond its crops (96 µm at 0.5 µm/px),
        prediction up to 320; give more, such as 400, to exclude that.
    model
        A model that was never trained (such as `pixnet.models.PixNet.paper` gives), to start from in each fold.
    update
        A model that `pixnet.tl.train` made of all objects with the same arguments. Its ``evidence`` becomes that of the
        groups that were held out, over all folds: what to expect on the next patient, if the groups are patients.
        Ratios and dispersions then hold for slides that no amount was balanced with.
    image_key, shapes, table_key, genes, layer, total_key, totals, mask_key, seed, device
        As for `pixnet.tl.train`. ``genes=None`` chooses them in each fold.
    **train_options
        Other arguments of `pixnet.tl.train`: settings of training and of the model.

    Returns
    -------
    DataFrame
        Tidy: columns ``fold``, ``group``, ``gene``, ``metric`` ("pearson", "mse", "mae") and ``value``; also
        ``section`` where a group has several objects, and ``shapes`` where several elements are tested. Correlations
        are within a section.

    Raises
    ------
    ValueError
        If there are fewer than two groups, labels do not fit the objects, a number of blocks is given for several
        objects, a block has fewer than two shapes or leaves none to train on, or the model was trained before; or if
        ``update`` predicts sums of logs or was not trained.
    KeyError, TypeError
        As `pixnet.tl.train`.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=400, n_genes=10)
    >>> scores = px.tl.cross_validate(sdata, groups=2, shapes="bins", max_epochs=1, variants=1, mpp=2.0, halo=64)
    >>> list(scores.columns)
    ['fold', 'group', 'gene', 'metric', 'value']
    """
    if "validation" in train_options:
        raise TypeError("cross_validate chooses validation itself, without the test group; leave out validation=")
    if model is not None and getattr(model, "history", None):
        raise ValueError(
            "model= was trained before, perhaps on what is tested here; give one that was never trained, or leave it out"
        )
    _check_update(update)
    if not gap_um >= 0:
        raise ValueError(f"gap_um is {gap_um!r}; a distance in µm, from 0, is needed")
    objects = named_objects(sdata)
    keys = (image_key, shapes, table_key, total_key)
    sources = open_measured(objects, *keys, totals=totals)
    if isinstance(groups, int | np.integer) and not isinstance(groups, bool):
        folds = _blocks(sources, int(groups), gap_um)
    else:
        folds = list(_groups(objects, groups))
    pairs = {source.name: source.pairs for source in sources}
    names = list(dict.fromkeys(key for found in pairs.values() for key in found))
    tables = [next(found[key] for found in pairs.values() if key in found) for key in names]
    options: dict[str, Any] = {
        "image_key": image_key,
        "shapes": names,
        "table_key": tables,
        "layer": layer,
        "total_key": total_key,
        "totals": totals,
    }
    frames, held_out = [], []
    drawn_with = settings.seed if seed is None else seed
    n_tests = sum(len(fold.test) for fold in folds)
    for number, fold in enumerate(folds):
        logger.info("fold %d of %d: testing on %s", number + 1, len(folds), fold.group)
        trained = train(
            fold.training if len(fold.training) > 1 else next(iter(fold.training.values())),
            genes=genes, mask_key=mask_key, model=model, seed=seed, device=device, validation=fold.validation,
            **options, **train_options,
        )  # fmt: skip
        for name, one in fold.test.items():
            work, tested = _predicted(one, trained, image_key, pairs[name], mask_key, device)
            measured: dict[str, Any] = {"layer": layer, "total_key": total_key, "totals": totals}
            scores = {
                key: evaluate(work, table_key=table, reference_key=pairs[name][key], **measured)
                for key, table in tested.items()
            }
            if update is not None:
                key, table = next(iter(tested.items()))
                held_out.append(
                    _held_out(work, key, table, pairs[name][key], update.genes, n_tests, drawn_with, measured)
                )
            for key, s in scores.items():
                if s["n"].max() < 2:
                    logger.warning(
                        "fold %d: %r has %d shapes to test on; correlations need two", number + 1, key, s["n"].max()
                    )
            frames += [s.assign(fold=number, group=fold.group, section=name, shapes=key) for key, s in scores.items()]
    if update is not None:
        from pixnet._core.train.evidence import assess, ratio_of

        update.evidence = assess(held_out, ratio_of(held_out), drawn_with, balanced=False)
    return _tidy(pd.concat(frames), several_sections=any(len(f.test) > 1 for f in folds), several_shapes=len(names) > 1)


def _predicted(
    sdata: SpatialData,
    model: Any,
    image_key: str | None,
    pairs: dict[str, str],
    mask_key: str | Literal[False] | None,
    device: str | None,
) -> tuple[SpatialData, dict[str, str]]:
    """Return an object with the tables of a model, and their names by element; the map is lazy and is summed as it is made."""
    work = SpatialData.init_from_elements(
        {name: element for _, name, element in sdata.gen_elements()}, attrs=sdata.attrs
    )
    map_key = _free(work, "map")
    predicted_map = predict(
        work, model, image_key=image_key, mask_key=mask_key, device=device, key_added=map_key, inplace=False
    )
    for name, element in (predicted_map if isinstance(predicted_map, dict) else {map_key: predicted_map}).items():
        work[name] = element
    tables = aggregate(work, list(pairs), image_key=map_key, inplace=False)
    names = {key: _free(work, f"{key}_predicted") for key in pairs}
    for key, name in names.items():
        work.tables[name] = tables[key] if isinstance(tables, dict) else tables
    return work, names


def _check_update(update: PixNet | None) -> None:
    """Refuse a model that cannot have the evidence of a cross-validation."""
    if update is None:
        return
    if not hasattr(update, "evidence"):
        raise TypeError(f"update is {type(update).__name__}; a PixNet is needed, which gets the evidence of all folds")
    if not update.history or update.quantity == "log_sum":
        why = f"predicts {update.quantity!r}" if update.history else "was not trained"
        raise ValueError(f"update= {why}; give a model of densities that pixnet.tl.train made of all objects")


def _held_out(
    sdata: SpatialData,
    shapes: str,
    table_key: str,
    reference_key: str,
    genes: list[str],
    n_tests: int,
    seed: int,
    measured: Mapping[str, Any],
) -> HeldOut:
    """Return what was predicted and measured of some genes in shapes of one of the tests; NaN for genes that the fold lacks."""
    from pixnet._core.train.evidence import HeldOut, most_shapes

    table = sdata[table_key]
    there = set(table.var_names) & set(sdata[reference_key].var_names)
    chosen = [gene for gene in genes if gene in there]
    pair = matched(
        sdata, table_key, reference_key, chosen, measured["layer"], measured["total_key"], measured["totals"]
    )
    drawn = np.sort(
        np.random.default_rng(seed).permutation(len(pair.total))[: max(1, most_shapes(len(genes)) // n_tests)]
    )
    position = {gene: k for k, gene in enumerate(genes)}
    columns = [position[gene] for gene in chosen]
    predicted, counts = np.full((2, len(drawn), len(genes)), np.nan)
    predicted[:, columns], counts[:, columns] = pair.predicted[drawn], pair.counts[drawn]
    rows, made = pair.rows[drawn], table.uns["pixnet"]
    centres = pixel_shapes(sdata, shapes, made["image_key"]).centroids[rows] * made["mpp"]
    area = table.obs["area"].to_numpy(dtype=np.float64)[rows]
    return HeldOut(predicted, counts, np.zeros(0), pair.total[drawn], area, centres)


def _free(sdata: SpatialData, key: str) -> str:
    """Return a name that no element has."""
    while key in sdata:
        key += "_"
    return key


def _tidy(frame: pd.DataFrame, *, several_sections: bool, several_shapes: bool) -> pd.DataFrame:
    columns = ["fold", "group", *(["section"] * several_sections), *(["shapes"] * several_shapes), "gene"]
    return frame.reset_index().melt(columns, ["pearson", "mse", "mae"], var_name="metric", value_name="value")


# folds -----------------------------------------------------------------------------------------------------------


def _groups(objects: dict[str, SpatialData], groups: Any) -> Iterator[_Fold]:
    """Yield a fold for each label; another group validates where two are left to train."""
    if isinstance(groups, Mapping):
        missing = [name for name in objects if name not in groups]
        if missing:
            raise ValueError(f"groups has no label for object {missing[0]!r}")
        labels = {name: str(groups[name]) for name in objects}
    elif isinstance(groups, Sequence) and not isinstance(groups, str):
        if len(groups) != len(objects):
            raise ValueError(f"groups has {len(groups)} labels for {len(objects)} objects; one for each is needed")
        labels = {name: str(label) for name, label in zip(objects, groups)}
    else:
        raise TypeError(f"groups is {groups!r}; a label for each object, or a number of blocks (int) is needed")
    distinct = list(dict.fromkeys(labels.values()))
    if len(distinct) < 2:
        raise ValueError(f"there is one group ({distinct[0]!r}); at least two are needed to hold one out")
    for i, group in enumerate(distinct):
        training = {name: one for name, one in objects.items() if labels[name] != group}
        others = [g for g in distinct if g != group]
        inner = others[(i - 1) % len(others)]
        validation = [name for name in training if labels[name] == inner]
        yield _Fold(
            group,
            training,
            validation if len(others) > 1 else None,
            {name: one for name, one in objects.items() if labels[name] == group},
        )


def _blocks(sources: list[MeasuredSlide], n: int, gap_um: float) -> list[_Fold]:
    """Return a fold for each of ``n`` bands of equally many shapes across the longer axis of a single object."""
    if len(sources) != 1:
        raise ValueError(
            f"groups={n} cuts a single object into blocks; for {len(sources)} objects give a label for each"
        )
    if n < 2:
        raise ValueError(f"groups is {n}; at least two blocks are needed to hold one out")
    source = sources[0]
    gap = gap_um / source.slide.mpp
    bounds, rows = {}, {}
    for key, table_key in source.pairs.items():
        rows[key] = match_rows(source.sdata, table_key, key)
        bounds[key] = pixel_shapes(source.sdata, key, source.slide.key).bounds
    first, at = next((bounds[key], rows[key]) for key in source.pairs)
    first = first[at[at >= 0]]
    if len(first) < 2 * n:
        raise ValueError(
            f"groups={n} cuts {len(first)} shapes of {next(iter(source.pairs))!r} into blocks of fewer than two, whose "
            "correlation is not defined; ask for fewer blocks"
        )
    axis, centres = longer_axis(first)
    lines = np.quantile(centres, np.linspace(0, 1, n + 1))
    lines[0], lines[-1] = -np.inf, np.inf
    folds = []
    for i in range(n):
        extent = {key: (bounds[key][at, axis], bounds[key][at, axis + 2]) for key, at in rows.items()}
        inside, outside = {}, {}
        for key, (start, stop) in extent.items():  # shapes on a line are tested where their centre lies
            centre = (start + stop) / 2
            inside[key] = (rows[key] >= 0) & (centre >= lines[i]) & (centre < lines[i + 1])
        low = min(start[inside[key]].min(initial=np.inf) for key, (start, _) in extent.items()) - gap
        high = max(stop[inside[key]].max(initial=-np.inf) for key, (_, stop) in extent.items()) + gap
        for key, (start, stop) in extent.items():
            outside[key] = (rows[key] >= 0) & ((stop <= low) | (start >= high))
        key = next(iter(source.pairs))
        if not outside[key].any():
            raise ValueError(
                f"block {i} of {n} leaves no shapes of {key!r} to train on at gap_um={gap_um:g}; ask for more blocks or a "
                "narrower gap"
            )
        parts = (_with_rows(source, rows, part) for part in (outside, inside))
        training, test = ({source.name: part} for part in parts)
        folds.append(_Fold(f"block {i}", training, None, test))
    return folds


def _with_rows(source: MeasuredSlide, rows: dict[str, np.ndarray], keep: dict[str, np.ndarray]) -> SpatialData:
    """Return the object with some rows of its tables, and of shapes those that they annotate; no pixel is copied."""
    sdata = source.sdata
    elements = {name: element for _, name, element in sdata.gen_elements()}
    for key, table_key in source.pairs.items():
        elements[table_key] = sdata.tables[table_key][keep[key]].copy()
        if key in sdata.shapes:  # the rest of the slide need not be predicted then
            elements[key] = sdata.shapes[key].iloc[np.sort(rows[key][keep[key]])]
    return SpatialData.init_from_elements(elements, attrs=dict(sdata.attrs))
