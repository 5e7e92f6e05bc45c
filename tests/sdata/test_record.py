"""The record: provenance that is about the element that it was written for, and that objects do not share."""

from __future__ import annotations

import json

import numpy as np
import pytest
import spatialdata as sd
import zarr
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel

import pixnet as px
from pixnet._names import TOTAL, TOTALS
from pixnet._sdata.inputs import check_sdata
from pixnet._sdata.keys import resolve_any_image, tissue_key
from pixnet._sdata.pixel_size import find_mpp
from pixnet._sdata.rasters import channel_names
from pixnet._sdata.record import find_entry, identity_of, note, recorded
from pixnet._sdata.store.element_store import write_mpp


def image(channels=("r", "g", "b"), side=64, dtype=np.uint8, **options):
    pixels = np.ones((len(channels), side, side), dtype)
    return Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=list(channels), **options)


def labels(side=64):
    return Labels2DModel.parse(np.ones((side, side), np.uint8), dims=("y", "x"))


def about(element, **values):
    return {**values, "identity": identity_of(element)}


@pytest.fixture
def sdata():
    made = SpatialData(
        images={"he": image(), "he_genes": image(["A", TOTAL], dtype=np.float32)}, labels={"mask": labels()}
    )
    write_mpp(made, "he", 0.5)
    note(made, "images", "he_genes", about(made["he_genes"], model="m", image_key="he"))
    note(made, "masks", "he", about(made["he"], mask_key="mask"))
    note(made, "defaults", "image_key", "he")
    return made


def test_reading_creates_nothing():
    empty = SpatialData(images={"he": image()})
    assert recorded(empty, "images") == {}
    assert find_entry(empty, "images", "he") is None
    assert empty.attrs == {}


@pytest.mark.parametrize("attrs", [{"pixnet": None}, {"pixnet": []}, {"pixnet": {"images": 3, "masks": {"he": 1}}}])
def test_a_record_edited_by_hand_is_not_an_error(attrs):
    sdata = SpatialData(images={"he": image()}, attrs=attrs)
    px.pp.set_mpp(sdata, "he", 0.5)
    assert find_entry(sdata, "images", "he") is None
    assert tissue_key(sdata, "he", None) is None
    note(sdata, "masks", "he", about(sdata["he"], mask_key="m"))
    assert find_entry(sdata, "masks", "he")["mask_key"] == "m"


@pytest.mark.parametrize("derive", ["subset", "box", "filter"])
def test_objects_made_from_another_share_no_record(sdata, derive):
    child = {
        "subset": lambda: sdata.subset(["he", "he_genes"]),
        "filter": lambda: sdata.filter_by_coordinate_system("global"),
        "box": lambda: sdata.query.bounding_box(
            axes=("x", "y"), min_coordinate=[0, 0], max_coordinate=[32, 32], target_coordinate_system="global"
        ),
    }[derive]()
    assert child.attrs is sdata.attrs  # as SpatialData has it
    before = json.dumps(sdata.attrs)
    note(child, "images", "he_genes", about(child["he_genes"], model="another"))
    assert json.dumps(sdata.attrs) == before
    note(sdata, "defaults", "image_key", "other")
    assert find_entry(child, "images", "he_genes")["model"] == "another"
    assert recorded(child, "defaults")["image_key"] == "he"


def test_a_part_that_was_read_may_be_changed(sdata):
    before = json.dumps(sdata.attrs)
    recorded(sdata, "images").clear()
    assert json.dumps(sdata.attrs) == before


def test_an_entry_goes_with_its_element(sdata):
    assert resolve_any_image(sdata) == "he_genes"
    assert find_entry(sdata, "images", "he_genes")["model"] == "m"
    del sdata["he_genes"]
    for other in (image(["B", TOTAL], dtype=np.float32), image(["A", TOTAL], side=32, dtype=np.float32)):
        sdata["he_genes"] = other
        assert find_entry(sdata, "images", "he_genes") is None
        del sdata["he_genes"]
    note(sdata, "defaults", "image_key", "he")  # the next thing that is recorded
    sdata["he_genes"] = image(["A", TOTAL], dtype=np.float32)
    assert find_entry(sdata, "images", "he_genes") is None


def test_a_mask_of_another_image_is_not_used_in_silence(sdata, capsys):
    assert tissue_key(sdata, "he", None) == "mask"
    del sdata["he"]
    sdata["he"] = image(side=128)
    assert tissue_key(sdata, "he", None) is None
    assert "'mask' was made for another image 'he'" in capsys.readouterr().err
    sdata["he_tissue"] = labels()
    assert tissue_key(sdata, "he", None) == "he_tissue"


def test_concatenation_keeps_masks_with_their_slides():
    one, other = (SpatialData(images={"he": image()}, labels={"he_tissue": labels()}) for _ in range(2))
    both = sd.concatenate({"a": one, "b": other})
    assert [tissue_key(both, f"he-{name}", None) for name in "ab"] == ["he_tissue-a", "he_tissue-b"]


@pytest.mark.parametrize("what", ["tissue_mask", "normalize_stain", "aggregate"])
def test_functions_roll_back_what_they_recorded(what, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    sdata = px.datasets.synthetic_tissue(size_um=200, n_genes=5)
    note(sdata, "masks", "he", None)
    before = json.dumps(sdata.attrs), [name for _, name, _ in sdata.gen_elements()]
    calls = {
        "tissue_mask": lambda: px.pp.tissue_mask(sdata),
        "normalize_stain": lambda: px.pp.normalize_stain(sdata),
        "aggregate": lambda: px.tl.aggregate(sdata, "spots", image_key="truth"),
    }
    monkeypatch.setattr("pixnet._sdata.store.element_store.set_element", full)
    with pytest.raises(OSError, match="no space left"):
        calls[what]()
    assert (json.dumps(sdata.attrs), [name for _, name, _ in sdata.gen_elements()]) == before


# objects of earlier versions -------------------------------------------------------------------------------------------


def old(**images):
    """Return an object as version 1831daa left it: numbers in the record, ``__total__`` whatever the genes are."""
    made = SpatialData(
        images={
            "he": image(scale_factors=[2]),
            "he_genes": image(["A", "B", TOTAL], 16, np.float32, scale_factors=[2]),
        },
        labels={"drawn": labels()},
    )
    entry = {
        "kind": "gene_map",
        "image_key": "he",
        "model": "m",
        "genes": ["A", "B"],
        "unit": "u",
        "quantity": "log_sum",
        "mpp": 2.0,
    }
    made.attrs["pixnet"] = {
        "mpp": {"he": 0.5, "gone": 0.5},
        "defaults": {"image_key": "he"},
        "images": {"he_genes": {**entry, **images}},
        "tables": {"spots_genes": {"kind": "aggregate"}},
        "masks": {"he": "drawn"},
    }
    return made


def use(sdata):
    """Do what every public function does first."""
    check_sdata(sdata)


def test_an_old_object_is_brought_over(capsys):
    sdata = old()
    use(sdata)
    assert (find_mpp(sdata, "he"), find_mpp(sdata, "he_genes")) == (0.5, 2.0)
    assert channel_names(sdata["he_genes"]) == ["A", "B", TOTALS["log_sum"]]
    assert channel_names(sdata["he_genes"]["scale1"]["image"]) == ["A", "B", TOTALS["log_sum"]]
    assert find_entry(sdata, "images", "he_genes")["model"] == "m"
    assert tissue_key(sdata, "he", None) == "drawn"
    assert set(sdata.attrs["pixnet"]) == {"format", "defaults", "images", "masks"}
    assert capsys.readouterr().err.count("an earlier version") == 1
    before = sdata.attrs
    use(sdata)
    assert sdata.attrs is before
    assert "an earlier version" not in capsys.readouterr().err


def test_what_is_stated_since_counts_more():
    sdata = old()
    write_mpp(sdata, "he", 0.25)
    use(sdata)
    assert find_mpp(sdata, "he") == 0.25


@pytest.mark.parametrize("mpp", [None, "0.5", True, -1, float("nan")])
def test_old_pixel_sizes_that_are_none_are_left_out(mpp):
    sdata = old()
    sdata.attrs["pixnet"]["mpp"]["he"] = mpp
    use(sdata)
    assert find_mpp(sdata, "he") is None


def test_an_old_entry_about_other_genes_is_left_out():
    sdata = old(genes=["A", "C"])
    use(sdata)
    assert channel_names(sdata["he_genes"])[-1] == TOTAL
    assert find_mpp(sdata, "he_genes") is None
    assert find_entry(sdata, "images", "he_genes") is None


def test_an_old_quantity_that_is_gone_is_refused_when_it_is_used():
    sdata = old(quantity="log_mean")
    with pytest.raises(ValueError, match="'__total_log_mean__'.*does not know"):
        px.pl.gene_map(sdata, "A")


def test_bringing_over_leaves_the_object_it_came_from_alone():
    parent = old()
    before = json.dumps(parent.attrs)
    child = parent.subset(["he", "he_genes"])
    use(child)
    assert json.dumps(parent.attrs) == before
    assert channel_names(parent["he_genes"])[-1] == TOTAL
    use(parent)
    assert channel_names(parent["he_genes"])[-1] == TOTALS["log_sum"]


def test_a_store_is_brought_over_with_the_first_change(tmp_path):
    old().write(tmp_path / "old.zarr")
    sdata = sd.read_zarr(tmp_path / "old.zarr")
    use(sdata)
    unchanged = sd.read_zarr(tmp_path / "old.zarr")
    assert unchanged.attrs["pixnet"] == old().attrs["pixnet"]  # looking writes nothing
    assert find_mpp(unchanged, "he") is None
    px.pp.tissue_mask(sdata)
    again = sd.read_zarr(tmp_path / "old.zarr")
    assert "brought_over" not in again.attrs["pixnet"]
    assert (find_mpp(again, "he"), find_mpp(again, "he_genes")) == (0.5, 2.0)
    assert channel_names(again["he_genes"]) == ["A", "B", TOTALS["log_sum"]]
    assert find_entry(again, "images", "he_genes")["model"] == "m"


def test_a_store_is_brought_over_though_a_subset_came_first(tmp_path):
    old().write(tmp_path / "old.zarr")
    sdata = sd.read_zarr(tmp_path / "old.zarr")
    use(sdata.subset(["he", "he_genes"]))  # which shares the slide with its parent
    px.pp.tissue_mask(sdata)
    again = sd.read_zarr(tmp_path / "old.zarr")
    assert (find_mpp(again, "he"), find_mpp(again, "he_genes")) == (0.5, 2.0)


def test_the_next_to_be_resampled_has_no_pixel_size():
    sdata = old()
    use(sdata)
    resampled = sdata.transform_to_coordinate_system("global")
    use(resampled)
    assert find_mpp(resampled, "he") is None


@pytest.mark.parametrize("done", ["nothing", "old one out", "all but the metadata"])
@pytest.mark.parametrize("replaces", [False, True])
def test_a_change_that_version_0_0_left_undone_is_completed(tmp_path, replaces, done):
    """Its journal holds the whole record of its object, and not what it replaces."""
    root, work = tmp_path / "old.zarr", tmp_path / "old.zarr" / ".pixnet" / "0f"
    before = old()
    if not replaces:
        del before.images["he_genes"]
        del before.attrs["pixnet"]["images"]["he_genes"]
    before.write(root)
    new = image(["A", "B", TOTAL], 20, np.float32, scale_factors=[2])
    SpatialData(images={"he_genes": new}).write(work / "new.zarr", consolidate_metadata=False)
    record = old(model="new").attrs["pixnet"] | {"mpp": {"he": 0.125}}  # corrected on disk since
    journal = {"kind": "images", "key": "he_genes", "consolidated": True, "pixnet": record}
    (work / "commit.json").write_text(json.dumps(journal))
    (work / "job.json").write_text(json.dumps({"key": "he_genes", "resumable": True, "what": {}}))
    if done != "nothing":
        content = json.loads((root / "zarr.json").read_text())
        del content["consolidated_metadata"]
        (root / "zarr.json").write_text(json.dumps(content))
    place = root / "images" / "he_genes"
    if done != "nothing" and replaces:
        (work / "old" / "images").mkdir(parents=True)
        place.rename(work / "old" / "images" / "he_genes")
    if done.startswith("all"):
        (work / "new.zarr" / "images" / "he_genes").rename(place)

    sdata = sd.read_zarr(root)
    use(sdata)
    assert not work.parent.exists()
    unwritten = sd.read_zarr(root)
    use(unwritten)
    px.pp.set_mpp(sdata, "he", 0.5)
    px.pp.tissue_mask(sdata)
    for found in (sdata, unwritten, sd.read_zarr(root)):
        assert found["he_genes"]["scale0"]["image"].shape == (3, 20, 20)
        assert channel_names(found["he_genes"]) == ["A", "B", TOTALS["log_sum"]]
        assert (find_mpp(found, "he"), find_mpp(found, "he_genes")) == (0.5, 2.0)
        assert find_entry(found, "images", "he_genes")["model"] == "new"
        assert tissue_key(found, "he", None) == ("drawn" if found is unwritten else "he_tissue")
    assert zarr.open_group(root).metadata.consolidated_metadata is not None
