"""Figures of gene maps, of programs, of tables at several scales, of training and of evaluation; and a page for any gene."""

from pixnet.pl._compare import compare
from pixnet.pl._evaluation import evaluation
from pixnet.pl._gene_map import gene_map
from pixnet.pl._programs import programs
from pixnet.pl._report import report
from pixnet.pl._scales import scales
from pixnet.pl._training import training

__all__ = ["compare", "evaluation", "gene_map", "programs", "report", "scales", "training"]
