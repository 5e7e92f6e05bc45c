"""Models from elsewhere: downloaded once into the cache, verified, and never run as code."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path

from pixnet._logging import logger
from pixnet._settings import settings

HUB = "hf://"
HUB_FILE = "model.safetensors"
_HASH = re.compile(r"(?:sha256[:=])?([0-9a-fA-F]{64})")


def is_remote(name: str) -> bool:
    """Whether a name is that of a file elsewhere."""
    return name.startswith(("http://", "https://", HUB))


def fetch(name: str) -> Path:
    """Return the file of a URL with a hash, or of a repository of the Hugging Face Hub.

    Raises
    ------
    ConnectionError
        If it could not be downloaded.
    ImportError
        If the Hub is meant and huggingface_hub is not installed.
    ValueError
        If a URL has no SHA-256 hash, the file has another one, or the name of a repository is not one.
    """
    return _from_hub(name) if name.startswith(HUB) else _from_url(name)


def _from_url(name: str) -> Path:
    import pooch

    url, _, stated = name.partition("#")
    found = _HASH.fullmatch(stated)
    if found is None:
        raise ValueError(
            f"the URL {name!r} has no hash, so a damaged or replaced file would not be noticed; write "
            "URL#sha256:HASH, where HASH is what `sha256sum` says of the file"
        )
    expected = found.group(1).lower()
    target = settings.cache_dir / "models" / f"{expected}.safetensors"
    if target.is_file() and _sha256(target) == expected:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    logger.info("downloading %s", url)
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=".download-")
    os.close(handle)
    try:
        try:
            pooch.HTTPDownloader(chunk_size=1 << 16, timeout=60)(url, partial, None)
        except OSError as error:  # requests' errors are OSErrors
            raise ConnectionError(f"{url} could not be downloaded: {error}") from error
        got = _sha256(Path(partial))
        if got != expected:
            raise ValueError(
                f"{url} gave a file with SHA-256 {got}, not {expected}: it was damaged on the way or replaced. Nothing was kept"
            )
        os.replace(partial, target)
    finally:
        Path(partial).unlink(missing_ok=True)
    return target


def _from_hub(name: str) -> Path:
    owner, _, rest = name.removeprefix(HUB).partition("/")
    repository, _, file = rest.partition("/")
    repository, _, revision = repository.partition("@")
    if not owner or not repository:
        raise ValueError(
            f"{name!r} does not name a model of the Hub; write hf://owner/name, hf://owner/name@revision or "
            "hf://owner/name/file.safetensors"
        )
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise ImportError(f"{name!r} is on the Hugging Face Hub, which needs pip install 'pixnet[hub]'") from error
    file = file or HUB_FILE
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file, revision=revision or None))
    except (OSError, HfHubHTTPError) as error:  # no network, no such repository or file, or no access to it
        raise ConnectionError(f"{file} of {name!r} could not be downloaded: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
