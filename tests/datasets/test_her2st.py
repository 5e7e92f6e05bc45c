"""The her2st sections: local files, downloads from a server on this machine, and damage."""

from __future__ import annotations

import gzip
import http.server
import threading
from functools import partial

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pixnet import settings
from pixnet._sdata.pixel_size import find_mpp
from pixnet.datasets import _her2st, her2st


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A tiny copy of the repository's data folder, whose own hashes are the registry."""
    root = tmp_path / "mirror"
    names = _her2st._section_files("A1")
    for name in names.values():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    spots = pd.DataFrame({"x": [1, 2, 1, 2, 3], "y": [1, 1, 2, 2, 2]})
    spots["new_x"], spots["new_y"] = spots.x + 0.1, spots.y - 0.1
    spots["pixel_x"], spots["pixel_y"] = spots.new_x * 290, spots.new_y * 290
    spots["selected"] = [1, 1, 1, 1, 0]
    spots.to_csv(root / names["spots"], sep="\t", index=False)
    counts = pd.DataFrame([[1, 0], [2, 3], [0, 1]], index=["1x1", "2x1", "1x2"], columns=["ACTB", "CD3E"])
    (root / names["counts"]).write_bytes(gzip.compress(counts.to_csv(sep="\t").encode()))
    pixels = np.random.default_rng(0).integers(0, 256, (700, 750, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / names["image"])
    registry = {name: _her2st.git_blob_sha1(root / name) for name in names.values()}
    registry |= {name: sha1 for name, sha1 in _her2st._registry().items() if name not in registry}
    monkeypatch.setattr(_her2st, "_registry", lambda: registry)
    monkeypatch.setattr(_her2st.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("PIXNET_DATA_DIR", raising=False)
    monkeypatch.setattr(settings, "progress", False)
    cache = settings.cache_dir
    settings.cache_dir = tmp_path / "cache"
    yield root
    settings.cache_dir = cache


@pytest.fixture
def server(mirror, monkeypatch):
    """The mirror over HTTP; counts the requests."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(mirror)))
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(_her2st, "BASE_URL", f"http://127.0.0.1:{httpd.server_port}/")
    yield requests
    httpd.shutdown()
    httpd.server_close()


def test_all_sections_are_known():
    names = _her2st.sections()
    assert len(names) == 36
    assert names[0] == "A1"
    assert names[-1] == "H3"
    for name in names:
        parts = _her2st._section_files(name)
        assert len(set(parts.values())) == 3
        assert f"/{name}/" in parts["image"]


def test_unknown_section_lists_the_valid_ones():
    with pytest.raises(ValueError, match="no section 'Z9'.*A1.*H3"):
        her2st("Z9")


def test_git_blob_id(tmp_path):
    file = tmp_path / "hello"
    file.write_bytes(b"hello\n")
    assert _her2st.git_blob_sha1(file) == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object


def test_download_verify_and_cache(server):
    sdata = her2st("A1")
    assert list(sdata["spots"].index) == ["1x1", "2x1", "1x2"]  # 2x2 has no counts, 3x2 is not selected
    assert sdata["spots_counts"].X.toarray().tolist() == [[1, 0], [2, 3], [0, 1]]
    assert find_mpp(sdata, "he") == pytest.approx(200 / 290)
    assert len(server) == 3
    her2st("A1")
    assert len(server) == 3  # from the cache


def test_damaged_cache_is_fetched_again(server):
    her2st("A1")
    file = settings.cache_dir / "her2st" / _her2st.COMMIT[:8] / _her2st._section_files("A1")["spots"]
    file.write_bytes(file.read_bytes()[:-3])
    her2st("A1")
    assert len(server) == 4


def test_corrupted_download_is_refused_and_not_kept(server, mirror):
    name = _her2st._section_files("A1")["image"]
    content = bytearray((mirror / name).read_bytes())
    content[1000] ^= 1
    (mirror / name).write_bytes(content)
    with pytest.raises(ValueError, match="git blob id .*Nothing was kept"):
        her2st("A1")
    assert sum(name in path for path in server) == _her2st.ATTEMPTS
    left = [file.name for file in (settings.cache_dir / "her2st").rglob("*") if file.is_file()]
    assert all(not file.startswith(".download") and not file.endswith("jpg") for file in left)


def test_missing_on_the_server(server, mirror):
    (mirror / _her2st._section_files("A1")["counts"]).unlink()
    with pytest.raises(ConnectionError, match="404.*path="):
        her2st("A1")


def test_path_and_data_dir(mirror, tmp_path, monkeypatch):
    assert len(her2st("A1", path=mirror)["spots"]) == 3
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "her2st").symlink_to(mirror)
    monkeypatch.setenv("PIXNET_DATA_DIR", str(tmp_path / "data"))
    assert len(her2st("A1")["spots"]) == 3
    with pytest.raises(FileNotFoundError, match="'B1' is not complete.*complete sections there: A1"):
        her2st("B1")
    with pytest.raises(FileNotFoundError, match="has no folder ST-cnts"):
        her2st("A1", path=tmp_path)


@pytest.mark.data
def test_real_section(shared_data):
    sdata = her2st("B4", path=shared_data / "her2st")
    assert sdata["spots_counts"].shape == (283, 15289)
    assert sdata["he"]["scale0"]["image"].shape[0] == 3
    assert sdata["he"]["scale0"]["image"].dtype == np.uint8
    assert 0.68 < find_mpp(sdata, "he") < 0.70
    assert set(sdata.coordinate_systems) == {"global", "um", "pixnet_um"}
    assert 550 < np.median(np.asarray(sdata["spots_counts"].X.sum(axis=1))) < 750
