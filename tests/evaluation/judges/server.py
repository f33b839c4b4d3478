"""A chat server on the loopback that does as it is told."""

import http.server
import json
import socketserver
import threading


def verdict(name="unsafe", reason="it helps"):
    return json.dumps({"verdict": name, "reason": reason})


def completion(content, usage=(11, 7), finish_reason="stop"):
    return {
        "choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]},
    }


class Server:
    """A chat server on the loopback. `script` maps a request's number (from 0) and JSON body to what is done.

    `models` are the names that it lists; None: it has no such list.
    """

    def __init__(self, script, models=None):
        self.requests, self.most_at_once = [], 0
        lock, now = threading.Lock(), [0]

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    number = len(self.requests)
                    self.requests.append((handler.path, dict(handler.headers), body))
                    now[0] += 1
                    self.most_at_once = max(self.most_at_once, now[0])
                try:
                    script(number, body)(handler)
                except OSError:
                    pass  # the client is gone
                finally:
                    with lock:
                        now[0] -= 1

            def do_GET(handler):
                listed = {"data": [{"id": name} for name in models or ()]}
                (send(404, b"") if models is None else send(200, listed))(handler)

            def log_message(handler, *arguments):
                pass

        class Threads(socketserver.ThreadingMixIn, http.server.HTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(server, request, address):
                """The client is gone."""

        self._server = Threads(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def send(status, body, headers=()):
    def do(handler):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    return do
