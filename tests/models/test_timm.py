"""Encoders from timm, randomly initialised."""

from __future__ import annotations

import pytest
import torch

from pixnet.models import PixNet
from pixnet.models._encoders import check_encoder

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
    model = PixNet(["A"], encoder=encoder, widths=16).eval()
    with torch.inference_mode():
        assert model(torch.rand(1, 3, 128, 128)).shape == (1, 2, 32, 32)


@pytest.mark.parametrize("patch", [14, 16])
def test_a_vit_becomes_a_pyramid_whatever_its_patches(patch):
    from pixnet.models._timm import TimmEncoder

    encoder = TimmEncoder(
        "vit_tiny_patch16_224", pretrained=False, patch_size=patch, depth=4, embed_dim=48, num_heads=3, img_size=224
    ).eval()
    assert encoder.strides == (4, 8, 16, 32)
    check_encoder("timm/vit", encoder)
    with torch.inference_mode():
        a = encoder(torch.rand(1, 3, 512, 256))
    assert [tuple(f.shape[2:]) for f in a] == [(128, 64), (64, 32), (32, 16), (16, 8)]


def test_an_unknown_name():
    from pixnet.models._timm import TimmEncoder

    with pytest.raises(ValueError, match="timm has no model"):
        TimmEncoder("no_such_net", pretrained=False)
