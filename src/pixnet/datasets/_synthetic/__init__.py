"""The generator behind :func:`pixnet.datasets.synthetic_tissue`."""
