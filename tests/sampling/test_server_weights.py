"""What a server gets when the weights are sent, and how that fails; it is a fake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fake_vllm import WEIGHTS, FakeVLLM, Handler, refuse, wait_for_the_client
from prl_lightning.models.causal_lm import named_weights
from prl_lightning.models.loading import load_policy
from prl_lightning.sampling import (
    FolderTransfer,
    SamplingConfig,
    VLLMServerSampler,
    weight_transfer,
)
from prl_lightning.types import Prompt
from sampling.conftest import MakeSampler

CONFIG = SamplingConfig(n=2, temperature=1.0, max_new_tokens=8, stop_token_ids=(1,))
PROMPTS = [Prompt([5, 6], "", seed=10 * row) for row in range(3)]


def test_the_server_is_paused_while_it_takes_weights(
    fake_server: FakeVLLM, server_sampler: VLLMServerSampler
) -> None:
    assert fake_server.paths()[-5:] == [
        "/pause?mode=wait",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/update_weight_version",
        "/resume",
    ]


@pytest.mark.parametrize("has_head", [True, False])
def test_the_folder_has_the_weights_of_the_model(
    fake_server: FakeVLLM,
    server_sampler: VLLMServerSampler,
    tied_model: str,
    has_head: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In several files; with the tied head only if the engine has one."""
    monkeypatch.setattr(weight_transfer, "PART_BYTES", 20_000)
    policy, files = load_policy(tied_model), list[dict[str, torch.Tensor]]()

    def read(handler: Handler, body: Any) -> None:
        assert body["method"] == "reload_weights"
        folder = Path(body["kwargs"]["weights_path"])
        files.extend(load_file(file) for file in folder.glob("*.safetensors"))
        handler.give(200, {"results": [None]})

    if not has_head:
        fake_server.model_text = fake_server.model_text.partition("\n")[0]
    server_sampler.start(tied_model, 64)
    fake_server.answers["/collective_rpc"] = read
    server_sampler.load_weights(named_weights(policy))
    assert len(files) > 2
    found = {name: tensor for file in files for name, tensor in file.items()}
    expected = dict(named_weights(policy))
    if not has_head:
        del expected["lm_head.weight"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_server_that_does_not_take_the_weights(
    fake_server: FakeVLLM, server_sampler: VLLMServerSampler, tmp_path: Path
) -> None:
    fake_server.answers["/collective_rpc"] = refuse(500, "size mismatch")
    with pytest.raises(RuntimeError, match=rf"FolderTransfer\.folder={tmp_path}.*size mismatch"):
        server_sampler.load_weights(WEIGHTS)
    assert not fake_server.is_paused
    fake_server.answers = {
        "/reset_prefix_cache": lambda handler, _: handler.give(200, {"success": False})
    }
    with pytest.raises(RuntimeError, match="did not reset its prefix cache"):
        server_sampler.load_weights(WEIGHTS)


def test_a_folder_that_cannot_be_written(
    fake_server: FakeVLLM, make_sampler: MakeSampler, tmp_path: Path
) -> None:
    folder = tmp_path / "none"
    sampler = make_sampler(transfer=FolderTransfer(str(folder)))
    (message,) = sampler.missing_requirements()
    assert f"FolderTransfer.folder={folder}: there is no such folder" in message
    weights = iter(WEIGHTS)
    with pytest.raises(RuntimeError, match=rf"FolderTransfer\.folder={folder}.*No such file"):
        sampler.load_weights(weights)
    assert next(weights, None) is None  # other ranks iterate to the end, too


def test_a_server_that_takes_weights_too_late(
    fake_server: FakeVLLM, server_sampler: VLLMServerSampler
) -> None:
    def pause(handler: Handler, body: Any) -> None:
        server_sampler._client.timeout = 0.2  # not before: this answer may take longer
        handler.give(200, {"status": "paused"})

    fake_server.answers = {"/pause": pause, "/collective_rpc": wait_for_the_client}
    with pytest.raises(RuntimeError, match=r"/collective_rpc was not answered within timeout=0\.2"):
        server_sampler.load_weights(WEIGHTS)


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_server_that_was_restarted_is_noticed(
    fake_server: FakeVLLM, server_sampler: VLLMServerSampler, when: str
) -> None:
    def restart(*_: Any) -> None:
        fake_server.weight_version = "default"

    if when == "before":
        restart()
    with pytest.raises(RuntimeError, match=r"weight_version='default'.* sent 'prl-"):
        server_sampler.generate(PROMPTS, CONFIG, restart)


def test_without_start(make_sampler: MakeSampler) -> None:
    with pytest.raises(RuntimeError, match=r"start\(\)"):
        make_sampler().load_weights(WEIGHTS)
