"""The command line over weight files, and downloads from a hub on loopback."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from turbo_backend.checkpoints import published, tiny_checkpoint_folder
from turbo_backend.checkpoints.commands import app
from turbo_backend.checkpoints.published import PublishedFile, models_with_published_files, published_files
from turbo_backend.config import MODELS

State = dict[str, torch.Tensor]
Write = Callable[..., Path]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# inspect


def test_inspect_a_good_file() -> None:
    path = tiny_checkpoint_folder() / "tiny-T2V.safetensors"
    result = run("inspect", path, "--keys")
    assert result.exit_code == 0, result.output
    assert "a denoiser of tiny (dim 256, 5 layers, 16 input channels)" in result.stdout
    assert "blocks.4.ffn.2.weight" in result.stdout
    document = json.loads(run("inspect", path, "--json", "--sha256", "--values").stdout)
    assert document["kind"] == "denoiser"
    assert document["models"] == ["tiny"]
    assert document["dtypes"] == {"bfloat16": 124, "float32": 36}, "norms and modulation stay as they are computed"
    assert document["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert document["problems"] == []
    assert "tensors" not in document
    assert len(json.loads(run("inspect", path, "--json", "--keys").stdout)["tensors"]) == 160


def test_inspect_finds_problems(dit_state: State, write: Write) -> None:
    state = {key: tensor.clone() for key, tensor in dit_state.items()}
    state["head.head.bias"][3] = float("nan")
    result = run("inspect", write(state, "a.pth"), "--values", "--json")
    assert result.exit_code == 1
    problems = json.loads(result.stdout)["problems"]
    assert "the sizes are those of no known model" in problems
    assert "head.head.bias: holds values that are not finite" in problems


def test_inspect_incomplete_file(write: Write) -> None:
    from turbo_backend.checkpoints import open_checkpoint

    checkpoint = open_checkpoint(tiny_checkpoint_folder() / "tiny-umt5.safetensors")
    state = {key: checkpoint.tensor(key) for key in checkpoint if key != "norm.weight"}
    result = run("inspect", write(state, "incomplete.pth"))
    assert result.exit_code == 1
    assert "1 missing" in result.stdout
    assert "norm.weight" in result.stdout


def test_inspect_what_cannot_be_opened(tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "absent.pth")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == f"error: {tmp_path / 'absent.pth'}: no such file\n"


# convert


def test_convert(small_state: State, write: Write, tmp_path: Path) -> None:
    source = write(small_state, "a.pth")
    result = run("convert", source, tmp_path / "b.safetensors")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path / 'b.safetensors'}: 6 tensors")
    result = run("convert", source, tmp_path / "b.safetensors")
    assert result.exit_code == 1
    assert "already exists: use --force" in result.stderr
    result = run("convert", source, tmp_path / "b.safetensors", "--force", "--json")
    document = json.loads(result.stdout)
    assert document["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    result = run("convert", source, tmp_path / "c.safetensors", "--max-shard-size", "0.06kB", "--json")
    assert json.loads(result.stdout)["path"].endswith("c.safetensors.index.json")


@pytest.mark.parametrize("arguments", [["b.bin"], ["b.safetensors", "--max-shard-size", "big"], []])
def test_convert_usage(small_state: State, write: Write, arguments: list[str]) -> None:
    assert run("convert", write(small_state, "a.pth"), *arguments).exit_code == 2


# weights


def test_published_table() -> None:
    assert models_with_published_files() == ("Wan2.1-1.3B", "Wan2.1-14B", "Wan2.2-A14B")
    files = published_files(MODELS["Wan2.2-A14B"], quant_linear=True)
    assert [(file.repository, file.name) for file in files if file.required] == [
        ("TurboDiffusion/TurboWan2.2-I2V-A14B-720P", "TurboWan2.2-I2V-A14B-high-720P-quant.pth"),
        ("TurboDiffusion/TurboWan2.2-I2V-A14B-720P", "TurboWan2.2-I2V-A14B-low-720P-quant.pth"),
        ("Wan-AI/Wan2.1-T2V-1.3B", "models_t5_umt5-xxl-enc-bf16.pth"),
        ("Wan-AI/Wan2.1-T2V-1.3B", "Wan2.1_VAE.pth"),
        ("Wan-AI/Wan2.1-T2V-1.3B", "google/umt5-xxl/tokenizer.json"),
    ]
    assert all(re.fullmatch(r"[0-9a-f]{64}", file.sha256) for file in files if file.sha256)


def test_weights_lists_what_is_absent(tmp_path: Path) -> None:
    result = run("weights", "Wan2.1-1.3B", "--checkpoint-dir", tmp_path)
    assert result.exit_code == 1
    assert "TurboWan2.1-T2V-1.3B-480P.pth" in result.stdout
    assert "11.36 GB" in result.stdout
    assert "about 2.84 GB" in result.stdout
    document = json.loads(run("weights", "Wan2.1-1.3B", "--checkpoint-dir", tmp_path, "--json").stdout)
    assert {file["state"] for file in document["files"]} == {"absent", "not needed"}
    assert list(tmp_path.iterdir()) == []


def test_weights_of_tiny_need_no_download() -> None:
    result = run("weights", "tiny", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["files"] == []


def test_weights_unknown_model() -> None:
    result = run("weights", "Wan9")
    assert result.exit_code == 2
    assert "Wan2.1-14B" in result.stderr


@dataclass
class Hub:
    """What the loopback hub serves, by `/owner/name/resolve/main/file`, and what it was asked."""

    endpoint: str
    contents: dict[str, bytes] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    fetched: list[str] = field(default_factory=list)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> bytes | None:
            content = hub.contents.get(self.path)
            if content is None:
                code = "EntryNotFound" if "/resolve/" in self.path else "RepoNotFound"
                self.send_response(404)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            return bytes(len(content)) if self.path in hub.corrupt else content

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            if "/resolve/" in self.path:  # the hub's client also asks for things of its own
                hub.fetched.append(self.path)
            content = self._answer()
            if content is not None:
                self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hub_model(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of tiny's sizes whose files are on the loopback hub in place of the published ones."""
    folder = tiny_checkpoint_folder()
    repository = "owner/tiny-files"
    entries = []
    for kind, name in (
        ("denoiser", "tiny-T2V.safetensors"),
        ("text encoder", "tiny-umt5.safetensors"),
        ("vae", "tiny-VAE.safetensors"),
        ("tokenizer", "tokenizer/tokenizer.json"),
    ):
        content = (folder / name).read_bytes()
        hub.contents[f"/{repository}/resolve/main/{name}"] = content
        entries.append(
            PublishedFile(
                kind=kind,  # type: ignore[arg-type]
                repository=repository,
                name=name,
                size=len(content),
                sha256=hashlib.sha256(content).hexdigest() if kind == "vae" else None,
            )
        )
    monkeypatch.setattr(published, "published_files", lambda model, quant_linear: tuple(entries))
    return "tiny"


def test_download(hub: Hub, hub_model: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    before = run("weights", hub_model, "--checkpoint-dir", folder, "--json")
    assert before.exit_code == 1
    assert hub.fetched == []
    assert not folder.exists()
    result = run("weights", hub_model, "--checkpoint-dir", folder, "--download", "--json")
    assert result.exit_code == 0, result.output
    assert "fetching" in result.stderr
    assert [file["state"] for file in json.loads(result.stdout)["files"]] == ["ok"] * 4
    for path, content in hub.contents.items():
        assert (folder / path.partition("/resolve/main/")[2]).read_bytes() == content
    assert len(hub.fetched) == 4
    assert run("weights", hub_model, "--checkpoint-dir", folder, "--download", "--sha256").exit_code == 0
    assert len(hub.fetched) == 4, "what is there is not fetched again"


def test_a_wrong_file_is_reported_and_not_replaced(hub: Hub, hub_model: str, tmp_path: Path) -> None:
    (tmp_path / "tiny-VAE.safetensors").write_bytes((tiny_checkpoint_folder() / "tiny-T2V.safetensors").read_bytes())
    result = run("weights", hub_model, "--checkpoint-dir", tmp_path, "--download")
    assert result.exit_code == 1
    assert "this file is a denoiser of tiny" in result.stdout
    assert "a Wan VAE (base width 16, 16 latent channels) is needed" in result.stdout
    assert len(hub.fetched) == 3


def test_corrupt_download_is_removed(hub: Hub, hub_model: str, tmp_path: Path) -> None:
    hub.corrupt.add("/owner/tiny-files/resolve/main/tiny-T2V.safetensors")
    result = run("weights", hub_model, "--checkpoint-dir", tmp_path, "--download")
    assert result.exit_code == 1
    assert "is not the published file; it was removed" in result.stderr
    assert not (tmp_path / "tiny-T2V.safetensors").exists()


def test_file_absent_from_the_hub(hub: Hub, hub_model: str, tmp_path: Path) -> None:
    del hub.contents["/owner/tiny-files/resolve/main/tiny-VAE.safetensors"]
    result = run("weights", hub_model, "--checkpoint-dir", tmp_path, "--download")
    assert result.exit_code == 1
    assert f"owner/tiny-files/tiny-VAE.safetensors: {hub.endpoint} has no such file" in result.stderr
    assert hub.fetched == [], "nothing is fetched unless everything is there"


def test_hub_out_of_reach(hub_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = run("weights", hub_model, "--checkpoint-dir", tmp_path, "--download")
    assert result.exit_code == 1
    assert "cannot be fetched from http://127.0.0.1:9" in result.stderr
    assert len(result.stderr.splitlines()) == 1
