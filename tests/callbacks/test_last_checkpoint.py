"""LastCheckpoint: what it saves can be continued from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from prl_lightning.callbacks import LastCheckpoint
from trainer_runs import train


@pytest.mark.process
def test_a_run_that_ends_with_the_average_saves_the_policy_before(
    tied_model: str, tmp_path: Path
) -> None:
    saves = {"enable_checkpointing": True}
    last = LastCheckpoint(every_n_epochs=10, dirpath=str(tmp_path))
    module, watch = train(
        tied_model, tmp_path, EMAWeightAveraging(decay=0.5), last, learning_rate=1.0, trainer=saves
    )
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    name = "policy.causal_lm.model.norm.weight"
    average, policy = checkpoint["state_dict"][name], checkpoint["current_model_state"][name]
    assert torch.equal(average, module.state_dict()[name])
    # The average begins as the policy after the first update, and the second has half the weight.
    first = watch.weights[1][name.removeprefix("policy.")]
    torch.testing.assert_close(average, (first + policy) / 2)
    assert not torch.equal(average, policy)
