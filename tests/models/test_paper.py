"""PixNet as published: decoder, quantity, settings, and any encoder."""

from __future__ import annotations

import pytest
import torch
from scipy import sparse
from torch import nn

import pixnet as px
from pixnet.models import PixNet
from pixnet.models._config import PAPER_FILTERS, paper_levels
from pixnet.models._heads import MeasuredShapes
from pixnet.models._paper import DepthToSpaceUp, PaperDecoder
from pixnet.models._pixnet import PixNet as Model

GENES = ["A", "B", "C"]
SMALL = (8, 8, 12, 16, 16, 16)


class Pyramid(nn.Module):
    """Maps at strides 4 to 32, as a ViT's groups of blocks give them."""

    strides, channels = (4, 8, 16, 32), (5, 6, 7, 8)

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        self.stems = nn.ModuleList(nn.Conv2d(3, c, s, stride=s) for s, c in zip(self.strides, self.channels))

    def forward(self, image):
        return [stem(image) for stem in self.stems]


px.models.register_encoder("pyramid-test", Pyramid)


def paper(**options) -> Model:
    torch.manual_seed(0)
    return PixNet.paper(GENES, **({"encoder": "pyramid-test", "widths": SMALL} | options)).eval()


@pytest.mark.parametrize(("stride", "levels"), [(1, 6), (2, 5), (4, 4)])
def test_levels_go_from_the_output_to_32(stride, levels):
    model = paper(stride=stride)
    decoder = model.members[0].decoder
    assert paper_levels(stride) == levels
    assert len(decoder.fuse) == 3
    assert sum(isinstance(m, DepthToSpaceUp) for m in decoder.deep) == levels - 3
    # Three intermediate maps are fused, the last one is where the decoder starts.
    assert decoder.sources == [0, 1, 2]
    assert model.levels == [0, 1, 2, 3]
    assert model.config.widths == SMALL[:levels]
    with torch.inference_mode():
        out = model(torch.rand(2, 3, 128, 64))
    assert out.shape == (2, 4, 128 // stride, 64 // stride)
    assert out.isfinite().all()


def test_published_filters_are_the_default():
    decoder = PaperDecoder(Pyramid.channels, Pyramid.strides, PAPER_FILTERS, 1)
    assert decoder.enter.out_channels == 512
    assert [s.out_channels for s in decoder.skip] == [64, 128, 256]
    assert [block[0].out_channels for block in decoder.deep] == [2048] * 3
    assert decoder.width == 64


def test_depth_to_space_doubles_the_size_from_depth_alone():
    block = DepthToSpaceUp(2, 3).eval()
    x = torch.zeros(1, 2, 4, 4)
    x[..., 1, 1] = 1
    out = block(x) - block(torch.zeros_like(x))
    assert out.shape == (1, 3, 8, 8)
    assert out.abs().sum() > 0


@pytest.mark.parametrize("stride", [1, 4])
def test_every_level_reaches_the_map(stride):
    model = paper(stride=stride)
    image = torch.rand(1, 3, 64, 64)
    features = {i: f.detach().requires_grad_() for i, f in model.encode(image).items()}
    nn.init.normal_(model.members[0].last.weight)
    model.decode(features).square().sum().backward()
    assert all(f.grad.abs().sum() > 0 for f in features.values())


def test_a_cnn_serves_from_its_map_nearest_to_the_output():
    model = PixNet.paper(GENES, encoder="efficientnet_lite0", stride=4, widths=(8, 8, 8, 8))
    assert model.members[0].decoder.sources == [1, 2, 3]  # strides 4, 8, 16 of 2 to 32
    with torch.inference_mode():
        assert model.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 4, 16, 16)


def test_an_encoder_of_one_map_serves_too():
    class One(Pyramid):
        strides, channels = (8,), (4,)

    with torch.inference_mode():
        assert paper(encoder=One(), stride=2)(torch.rand(1, 3, 64, 64)).shape == (1, 4, 32, 32)


def test_what_lies_far_away_changes_nothing():
    model = paper(stride=4)
    a = torch.rand(1, 3, 128, 512)
    b = a.clone()
    b[..., 384:] = torch.rand(1, 3, 128, 128)
    with torch.inference_mode():
        torch.testing.assert_close(model(a)[..., :48], model(b)[..., :48])


@pytest.mark.parametrize("stride", [4, 1])
def test_a_crop_is_the_inner_part_of_the_whole_map(stride):
    model = paper(stride=stride, quantity="density")
    nn.init.normal_(model.members[0].last.weight, std=0.5)
    seen = []
    model.members[0].decoder.fuse[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    image, crop = torch.rand(1, 3, 64, 384), 128 // stride
    with torch.inference_mode():
        whole = model.decode(model.encode(torch.cat([image] * 6, dim=2)))
        found = model.decode(model.encode(torch.cat([image] * 6, dim=2)), None, crop)
    assert seen == [384 // stride, 256 // stride], "the finest level skips half of the halo"
    torch.testing.assert_close(found, whole[..., crop:-crop, crop:-crop], rtol=1e-4, atol=1e-6)


def test_it_carries_the_published_settings():
    options = paper(stride=4).training_options
    assert (options["lr"], options["weight_decay"], options["loss"]) == (5e-4, 1e-4, "mse+pcc")
    assert px.tl.TrainingOptions(**options).batch_crops == 32
    assert paper().quantity == "log_sum"
    assert PixNet(GENES, encoder="pyramid-test").training_options == {}


def test_wrong_settings():
    with pytest.raises(ValueError, match="stride is 8; it should be 1, 2 or 4"):
        paper(stride=8)
    with pytest.raises(ValueError, match="published decoder at stride 1 has 6 levels"):
        paper(widths=(8, 8))
    with pytest.raises(ValueError, match="quantity is 'sum'.*'log_sum'"):
        paper(quantity="sum")
    with pytest.raises(TypeError, match="depth"):
        paper(depth=3)


def measured(logs, area_um2):
    """A shape with a log1p CP10k of each gene."""
    return MeasuredShapes(sparse.csr_array(torch.expm1(logs)[None].numpy() / 1e4), area_um2, 0)


class TestQuantity:
    def test_a_log_sum_starts_from_the_mean_log_of_the_mean_area(self):
        model = paper(stride=4)
        level = torch.tensor([0.5, 2.0, 3.0])
        model.start(measured(level, 400.0))
        nn.init.zeros_(model.members[0].last.weight)
        with torch.inference_mode():
            out = model(torch.rand(1, 3, 64, 64))[0, :, 0, 0]
        torch.testing.assert_close(out[:3] * 400, level)
        assert out[3].item() == pytest.approx(1e4)
        with pytest.raises(ValueError, match="mean area"):
            model.start(measured(level, float("nan")))

    def test_other_genes_keep_the_size_that_the_logs_hold_for(self):
        model = paper(stride=4)
        model.start(measured(torch.tensor([0.5, 2.0, 3.0]), 400.0))
        nn.init.normal_(model.members[0].last.weight, std=0.5)
        new = model.with_genes([model.genes[2], "NEW"])
        assert new.head.area_um2 == 400
        image = torch.rand(1, 3, 64, 64)
        with torch.inference_mode():
            torch.testing.assert_close(new.eval()(image)[:, [0, 2]], model.eval()(image)[:, [2, 3]])

    def test_it_survives_a_file(self, tmp_path):
        model = paper(stride=4)
        model.start(measured(torch.tensor([0.5, 2.0, 3.0]), 400.0))
        model.save(tmp_path / "m.safetensors")
        found = px.models.load(tmp_path / "m.safetensors")
        assert found.config == model.config
        assert found.training_options == model.training_options
        assert found.head.area_um2 == 400
        image = torch.rand(1, 3, 64, 64)
        with torch.inference_mode():
            torch.testing.assert_close(found(image), model(image), rtol=0, atol=0)
