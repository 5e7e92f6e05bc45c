"""What tl.train stands on: sections, crops, batches, the objective and the trainer, with losses of the test's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

import pixnet as px
from pixnet._core.train.batches import SectionBatchSampler, collate
from pixnet._core.train.crops import Targets, cover, kept_on_disk, place_crops
from pixnet._core.train.dataset import Crop, CropDataset, CropTargets
from pixnet._core.train.fit import fit
from pixnet._core.train.objective import Objective
from pixnet._core.train.split import split_block
from pixnet._core.train.trainer import learning_rate, passes_as_far
from pixnet._sdata.sections import open_measured, open_section
from pixnet.models._losses import squared_error_and_pcc

from .conftest import QUICK, coloured_slide, with_cells


def sections(*slides, genes=("PINK", "BLUE", "FLAT"), mpp=0.5, stride=4, **names):
    """Open slides as training does."""
    objects = {str(i): one for i, one in enumerate(slides)}
    found = open_measured(objects, mask_key=False, **names)
    return [open_section(m, m.tables(genes), mpp, stride) for m in found]


def fitted(*slides, objective=None, on_epoch=None, shapes=None, table_key=None, n_programs=None, **options):
    """Train on all slides but the last, which validates, with the losses and the callback of the test's own."""
    options = px.tl.TrainingOptions(**{"max_epochs": 1, "variants": 1, "lr": 1e-2} | options)
    opened = sections(*slides, shapes=shapes, table_key=table_key)
    torch.manual_seed(0)
    small = {"encoder": "patch-test", "hidden": 16, "window": 256, "halo": 64}
    model = px.models.PixNet(QUICK["genes"], n_programs=n_programs, **small)
    objective = None if objective is None else objective(options)
    found = fit(model, opened[:-1], opened[-1:], options, seed=0, device="cpu", objective=objective, on_epoch=on_epoch)
    return found


class TestCrops:
    def test_every_shape_is_whole_in_exactly_one(self, slide):
        (section,) = sections(slide)
        crops = place_crops(section, 320)
        rows = np.concatenate([c.rows["spots"] for c in crops])
        assert sorted(rows) == list(range(225))
        for crop in crops:
            assert crop.origin[0] % 64 == 0
            assert crop.origin[1] % 64 == 0
            area = cover(crop, section, 320).weights["spots"].sum(axis=1)
            np.testing.assert_allclose(area, np.pi * 3**2, rtol=1e-3)


class TestDataset:
    @pytest.fixture(scope="class")
    def dataset(self):
        return CropDataset.of(sections(coloured_slide(1), coloured_slide(2)), 320)

    def test_it_is_one_of_torch(self, dataset):
        assert isinstance(dataset, torch.utils.data.Dataset)
        assert len(dataset) == len(list(dataset)) > 4
        assert dataset.n_shapes == {"spots": 450}
        assert dataset.image(0, 64).shape == (3, 448, 448)

    def test_depth_averages_1e4_in_each_section(self, dataset):
        for section in (0, 1):
            depth = np.concatenate([crop.targets["spots"].depth for crop in dataset if crop.section == section])
            assert float(depth.mean()) == pytest.approx(1e4, rel=1e-4)

    def test_joined_data_sets_keep_crops_and_sections_apart(self, dataset):
        other = CropDataset.of(sections(coloured_slide(3)), 320)
        both = dataset.join(other)
        assert len(both) == len(dataset) + len(other)
        assert [s.name for s in both.sections] == ["0", "1", "0"]
        assert {crop.section for crop in both.crops[len(dataset) :]} == {2}
        assert {crop.section for crop in other} == {0}, "the other data set stays as it is"

    def test_batches_are_of_one_section_and_take_turns(self, dataset):
        sampler = SectionBatchSampler(dataset, shapes=60, crops=3)
        batches = list(sampler)
        assert sorted(i for batch in batches for i in batch) == list(range(len(dataset)))
        assert len(sampler) == len(batches)
        of = [{dataset[i].section for i in batch} for batch in batches]
        assert all(len(sections) == 1 for sections in of)
        assert of[:2] == [{0}, {1}]

    def test_shuffled_batches_depend_on_the_generator_alone(self, dataset):
        first, again, other = (
            list(SectionBatchSampler(dataset, 60, 3, torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)
        )
        assert first == again != other

    def test_a_batch_sums_pixels_as_its_crops_do(self, dataset):
        indices = [0, 1]
        batch = collate(dataset, indices)
        values = torch.rand(len(indices), (320 // 4) ** 2)
        found = torch.sparse.mm(batch.targets["spots"].weights, values[batch.crop_of_pixel, batch.pixel][:, None])
        expected = [
            dataset[i].targets["spots"].weights @ values[k].numpy()[dataset[i].pixels] for k, i in enumerate(indices)
        ]
        np.testing.assert_allclose(found[:, 0], np.concatenate(expected), rtol=1e-4)
        np.testing.assert_allclose(batch.targets["spots"].covered, np.pi * 9, rtol=1e-3)


def test_a_block_of_a_single_one_shares_no_shape(slide):
    (section,) = sections(slide)
    near, far = split_block(section)
    a, b = near.targets[0].shapes.bounds, far.targets[0].shapes.bounds
    assert len(a) + len(b) <= 225
    assert 30 <= len(b) <= 60
    assert a[:, 2].max() <= b[:, 0].min() or a[:, 3].max() <= b[:, 1].min()


def test_crops_on_disk_are_the_same(slide):
    (section,) = sections(slide)
    crops = [cover(crop, section, 512) for crop in place_crops(section, 512)]
    for kept, crop in zip(kept_on_disk(crops), crops, strict=True):
        assert (kept.origin, kept.rows) == (crop.origin, crop.rows)
        np.testing.assert_array_equal(kept.pixels, crop.pixels)
        for name, weights in crop.weights.items():
            assert (kept.weights[name] != weights).nnz == 0
            assert not kept.weights[name].data.flags.writeable


def test_dispersion_is_that_of_the_counts():
    rng = np.random.default_rng(0)
    umi = rng.uniform(2000, 8000, 4000)
    share, dispersion = np.array([0.01, 0.03, 0.02]), np.array([0.5, 0.1, 0.0])
    rate = [rng.gamma(1 / d, d, 4000) if d else np.ones(4000) for d in dispersion]
    counts = rng.poisson(umi[:, None] * share * np.stack(rate, axis=1))
    measured = Targets("spots", None, sparse.csr_array(counts), umi)
    crops = [  # of one section, so their shapes are taken together
        Crop(0, (0, 0), np.arange(4), {"spots": CropTargets(rows, None, None, measured)})
        for rows in np.array_split(np.arange(4000), 3)
    ]
    dataset = CropDataset([], 512, crops)
    np.testing.assert_allclose(dataset.dispersion()["spots"], np.maximum(dispersion, 1e-2), rtol=0.15)


def test_the_learning_rate_rises_and_falls_to_zero():
    rates = [learning_rate(step, 100) for step in range(101)]
    assert np.argmax(rates) in (9, 10)
    assert np.all(np.diff(rates[:9]) > 0)
    assert np.all(np.diff(rates[10:]) < 0)
    assert rates[-1] == pytest.approx(0)


@pytest.mark.parametrize(("best", "most"), [(1, 1), (2, 12), (8, 30), (17, 30), (30, 30)])
def test_the_run_on_everything_learns_as_much_as_up_to_the_best_pass(best, most):
    passes = passes_as_far(best, most)
    assert best <= passes <= most
    first = sum(learning_rate(step, 11 * most) for step in range(11 * best)) / 11
    last = sum(learning_rate(step, 11 * passes) for step in range(11 * passes)) / 11
    assert last == pytest.approx(first, abs=0.35)  # half of what one pass adds


class NoBetter(Objective):
    """Validates no pass after the first as better."""

    def evaluate(self, model, dataset, device):
        return {"expression": 1.0, "total": 0.0, "pcc": 0.0}


@pytest.mark.parametrize(("n_programs", "passes"), [(None, 1), (2, 2)])
def test_the_run_on_everything_anneals_over_its_own_passes(slide, n_programs, passes):
    """Else it would stop in the middle of the schedule of the run before it, at a high rate.

    Programs learn as much as the best pass had: more passes, since the rate falls.
    """
    rows = []
    options = {"max_epochs": 6, "patience": 3, "batch_shapes": 8, "lr": 1e-2}
    model = fitted(slide, coloured_slide(1), objective=NoBetter, on_epoch=rows.append, n_programs=n_programs, **options)
    assert model.provenance["epochs"] == 1, "no pass after the first was better"
    first, last = ([row for row in rows if ("val_pcc" in row) == validated] for validated in (True, False))
    assert [row["epoch"] for row in first] == [1, 2, 3, 4]
    assert model.provenance["refit_epochs"] == len(last) == passes
    assert first[-1]["lr"] > 0.2 * options["lr"], "the run before stopped in the middle"
    assert last[-1]["lr"] < 0.2 * options["lr"]


def test_each_scale_weighs_the_same_in_every_batch(slide):
    """The loss is the mean over the elements, however many shapes each has."""
    seen = []

    class Watched(Objective):
        def __init__(self, options):
            super().__init__(options, self.watched)

        def watched(self, predicted, cp10k, pcc, **counts):
            loss = squared_error_and_pcc(predicted, cp10k, pcc)
            seen.append((predicted.requires_grad, float(loss.detach())))
            return loss

    keys = {"shapes": ["spots", "cells"], "table_key": ["spots_counts", "cells_counts"]}
    slides = with_cells(slide), with_cells(coloured_slide(1))
    model = fitted(*slides, **keys, objective=Watched, batch_shapes=10**6, refit=False, dropout=0.0)
    cells, spots = [loss for grad, loss in seen if grad]
    assert model.history[0]["train_expression"] == pytest.approx((cells + spots) / 2)


def test_a_validation_that_is_nan_stops_too(slide):
    class Broken(Objective):
        def evaluate(self, model, dataset, device):
            return {"expression": float("nan"), "total": 0.0, "pcc": 0.0}

    with pytest.raises(FloatingPointError, match="validation loss is nan after epoch 1"):
        fitted(slide, coloured_slide(1), objective=Broken)


def test_a_nan_loss_names_its_batch(slide):
    def broken(predicted, cp10k, pcc, **counts):
        return squared_error_and_pcc(predicted, cp10k, pcc) * torch.nan

    with pytest.raises(FloatingPointError, match=r"epoch 1, batch 1 \(section 0\)"):
        fitted(slide, coloured_slide(1), objective=lambda options: Objective(options, broken))
