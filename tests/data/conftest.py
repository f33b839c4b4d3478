"""A server on this machine that gives a data set as the Hugging Face hub does."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

import huggingface_hub
import pytest

OWNER_NAME = "someone/queries"


class Hub:
    """`files` (path -> bytes) of one repository, on one branch; `requests` are the paths that were asked for."""

    def __init__(self, url: str):
        self.url, self.files, self.requests = url, {}, []

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of GET; the endpoints that snapshot_download uses."""
        self.requests.append(path)
        path = urllib.parse.unquote(urllib.parse.urlsplit(path).path)
        api, resolve = f"/api/datasets/{OWNER_NAME}", f"/datasets/{OWNER_NAME}/resolve/{self.commit}/"
        if path in (f"{api}/revision/{name}" for name in ("main", self.commit)):
            return self._json({"id": OWNER_NAME, "sha": self.commit, "private": False, "siblings": [], "tags": []})
        if path.rstrip("/") == f"{api}/tree/{self.commit}":
            return self._json(
                [
                    {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                    for name, body in self.files.items()
                ]
            )
        name = path.removeprefix(resolve)
        if path.startswith(resolve) and name in self.files:
            body = self.files[name]
            return 200, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": self.commit}, body
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def _json(self, value) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@contextlib.contextmanager
def serve():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub, which huggingface_hub asks in place of the real one, with an empty cache."""
    with serve() as hub:
        # What HF_ENDPOINT, HF_HUB_OFFLINE=0 and HF_HOME set in a new process.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        yield hub
