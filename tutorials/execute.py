"""Run tutorials as a reader would, and keep their outputs: ``python tutorials/execute.py [NAME ...]`` (all of them).

Real data is read from PIXNET_DATA_DIR. The tests run the same notebooks with
smaller values of the first cell's constants (its ``nbmake`` metadata); here nothing is made smaller. The time that each
took is written into its first lines.
"""

from __future__ import annotations

import base64
import io
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(path: Path) -> float:
    """Run one notebook and write it back with its outputs; return the seconds it took."""
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:  # whatever it leaves behind goes with it
        client = NotebookClient(notebook, timeout=1800, record_timing=False, resources={"metadata": {"path": folder}})
        client.execute()
        text = nbformat.writes(notebook)
    seconds = time.perf_counter() - start
    minutes = max(1, round(seconds / 60))
    said = f"**Time:** about {minutes} minute{'s' * (minutes > 1)} on two cores"
    notebook.cells[0].source, n = re.subn(r"\*\*Time:\*\* about .*? on two cores", said, notebook.cells[0].source)
    if n != 1:
        raise SystemExit(f"{path.name}: its first cell does not say '**Time:** about ... on two cores'")
    shrink_pictures(notebook)
    notebook.metadata["kernelspec"] = KERNEL
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)
    for private in (str(Path.home()), str(HERE.parent), folder, tempfile.gettempdir() + "/"):
        if len(private) > 4 and private in text:
            where = text.index(private)
            raise SystemExit(
                f"{path.name}: a path of this machine is in the outputs: {text[where - 200 : where + 200]}"
            )
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise SystemExit(f"{path.name}: a cell writes to stderr: {output['text'][:500]}")
    return seconds


def shrink_pictures(notebook: nbformat.NotebookNode) -> None:
    """Give pictures a palette of 256 colours where that makes them smaller, so that a clone stays small."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" not in data:
                continue
            small = io.BytesIO()
            picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
            palette = picture.quantize(254, kmeans=1)
            palette.putpalette([*palette.getpalette()[: 254 * 3], 0, 0, 0, 255, 255, 255])  # letters stay black on white
            picture.quantize(palette=palette, dither=Image.Dither.NONE).save(small, "png", optimize=True)
            text = base64.b64encode(small.getvalue()).decode() + "\n"
            if len(text) < len(data["image/png"]):
                data["image/png"] = text


def main(names: list[str]) -> None:
    """Run the tutorials of these names."""
    for path in [HERE / f"{Path(name).stem}.ipynb" for name in names] or sorted(HERE.glob("*.ipynb")):
        sys.stdout.write(f"{path.name}: {execute(path):.0f} s\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
