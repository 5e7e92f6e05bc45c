"""Models by address, and their cards."""

from __future__ import annotations

import hashlib
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import pixnet as px
from pixnet._evidence import COLUMNS, evidence_of


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    px.models.PixNet(["A", "B"], pretrained=False).save(path, dtype="float16")
    return path.read_bytes()


@pytest.fixture
def server(content, tmp_path, monkeypatch):
    """A server of one model, also as the Hub's; yields its address and the paths that were asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self, body=True):
            asked.append(f"{self.command} {self.path}")
            self.send_response(200 if self.path.endswith("model.safetensors") else 404)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", '"abc"')
            self.send_header("X-Repo-Commit", "1" * 40)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_HEAD(self):
            self.do_GET(body=False)

        def log_message(self, *args):
            pass

    monkeypatch.setattr(px.settings, "cache_dir", tmp_path / "cache")
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}", asked
    found.shutdown()
    found.server_close()


def test_a_url_with_a_hash(server, content):
    address, asked = server
    url = f"{address}/model.safetensors"
    right = hashlib.sha256(content).hexdigest()
    for _ in range(2):
        assert px.models.load(f"{url}#sha256:{right}").genes == ["A", "B"]
    assert asked == ["GET /model.safetensors"]  # kept after the first
    with pytest.raises(ValueError, match=f"gave a file with SHA-256 {right}, not {'0' * 64}.*Nothing was kept"):
        px.models.load(f"{url}#sha256:{'0' * 64}")
    with pytest.raises(ValueError, match="has no hash"):
        px.models.load(url)
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        px.models.load(f"{address}/none#sha256:{'1' * 64}")
    assert [p.name for p in (px.settings.cache_dir / "models").iterdir()] == [f"{right}.safetensors"]


def test_the_hub(server, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    address, asked = server
    local = partial(hub.hf_hub_download, endpoint=address, cache_dir=tmp_path)
    monkeypatch.setattr(hub, "hf_hub_download", local)
    assert px.models.load("hf://owner/name@v1").genes == ["A", "B"]
    assert "GET /owner/name/resolve/v1/model.safetensors" in [line.replace("1" * 40, "v1") for line in asked]
    with pytest.raises(ConnectionError, match=r"other\.bin of"):
        px.models.load("hf://owner/name/other.bin")
    with pytest.raises(ValueError, match="write hf://owner/name"):
        px.models.load("hf://owner")


def test_cards():
    shipped = px.models.load("her2st").card()
    assert "| trained on | C2 (187 spots); C3 (180 spots) |" in shipped
    model = px.models.PixNet(["A", "B"], n_programs=3, pretrained=False)
    assert "How this model was trained is not recorded" in model.card()
    assert "carries no held-out evidence" in model.card()
    r = np.array([0.1, 0.5])
    model.evidence = evidence_of(50, 100, 10, dict.fromkeys(COLUMNS, r) | {"validation_pearson_low": r - 0.2})
    text = model.card()
    assert "over 50 held-out shapes of 100 µm² on average. Median over 2 genes: 0.30. For 1 of them" in text
    assert text.index("| B | 0.50 | 0.30 to 0.50 | 0.50 |") < text.index("| A | 0.10 |")
