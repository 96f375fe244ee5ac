"""`config.pbtxt` is the contract: the adapters, the ensemble, the parameters and the SDK all agree with it."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from turbo_backend.parameters import IMAGE_FIELDS, TEXT_FIELDS

REPOSITORY = Path(__file__).parents[2] / "model_repository"
MODELS = sorted(path.parent.name for path in REPOSITORY.glob("*/config.pbtxt"))
ENSEMBLES = ["text_to_video", "image_to_video"]
NET_MODELS = [name for name in MODELS if (REPOSITORY / name / "1" / "model.py").exists()]


def read_config(name: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse((REPOSITORY / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def named_by_adapter(name: str) -> set[str]:
    """Its string constants, and what `triton_adapter.read_values` reads for it."""
    nodes = list(ast.walk(ast.parse((REPOSITORY / name / "1" / "model.py").read_text())))
    constants = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    reads_values = any(isinstance(node, ast.Attribute) and node.attr == "read_values" for node in nodes)
    return constants | ({*TEXT_FIELDS, *IMAGE_FIELDS} if reads_values else set())


def test_repository_holds_the_documented_models() -> None:
    networks = {"text_encoder", "image_encoder", "denoiser", "vae_decoder"}
    assert networks | set(ENSEMBLES) | {"jobs"} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_config_parses_and_names_its_folder(name: str) -> None:
    config = read_config(name)
    assert config.name == name
    assert config.max_batch_size >= 1
    for tensor in (*config.input, *config.output):
        assert re.fullmatch(r"[A-Z][A-Z_]*", tensor.name), f"{tensor.name} is not UPPER_SNAKE"


def test_encoders_are_batched_by_triton_and_the_others_batch_themselves() -> None:
    """Triton's batcher drops cancelled requests unseen; the models that heed cancellations must see them."""
    batched = {name for name in MODELS if read_config(name).HasField("dynamic_batching")}
    assert batched == {"text_encoder", "image_encoder"}


@pytest.mark.parametrize("name", NET_MODELS)
def test_adapter_names_every_tensor_of_its_config_and_no_other(name: str) -> None:
    config = read_config(name)
    wired = {tensor.name for tensor in (*config.input, *config.output)}
    named = {text for text in named_by_adapter(name) if re.fullmatch(r"[A-Z][A-Z_]+", text)}
    assert named == wired


@pytest.mark.parametrize("name", NET_MODELS)
def test_adapter_is_thin(name: str) -> None:
    lines = (REPOSITORY / name / "1" / "model.py").read_text().splitlines()
    assert len(lines) <= 120


@pytest.mark.parametrize("name", ENSEMBLES)
def test_ensemble_tensors_match_those_of_its_steps(name: str) -> None:
    ensemble = read_config(name)
    types = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in ensemble.input}
    optional = {tensor.name for tensor in ensemble.input if tensor.optional}
    for step in ensemble.ensemble_scheduling.step:
        model = read_config(step.model_name)
        inputs = {tensor.name: tensor for tensor in model.input}
        outputs = {tensor.name: tensor for tensor in model.output}
        # An ensemble may leave optional inputs of a step out: text alone has none of the image's.
        required = {tensor.name for tensor in model.input if not tensor.optional}
        assert required <= set(step.input_map) <= set(inputs)
        assert set(step.output_map) == set(outputs)
        for name, value in step.input_map.items():
            assert types[value] == (inputs[name].data_type, list(inputs[name].dims)), f"{step.model_name}.{name}"
            assert inputs[name].optional or value not in optional, f"{step.model_name}.{name}"
        for name, value in step.output_map.items():
            assert value not in types, f"{value} is written twice"
            types[value] = (outputs[name].data_type, list(outputs[name].dims))
    for tensor in ensemble.output:
        assert types[tensor.name] == (tensor.data_type, list(tensor.dims))


def test_every_optional_input_is_a_parameter_the_server_checks() -> None:
    from turbo_backend.config import MODELS as SERVED
    from turbo_backend.errors import InvalidArgument
    from turbo_backend.parameters import make_parameters

    for model in (SERVED["tiny"], SERVED["tiny-I2V"]):
        for tensor in read_config(model.ensemble).input:
            if tensor.optional:
                with pytest.raises(InvalidArgument) as caught:
                    make_parameters(model, {tensor.name: object()}, seed=1)
                assert caught.value.field == tensor.name


def test_image_ensemble_is_the_text_ensemble_with_an_image() -> None:
    text, image = (read_config(name) for name in ENSEMBLES)
    assert [tensor for tensor in image.input if tensor in text.input] == list(text.input)
    assert image.output == text.output


def test_image_encoder_checks_all_that_the_denoiser_does() -> None:
    values = {tensor.name for tensor in read_config("image_to_video").input} - {"PROMPT", "IMAGE"}
    for name in ("image_encoder", "denoiser"):
        assert values <= {tensor.name for tensor in read_config(name).input}


def test_sdk_knows_the_servers_sampling_times() -> None:
    from turbo_backend.sampler import RCMSchedule
    from turbo_client import GenerationRequest

    for num_steps in (1, 2, 3, 4):
        for sigma_max in (14.2, 80.0, 200.0):
            last = RCMSchedule(num_steps, sigma_max).times[-2]
            for boundary in (last - 1e-6, last + 1e-6):
                request = GenerationRequest(
                    "a", image=b"x", num_steps=num_steps, sigma_max=sigma_max, boundary=boundary
                )
                assert (request.remark() is None) == (last < boundary)


def wire_types(tensors: object) -> dict[str, str]:
    """Name to the type's name on the wire, where TYPE_STRING is BYTES."""
    names = model_config_pb2.DataType.Name
    return {tensor.name: names(tensor.data_type).removeprefix("TYPE_").replace("STRING", "BYTES") for tensor in tensors}


def test_sdk_speaks_the_ensembles_tensors() -> None:
    from turbo_client._requests import IMAGE_INPUTS, INPUTS
    from turbo_client._responses import OUTPUTS

    for ensemble, inputs in zip(map(read_config, ENSEMBLES), (INPUTS, {**INPUTS, **IMAGE_INPUTS}), strict=True):
        assert {name.upper(): kind for name, kind in inputs.items()} == wire_types(ensemble.input)
        assert dict(OUTPUTS) == wire_types(ensemble.output)


def test_jobs_take_what_the_ensembles_do_and_the_sdk_speaks_it() -> None:
    from turbo_client._jobs import INPUTS, OUTPUTS

    jobs = read_config("jobs")
    own = {name: kind for name, kind in wire_types(jobs.input).items() if name in INPUTS}
    assert own == dict(INPUTS)
    ensembles = wire_types(read_config("image_to_video").input)
    assert {name: kind for name, kind in wire_types(jobs.input).items() if name not in INPUTS} == ensembles
    assert [tensor.name for tensor in jobs.input if not tensor.optional] == ["OPERATION"]
    assert wire_types(jobs.output) == dict(OUTPUTS)


def test_sdk_sends_the_delivery_parameters_that_the_server_reads() -> None:
    from turbo_backend.parameters import Delivery, Scheduling
    from turbo_client._requests import PARAMETERS

    read = {field.name for kind in (Delivery, Scheduling) for field in dataclasses.fields(kind)}
    assert set(PARAMETERS) == read - {"durable"}, "the jobs model alone says `durable`"
