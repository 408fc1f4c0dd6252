"""The site as a reader sees it: built, served, and opened in headless Chromium. SITE_PICTURES=FOLDER keeps the screenshots."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DARK = "--blink-settings=preferredColorScheme=0"
PAGES = {
    "front": "index.html",
    "tutorial": "first-student.html",
    "explanation": "method.html",
    "api": "api.html",
    "commands": "commands.html",
    "speed": "performance.html",
    "quality": "quality.html",
}

pytestmark = pytest.mark.slow


# A search runs in a worker, which Chromium does not wait for. This page loads until the search has results, or 30 seconds.
SEARCH = """<!doctype html><style>iframe { width: 1280px; height: 900px; border: 0 } body { margin: 0 }</style>
<iframe src="/index.html?q=QUERY"></iframe><img src="/_wait" hidden>
<script>
const look = setInterval(() => {
  const links = [...document.querySelector('iframe').contentDocument.querySelectorAll('a.md-search-result__link')];
  if (!links.length) return;
  clearInterval(look);
  document.body.insertAdjacentHTML('beforeend', links.map(({ href }) => `<p hidden>found: ${href}</p>`).join(''));
  fetch('/_found');
}, 100);
</script>"""


class Site(SimpleHTTPRequestHandler):
    """The built site, and the page that searches it."""

    found: threading.Event

    def do_GET(self) -> None:
        if self.path.startswith("/_search?"):
            self.answer(SEARCH.replace("QUERY", self.path.partition("?")[2]))
        elif self.path == "/_found":
            self.found.set()
            self.answer("")
        elif self.path == "/_wait":
            self.found.wait(30)
            self.found.clear()
            self.answer("")
        else:
            super().do_GET()

    def answer(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the built site."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: install Debian's chromium")
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install '.[docs]'")
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "--site-dir", str(place)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(type("Here", (Site,), {"found": threading.Event()}), directory=str(place))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def opened(address: str, picture: Path | None = None, *flags: str, size: str = "1280,900", waits: bool = True) -> str:
    """What the page is after its scripts ran, as HTML; with a name, its picture is written as well.

    Without `waits`, what it is when it has loaded.
    """
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", f"--window-size={size}"]
    command += ["--virtual-time-budget=15000"] * waits + list(flags)
    if picture is not None:
        subprocess.run([*command, f"--screenshot={picture}", address], capture_output=True, check=True, timeout=120)
    done = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def pictures(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("SITE_PICTURES", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def brightness(picture: Path) -> float:
    return float(np.asarray(Image.open(picture).convert("L")).mean())


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_drawn_light_and_dark(name: str, site: str, tmp_path: Path) -> None:
    light, dark = (pictures(tmp_path) / f"{name}-{scheme}.png" for scheme in ("light", "dark"))
    html = opened(f"{site}/{PAGES[name]}", light)
    assert 'data-md-color-scheme="default"' in html
    assert 'data-md-color-scheme="slate"' in opened(f"{site}/{PAGES[name]}", dark, DARK)
    assert brightness(light) > 170
    assert brightness(dark) < 90
    for source in re.findall(r'<img[^>]* src="([^"]+)"', html):
        assert source.startswith("data:") or source.partition("://")[0] != "https", f"{source} is fetched from another server"


def test_the_api_page_has_every_public_name(site: str) -> None:
    import pyard

    html = opened(f"{site}/api.html")
    missing = [name for name in pyard.__all__ if name != "__version__" and f'id="pyard.{name}"' not in html]
    assert missing == []


@pytest.mark.parametrize(("query", "page"), [("preemption", "clusters.html"), ("generate_trajectories", "api.html")])
def test_the_search_finds(query: str, page: str, site: str, tmp_path: Path) -> None:
    html = opened(f"{site}/_search?{query}", pictures(tmp_path) / f"search-{query}.png", waits=False)
    links = re.findall(r"found: ([^<]+)<", html)
    assert any(page in link for link in links), links


def test_a_narrow_window_shows_the_page(site: str, tmp_path: Path) -> None:
    picture = pictures(tmp_path) / "narrow.png"
    html = opened(f"{site}/index.html", picture, size="500,900")
    assert "Few-step students" in html
    assert brightness(picture) > 150
