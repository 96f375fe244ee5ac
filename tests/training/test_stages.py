"""Every stage of training, a few steps each; what is exported serves; a stop and a restart change nothing."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch

from turbo_backend.checkpoints import DenoiserLayout, TextEncoderLayout, VAELayout, open_checkpoint
from turbo_backend.tokenizer import Tokenizer
from turbo_training.export import import_weights
from turbo_training.latents import LatentBank
from turbo_training.run import DENOISERS, STAGES, Run
from turbo_training.shapes import SMOKE
from turbo_training.train_teacher import TeacherStage, make_denoiser
from turbo_training.trainer import Budget, Paused, is_done, run_stage

pytestmark = [
    pytest.mark.training,
    # PyTorch's own rules for forward derivatives are loaded through what it calls deprecated.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]


_TRAINED = tuple(name for name in STAGES if name != "export" and "latents" not in name)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(
        shape=SMOKE, folder=tmp_path_factory.mktemp("run"), minutes=2, seed=3, device=torch.device("cpu"), quiet=True
    )
    run.train()
    return run


def test_every_stage_ran_with_finite_losses(run: Run) -> None:
    for name in _TRAINED:
        lines = (run.folder / name / "losses.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == getattr(SMOKE, name).max_steps
        assert [json.loads(line)["step"] for line in lines] == list(range(len(lines)))
        assert (run.folder / name / "losses.png").stat().st_size > 0
    for ending, losses in (("sla", {"dense", "blocks"}), ("rcm", {"consistency", "score", "fake"})):
        for name in (ending, f"i2v_{ending}"):
            log = (run.folder / name / "losses.jsonl").read_text(encoding="utf-8").splitlines()
            assert losses <= set().union(*map(json.loads, log))
    for name in ("vae", "teacher", "sla", "rcm", "i2v", "i2v_sla", "i2v_rcm"):
        assert (run.folder / name / "sheet.png").stat().st_size > 0


@pytest.mark.parametrize("name", DENOISERS)
def test_every_stage_can_be_judged(run: Run, name: str) -> None:
    verdicts = run.sampler(name, num_steps=2).judge(3)
    assert len(verdicts) == 3
    assert all(len(verdict["camera"]) == 1 <= len(verdict["subject"]) for verdict in verdicts)
    assert verdicts == run.sampler(name, num_steps=2).judge(3)


def test_what_is_exported_loads_strictly(run: Run) -> None:
    folder, model = run.folder / "weights", SMOKE.model
    cpu, dtype = torch.device("cpu"), torch.float32
    for name, config in (
        ("tiny-T2V", model.dit),
        ("tiny-T2V-teacher", model.dit),
        ("tiny-I2V", SMOKE.image_model.dit),
    ):
        layout = DenoiserLayout(config, quant_linear=False)
        net = layout.load(open_checkpoint(folder / f"{name}.safetensors"), device=cpu, dtype=dtype)
        assert all(torch.isfinite(tensor).all() for tensor in net.state_dict().values())
    text = open_checkpoint(folder / "tiny-umt5.safetensors")
    TextEncoderLayout(model.text_encoder).load(text, device=cpu, dtype=dtype)
    VAELayout(model.vae).load(open_checkpoint(folder / "tiny-VAE.safetensors"), device=cpu, dtype=dtype)
    tokenizer = Tokenizer.from_folder(folder / "tokenizer")
    assert tokenizer.vocab_size <= model.text_encoder.vocab_size
    short, long = tokenizer.encode("a red cat spins"), tokenizer.encode("une phrase d'autre chose: ½ 🐈")
    assert len(short) <= 8
    assert max(long) < model.text_encoder.vocab_size


def test_a_finished_run_does_nothing_more(run: Run) -> None:
    before = (run.folder / "teacher" / "checkpoint.pt").stat().st_mtime_ns
    run.train()
    assert (run.folder / "teacher" / "checkpoint.pt").stat().st_mtime_ns == before


def test_a_run_begins_with_exported_weights(run: Run, tmp_path: Path) -> None:
    import_weights(SMOKE.model, run.folder / "weights", tmp_path)
    later = Run(shape=SMOKE, folder=tmp_path, minutes=2, seed=3, device=torch.device("cpu"), quiet=True)
    later.train(("vae", "text", "latents", "teacher"))
    assert list(tmp_path.glob("*/losses.jsonl")) == [], "nothing was trained"
    assert later.bank("latents").latents.shape == run.bank("latents").latents.shape
    for key, tensor in run.denoiser("teacher").state_dict().items():
        torch.testing.assert_close(later.denoiser("teacher").state_dict()[key], tensor, rtol=2**-8, atol=0.0)
    with pytest.raises(FileNotFoundError):
        import_weights(SMOKE.model, tmp_path / "absent", tmp_path / "other")


def test_a_paused_run_goes_on(tmp_path: Path) -> None:
    run = Run(shape=SMOKE, folder=tmp_path, minutes=2, seed=3, device=torch.device("cpu"), quiet=True)
    run.pause_at = time.monotonic()
    with pytest.raises(Paused, match="text: 0 % done"):
        run.train(("text",))
    assert not is_done(tmp_path / "text")
    run.pause_at = time.monotonic() + 1
    with pytest.raises(Paused, match="latents: not begun"):
        run.train(("latents",))
    run.pause_at = math.inf
    run.train(("text",))
    assert is_done(tmp_path / "text")


def make_teacher(bank: LatentBank) -> TeacherStage:
    net = make_denoiser(SMOKE.model.dit, 3)
    return TeacherStage("teacher", SMOKE.teacher, bank, net, seed=3, device=torch.device("cpu"))


def test_resuming_gives_the_same_weights(run: Run, tmp_path: Path) -> None:
    bank = run.bank("latents")

    def train(folder: Path, *limits: int) -> dict[str, torch.Tensor]:
        for limit in limits:
            stage = make_teacher(bank)
            # The schedule follows progress: stop by an exception, as an interruption does.
            stop_after(stage, limit)
            try:
                run_stage(stage, folder, Budget(max_steps=4, minutes=10), seed=3, quiet=True, save_seconds=0)
            except InterruptedError:
                continue
        return {key: tensor.clone() for key, tensor in stage.average.state_dict().items()}

    whole, broken = train(tmp_path / "whole", 4), train(tmp_path / "broken", 2, 4)
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "broken")


def losses_of(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "losses.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def stop_after(stage: TeacherStage, limit: int) -> None:
    step = stage.step

    def limited(index: int, progress: float) -> dict[str, torch.Tensor]:
        if index >= limit:
            raise InterruptedError
        return step(index, progress)

    stage.step = limited  # type: ignore[method-assign]


def test_a_loss_that_is_not_finite_stops_the_stage(run: Run, tmp_path: Path) -> None:
    stage = make_teacher(run.bank("latents"))
    with torch.no_grad():
        stage.net.patch_embedding.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="teacher: step 0"):
        run_stage(stage, tmp_path / "broken", Budget(max_steps=4, minutes=10), seed=3, quiet=True)
