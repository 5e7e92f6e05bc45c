"""Settings of timm models that need more than their name. Importing this module needs no timm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TimmModel:
    """What is known of a timm model.

    Attributes
    ----------
    name
        Name as `timm.create_model` takes it.
    weights, licence, gated
        Source and licence of its weights; whether they are given out only on accepted terms.
    parameters
        Number of parameters, in millions.
    mpp
        Pixel size (µm/px) of the images that it was trained on; None for natural images.
    architecture
        Name to build it under when its weights are not asked for, so that the hub is not.
    options
        Arguments of `timm.create_model`.
    layers
        More of them, classes given as ``"package.module:Class"``.
    mean, sd
        Normalisation of its images; None: as timm says.
    """

    name: str
    weights: str
    licence: str
    parameters: float
    gated: bool = False
    mpp: float | None = None
    architecture: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)
    mean: tuple[float, float, float] | None = None
    sd: tuple[float, float, float] | None = None


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_BIOPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
_SWIGLU = {"mlp_layer": "timm.layers:SwiGLUPacked", "act_layer": "torch.nn:SiLU"}
_VIT = {"img_size": 224, "init_values": 1e-5, "num_classes": 0}
_BY_NC_ND = "CC-BY-NC-ND-4.0"


def _pathology(
    repository: str,
    licence: str,
    parameters: float,
    architecture: str,
    norm: tuple[tuple[float, float, float], tuple[float, float, float]] = _IMAGENET,
    layers: Mapping[str, str] | None = None,
    **options: Any,
) -> TimmModel:
    """Return a vision transformer for pathology: gated on Hugging Face, trained at 0.5 µm/px among others."""
    return TimmModel(
        f"hf-hub:{repository}",
        "H&E; Hugging Face, gated: accept the terms and log in",
        licence,
        parameters,
        gated=True,
        mpp=0.5,
        architecture=architecture,
        options={**_VIT, **options},
        layers=layers or {},
        mean=norm[0],
        sd=norm[1],
    )


_MODELS = (
    TimmModel("resnet18", "ImageNet; Hugging Face, timm/resnet18.a1_in1k", "Apache-2.0", 11.2),
    # as the model cards on Hugging Face give them
    _pathology("MahmoodLab/UNI", _BY_NC_ND, 303.4, "vit_large_patch16_224"),
    _pathology(
        "MahmoodLab/UNI2-h", _BY_NC_ND, 681.4, "vit_giant_patch14_224", layers=_SWIGLU, patch_size=14, depth=24,
        num_heads=24, embed_dim=1536, mlp_ratio=2.66667 * 2, no_embed_class=True, reg_tokens=8, dynamic_img_size=True,
    ),
    _pathology("paige-ai/Virchow", "Apache-2.0", 631.2, "vit_huge_patch14_224", layers=_SWIGLU, mlp_ratio=5.3375),
    _pathology(
        "paige-ai/Virchow2", _BY_NC_ND, 631.2, "vit_huge_patch14_224", layers=_SWIGLU, mlp_ratio=5.3375, reg_tokens=4
    ),
    _pathology("bioptimus/H-optimus-0", "Apache-2.0", 1134.8, "vit_giant_patch14_reg4_dinov2", _BIOPTIMUS),
    _pathology("bioptimus/H-optimus-1", _BY_NC_ND, 1134.8, "vit_giant_patch14_reg4_dinov2", _BIOPTIMUS),
    _pathology("prov-gigapath/prov-gigapath", "Apache-2.0", 1135.0, "vit_giant_patch14_dinov2", patch_size=16),
)  # fmt: skip

TIMM_MODELS = {model.name: model for model in _MODELS}
"""A small CNN, the encoder of the paper, and others for pathology, of the many that timm builds."""


def known_timm_model(name: str) -> TimmModel | None:
    """Return what is known of a timm model, also of one whose files are in a folder of its name (``local-dir:``)."""
    if name.startswith("local-dir:"):
        folder = name.rstrip("/").rpartition("/")[2]
        return next((m for m in TIMM_MODELS.values() if m.name.rpartition("/")[2] == folder), None)
    return TIMM_MODELS.get(name)


def timm_encoder_name(name: str) -> str:
    """Return the name of a timm model as an encoder; a folder of a known model is a place on one machine only."""
    known = known_timm_model(name)
    return f"timm/{name if known is None else known.name}"
