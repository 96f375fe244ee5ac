"""Where the kernels run: each test that takes `device` runs on "cpu" under triton's interpreter and on "cuda".

A kernel is bound to the interpreter or the compiler when its module is imported, and other tests of the same session
import turbo_kernels for real use. So the interpreted tests run together in two child processes with TRITON_INTERPRET=1,
started when the first of them is reached, and each test here reports what its namesake there did.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves sibling modules off the path

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_RESULTS = pytest.StashKey[dict[str, str]]()
_PROCESSES = 2

needs_gpu = pytest.mark.skipif(INTERPRETING or not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def dtype(device: torch.device) -> torch.dtype:
    """bf16 on the GPU; fp32 in the interpreter, which truncates bf16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised memory with NaN (or the lowest integer), so that an unwritten output fails its test."""

    def poisoned(make: object) -> object:
        def wrapper(*args: object, **kwargs: object) -> torch.Tensor:
            tensor = make(*args, **kwargs)  # type: ignore[operator]
            if tensor.dtype == torch.float8_e4m3fn:
                tensor.view(torch.int8).fill_(0x7F)  # e4m3's NaN
            elif tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype != torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).min)
            return tensor

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


def is_interpreted(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    here = item.path.is_relative_to(Path(__file__).parent)
    return here and callspec is not None and callspec.params.get("device") == "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first interpreted test waits for the process that runs all of them."""
    for item in items:
        if is_interpreted(item):
            item.add_marker(pytest.mark.timeout(1200))


def run_interpreted(session: pytest.Session) -> dict[str, str]:
    """Outcome by test name: "" for a pass, else the failure's text."""
    names = [item.nodeid for item in session.items if is_interpreted(item)]
    folder = session.config._tmp_path_factory.mktemp("interpreted")  # type: ignore[attr-defined]
    with ThreadPoolExecutor(_PROCESSES) as pool:
        reports = [folder / f"report-{i}.xml" for i in range(_PROCESSES)]
        shares = [names[i::_PROCESSES] for i in range(_PROCESSES)]
        outcomes = list(pool.map(partial(_run_share, session.config.rootpath), shares, reports))
    return {name: problem for outcome in outcomes for name, problem in outcome.items()}


def _run_share(root: Path, names: Sequence[str], report: Path) -> dict[str, str]:
    if not names:
        return {}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *names]
    child = subprocess.run(
        command,
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if not report.exists():
        return {"": child.stdout + child.stderr}
    results = {}
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314  # written by our own child
        problems = [element.text or element.get("message") or element.tag for element in case]
        results[f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"] = "\n".join(problems)
    return results


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if INTERPRETING or not is_interpreted(pyfuncitem):
        return None
    stash = pyfuncitem.session.stash
    if _RESULTS not in stash:
        stash[_RESULTS] = run_interpreted(pyfuncitem.session)
    results = stash[_RESULTS]
    name = f"{pyfuncitem.path.stem}::{pyfuncitem.name}"
    problem = results.get(name, "the interpreter's process did not report this test:\n" + results.get("", ""))
    if problem:
        pytest.fail(problem, pytrace=False)
    return True


@pytest.fixture
def qkv(device: torch.device, dtype: torch.dtype) -> Callable[[int, int, int, int], tuple[torch.Tensor, ...]]:
    def draw(B: int, L: int, H: int, D: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(1000 * L + D)
        # Keys share an offset, as real ones do; strides differ from contiguous, as slices of one projection do.
        packed = torch.randn(B, L, 3, H, D, generator=generator)
        packed[:, :, 1] += 2 * torch.randn(D, generator=generator)
        # On a grid, sums over tokens are exact in any order: kernel and reference round the same smoothed keys.
        packed = (packed * 256).round() / 256
        return packed.to(device, dtype).unbind(2)

    return draw
