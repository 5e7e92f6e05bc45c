"""Figures of maps, programs, tables at several scales, training, evaluation and trust; and a page for any gene."""

from pixnet.pl._compare import compare
from pixnet.pl._evaluation import evaluation
from pixnet.pl._gene_map import gene_map
from pixnet.pl._programs import programs
from pixnet.pl._report import report
from pixnet.pl._scales import scales
from pixnet.pl._training import training
from pixnet.pl._trust import trust

__all__ = ["compare", "evaluation", "gene_map", "programs", "report", "scales", "training", "trust"]
