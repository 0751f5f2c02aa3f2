"""A checkpoint becomes a folder that transformers and vLLM load with the same log-probabilities."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from prl_lightning.callbacks import HFExport
from prl_lightning.cli import main
from prl_lightning.data import collate
from prl_lightning.models.causal_lm import LogprobModel
from prl_lightning.models.export import export_checkpoint
from prl_lightning.models.loading import load_causal_lm
from prl_lightning.sampling import SamplingConfig, VLLMSampler
from prl_lightning.types import Prompt, Rollout
from tiny_runs import fit, tiny_overrides


@pytest.fixture(scope="module", params=["tied", "untied"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run, and beside it the model that it started from."""
    folder = tmp_path_factory.mktemp("run")
    model = request.getfixturevalue(f"{request.param}_model")
    export = ["--trainer.callbacks+=prl_lightning.callbacks.HFExport"]
    lr = ["--model.optimizer.init_args.lr=0.01"]
    fit(*tiny_overrides(model, folder), *lr, "--trainer.max_epochs=1", *export)
    (folder / "model").symlink_to(model)
    return folder


@pytest.fixture
def checkpoint(run: Path) -> Path:
    return run / "run" / "version_0" / "checkpoints" / "last.ckpt"


def test_the_exported_policy_is_that_of_the_checkpoint(
    run: Path, checkpoint: Path, tmp_path: Path
) -> None:
    main(["export", f"--ckpt_path={checkpoint}", f"--out={tmp_path / 'out'}"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    started = load_causal_lm(str(run / "model")).state_dict()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, state[f"policy.causal_lm.{name}"]), name
        assert not torch.equal(weight, started[name]), name
    # The callback has written the same at the end of training.
    by_callback = AutoModelForCausalLM.from_pretrained(run / "run" / "version_0" / "huggingface")
    for name, weight in by_callback.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


def test_what_goes_with_the_weights_is_the_original_models(
    run: Path, checkpoint: Path, tmp_path: Path
) -> None:
    export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "out", run / "model"))
    assert ours.get_vocab() == theirs.get_vocab()
    recommended = (tmp_path / "out" / "generation_config.json").read_text()
    assert recommended == (run / "model" / "generation_config.json").read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]  # nothing half-written


def test_vllm_loads_the_folder_and_gives_the_same_logprobs(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = str(tmp_path / "out")
    export_checkpoint(str(checkpoint), folder)
    engine = VLLMSampler(cache_gib=0.1, engine_args={"load_format": "auto"})
    engine.start(folder, max_model_tokens=64)
    prompts = [Prompt([5, 14, 7, 17], "", seed=1), Prompt([9], "", seed=2)]
    config = SamplingConfig(n=4, temperature=1.0, max_new_tokens=12, stop_token_ids=(1,))
    groups = engine.generate(prompts, config)
    engine.stop()
    rollouts = [
        Rollout(prompt, completion, "")
        for prompt, group in zip(prompts, groups, strict=True)
        for completion in group
    ]
    batch = collate(rollouts, 1, 1)
    with torch.no_grad():
        logprobs, _ = LogprobModel(AutoModelForCausalLM.from_pretrained(folder))(batch)
    assert (logprobs - batch.rollout_logprobs).abs().max() < 1e-4


def test_a_dtype_that_is_none_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype=bf16: use one such as bfloat16"):
        export_checkpoint("nowhere.ckpt", str(tmp_path / "out"), dtype="bf16")
    with pytest.raises(ValueError, match="dtype=bf16: use one such as bfloat16"):
        HFExport(dtype="bf16").setup(Trainer(logger=False), LightningModule(), "fit")


def test_a_dtype_can_be_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(str(checkpoint), str(tmp_path / "out"), dtype="bfloat16")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert half.dtype == torch.bfloat16
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, weight in half.state_dict().items():
        assert torch.equal(weight, state[f"policy.causal_lm.{name}"].bfloat16()), name


def test_what_is_wrong_is_said(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="ckpt_path=nowhere"):
        export_checkpoint("nowhere", str(tmp_path / "out"))
    with pytest.raises(FileExistsError, match="name another folder"):
        export_checkpoint(str(checkpoint), str(tmp_path))
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="does not name its policy"):
        export_checkpoint(str(tmp_path / "foreign.ckpt"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
