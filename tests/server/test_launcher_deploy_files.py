"""The files in `deploy/` parse, and name only options, variables, ports and files that there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from turbo_backend.server.cli import app
from turbo_backend.settings import list_variables

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted(
    path
    for path in DEPLOY.iterdir()
    if path.suffix in (".md", ".service", ".yaml", ".yml", "") or "Docker" in path.name
)
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"]["turbodiffusion"]
DEPLOYMENT, SERVICE = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
CONTAINER: dict[str, Any] = DEPLOYMENT["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_variables_are_known(path: Path) -> None:
    named = set(re.findall(r"\bTURBO_[A-Z_]*[A-Z]", path.read_text()))
    assert named <= {variable.name for variable in list_variables()}


@pytest.mark.parametrize("arguments", [COMPOSE["command"], CONTAINER["args"]])
def test_commands_are_understood(arguments: list[str]) -> None:
    command = typer.main.get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
    parsed = command.make_context("serve", list(arguments[1:])).params
    assert parsed["host"] == "0.0.0.0"  # noqa: S104  (inside a container)
    assert parsed["exit_timeout"] + 15 < DEPLOYMENT["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert parsed["exit_timeout"] + 15 < int(COMPOSE["stop_grace_period"].removesuffix("s"))
    ports = {parsed["http_port"], parsed["grpc_port"], parsed["metrics_port"]}
    assert {port["containerPort"] for port in CONTAINER["ports"]} == ports
    assert {int(port.rpartition(":")[2]) for port in COMPOSE["ports"]} == ports
    assert all(port.startswith("127.0.0.1:") for port in COMPOSE["ports"])


def test_kubernetes_parts_fit_each_other() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert SERVICE["spec"]["selector"].items() <= labels.items()
    names = {port["name"] for port in CONTAINER["ports"]}
    assert {port["targetPort"] for port in SERVICE["spec"]["ports"]} <= names
    volumes = {volume["name"] for volume in DEPLOYMENT["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == volumes


def test_the_image_gets_what_the_build_reads() -> None:
    kept = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept)
