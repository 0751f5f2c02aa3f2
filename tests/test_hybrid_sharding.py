"""Four ranks with two copies of the model, each sharded over two ranks, do what one rank does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prl_lightning.checks.contradictions import ConfigurationError
from prl_lightning.cli import main
from prl_lightning.models.export import export_checkpoint
from prl_lightning.models.loading import load_causal_lm
from ranks import gap, read, recorded_run, run_all
from tiny_runs import ARITHMETIC, fit, memory_of, tiny_overrides

pytestmark = [pytest.mark.process, pytest.mark.slow]  # four ranks on two cores


def strategy(replicas: int) -> str:
    kind = "class_path: prl_lightning.trainer.FSDP2Strategy"
    return f"--trainer.strategy={{{kind}, init_args: {{replicas: {replicas}}}}}"


def test_two_copies_of_two_shards_train_as_one_rank(tied_model: str, tmp_path: Path) -> None:
    """The gradient, its norm over all ranks, the weights after it and what an engine is sent."""
    four = [
        *recorded_run(tied_model, tmp_path / "four"),
        "--trainer.accelerator=cpu",
        "--trainer.devices=4",
        strategy(replicas=2),
        "--trainer.accumulate_grad_batches=1",
    ]
    ours = run_all(tmp_path, 4, {"four": four})["four"]
    fit(*recorded_run(tied_model, tmp_path / "one"), "--trainer.devices=1")
    theirs = read(tmp_path / "one")
    for name in ("gradient", "after", "sent"):
        assert gap(ours[name], theirs[name]) < 1e-5, name
    assert gap(ours["after"], ours["before"]) > 1e-3
    # A rank holds half of the weights, as if there were two ranks.
    assert ours["held"] == pytest.approx(theirs["held"] / 2, rel=0.05)
    checkpoint = tmp_path / "four" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    exported = load_causal_lm(str(tmp_path / "out")).state_dict()
    assert all(torch.equal(exported[name], sent) for name, sent in ours["sent"].items())
    norm = "train/grad_norm"
    assert ours["metrics"][norm] == pytest.approx(theirs["metrics"][norm], rel=1e-4)


def checked(model: str, folder: Path, replicas: int) -> None:
    ranks = ["--trainer.devices=4", "--trainer.accelerator=cpu", strategy(replicas)]
    main(["check", f"--config={ARITHMETIC}", *tiny_overrides(model, folder), *ranks,
          "--trainer.accumulate_grad_batches=1"])  # fmt: skip


@pytest.mark.parametrize("replicas", [0, 3])
def test_copies_that_the_ranks_cannot_hold_are_refused(
    tied_model: str, tmp_path: Path, replicas: int
) -> None:
    with pytest.raises(ConfigurationError, match=rf"strategy\.replicas={replicas}.* 4 ranks"):
        checked(tied_model, tmp_path, replicas)


def test_the_memory_estimate_divides_a_copy_by_its_ranks(
    tied_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("prl_lightning.checks.memory.MIB", 1)
    found = []
    for replicas in (1, 2):
        checked(tied_model, tmp_path, replicas)
        found.append(memory_of(capsys.readouterr().out)["policy"])
    assert found[1] == 2 * found[0]
