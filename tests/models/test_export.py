"""A checkpoint becomes a folder that transformers and vLLM load with the same log-probabilities."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine_gap import trainer_gap
from prl_lightning.callbacks import HFExport
from prl_lightning.cli import main
from prl_lightning.models.export import export_checkpoint
from prl_lightning.models.loading import load_policy
from prl_lightning.sampling import SamplingConfig, VLLMSampler
from prl_lightning.types import Prompt
from tiny_runs import fit, tiny_overrides
from trainer_runs import train

pytestmark = pytest.mark.process


class Run:
    """A finished run with HFExport: the model that it started from, and its results."""

    def __init__(self, model: str, folder: Path) -> None:
        export = ["--trainer.callbacks+=prl_lightning.callbacks.HFExport"]
        rate = ["--model.optimizer.init_args.lr=0.01", "--trainer.max_epochs=1"]
        fit(*tiny_overrides(model, folder), *rate, *export)
        self.model = Path(model)
        self.by_callback = folder / "run" / "version_0" / "huggingface"
        self.checkpoint = folder / "run" / "version_0" / "checkpoints" / "last.ckpt"
        state = torch.load(self.checkpoint, weights_only=True)["state_dict"]
        self.weights = {k.removeprefix("policy.causal_lm."): v for k, v in state.items()}
        main(["export", f"--ckpt_path={self.checkpoint}", f"--out={folder / 'out' / 'folder'}"])
        self.exported = folder / "out" / "folder"


@pytest.fixture(scope="module", params=["tied", "untied"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    model = request.getfixturevalue(f"{request.param}_model")
    return Run(model, tmp_path_factory.mktemp("run"))


def state_of(folder: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def test_the_exported_policy_is_that_of_the_checkpoint(run: Run) -> None:
    exported, by_callback, started = map(state_of, (run.exported, run.by_callback, run.model))
    for name, weight in exported.items():
        assert torch.equal(weight, run.weights[name]), name
        assert torch.equal(weight, by_callback[name]), name
        assert not torch.equal(weight, started[name]), name


def test_tokenizer_and_generation_config_are_the_models(run: Run) -> None:
    ours, theirs = map(AutoTokenizer.from_pretrained, (run.exported, run.model))
    assert ours.get_vocab() == theirs.get_vocab()
    recommended, original = (f / "generation_config.json" for f in (run.exported, run.model))
    assert recommended.read_text() == original.read_text()
    assert list(run.exported.parent.iterdir()) == [run.exported]  # and no partial folder


@pytest.mark.parametrize("run", ["tied"], indirect=True)
def test_vllm_loads_the_folder_with_the_same_logprobs(run: Run) -> None:
    engine = VLLMSampler(cache_gib=0.1, engine_args={"load_format": "auto"})
    engine.start(str(run.exported), max_model_tokens=64)
    prompts = [Prompt([5, 14, 7, 17], "", seed=1), Prompt([9], "", seed=2)]
    config = SamplingConfig(n=4, temperature=1.0, max_new_tokens=12, stop_token_ids=(1,))
    groups = engine.generate(prompts, config)
    engine.stop()
    assert trainer_gap(load_policy(str(run.exported)), prompts, groups).max() < 1e-4


def test_the_average_is_exported_wherever_its_callback_stands(
    tied_model: str, tmp_path: Path
) -> None:
    export, average = HFExport(str(tmp_path / "out")), EMAWeightAveraging(decay=0.5)
    module, watch = train(tied_model, tmp_path, export, average, learning_rate=1.0, epochs=3)
    exported = state_of(tmp_path / "out")
    assert all(torch.equal(exported[name], weight) for name, weight in module.weights())
    name = "model.norm.weight"
    assert not torch.equal(exported[name], watch.weights[-1][f"causal_lm.{name}"])


def test_a_dtype_can_be_chosen(run: Run, tmp_path: Path) -> None:
    export_checkpoint(str(run.checkpoint), str(tmp_path / "out"), dtype="bfloat16")
    for name, weight in state_of(tmp_path / "out").items():
        assert torch.equal(weight, run.weights[name].bfloat16()), name


def test_an_unknown_dtype_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype=bf16"):
        export_checkpoint("nowhere.ckpt", str(tmp_path / "out"), dtype="bf16")
    with pytest.raises(ValueError, match="dtype=bf16"):
        HFExport(dtype="bf16").setup(Trainer(logger=False), LightningModule(), "fit")


def test_wrong_paths_are_named(tmp_path: Path) -> None:
    foreign, out = tmp_path / "foreign.ckpt", tmp_path / "out"
    torch.save({"state_dict": {}}, foreign)
    for ckpt_path, folder, error, message in (
        ("nowhere", out, FileNotFoundError, "ckpt_path=nowhere"),
        (str(foreign), tmp_path, FileExistsError, f"out={tmp_path}"),
        (str(foreign), out, ValueError, f"ckpt_path={foreign}.*policy"),
    ):
        with pytest.raises(error, match=message):
            export_checkpoint(ckpt_path, str(folder))
    assert not out.exists()
