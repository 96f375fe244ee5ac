"""One real Triton server for all tests that only call it, and small model repositories to try the launcher on."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import find_leftovers

from turbo_backend.server.process import TritonServer
from turbo_backend.settings import list_variables

#: Models of one fp32 number, by name: code, and whether it answers over the stream alone.
_MODELS = {
    # Answers with its input.
    "echo": (
        """
        import triton_python_backend_utils as pb_utils

        class TritonPythonModel:
            def execute(self, requests):
                tensors = [pb_utils.get_input_tensor_by_name(request, "X").as_numpy() for request in requests]
                return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", tensor)]) for tensor in tensors]
        """,
        False,
    ),
    # Says so in a file `busy`, sleeps as many seconds as its input says, and answers with it.
    "slow": (
        """
        import pathlib, time
        import triton_python_backend_utils as pb_utils

        class TritonPythonModel:
            def execute(self, requests):
                for request in requests:
                    tensor = pb_utils.get_input_tensor_by_name(request, "X").as_numpy()
                    pathlib.Path(__file__).with_name("busy").touch()
                    time.sleep(float(tensor[0]))
                    response = pb_utils.InferenceResponse([pb_utils.Tensor("Y", tensor)])
                    request.get_response_sender().send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        """,
        True,
    ),
}


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[TritonServer]:
    """The committed model repository with the tiny model on the CPU, started once for the whole run.

    Whatever `TURBO_*` variables the caller's shell holds count as unset. Other settings: parametrize `triton`
    indirectly with a dict of variables, which starts a server of its own.
    """
    unset = {variable.name: "" for variable in list_variables()}
    environment = {**unset, "TURBO_DEVICE": "cpu", **getattr(request, "param", {})}
    log_path = tmp_path_factory.mktemp("triton") / "server.log"
    with TritonServer(environment=environment, log_path=log_path, ready_timeout=120) as server:
        yield server


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """`write_model(repository, name, code=...)` writes one model and returns the repository; see `_MODELS`."""

    def write(repository: Path, name: str, code: str | None = None) -> Path:
        known_code, decoupled = _MODELS.get(name, ("", False))
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "1" / "model.py").write_text(textwrap.dedent(code or known_code))
        (repository / name / "config.pbtxt").write_text(
            f"""
            name: "{name}" backend: "python" max_batch_size: 0
            input {{ name: "X" data_type: TYPE_FP32 dims: [ 1 ] }}
            output {{ name: "Y" data_type: TYPE_FP32 dims: [ 1 ] }}
            model_transaction_policy {{ decoupled: {str(decoupled).lower()} }}
            instance_group {{ kind: KIND_CPU }}
            """
        )
        return repository

    return write


@pytest.fixture(scope="session")
def leftovers() -> Callable[[str], list[str]]:
    """`leftovers(shm_prefix)` lists processes, shared memory and temporary folders that bear a server's name."""
    return lambda prefix: sorted(find_leftovers(prefix))
