"""The command line: public functions with files in place of objects."""

from __future__ import annotations

import json
import logging
import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata
from PIL import Image

import pixnet as px

cli = pytest.importorskip("pixnet.cli")


@pytest.fixture
def log():
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(f"{record.levelname}: {record.getMessage()}")
    logging.getLogger("pixnet").addHandler(handler)
    yield found
    logging.getLogger("pixnet").removeHandler(handler)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a slide, its cells, a store with counts, and a small model."""
    folder = tmp_path_factory.mktemp("source")
    sdata = px.datasets.synthetic_tissue(500, n_genes=13, shapes=("spots", "cells"))
    Image.fromarray(sdata["he"]["scale0"]["image"].values.transpose(1, 2, 0)).save(folder / "slide.png")
    px.io.write_geojson(sdata, "cells", folder / "cells.geojson", table_key=False)
    px.tl.train(sdata, genes=["TUM1", "FIB1"], max_epochs=1, variants=1, mpp=1.0).save(folder / "model.safetensors")
    measured = spatialdata.SpatialData(
        images={"he": sdata["he"]}, shapes={"spots": sdata["spots"]}, tables={"spots_counts": sdata["spots_counts"]}
    )
    measured.write(folder / "measured.zarr")
    return folder


def pixnet(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_a_slide_to_a_store(source, tmp_path, log):
    out = tmp_path / "out.zarr"
    options = ["--mpp", 0.5, "--model", source / "model.safetensors", "--out", out]
    (tmp_path / "genes.txt").write_text("FIB1\n\n")
    more = [
        "--shapes",
        source / "cells.geojson",
        "--grid",
        50,
        100,
        "--genes",
        f"@{tmp_path / 'genes.txt'}",
        "--out-mpp",
        8,
        "--report",
        tmp_path / "out.html",
    ]
    assert pixnet("predict", source / "slide.png", *options, *more) == 0
    sdata = spatialdata.read_zarr(out)
    assert {"he", "he_tissue", "he_genes", "cells", "grid_50um", "grid_100um", "cells_genes", "grid_50um_genes"} <= {
        name for _, name, _ in sdata.gen_elements()
    }
    assert list(sdata["cells_genes"].var_names)[0] == "FIB1"
    record = json.loads((tmp_path / "out.run.json").read_text())
    assert record["state"] == "done"
    assert sdata.attrs["pixnet"]["images"]["he_genes"]["model"] == "model"
    assert record["asked"]["options"] == {"genes": ["FIB1"], "out_mpp": 8.0}
    assert record["versions"]["spatialdata"]
    assert record["model"]["sha256"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["genes.txt", "out.html", "out.run.json", "out.zarr"]
    # the page again, from the store, with what the run warned of
    (tmp_path / "out.run.json").write_text(json.dumps({**record, "warnings": ["The stain is pale."]}))
    assert pixnet("report", out, "--out", tmp_path / "again.html", "--title", "Again") == 0
    assert "The stain is pale." in (tmp_path / "again.html").read_text()
    assert pixnet("report", out, "--out", tmp_path / "again.html") == 1
    assert "pass --overwrite to replace it" in log[-1]
    # a part of it, drawn in QuPath
    shutil.copy(source / "cells.geojson", tmp_path / "drawn.geojson")
    part = ["--region", tmp_path / "drawn.geojson", "--key-added", "part", "--genes", "FIB1", "--model", options[3]]
    assert pixnet("predict", out, *part) == 0
    part = spatialdata.read_zarr(out)["part"]["scale0"]["image"].values[0]
    assert 0 < np.isfinite(part).mean() < np.isfinite(sdata["he_genes"]["scale0"]["image"].values[0]).mean()
    # again: refused, replaced, or completed
    assert pixnet("predict", source / "slide.png", *options) == 1
    assert "pass --overwrite to replace it, or --resume" in log[-1]
    assert pixnet("predict", source / "slide.png", *options, "--resume", "--grid", 50) == 0
    assert any("the map 'he_genes' is there and is kept" in line for line in log)
    changed = [
        other_model(source, tmp_path) if option == source / "model.safetensors" else option for option in options
    ]
    assert pixnet("predict", source / "slide.png", *changed, "--resume") == 1
    assert "the map 'he_genes' in" in log[-1]
    assert "was made by another model" in log[-1]
    # a store is extended in place; what is there is told before the model runs
    second = ["predict", out, "--model", source / "model.safetensors", "--key-added", "second", "--out-mpp", 8]
    assert pixnet(*second, "--shapes", "cells") == 1
    assert "has the tables 'cells_genes'; pass --overwrite" in log[-1]
    assert "second" not in spatialdata.read_zarr(out)
    assert pixnet(*second, "--shapes", "cells", "--overwrite") == 0
    assert spatialdata.read_zarr(out)["cells_genes"].uns["pixnet"]["image_key"] == "second"


def other_model(source, folder):
    """Return the path of a model that differs in a weight."""
    import torch

    model = px.models.load(source / "model.safetensors")
    with torch.no_grad():
        model.members[0].last.bias += 0.1
    model.save(folder / "other.safetensors", overwrite=True)
    return folder / "other.safetensors"


def test_five_slides_of_which_one_is_corrupt(source, tmp_path, log):
    small = Image.open(source / "slide.png").crop((0, 0, 256, 256))
    for name in ("c", "d", "e"):
        small.save(tmp_path / f"{name}.png")
    (tmp_path / "bad.png").write_bytes((source / "slide.png").read_bytes()[:5000])
    rows = [
        ("one", source / "slide.png", source / "cells.geojson"),
        ("two", tmp_path / "bad.png", ""),
        *((number, tmp_path / f"{name}.png", "") for number, name in zip(("three", "four", "five"), "cde")),
    ]
    pd.DataFrame(rows, columns=["sample", "image", "shapes"]).assign(mpp=0.5).to_csv(tmp_path / "s.csv", index=False)
    command = [
        "predict",
        "--samples",
        tmp_path / "s.csv",
        "--out",
        tmp_path / "out",
        "--model",
        source / "model.safetensors",
    ]
    command += ["--out-mpp", 8]
    assert pixnet(*command) == 1
    errors = [line for line in log if line.startswith("ERROR")]
    assert len(errors) == 2
    assert errors[0].startswith("ERROR: two failed: ValueError:")
    assert errors[1] == "ERROR: 1 of 5 slides failed: two"
    states = {p.name: json.loads(p.read_text())["state"] for p in (tmp_path / "out").glob("*.run.json")}
    done = ("one", "three", "four", "five")
    assert states == {"two.run.json": "failed"} | {f"{name}.run.json": "done" for name in done}
    assert all("he_genes" in spatialdata.read_zarr(tmp_path / "out" / f"{name}.zarr") for name in done)
    assert "cells_genes" in spatialdata.read_zarr(tmp_path / "out" / "one.zarr")
    assert not (tmp_path / "out" / "two.zarr").exists()
    # the failed one alone runs again
    small.save(tmp_path / "bad.png")
    log.clear()
    assert pixnet(*command, "--resume") == 0
    assert [line.split()[1] for line in log if "is done" in line] == list(done)
    assert "he_genes" in spatialdata.read_zarr(tmp_path / "out" / "two.zarr")
    # asked for more, none is done
    log.clear()
    assert pixnet(*command, "--resume", "--grid", 50) == 0
    assert not [line for line in log if "is done" in line]
    assert "grid_50um_genes" in spatialdata.read_zarr(tmp_path / "out" / "one.zarr")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("sample,mpp\na,0.5\n", "lacks the column 'image'"),
        ("sample,image,um\na,b.png,1\n", "columns that mean nothing: 'um'"),
        ("sample,image\na,b.png\na,c.png\n", "names the sample 'a' more than once"),
        ("sample,image\na,b.png\nb,b.png\n", "names the image 'b.png' more than once"),
        ("sample,image\n", "names no sample"),
        ("sample,image\na,\n", "has no image in line 2"),
        ("sample,image\n../a,b.png\n", "names a sample '../a'"),
    ],
)
def test_tables_of_samples_are_checked_first(tmp_path, log, table, message):
    (tmp_path / "s.csv").write_text(table)
    assert pixnet("predict", "--samples", tmp_path / "s.csv", "--out", tmp_path / "out") == 1
    assert message in log[-1]
    assert not (tmp_path / "out").exists()


def test_train_predict_evaluate(source, tmp_path, log, capsys):
    store = tmp_path / "a.zarr"
    shutil.copytree(source / "measured.zarr", store)
    model = tmp_path / "m.safetensors"
    quick = ["--genes", "TUM1", "FIB1", "--max-epochs", 1, "--variants", 1, "--mpp", 1.0, "--seed", 3]
    assert pixnet("train", store, "--out", model, *quick) == 0
    assert px.models.load(model).genes == ["TUM1", "FIB1"]
    assert pixnet("train", store, "--out", model, *quick) == 1
    assert "pass --overwrite" in log[-1]
    assert pixnet("predict", store, "--model", model) == 0
    trust = json.loads((tmp_path / "a.run.json").read_text())["trust"]
    assert trust == {"genes": 2, "trusted_genes": None, "tissue_above_99": None}  # three spots were held out
    table, geojson = tmp_path / "spots.h5ad", tmp_path / "spots.geojson.gz"
    assert pixnet("aggregate", store, "spots", "--table", table, "--geojson", geojson) == 0
    found = ad.read_h5ad(table)
    np.testing.assert_array_equal(found.X, spatialdata.read_zarr(store)["spots_genes"].X)
    assert geojson.exists()
    assert pixnet("aggregate", store, source / "cells.geojson") == 0
    keys = ["--table-key", "spots_genes", "--reference-key", "spots_counts"]
    capsys.readouterr()
    assert pixnet("evaluate", store, *keys, "--out", tmp_path / "scores.csv") == 0
    assert "pcc_mean:" in capsys.readouterr().out
    assert list(pd.read_csv(tmp_path / "scores.csv")["gene"]) == ["TUM1", "FIB1"]
    assert pixnet("info", store) == 0
    assert "he_genes" in capsys.readouterr().out
    assert pixnet("info", model) == 0
    assert "| genes | 2: TUM1, FIB1 |" in capsys.readouterr().out


def test_options_and_their_help_are_those_of_the_functions(capsys):
    assert pixnet("predict", "--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--device" in text
    assert "Torch device. None: settings.device, else a GPU if there is one." in text
    assert "--inplace" not in text
    assert pixnet("--version") == 0
    assert capsys.readouterr().out.strip() == px.__version__


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["predict"], 1, "give a slide, or a table"),
        (["predict", "none.svs", "--out", "a.zarr"], 1, "no slide none.svs"),
        (["predict", "a.svs", "--samples", "s.csv", "--out", "b"], 1, "leave SLIDE"),
        (["predict", "--samples", "s.csv"], 1, "give --out"),
        (["info", "none.zarr"], 1, "does not exist"),
        (["aggregate", "none.zarr", "cells"], 1, "no store none.zarr"),
        (["predict", "a.svs", "--colour", "red"], 2, None),
        (["paint"], 2, None),
    ],
)
def test_refusals(tmp_path, monkeypatch, log, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    assert pixnet(*arguments) == code
    if message:
        assert message in log[-1]
