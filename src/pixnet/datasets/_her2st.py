"""HER2-positive breast tumours (Andersson et al. 2021): fetched at a fixed commit, verified, read as SpatialData."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from functools import cache
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from pixnet._logging import logger
from pixnet._settings import settings

if TYPE_CHECKING:
    from spatialdata import SpatialData
    from tqdm import tqdm

COMMIT = "85df7411b987a7dec3feff9718b869a7a82091ec"
BASE_URL = f"https://raw.githubusercontent.com/almaan/her2st/{COMMIT}/data/"
ATTEMPTS = 3


def her2st(section: str = "C2", *, path: str | PathLike[str] | None = None) -> SpatialData:
    """Load a section of the HER2-positive breast tumours of Andersson et al. (Nature Communications 2021).

    There are 36 sections of 8 patients (A to H), measured by legacy Spatial Transcriptomics: spots of 100 µm, 200 µm
    apart, with the H&E picture of the same section. Files come from the public repository ``almaan/her2st`` at a fixed
    commit (about 5 MB per section), are kept under ``settings.cache_dir`` and checked against the repository's hashes
    at each use.

    Parameters
    ----------
    section
        Letter of the patient and number of the section: ``"A1"`` to ``"H3"``.
    path
        Folder that holds ``ST-cnts``, ``ST-imgs`` and ``ST-spotfiles`` of the public repository; nothing is downloaded
        then. ``None`` looks for ``her2st`` in the folder that the environment variable ``PIXNET_DATA_DIR`` names, and
        downloads otherwise.

    Returns
    -------
    SpatialData
        Image ``"he"`` (multiscale), circles ``"spots"`` (selected spots that have a row of counts, index
        ``"{x}x{y}"``), table ``"spots_counts"`` (raw counts, all genes). Coordinate systems ``"global"`` (pixels) and
        ``"um"``; the pixel size is measured on the section from the pitch of its spots.

    Raises
    ------
    ValueError
        If there is no such section, or a downloaded file differs from that of the fixed commit.
    FileNotFoundError
        If ``path`` lacks a file of the section.
    ConnectionError
        If a file cannot be downloaded.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.her2st("C2")  # doctest: +SKIP
    >>> sdata["spots_counts"].shape  # doctest: +SKIP
    (187, 15706)
    """
    from pixnet.io import legacy_st

    parts = _section_files(section)
    folder = _local_folder(path)
    if folder is None:
        found = {kind: _fetch(name) for kind, name in parts.items()}
    else:
        found = {kind: folder / name for kind, name in parts.items()}
        missing = [name for name, file in zip(parts.values(), found.values()) if not file.is_file()]
        if missing:
            here = [
                name for name in sections() if all((folder / file).is_file() for file in _section_files(name).values())
            ]
            raise FileNotFoundError(
                f"section {section!r} is not complete in {folder}: no {', '.join(missing)}; complete sections there: "
                f"{', '.join(here) or 'none'}. To download it, leave path=None and unset PIXNET_DATA_DIR"
            )
        for name, file in zip(parts.values(), found.values()):
            if git_blob_sha1(file) != _registry()[name]:
                logger.warning("%s differs from the file of the public repository", file)
    return legacy_st(found["counts"], found["spots"], found["image"])


def sections() -> list[str]:
    """Return the names of the sections, ``"A1"`` to ``"H3"``."""
    return sorted(name.split("/")[-1].split(".")[0] for name in _registry() if name.startswith("ST-cnts/"))


@cache
def _registry() -> dict[str, str]:
    """Return the git blob id of each file, by its path in the repository's ``data`` folder."""
    lines = files("pixnet.datasets").joinpath("her2st_registry.tsv").read_text().splitlines()[1:]
    return {name.removeprefix("data/"): sha1 for name, sha1 in (line.split("\t") for line in lines if line)}


def _section_files(section: str) -> dict[str, str]:
    """Return the files of a section: counts, spots and image."""
    valid = sections()
    if section not in valid:
        raise ValueError(f"her2st has no section {section!r}; it has {', '.join(valid)}")
    folder = f"ST-imgs/{section[0]}/{section}/"
    return {
        "counts": f"ST-cnts/{section}.tsv.gz",
        "spots": f"ST-spotfiles/{section}_selection.tsv",
        "image": next(name for name in _registry() if name.startswith(folder)),
    }


def _local_folder(path: str | PathLike[str] | None) -> Path | None:
    """Return the folder to read from; None where files have to be downloaded."""
    if path is not None:
        folder = Path(path).expanduser()
        if not (folder / "ST-cnts").is_dir():
            raise FileNotFoundError(
                f"path {str(folder)!r} has no folder ST-cnts; give the folder that has one, or None to download"
            )
        return folder
    root = os.environ.get("PIXNET_DATA_DIR")
    if root:
        folder = Path(root).expanduser() / "her2st"
        if (folder / "ST-cnts").is_dir():
            return folder
        logger.info("PIXNET_DATA_DIR is %s, which has no her2st/ST-cnts: downloading", root)
    return None


def git_blob_sha1(path: Path) -> str:
    """Return git's id of a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _fetch(name: str) -> Path:
    """Return a file of the repository: from the cache, or downloaded, verified and moved into place."""
    import pooch

    expected = _registry()[name]
    target = settings.cache_dir / "her2st" / COMMIT[:8] / name
    if target.is_file():
        if git_blob_sha1(target) == expected:
            return target
        logger.warning("%s is damaged and is downloaded again", target)
    target.parent.mkdir(parents=True, exist_ok=True)
    url = BASE_URL + name
    logger.info("downloading %s", url)
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=".download-")
    os.close(handle)
    try:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                pooch.HTTPDownloader(progressbar=_bar(name), chunk_size=1 << 16, timeout=60)(url, partial, None)
            except OSError as error:  # requests' errors are OSErrors
                problem: Exception = ConnectionError(f"{url} could not be downloaded: {error}. {_by_hand()}")
                problem.__cause__ = error
            else:
                found = git_blob_sha1(Path(partial))
                if found == expected:
                    os.replace(partial, target)
                    return target
                problem = ValueError(
                    f"{url} gave a file with git blob id {found}, not {expected}: damaged on the way or replaced by a "
                    f"proxy. Nothing was kept. {_by_hand()}"
                )
            if attempt < ATTEMPTS:
                logger.warning("attempt %d of %d failed: %s", attempt, ATTEMPTS, problem)
                time.sleep(attempt)
        raise problem
    finally:
        Path(partial).unlink(missing_ok=True)


def _by_hand() -> str:
    """Return the part of a message that says how to do without the download."""
    return f"Try again, or clone https://github.com/almaan/her2st at {COMMIT[:8]} and give path= the folder that holds ST-cnts"


def _bar(name: str) -> tqdm | bool:
    """Return a progress bar for a download, or False for none."""
    from tqdm import tqdm

    if not settings.progress:
        return False
    # pooch sets the total, and takes a bar of total 0 for no bar
    return tqdm(total=1, unit="B", unit_scale=True, desc=name.split("/")[-1], file=sys.stderr, leave=False)
