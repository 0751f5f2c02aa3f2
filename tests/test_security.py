"""Nothing runs that came with a model or a checkpoint, nothing listens, no secret is kept."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.distributed.checkpoint import FileSystemReader, save

from prl_lightning.checks.secrets import masked
from prl_lightning.models.export import export_checkpoint
from prl_lightning.module import PRLModule
from prl_lightning.runs.unpickling import refuse_code
from tiny_runs import fit, tiny_overrides

pytestmark = pytest.mark.process

EVIL_CODE = """
from pathlib import Path
Path({trace!r}).touch()
from transformers import Qwen2ForCausalLM as Evil
"""


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_code_that_comes_with_a_model_is_not_run(tied_model: str, tmp_path: Path) -> None:
    model, trace = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(tied_model, model)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(EVIL_CODE.format(trace=str(trace)))
    fit(*tiny_overrides(str(model), tmp_path), "--trainer.max_epochs=1")
    assert not trace.exists()


def test_a_checkpoint_is_not_unpickled(tied_model: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"state_dict": {}, "loops": Evil(trace)}, tmp_path / "evil.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="weights_only|Weights only"):
        fit(*tiny_overrides(tied_model, tmp_path), f"--ckpt_path={tmp_path / 'evil.ckpt'}")
    assert not trace.exists()


def sharded(folder: Path, learning_rate: Any) -> Path:
    """A checkpoint as strategies that shard write it: tensors, and an optimizer's options."""
    state = {"state_dict": {"w": torch.ones(2)}, "optimizer_0": {"lr": learning_rate}}
    save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"hyper_parameters": {"policy": "none", "lora": None}}, folder / "meta.pt")
    return folder


def evil_metadata(folder: Path, trace: Path) -> Path:
    sharded(folder, 0.1)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(trace)))
    return folder


@pytest.mark.parametrize("where", ["metadata", "optimizer"])
def test_a_sharded_checkpoint_is_not_unpickled(where: str, tied_model: str, tmp_path: Path) -> None:
    trace, folder = tmp_path / "trace", tmp_path / "evil.ckpt"
    if where == "metadata":
        evil_metadata(folder, trace)
    else:
        sharded(folder, Evil(trace))
    with pytest.raises(pickle.UnpicklingError, match=r"evil\.ckpt is not loaded.*run code"):
        fit(*tiny_overrides(tied_model, tmp_path), f"--ckpt_path={folder}")
    with pytest.raises(pickle.UnpicklingError, match=r"evil\.ckpt is not loaded"):
        export_checkpoint(str(folder), str(tmp_path / "out"))
    with pytest.raises(pickle.UnpicklingError, match=r"evil\.ckpt is not loaded"):
        PRLModule.load_from_checkpoint(folder)
    assert not trace.exists()


def test_torch_would_have_unpickled_it_and_an_honest_one_passes(tmp_path: Path) -> None:
    refuse_code(sharded(tmp_path / "honest.ckpt", {"lr": 0.1, "betas": (0.9, 0.99)}))
    trace = tmp_path / "trace"
    with pytest.raises(AttributeError):  # what comes out is no metadata
        FileSystemReader(evil_metadata(tmp_path / "evil.ckpt", trace)).read_metadata()
    assert trace.exists()


class Listening(Callback):
    """Note which sockets listen while the engine, the rewards and the trainer are there."""

    found: list[Any] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object
    ) -> None:
        own = psutil.Process()
        everyone = [own, *own.children(recursive=True)]
        Listening.found = [
            connection
            for process in everyone
            for connection in process.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        ]


def test_nothing_listens_on_the_network_while_it_trains_with_the_engine(
    tied_model: str, tmp_path: Path
) -> None:
    """On loopback the engine's process group of one does: torch's gloo knows no other way."""
    overrides = tiny_overrides(tied_model, tmp_path, sampler="VLLMSampler")
    fit(
        *overrides,
        "--rollout.sampler.cache_gib=0.1",
        "--trainer.max_epochs=1",
        f"--trainer.callbacks+={__name__}.Listening",
    )
    assert Listening.found is not None
    assert all(ip_address(listens.laddr.ip).is_loopback for listens in Listening.found)
    # With it, vLLM would unpickle functions that it is sent.
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in os.environ


class Tracker(CSVLogger):
    """A logger that is given what nobody else may read."""

    def __init__(self, save_dir: str, api_key: str, tracking_uri: str, settings: Any) -> None:
        super().__init__(save_dir, name="run")
        Tracker.given = (api_key, tracking_uri, settings)

    given: Any = None


def test_secrets_of_a_logger_are_not_written_down(tied_model: str, tmp_path: Path) -> None:
    key, password, token = "a-key", "a-password", "a-token"
    init = {
        "save_dir": str(tmp_path),
        "api_key": key,
        "tracking_uri": f"https://me:{password}@tracking.example/path",
        "settings": {"hf_token": token, "team": "ours"},
    }
    logger = json.dumps({"class_path": f"{__name__}.Tracker", "init_args": init})
    fit(
        *tiny_overrides(tied_model, tmp_path),
        "--trainer.max_epochs=1",
        f"--trainer.logger={logger}",
    )
    assert Tracker.given == (key, init["tracking_uri"], init["settings"])
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    (config,) = [file for file in files if file.name == "config.yaml"]
    assert "api_key: '***'" in config.read_text()
    assert "https://***@tracking.example/path" in config.read_text()
    assert "team: ours" in config.read_text()
    for secret in (key, password, token):
        assert not any(secret.encode() in file.read_bytes() for file in files), secret


def test_what_only_sounds_like_a_secret_is_kept() -> None:
    harmless = {
        "max_new_tokens": 8,
        "max_prompt_tokens": 16,
        "stop_token_ids": [1],
        "aggregation": "token_mean",
        "steps": "token",
        "tokenizer": "owner/model",
        "eos_token": "</s>",
        "monitor": "val/tiny/pass@2",
        "train": "owner/dataset:train",
    }
    assert masked(harmless) == harmless
