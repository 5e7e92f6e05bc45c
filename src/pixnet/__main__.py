"""``python -m pixnet`` is the command line."""

from __future__ import annotations

from pixnet.cli import run

run()
