"""A local server that speaks Google Cloud Storage, and the variables with which gcsfs and TensorStore find it.

python -m tests.io.gcs PORT BUCKET      serves until it is killed
"""

import contextlib
import functools
import http.server
import logging
import re
import sys
import threading
import urllib.parse
from typing import Any

from gcp_storage_emulator import server, storage
from gcp_storage_emulator.handlers import buckets

_one_at_a_time = threading.RLock()  # the emulator expects one client; here are several processes, of many threads each


class _Refused(Exception):
    """A precondition does not hold."""


class _Storage(storage.Storage):
    """With the precondition by which the store makes an object only where there is none, or replaces one it knows."""

    generation: str | None = None

    def create_file(self, bucket_name: str, file_name: str, *args: Any, **options: Any) -> None:
        if self.generation is not None:
            try:
                present = self.get_file_obj(bucket_name, file_name)["generation"]
            except storage.NotFound:
                present = "0"
            if present != self.generation:
                raise _Refused
        super().create_file(bucket_name, file_name, *args, **options)


class _Handler(server.RequestHandler):
    def _alone(self, act: Any) -> None:
        with _one_at_a_time:
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            self.storage.generation = query.get("ifGenerationMatch", [None])[0]
            try:
                if "/moveTo/" in self.path:  # which the emulator does not have; gcsfs copies and deletes then
                    return self._end(http.HTTPStatus.BAD_REQUEST)
                act()
            except _Refused:
                self._end(http.HTTPStatus.PRECONDITION_FAILED)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client was killed

    def end_headers(self) -> None:
        """With an object's generation, by which TensorStore replaces what it has read: the emulator leaves it out."""
        found = re.search(r"/b/([^/]+)/o/([^/?]+)\?(?:.*&)?alt=media", self.path)
        if self.command == "GET" and found:
            with contextlib.suppress(storage.NotFound):
                read = self.storage.get_file_obj(found[1], urllib.parse.unquote(found[2]))
                self.send_header("x-goog-generation", read["generation"])
        super().end_headers()

    def _end(self, status: http.HTTPStatus) -> None:
        self.send_response(status)
        self.end_headers()

    def do_GET(self) -> None:
        self._alone(super().do_GET)

    def do_POST(self) -> None:
        self._alone(super().do_POST)

    def do_PUT(self) -> None:
        self._alone(super().do_PUT)

    def do_DELETE(self) -> None:
        self._alone(super().do_DELETE)


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size, daemon_threads = 128, True


def start(port: int, bucket: str) -> _Server:
    """A server with a bucket; port 0 is a free one, see server_address."""
    logging.getLogger(server.__name__).setLevel(logging.CRITICAL)
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    kept = _Storage(use_memory_fs=True)
    buckets.create_bucket(bucket, kept)
    made = _Server(("127.0.0.1", port), functools.partial(_Handler, kept))
    threading.Thread(target=made.serve_forever, daemon=True).start()
    return made


def variables(made: _Server) -> dict[str, str]:
    address = f"http://127.0.0.1:{made.server_address[1]}"
    names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
    # Without credentials, which would be looked for at addresses of Google's machines, for seconds each time.
    return dict.fromkeys(names, address) | {"GOOGLE_CLOUD_PROJECT": "any", "FSSPEC_GS_TOKEN": "anon"}


if __name__ == "__main__":
    start(int(sys.argv[1]), sys.argv[2])
    threading.Event().wait()
