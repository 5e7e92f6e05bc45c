"""Several slides: as several objects, and in one."""

from __future__ import annotations

import pytest
import spatialdata as sd

import pixnet as px
from pixnet._sdata.sections import open_measured, open_section

SEEDS = {"a": 0, "b": 1}


def slides():
    return {
        name: px.datasets.synthetic_tissue(600, mpp=1.0, n_genes=13, seed=seed, shapes=("spots",))
        for name, seed in SEEDS.items()
    }


@pytest.mark.parametrize("one_table", [False, True])
def test_slides_in_one_object_are_told_apart_by_coordinate_system(one_table):
    # As spatialdata concatenates: attrs are lost, names of elements and coordinate systems have the slide's added, and
    # each image keeps its pixel size.
    both = sd.concatenate(slides(), concatenate_tables=one_table)
    alone = slides()
    with pytest.raises(ValueError, match=r"several elements may be the H&E image: 'he-a', 'he-b'.*image_key="):
        px.pp.tissue_mask(both)
    apart = {name: both.filter_by_coordinate_system(f"global-{name}") for name in SEEDS}
    tables = {name: "spots_counts" if one_table else f"spots_counts-{name}" for name in SEEDS}
    sources = open_measured(apart, mask_key=False)
    assert [(s.slide.key, s.slide.mpp, s.pairs) for s in sources] == [
        (f"he-{name}", 1.0, {f"spots-{name}": tables[name]}) for name in SEEDS
    ]
    assert px.pp.select_genes(apart, n_top=5) == px.pp.select_genes(alone, n_top=5)
    for source, single in zip(sources, open_measured(alone, mask_key=False)):
        found, expected = (open_section(s, s.tables(["TUM1", "FIB1"]), 1.0, 2) for s in (source, single))
        assert (found.targets[0].cp10k == expected.targets[0].cp10k).all()
        assert found.targets[0].shapes.bounds == pytest.approx(expected.targets[0].shapes.bounds)
