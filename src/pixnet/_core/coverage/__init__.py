"""Shapes as arrays, and the exact fraction of every pixel that lies inside each shape."""

from pixnet._core.coverage.fractions import WEIGHTS, Weights, coverage
from pixnet._core.coverage.shapes import ShapeArrays

__all__ = ["WEIGHTS", "ShapeArrays", "Weights", "coverage"]
