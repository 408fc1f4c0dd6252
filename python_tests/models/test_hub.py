"""huggingface_hub's real client against a small server of our own that speaks as much of the hub's protocol as it asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_student
from own_teachers import TEXT, student_of, text_teacher

import pyard
from pyard.errors import InputError
from pyard.models.student import Student

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """One repository in memory."""

    files: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/someone/student", "name": "someone/student"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            wanted = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]})
        elif self.path.endswith("/commit/main"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer({"commitOid": COMMIT, "commitUrl": f"http://{self.headers['Host']}/someone/student/commit/{COMMIT}"})
        else:
            self.send_error(404)

    def do_GET(self) -> None:
        name = self.path.split(f"/resolve/{COMMIT}/")[-1].split("?")[0]
        if self.path.startswith("/api/models/someone/student/revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer(
                {"id": "someone/student", "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            )
        elif self.path.startswith("/api/models/someone/student/tree/"):
            tree = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in self.files.items()
            ]
            self.answer(tree)
        elif name in self.files or (name := name.split("/resolve/main/")[-1]) in self.files:
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.files[name])))
            self.send_header("ETag", f'"{hashlib.sha1(self.files[name]).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(self.files[name])
        else:
            self.send_response(404)
            self.send_header(
                "X-Error-Code", "EntryNotFound"
            )  # by which the client tells a missing file from a missing repository
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET  # noqa: N815 (the server's own form)

    def answer(self, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    files: dict[str, bytes] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"files": files}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", files
    server.shutdown()
    server.server_close()


def run(code: str, endpoint: str, cache: Path) -> str:
    # The client reads its settings once, when it is imported: so in a process of its own.
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    folder = Path(pyard.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_pushed_student_is_read_back_by_its_name(hub, tmp_path: Path):
    endpoint, files = hub
    student = tiny_student(2, history_layers=1)
    student.save_pretrained(tmp_path / "student")
    folder = str(tmp_path / "student")
    push = f"import pyard; print(pyard.Student.from_pretrained({folder!r}).push_to_hub('someone/student', token='t'))"
    assert run(push, endpoint, tmp_path / "cache").strip() == f"{endpoint}/someone/student/commit/{COMMIT}"
    assert set(files) == {"config.json", "model.safetensors", "README.md"}
    assert b'from_pretrained("someone/student")' in files["README.md"]
    assert files["model.safetensors"] == (tmp_path / "student" / "model.safetensors").read_bytes()
    read = f"import pyard; pyard.Student.from_pretrained('someone/student').save_pretrained({str(tmp_path / 'again')!r})"
    run(read, endpoint, tmp_path / "other cache")
    again = Student.from_pretrained(tmp_path / "again")
    assert again.config == student.config
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), student.state_dict().values(), strict=True))


@pytest.mark.slow
def test_a_readme_on_the_hub_that_is_not_pyard_s_stays(hub, tmp_path: Path):
    endpoint, files = hub
    pyard.ARDPipeline(tiny_student(2, history_layers=1)).save_pretrained(tmp_path / "pipe")
    push = (
        f"import pyard; pyard.ARDPipeline.from_pretrained({str(tmp_path / 'pipe')!r}).push_to_hub('someone/student', token='t')"
    )
    run(push, endpoint, tmp_path / "cache 1")
    card = files["README.md"]
    assert b'ARDPipeline.from_pretrained("someone/student")' in card
    files["README.md"] = card.replace(b"| steps | 2 |", b"| steps | 3 |")
    run(push, endpoint, tmp_path / "cache 2")
    assert files["README.md"] == card, "pyard's own card is written again"
    files["README.md"] = b"# Mine"
    run(push, endpoint, tmp_path / "cache 3")
    assert files["README.md"] == b"# Mine"


@pytest.mark.slow
def test_a_name_that_is_nowhere_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    code = """
import pyard
try:
    pyard.Student.from_pretrained("someone/student")
except pyard.InputError as error:
    print(error)
"""
    out = run(code, "http://127.0.0.1:9", tmp_path / "cache")
    assert "someone/student: neither an existing path nor a readable repository" in out
    with pytest.raises(InputError, match=r"no config\.json"):
        Student.from_pretrained(tmp_path / "nowhere")


@pytest.mark.slow
def test_a_pipeline_is_read_by_its_name_with_somebody_else_s_backbone(hub, tmp_path: Path):
    endpoint, files = hub
    student = student_of(text_teacher(), num_steps=2)
    pyard.ARDPipeline(student).save_pretrained(tmp_path / "pipe")
    files |= {str(f.relative_to(tmp_path / "pipe")): f.read_bytes() for f in (tmp_path / "pipe").rglob("*") if f.is_file()}
    code = f"""
import sys
sys.path.append({str(Path(__file__).parents[1])!r})
import pyard
pipe = pyard.ARDPipeline.from_pretrained("someone/student", network="own_backbones:TextBackbone")
pipe.student.student.save_pretrained({str(tmp_path / "again")!r})
"""
    run(code, endpoint, tmp_path / "cache")
    again = Student.from_pretrained(tmp_path / "again", network=TEXT)
    assert again.config == student.config
    assert again.num_conditions == 5
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), student.state_dict().values(), strict=True))
