"""A Space: a folder that runs the explorer by itself, under the name that the hub gives it."""

import os
import re
import socket
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path

import pytest
from support.commands import typed
from support.hub import Hub, hub_of

pytest.importorskip("gradio", reason="the extra `explore` is not installed")

UNNEEDED = ("lightning", "webdataset", "wandb", "timm", "torchmetrics", "torch_fidelity", "torchvision")
RUN = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({UNNEEDED}))  # as where requirements.txt alone is installed
sys.argv = ["app.py", *sys.argv[1:]]
runpy.run_path("app.py", run_name="__main__")
"""


def ask(port: int, host: str) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/", headers={"Host": host, "X-Forwarded-Host": host, "X-Forwarded-Proto": "https"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_it_runs_by_itself_and_answers_to_its_name(tmp_path, capsys):
    said = typed(capsys, tmp_path, "export", "checkpoint=digits", "out=x", "format=space", "license=mit")
    assert said.status == 0, said.words
    folder = tmp_path / "x"
    assert {path.name for path in folder.iterdir()} == {"README.md", "app.py", "requirements.txt", "model", "dcdit"}
    head = (folder / "README.md").read_text().split("---")[1]
    pins = dict(line.split("==") for line in (folder / "requirements.txt").read_text().split())
    assert {'sdk: "gradio"', 'app_file: "app.py"', 'license: "mit"', f'sdk_version: "{pins["gradio"]}"'} < set(
        head.splitlines()
    )
    assert all(re.fullmatch(r"[\d.]+", number) for number in pins.values())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    source = folder / "dcdit" / "explore.py"  # which runs, not that of the tests
    source.write_text(source.read_text().replace("The explorer is at", "The copy is at"))
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = inherited | {"SPACE_HOST": "me-space.hf.space"}
    command = [sys.executable, "-c", RUN, f"port={port}"]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as app:
        try:
            said = ""
            while "The copy is at" not in said and (line := app.stdout.readline()):
                said += line.decode()
            assert "The copy is at" in said, said
            status, page = ask(port, "me-space.hf.space")
            other, _ = ask(port, "elsewhere.example.org")
        finally:
            app.terminate()
    assert (status, other) == (200, 421)
    assert "https://me-space.hf.space" in page
    again = typed(capsys, tmp_path, "export", "checkpoint=digits", "out=x", "format=space")
    assert (again.status, "out=x is there: a Space is written into a new or empty folder" in again.words) == (2, True)


def test_it_is_pushed_as_a_space(tmp_path, capsys, monkeypatch):
    asked = []
    real = Hub.accept
    monkeypatch.setattr(Hub, "accept", lambda hub, request: asked.append(request.path) or real(hub, request))
    with hub_of({}, tmp_path / "cache") as hub:
        hub.new = tmp_path / "hub"
        command = ("export", "checkpoint=digits", "out=x", "format=space", "push=me/space")
        said = typed(capsys, tmp_path, *command)
    assert said.status == 0, said.words
    assert any(path.startswith("/api/spaces/me/space/commit") for path in asked)
    sent = {path.relative_to(tmp_path / "hub" / "me" / "space") for path in (tmp_path / "hub").rglob("*.*")}
    assert {Path("app.py"), Path("README.md"), Path("model/model.safetensors"), Path("dcdit/explore.py")} < sent
