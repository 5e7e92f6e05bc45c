"""Sections cut in two in space."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pixnet._core.train.crops import Section


def longer_axis(bounds: np.ndarray) -> tuple[int, np.ndarray]:
    """Return the axis (0: x, 1: y) along which the centres of boxes ``(n, 4)`` spread most, and the centres on it."""
    centres = np.stack([bounds[:, [0, 2]].mean(axis=1), bounds[:, [1, 3]].mean(axis=1)])
    axis = int(np.argmax(np.ptp(centres, axis=1)))
    return axis, centres[axis]


def split_block(section: Section, share: float = 0.2) -> tuple[Section, Section]:
    """Cut a section in two by a line across its longer axis; the far part holds ``share`` of its shapes.

    Shapes that straddle the line are in neither part.
    """
    first = section.targets[0].shapes.bounds
    if len(first) < 10:
        raise ValueError(
            f"section {section.name!r} has {len(first)} usable shapes; too few to hold some back for validation: "
            "pass other objects as validation="
        )
    axis, centres = longer_axis(first)
    line = float(np.quantile(centres, 1 - share))
    near, far = [], []
    for targets in section.targets:
        bounds = targets.shapes.bounds
        near.append(targets.take(np.flatnonzero(bounds[:, axis + 2] <= line)))
        far.append(targets.take(np.flatnonzero(bounds[:, axis] >= line)))
    return replace(section, targets=near), replace(section, targets=far)
