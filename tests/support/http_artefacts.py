"""An artefact store behind HTTP, as MLflow uses one, that answers with any status."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Store:
    """What an artefact store behind HTTP got, and the status it answers with."""

    def __init__(self) -> None:
        self.status = 200
        self.files: dict[str, bytes] = {}
        self.address = ""


@contextmanager
def http_store() -> Iterator[Store]:
    store = Store()

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            if store.status == 200:
                store.files[self.path.rpartition("/artifacts/")[2]] = data
            self.send_response(store.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Not in the tests' output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    store.address = f"http://127.0.0.1:{server.server_address[1]}/api/2.0/mlflow-artifacts"
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
