"""The parts of the page that `pixnet.pl.report` writes."""
