"""What reaches the hub, from a stand-in of its API on this machine, and one line for whatever it refuses."""

import base64
import http.server
import json
import re
import threading

import huggingface_hub
import pytest

from msd_jax.errors import UserError
from msd_jax.io import uploads

NAME, TOKEN = "someone/aligned", "hf_secret_0123456789"


class Hub(http.server.ThreadingHTTPServer):
    """One model repository: `files` (path -> bytes) once a commit has come, `private` once it is made."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.objects, self.private, self.refuses = {}, {}, None, {}

    def answer(self, method, path, headers, body):
        """(status, JSON) of a request; the endpoints that uploads use."""
        for pattern, status in self.refuses.items():
            if re.search(pattern, path):
                return status, {"error": "no"}
        if headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/storage"):
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            return 200, {"name": "someone", "type": "user", "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/repos/create":
            if self.private is not None:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{NAME}"}
            asked = json.loads(body)
            self.private = asked.get("visibility") == "private" or asked.get("private") is True
            return 200, {"url": f"{self.url}/{asked.get('organization', 'someone')}/{asked['name']}"}
        if path.startswith(f"/api/models/{NAME}/preupload/"):
            modes = {True: "lfs", False: "regular"}
            files = [{"path": f["path"]} for f in json.loads(body)["files"]]
            for file in files:
                file |= {"uploadMode": modes[file["path"].endswith(".safetensors")], "shouldIgnore": False, "oid": None}
            return 200, {"files": files}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == f"/{NAME}.git/info/lfs/objects/batch":
            href = {o["oid"]: f"{self.url}/storage/{o['oid']}" for o in json.loads(body)["objects"]}
            objects = [{"oid": o, "size": 1, "actions": {"upload": {"href": href[o]}}} for o in href]
            return 200, {"transfer": "basic", "objects": objects}
        if path.startswith("/storage/") and method == "PUT":
            self.objects[path.removeprefix("/storage/")] = body
            return 200, {}
        if path.startswith(f"/api/models/{NAME}/commit/"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.objects[value["oid"]]
            return 200, {"commitUrl": f"{self.url}/{NAME}/commit/1", "commitOid": "1" * 40, "pullRequestUrl": None}
        return 404, {"error": f"{method} {path}"}


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self.chunks())
        path = self.path.partition("?")[0]
        status, value = self.server.answer(self.command, path, self.headers, body)
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = answer

    def chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """What HF_ENDPOINT, HF_HUB_OFFLINE=0, HF_HUB_DISABLE_XET=1 and HF_TOKEN set in a new process."""
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def exported(tmp_path):
    files = {"config.json": b"{}", "README.md": b"# a card", "model.safetensors": b"\x00" * 999}
    files |= {"adapter/adapter_config.json": b"{}", "adapter/adapter_model.safetensors": b"\x01" * 99}
    for name, content in files.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content)
    return tmp_path / "out", files


@pytest.mark.parametrize("private", [True, False])
def test_model_adapter_and_card_arrive_in_one_commit(hub, exported, private):
    directory, files = exported
    assert uploads.claim(NAME, private) == f"{hub.url}/{NAME}" and hub.private is private
    uploads.upload(NAME, directory, "exported")
    assert hub.files == files
    uploads.claim(NAME, private=True)  # it is there now, and stays as it is
    assert hub.private is private


@pytest.mark.parametrize(
    ("refuses", "message"),
    [
        ({"whoami": 401}, r"--push_to_hub=someone/aligned: the hub refuses the token \(HTTP 401\)$"),
        ({"create": 403}, r"the token has no right to write there \(HTTP 403\)$"),
        ({"create": 500}, r"the hub does not take it \(HTTP 500\)$"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, refuses, message):
    hub.refuses = refuses
    with pytest.raises(UserError, match=message) as caught:
        uploads.claim(NAME, private=True)
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)


def test_what_stops_an_upload_leaves_the_files_and_says_how_to_go_on(hub, exported):
    uploads.claim(NAME, private=True)
    hub.refuses = {"commit": 403}
    with pytest.raises(UserError, match=r"no right to write there \(HTTP 403\); \S+ is whole: hf upload someone/alig"):
        uploads.upload(NAME, exported[0], "exported")


def test_no_token_no_hub_no_name(hub, monkeypatch):
    with pytest.raises(UserError, match=r"--push_to_hub=aligned: write OWNER/NAME"):
        uploads.claim("aligned", private=True)
    with pytest.raises(UserError, match=r"Repo id must use alphanumeric"):
        uploads.claim("some one/x", private=True)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"the hub cannot be reached \(ConnectError\)$"):
        uploads.claim(NAME, private=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set$"):
        uploads.claim(NAME, private=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"no token: run `hf auth login`, or set HF_TOKEN$"):
        uploads.claim(NAME, private=True)
