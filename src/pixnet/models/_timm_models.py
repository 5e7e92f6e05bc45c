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


TIMM_MODELS = {
    model.name: model
    for model in (
        TimmModel("resnet18", "ImageNet; Hugging Face, timm/resnet18.a1_in1k", "Apache-2.0", 11.2),
        TimmModel(
            "hf-hub:MahmoodLab/UNI2-h",
            "H&E and IHC; Hugging Face, gated: accept the terms and log in",
            "CC-BY-NC-ND-4.0",
            681.4,
            gated=True,
            mpp=0.5,
            architecture="vit_giant_patch14_224",
            # as the model card on Hugging Face gives them
            options={
                "img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "init_values": 1e-5, "embed_dim": 1536,
                "mlp_ratio": 2.66667 * 2, "num_classes": 0, "no_embed_class": True, "reg_tokens": 8, "dynamic_img_size": True,
            },
            layers={"mlp_layer": "timm.layers:SwiGLUPacked", "act_layer": "torch.nn:SiLU"},
            mean=(0.485, 0.456, 0.406),
            sd=(0.229, 0.224, 0.225),
        ),
    )
}  # fmt: skip
"""Two of the many that timm builds: a small CNN, and the encoder of the paper."""


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
