"""How unlike the training tissue each place is."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import spatialdata as sd
import torch
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

import pixnet as px
from pixnet._sdata.rasters import full_resolution
from pixnet.models._novelty import Novelty

from .conftest import QUICK, coloured_slide, with_cells


@pytest.fixture(scope="module")
def model(quick_model):
    assert quick_model.novelty.known
    return quick_model


def green(slide, half: bool = False):
    """Paint a slide, or its left half, in a colour that no training slide has; its novelty has pixels of 8 px."""
    pixels = full_resolution(slide["he"]).values.copy()
    width = pixels.shape[2] // 2 if half else pixels.shape[2]
    pixels[:, :, :width] = np.array([60, 200, 60])[:, None, None]
    transformations = get_transformation(slide["he"], get_all=True)
    del slide.images["he"]
    slide["he"] = Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations=transformations)
    return slide


def values(sdata, key="he_novelty"):
    return full_resolution(sdata[key]).values[0]


class TestPercentiles:
    @pytest.fixture(scope="class")
    def fitted(self):
        rng = np.random.default_rng(0)
        mixing = rng.normal(size=(12, 40))
        draw = lambda n: (rng.normal(size=(n, 12)) @ mixing + rng.normal(0, 0.3, (n, 40)) + 5).astype(np.float32)  # noqa: E731
        novelty = Novelty({0: (16, 4), 1: (24, 8)}, 4)
        novelty.fit(draw(5000), draw(4000), seed=0)
        return novelty, draw

    def test_those_of_the_same_tissue_are_uniform(self, fitted):
        novelty, draw = fitted
        found = novelty.percentile(novelty.distance(torch.from_numpy(draw(4000)))).numpy()
        np.testing.assert_allclose(np.quantile(found, [0.1, 0.5, 0.9, 0.99]), [10, 50, 90, 99], atol=3)

    def test_what_breaks_the_correlations_is_far_although_each_feature_is_usual(self, fitted):
        novelty, draw = fitted
        x = draw(2000)
        shuffled = np.stack([np.random.default_rng(i).permutation(x[:, i]) for i in range(x.shape[1])], axis=1)
        found = novelty.percentile(novelty.distance(torch.from_numpy(shuffled)))
        assert float((found > 99).float().mean()) > 0.99

    def test_features_of_all_levels_are_averaged_over_the_coarsest_pixel(self):
        novelty = Novelty({0: (1, 4), 2: (2, 16)}, 4)
        fine = torch.arange(64.0).reshape(1, 1, 8, 8)
        pooled = novelty.pooled({0: fine, 2: torch.ones(1, 2, 2, 2)})
        assert pooled.shape == (1, 2, 2, 3)
        assert float(pooled[0, 0, 1, 0]) == float(fine[0, 0, :4, 4:].mean())

    def test_too_little_tissue_leaves_it_unknown(self):
        novelty = Novelty({0: (3, 4)}, 4)
        novelty.fit(np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32), np.zeros((99, 3), np.float32), 0)
        assert not novelty.known


class TestMaps:
    @pytest.fixture(scope="class")
    def predicted(self, model):
        slide = green(with_cells(coloured_slide(7)), half=True)
        px.tl.predict(slide, model, mask_key=False)
        px.tl.aggregate(slide, ["spots", "cells"])
        return slide

    def test_new_tissue_is_far_and_known_tissue_is_not(self, predicted):
        found = values(predicted)
        assert found.shape == (96, 96)  # pixels of 8 px
        left, right = found[:, :47], found[:, 49:]
        assert (left == 100).all()
        assert 30 < right.mean() < 70
        assert (right > 99).mean() < 0.05

    def test_it_lies_on_the_slide(self, predicted):
        matrix = get_transformation(predicted["he_novelty"], "global").to_affine_matrix(("x", "y"), ("x", "y"))
        np.testing.assert_allclose(matrix, np.diag([8, 8, 1]))

    def test_tables_have_the_mean_over_each_shape(self, predicted):
        for key in ("spots", "cells"):
            novelty = predicted[f"{key}_genes"].obs["novelty"].to_numpy()
            x = np.array([p.x for p in predicted[key].geometry])
            assert (novelty[x < 350] == 100).all()
            assert novelty[x > 420].mean() < 70

    def test_a_warning_gives_the_share_of_new_tissue(self, model, caplog, monkeypatch):
        monkeypatch.setattr("pixnet._logging.logger.propagate", True)
        caplog.set_level(logging.INFO, logger="pixnet")
        px.tl.predict(green(coloured_slide(7), half=True), model, mask_key=False)
        assert any(
            r.levelno == logging.WARNING and re.match(r"5[01] % of the tissue of image 'he'", r.message)
            for r in caplog.records
        )
        caplog.clear()
        px.tl.predict(coloured_slide(8), model, mask_key=False)
        assert not any("he_novelty" in r.message for r in caplog.records)
        assert any("farther from the training tissue" in r.message for r in caplog.records)

    @pytest.mark.parametrize("settings", [{"tile_size": 512}, {"out_mpp": 7.0}, {"genes": ["BLUE"]}])
    def test_it_does_not_depend_on_the_map(self, model, predicted, settings):
        slide = green(coloured_slide(7), half=True)
        px.tl.predict(slide, model, mask_key=False, **settings)
        np.testing.assert_allclose(values(slide), values(predicted), atol=1e-3)

    def test_a_region_has_the_values_of_the_whole(self, model, predicted):
        slide = green(coloured_slide(7), half=True)
        px.tl.predict(slide, model, mask_key=False, region=(300, 100, 500, 260))
        found = values(slide)
        known = np.isfinite(found)
        assert known.sum() == 26 * 21  # the pixels that the region touches
        np.testing.assert_allclose(found[known], values(predicted)[known], atol=1e-3)

    def test_stages_give_what_whole_windows_give(self):
        torch.manual_seed(0)
        model = px.models.PixNet(["A"], mpp=0.5, pretrained=False, window=256, halo=256)
        rng = np.random.default_rng(0)
        n = len(model.novelty.mean)
        with torch.no_grad():
            model.novelty.sd.fill_(0.01)
            model.novelty.quantiles.copy_(torch.linspace(0, 5, len(model.novelty.quantiles)))
            model.novelty.components.copy_(torch.from_numpy(np.linalg.qr(rng.normal(size=(n, n)))[0][:, :64].T))
        maps = []
        for staged in (True, False):
            slide = coloured_slide(7, size=320)
            if not staged:
                model.encoder.reach = None
            px.tl.predict(slide, model, mask_key=False)
            maps.append(values(slide))
        assert np.ptp(np.nanquantile(maps[0], [0.1, 0.9])) > 10
        inner = slice(6, -6)  # beyond the slide's edge both see white, but whole windows only as far as their halo
        np.testing.assert_allclose(maps[0][inner, inner], maps[1][inner, inner], atol=0.5)

    def test_an_interrupted_map_goes_on_with_it(self, model, predicted, tmp_path, monkeypatch):
        from pixnet._sdata.store.map_writer import MapWriter

        green(coloured_slide(7), half=True).write(tmp_path / "a.zarr")
        sdata = sd.read_zarr(tmp_path / "a.zarr")
        mark, left = MapWriter.mark, [4]

        def stop(self, *args):
            mark(self, *args)
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        monkeypatch.setattr(MapWriter, "mark", stop)
        with pytest.raises(KeyboardInterrupt):
            px.tl.predict(sdata, model, mask_key=False, tile_size=256)
        monkeypatch.setattr(MapWriter, "mark", mark)
        assert "he_novelty" not in sd.read_zarr(tmp_path / "a.zarr")
        px.tl.predict(sdata, model, mask_key=False, tile_size=256, resume=True)
        again = sd.read_zarr(tmp_path / "a.zarr")
        np.testing.assert_allclose(values(again), values(predicted), atol=1e-3)
        px.tl.aggregate(again, "spots")
        assert again["spots_genes"].obs["novelty"].notna().all()


class TestNames:
    def test_a_second_map_of_the_same_model_replaces_it(self, model, tmp_path):
        coloured_slide(7).write(tmp_path / "a.zarr")
        sdata = sd.read_zarr(tmp_path / "a.zarr")
        px.tl.predict(sdata, model, mask_key=False)
        px.tl.predict(sdata, model, mask_key=False, overwrite=True)
        px.tl.predict(sdata, model, mask_key=False, key_added="again")
        assert {"he_novelty", "again_novelty"} <= set(sd.read_zarr(tmp_path / "a.zarr").images)
        px.tl.aggregate(sdata, "spots", image_key="again")
        assert "novelty" in sdata["spots_genes"].obs

    def test_another_image_of_its_name_is_kept(self, model):
        slide = coloured_slide(7)
        slide["he_novelty"] = slide["he"]
        with pytest.raises(ValueError, match="'he_novelty' exists"):
            px.tl.predict(slide, model, mask_key=False, image_key="he")

    def test_that_of_another_model_is_not_taken(self, model):
        slide = coloured_slide(7)
        px.tl.predict(slide, model, mask_key=False)
        other = model.copy()
        with torch.no_grad():
            other.novelty.mean.add_(1)
        px.tl.predict(slide, other, mask_key=False, key_added="other")
        slide["he_novelty"] = slide["other_novelty"]
        px.tl.aggregate(slide, "spots", image_key="other", key_added="of_other")
        assert "novelty" in slide["of_other"].obs
        del slide.images["other_novelty"]
        px.tl.aggregate(slide, "spots", image_key="other", overwrite=True, key_added="without")
        assert "novelty" not in slide["without"].obs

    def test_a_model_that_does_not_know_writes_none(self):
        slide = coloured_slide(7)
        model = px.models.PixNet(["A"], mpp=0.5, **{k: QUICK[k] for k in ("encoder", "hidden", "window", "halo")})
        px.tl.predict(slide, model, mask_key=False)
        px.tl.aggregate(slide, "spots")
        assert "he_novelty" not in slide
        assert "novelty" not in slide["spots_genes"].obs

    def test_the_slide_is_still_the_h_and_e_image(self, model):
        slide = coloured_slide(7)
        px.tl.predict(slide, model, mask_key=False)
        slide.attrs = {}
        px.pp.tissue_mask(slide)
        assert "he_tissue" in slide


class TestFiles:
    def test_it_travels_with_the_model(self, model, tmp_path):
        model.save(tmp_path / "a.safetensors", dtype="float16")
        loaded = px.models.load(tmp_path / "a.safetensors")
        assert loaded.novelty.known
        slides = [coloured_slide(7), coloured_slide(7)]
        for slide, one in zip(slides, (model, loaded)):
            px.tl.predict(slide, one, mask_key=False, genes=["BLUE"])
        np.testing.assert_allclose(*map(values, slides), atol=2)

    def test_a_file_has_all_of_it_or_nothing(self, model, tmp_path):
        from safetensors import safe_open
        from safetensors.torch import save_file

        path = tmp_path / "a.safetensors"
        model.save(path)
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
        without = {k: v for k, v in tensors.items() if not k.startswith("novelty.")}
        save_file(without, tmp_path / "b.safetensors", metadata=metadata)
        assert not px.models.load(tmp_path / "b.safetensors").novelty.known
        path = tmp_path / "c.safetensors"  # not one that tensors may still be mapped from
        save_file({k: v for k, v in tensors.items() if k != "novelty.mean"}, path, metadata=metadata)
        with pytest.raises(ValueError, match=r"1 missing \(novelty.mean\)"):
            px.models.load(path)


GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "believe.md"


@pytest.mark.skipif(not GUIDE.exists(), reason="the documentation's sources are not here")
def test_the_guide_runs(quick_model, tmp_path, monkeypatch):
    """The lines of "Can I believe this gene on my slide?", in order, with quick settings of training."""
    text = GUIDE.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    quick_model.save("model.safetensors")
    names = {
        "sdata": with_cells(coloured_slide(7)),
        "measured": coloured_slide(8),
        "slides": {name: coloured_slide(i, size=512) for i, name in enumerate("ab")},
        "patients": ["P", "Q"],
        "settings": QUICK | {"genes": ["PINK", "BLUE", "FLAT", "REST"], "max_epochs": 12, "seed": 0},
    }
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code.replace("(slides", "(slides, **settings"), names)
    assert {"PINK", "BLUE"} <= set(names["believed"].index)
    assert "FLAT" not in names["genes"]
    assert len(names["familiar"]) > 0.9 * names["table"].n_obs
