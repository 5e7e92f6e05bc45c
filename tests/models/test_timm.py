"""Encoders from timm, randomly initialised."""

from __future__ import annotations

import pkgutil
from dataclasses import replace

import pytest
import torch

from pixnet.models import PixNet
from pixnet.models._encoders import check_encoder
from pixnet.models._timm_models import TIMM_MODELS

pytestmark = pytest.mark.timm


@pytest.fixture(autouse=True)
def _timm():
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as err:
        pytest.skip(f"timm does not import here: {err}")


def test_a_cnn_gives_its_pyramid():
    from pixnet.models._timm import TimmEncoder

    encoder = TimmEncoder("resnet18", pretrained=False)
    assert encoder.strides == (2, 4, 8, 16, 32)
    check_encoder("timm/resnet18", encoder)
    model = PixNet(["A"], encoder=encoder).eval()
    with torch.inference_mode():
        assert model(torch.rand(1, 3, 128, 128)).shape == (1, 2, 32, 32)


@pytest.mark.parametrize("patch", [14, 16])
def test_a_vit_gives_its_tokens_at_their_own_stride_whatever_its_patches(patch):
    from pixnet.models._timm import TimmEncoder

    encoder = TimmEncoder(
        "vit_tiny_patch16_224", pretrained=False, patch_size=patch, depth=4, embed_dim=48, num_heads=3, img_size=224
    ).eval()
    assert encoder.strides == (16, 16, 16, 16)
    check_encoder("timm/vit", encoder)
    image = torch.rand(1, 3, 512, 320)
    with torch.inference_mode():
        maps = encoder(image)
        block = encoder(image[..., 256:512, :256])  # its blocks see nothing of each other
        found = PixNet(["A"], encoder=encoder).eval()(image)
    assert [tuple(f.shape[2:]) for f in maps] == [(32, 20)] * 4
    for own, alone in zip(maps, block):
        torch.testing.assert_close(own[..., 16:, :16], alone, rtol=1e-4, atol=1e-4)
    assert found.shape == (1, 2, 128, 80)


def test_families_are_told_apart_by_structure_not_by_name():
    from pixnet.models._timm import TimmEncoder

    assert not TimmEncoder("mobilevit_xxs", pretrained=False).is_vit
    assert not TimmEncoder("efficientnet_b0", pretrained=False).is_vit
    assert TimmEncoder("deit_tiny_patch16_224", pretrained=False).is_vit


SMALL_UNI2 = {"depth": 8, "embed_dim": 48, "num_heads": 3, "mlp_ratio": 2.0}
"""The architecture of UNI2-h (patches of 14, 8 registers, SwiGLU) with fewer and narrower blocks."""
UNI2_H = "hf-hub:MahmoodLab/UNI2-h"


def small_uni2():
    return replace(TIMM_MODELS[UNI2_H], options={**TIMM_MODELS[UNI2_H].options, **SMALL_UNI2})


@pytest.mark.parametrize(
    ("name", "depth", "width", "patch", "registers"),
    [
        ("MahmoodLab/UNI", 24, 1024, 16, 0),
        ("MahmoodLab/UNI2-h", 24, 1536, 14, 8),
        ("paige-ai/Virchow", 32, 1280, 14, 0),
        ("paige-ai/Virchow2", 32, 1280, 14, 4),
        ("bioptimus/H-optimus-0", 40, 1536, 14, 4),
        ("bioptimus/H-optimus-1", 40, 1536, 14, 4),
        ("prov-gigapath/prov-gigapath", 40, 1536, 16, 0),
    ],
)
def test_architectures_are_those_of_their_cards(name, depth, width, patch, registers):
    import timm

    known = TIMM_MODELS[f"hf-hub:{name}"]
    layers = {argument: pkgutil.resolve_name(layer) for argument, layer in known.layers.items()}
    with torch.device("meta"):
        net = timm.create_model(known.architecture, pretrained=False, **known.options, **layers)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(known.parameters, abs=0.1)
    assert (len(net.blocks), net.embed_dim, net.patch_embed.patch_size) == (depth, width, (patch, patch))
    assert (0 if net.reg_token is None else net.reg_token.shape[1]) == registers


class TestUni2:
    def test_its_groups_two_four_and_six_of_eight_and_the_last(self):
        from pixnet.models._timm import TimmEncoder

        encoder = TimmEncoder("hf-hub:MahmoodLab/UNI2-h", pretrained=False, **SMALL_UNI2)
        assert list(encoder.net.out_indices) == [1, 3, 5, 7]
        assert encoder.patch == 14
        torch.testing.assert_close(encoder.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))

    def test_the_paper_stands_on_it_from_training_to_a_file(self, tmp_path, monkeypatch):
        """All that a user with the weights does, with a small random one in their place."""
        import pixnet as px

        monkeypatch.setitem(TIMM_MODELS, UNI2_H, small_uni2())
        sdata = px.datasets.synthetic_tissue(size_um=500, n_genes=6)
        genes = px.pp.select_genes(sdata, table_key="spots_counts", n_top=2)
        model = PixNet.paper(genes, stride=4, widths=(8, 8, 16, 16), pretrained=False)
        assert model.config.encoder == "timm/hf-hub:MahmoodLab/UNI2-h"
        model = px.tl.train(sdata, shapes="spots", model=model, max_epochs=1, variants=1, refit=False)
        model.save(tmp_path / "m.safetensors")
        again = px.models.load(tmp_path / "m.safetensors")  # asks the hub for nothing
        image = torch.rand(1, 3, 256, 256)
        with torch.inference_mode():
            torch.testing.assert_close(again(image), model(image), rtol=0, atol=0)

    def test_a_folder_is_not_part_of_the_name(self, monkeypatch):
        monkeypatch.setitem(TIMM_MODELS, UNI2_H, small_uni2())
        model = PixNet(["A"], encoder="timm/local-dir:/somewhere/UNI2-h", pretrained=False)
        assert model.config.encoder == "timm/hf-hub:MahmoodLab/UNI2-h"


class TestWeightsThatCannotBeHad:
    @pytest.fixture(autouse=True)
    def _offline(self, monkeypatch, tmp_path):
        constants = pytest.importorskip("huggingface_hub.constants")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    @pytest.mark.parametrize(
        ("name", "match"),
        [
            ("timm/hf-hub:MahmoodLab/UNI2-h", "accept its terms at https://huggingface.co/MahmoodLab/UNI2-h"),
            ("timm/hf-hub:MahmoodLab/UNI2-h", "encoder='timm/local-dir:/path/to/UNI2-h'"),
            ("timm/local-dir:/no/such/folder", "'/no/such/folder' has no model of timm: it needs config.json"),
        ],
    )
    def test_the_way_to_supply_them_is_told(self, name, match):
        with pytest.raises(FileNotFoundError, match=match):
            PixNet(["A"], encoder=name)

    def test_the_paper_names_them_too(self):
        with pytest.raises(FileNotFoundError, match="hf auth login"):
            PixNet.paper(["A"])


def test_an_unknown_name():
    from pixnet.models._timm import TimmEncoder

    with pytest.raises(ValueError, match="timm has no model"):
        TimmEncoder("no_such_net", pretrained=False)
