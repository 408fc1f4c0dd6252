"""Serve the page and a student to this machine's browser, with the headers that threads need; standard library alone.

npm ci --prefix examples/browser
python examples/browser/serve.py student.onnx --port 8080
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).resolve().parent
LIBRARY = PAGE / "node_modules" / "onnxruntime-web" / "dist"


class Handler(SimpleHTTPRequestHandler):
    """Files of the page, and the student as /student.onnx, or as /student/ if it is a folder."""

    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript", ".wasm": "application/wasm"}  # noqa: RUF012

    def __init__(self, *arguments: object, student: Path, **named: object):
        self.student = student
        super().__init__(*arguments, directory=str(PAGE), **named)  # type: ignore[arg-type]

    def translate_path(self, path: str) -> str:
        """Where a requested file lies."""
        below = path.split("?")[0].removeprefix("/student/")
        if below == "/student.onnx" and self.student.is_file():
            return str(self.student)
        if self.student.is_dir() and not below.startswith("/") and ".." not in below.split("/"):
            return str(self.student / below)
        return super().translate_path(path)

    def end_headers(self) -> None:
        """Threads share memory, which browsers allow to pages that are isolated from other origins alone."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Say only what failed."""

    def log_error(self, format: str, *arguments: object) -> None:
        """One line for what failed."""
        print(f"{getattr(self, 'path', '')}: {format % arguments}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "student", type=Path, help="file written by python -m pyard.export --form step, or folder of a text-to-image student"
    )
    parser.add_argument("--port", type=int, default=8080, help="port to listen on; 0 picks a free one")
    options = parser.parse_args()
    if not options.student.is_file() and not (options.student / "config.json").is_file():
        sys.exit(f"{options.student}: no such file; expected one written by python -m pyard.export --form step --onnx FILE")
    if not LIBRARY.is_dir():
        sys.exit(f"{LIBRARY} is missing: run npm ci --prefix {PAGE}")
    server = ThreadingHTTPServer(("127.0.0.1", options.port), functools.partial(Handler, student=options.student.resolve()))
    query = "?student=student/" if options.student.is_dir() else ""
    print(f"http://localhost:{server.server_address[1]}/{query}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
