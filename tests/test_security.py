"""Nothing runs that came with a model, a checkpoint or a completion, and nothing listens."""

from __future__ import annotations

import json
import pickle
import shutil
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from runs import fit, tiny_overrides

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


def test_secrets_of_the_environment_are_not_written_down(
    tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "a-key-that-nobody-may-read"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, secret)
    fit(*tiny_overrides(tied_model, tmp_path), "--trainer.max_epochs=1")
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert any(file.name == "config.yaml" for file in files)
    assert not any(secret.encode() in file.read_bytes() for file in files)
