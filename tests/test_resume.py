"""A run that was killed and continued ends with the parameters of one left alone, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from interruptions import At, Command, SaveAt, Settings, callback, differing
from noisy import noisy_digits
from prl_lightning.callbacks import CompletionLog, EvaluationLog, RolloutCallback, RunSummary
from prl_lightning.data import PromptDataModule
from prl_lightning.evaluation import Evaluation
from prl_lightning.module import PRLModule
from prl_lightning.objective import Objective
from prl_lightning.references import Reference
from prl_lightning.rewards import RewardLimits
from prl_lightning.runs.files import Curve, read_metrics
from prl_lightning.sampling import HFSampler
from prl_lightning.trainer import PRLTrainer
from tiny_runs import write_prompts

pytestmark = pytest.mark.process

# In one process: every moment at which a checkpoint can be saved

REFERENCES = {
    "start": Reference(beta=0.1, target=0.15),
    "before": Reference(kind="moving", beta=0.1),
}


def train(
    model: str,
    folder: Path,
    *callbacks: Callback,
    checkpoint: str | None = None,
    seed: int = 1,
    accumulate: int = 2,
    micro_batch_tokens: int | None = None,
    **options: Any,
) -> Path:
    """Three epochs of two updates of two micro-batches each; the path of the last checkpoint."""
    seed_everything(seed, verbose=False)
    module = PRLModule(
        model,
        Objective(references=REFERENCES),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=6),
    )
    data = PromptDataModule(
        model,
        train=str(write_prompts(folder / "train.jsonl")),
        evaluation=Evaluation(
            {"held": str(write_prompts(folder / "held.jsonl", count=3, seed=1))},
            samples=2,
            pass_at=(2,),
        ),
        prompts_per_epoch=4,
        group_size=4,
        updates_per_epoch=2,
        max_prompt_tokens=16,
        micro_batch_tokens=micro_batch_tokens,
    )
    rollout = RolloutCallback(
        [noisy_digits],
        HFSampler(),
        max_new_tokens=8,
        limits=RewardLimits(workers=0),  # the commands below have workers
    )
    trainer = PRLTrainer(
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        callbacks=[*callbacks, rollout, RunSummary()],
        logger=CSVLogger(folder, name="run", flush_logs_every_n_steps=1),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=-1,
        **({"max_epochs": 3} | options),
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    end = folder / "end.ckpt"
    trainer.save_checkpoint(end)
    return end


def load(path: Path) -> Settings:
    return torch.load(path, weights_only=True)


EPOCHS: Settings = {"max_epochs": 3}
STEPS: Settings = {"max_epochs": -1, "max_steps": 6}


MOMENTS: list[tuple[str, int, Settings]] = [
    ("on_train_batch_end", 1, EPOCHS),  # between two updates of an epoch
    ("on_train_batch_end", 5, STEPS),
    ("on_train_batch_end", 4, EPOCHS),  # within an update, the first of its epoch
    ("on_train_batch_end", 2, STEPS),  # within an update
    ("on_train_batch_end", 3, EPOCHS),  # the last batch of an epoch
    ("on_train_batch_end", 7, STEPS),
    ("on_validation_end", 0, EPOCHS),
    ("on_validation_end", 1, {"max_epochs": 3, "val_check_interval": 3}),  # within an update
    ("on_train_epoch_end", 1, EPOCHS),
    ("on_train_epoch_end", 0, {"max_epochs": 3, "max_steps": 6}),
    ("on_train_epoch_start", 1, EPOCHS),  # while an epoch is being sampled
    ("on_train_epoch_start", 1, STEPS),
]


def curves_of(folder: Path) -> dict[str, Curve]:
    """The curves of its newest run."""
    newest = max((folder / "run").iterdir(), key=lambda version: version.name)
    return read_metrics(newest / "metrics.csv")


def saved_at(folder: Path, hook: str, call: int) -> Path:
    return folder / f"{hook}-{call}.ckpt"


@pytest.fixture(scope="module")
def whole_run(
    tied_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Settings], Path]:
    """The folder of a run with these options, which has saved at all of its moments."""
    folders: dict[str, Path] = {}

    def of(options: Settings) -> Path:
        name = str(options)
        if name not in folders:
            folder = tmp_path_factory.mktemp("whole")
            moments = [(hook, call) for hook, call, of_it in MOMENTS if of_it == options]
            saves = [SaveAt(*at, str(saved_at(folder, *at))) for at in moments]
            train(tied_model, folder, *saves, **options).rename(folder / "whole.ckpt")
            folders[name] = folder
        return folders[name]

    return of


@pytest.mark.parametrize(("hook", "call", "options"), MOMENTS)
def test_a_run_goes_on_exactly_from_any_moment(
    hook: str,
    call: int,
    options: Settings,
    whole_run: Callable[[Settings], Path],
    tied_model: str,
    tmp_path: Path,
) -> None:
    folder = whole_run(options)
    saved = str(saved_at(folder, hook, call))
    resumed = load(train(tied_model, tmp_path, checkpoint=saved, seed=99, **options))
    whole = load(folder / "whole.ckpt")
    assert whole["global_step"] == 6
    assert differing(resumed, whole) == []
    shown, curves = (curves_of(some) for some in (folder, tmp_path))
    assert curves["rollout/reward"] == shown["rollout/reward"]
    assert curves["train/loss"][0] == shown["train/loss"][0]


class StopAt(At):
    """As ``max_time`` does, also within an update; the iteration is then finished."""

    def act(self, trainer: Trainer) -> None:
        trainer.should_stop = True


CUTS: list[tuple[list[Callback], Settings, Settings]] = [
    ([], STEPS | {"max_steps": 3}, STEPS),
    ([StopAt("on_train_batch_end", 6)], EPOCHS, EPOCHS),
    ([StopAt("on_train_batch_end", 4)], EPOCHS, EPOCHS),  # within the first update of an epoch
    ([], {"max_epochs": 3, "max_steps": 3, "val_check_interval": 2}, EPOCHS),
]


@pytest.mark.parametrize(("stops", "options", "later"), CUTS)
def test_a_run_that_ended_within_an_epoch_goes_on_with_its_other_updates(
    stops: list[Callback],
    options: Settings,
    later: Settings,
    whole_run: Callable[[Settings], Path],
    tied_model: str,
    tmp_path: Path,
) -> None:
    at_end = tmp_path / "at_end.ckpt"  # of the epoch that is not over
    save = SaveAt("on_train_epoch_end", options.get("max_steps", 3) // 2, str(at_end))
    after_fit = train(tied_model, tmp_path, *stops, save, **options)
    whole, goes_on = whole_run(later), options | {"max_steps": -1} | later
    shown = curves_of(whole)
    for saved in (after_fit, at_end):
        moved = saved.rename(tmp_path / "moved.ckpt")
        end = train(tied_model, tmp_path, checkpoint=str(moved), seed=99, **goes_on)
        assert differing(load(end), load(whole / "whole.ckpt")) == [], saved
        curves = curves_of(tmp_path)
        assert curves["rollout/reward"] == shown["rollout/reward"]
        assert curves["train/loss"][0] == shown["train/loss"][0]  # steps: one row an epoch


# An empty one of each update, one within an update, the last of an update.
@pytest.mark.parametrize("call", [0, 4, 2, 6, 3])
def test_a_run_with_empty_micro_batches_goes_on_exactly(
    call: int, tied_model: str, tmp_path: Path
) -> None:
    """Epochs of eight, of which two or three of each update have completions."""
    saved = tmp_path / "saved.ckpt"
    cut: Settings = {"accumulate": 4, "micro_batch_tokens": 40}
    save = SaveAt("on_train_batch_end", 8 + call, str(saved))
    whole = load(train(tied_model, tmp_path, save, **cut))
    used = curves_of(tmp_path)["rollout/micro_batches"][1]
    assert all(1 < count < 4 for count in used)
    resumed = load(train(tied_model, tmp_path, checkpoint=str(saved), seed=99, **cut))
    assert whole["global_step"] == 6
    assert differing(resumed, whole) == []


def test_saving_and_evaluating_do_not_change_the_run(tied_model: str, tmp_path: Path) -> None:
    often = SaveAt("on_train_batch_end", 1, str(tmp_path / "saved.ckpt"))
    one = load(train(tied_model, tmp_path, often, check_val_every_n_epoch=1))
    other = load(train(tied_model, tmp_path, check_val_every_n_epoch=3))
    assert differing(one, other) == []


def test_a_checkpoint_within_an_epoch_has_its_rollouts_and_one_between_epochs_none(
    tied_model: str, tmp_path: Path
) -> None:
    def loader_state(call: int) -> Settings:
        saved = tmp_path / f"{call}.ckpt"
        train(tied_model, tmp_path, SaveAt("on_train_batch_end", call, str(saved)), max_epochs=1)
        return load(saved)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]

    within, between = loader_state(1), loader_state(3)
    assert within["position"] == 2
    assert len(within["shares"][0]["text"]) == 16
    assert between == {"position": 4, "updates": 2, "micro_batches": 2}


def test_an_epoch_under_way_is_not_cut_otherwise(tied_model: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved.ckpt"
    train(tied_model, tmp_path, SaveAt("on_train_batch_end", 1, str(saved)), max_epochs=1)
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=4.*with 2\. Set it back"):
        train(tied_model, tmp_path, checkpoint=str(saved), accumulate=4)


def test_what_a_continued_run_shows_is_that_of_one_left_alone(
    tied_model: str, tmp_path: Path
) -> None:
    saved = tmp_path / "saved.ckpt"
    shown = (EvaluationLog(), CompletionLog(every_n_epochs=1, groups=2))
    train(tied_model, tmp_path, SaveAt("on_train_batch_end", 5, str(saved)), *shown)
    folder = tmp_path / "run"
    with (folder / "version_0" / "metrics.csv").open("a") as file:
        file.write("0.1")  # a row that a kill has cut
    named_by_metric = folder / "version_0" / "checkpoints" / "epoch=1-val" / "held"
    named_by_metric.mkdir(parents=True)
    moved = shutil.copy(saved, named_by_metric)
    for version, checkpoint in ((1, saved), (2, moved)):
        train(tied_model, tmp_path, *shown, checkpoint=str(checkpoint))
        for name in (
            "evaluations.jsonl",
            *(f"completions/epoch={n:05d}.parquet" for n in range(3)),
        ):
            of_whole, of_resumed = (folder / f"version_{v}" / name for v in (0, version))
            assert of_resumed.read_bytes() == of_whole.read_bytes(), name
        whole, resumed = (
            read_metrics(folder / f"version_{v}" / "metrics.csv") for v in (0, version)
        )
        for name in ("rollout/reward", "rollout/tokens", "val/held/mean@2", "train/seconds"):
            assert resumed[name][0] == whole[name][0]  # steps
            if name != "train/seconds":
                assert resumed[name][1] == whole[name][1]
        # The base model's evaluation is not repeated with the weights of the checkpoint.
        assert whole["val/held/mean@2"][0] == [0, 1, 3, 5]


# Killed processes


def killed_and_resumed(command: Command, kill: Settings | float) -> str:
    """Kill at a moment or after so many seconds, continue with ``last``; what was printed."""
    if isinstance(kill, float):
        process = command.start()
        time.sleep(kill)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code, output = process.finish()
        if code == 0:  # it was quicker than the run by which the moment was chosen
            return output
    else:
        code, output = command.run(callbacks=(kill,))
    assert code == -signal.SIGKILL, output
    code, output = command.run("--ckpt_path=last")
    assert code == 0, output
    return output


@pytest.mark.parametrize(
    ("ranks", "strategy", "kill"),
    [
        (1, "ddp", callback("KillWhileSaving", call=2)),
        (2, "ddp", callback("KillAt", hook="on_train_batch_start", call=6)),
        pytest.param(
            2,
            "fsdp2",
            callback("KillAt", hook="on_train_batch_start", call=6),
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "one process, half a checkpoint written",
        "two ranks, within an epoch",
        "checkpoints that are folders",
    ],
)
def test_a_killed_run_ends_with_the_parameters_of_one_left_alone(
    ranks: int, strategy: str, kill: Settings, tied_model: str, tmp_path: Path
) -> None:
    alone = Command(tied_model, tmp_path / "alone", ranks, strategy)
    undisturbed = alone.start()
    killed = Command(tied_model, tmp_path / "killed", ranks, strategy)
    output = killed_and_resumed(killed, kill)
    assert undisturbed.finish()[0] == 0
    assert "last.ckpt" in output
    assert alone.last()["global_step"] == 6
    assert differing(killed.last(), alone.last()) == []


KILLS = [
    *(callback("KillAt", hook="on_train_batch_start", call=call) for call in (1, 2, 3, 4, 6, 10)),
    *(callback("KillAt", hook="on_train_epoch_start", call=call) for call in (1, 2)),
    callback("KillAt", hook="on_validation_batch_start", call=1),
    callback("KillAt", hook="on_train_end", call=0),
    *(callback("KillWhileSaving", call=call) for call in (0, 1, 3)),
]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_many_kills(ranks: int, tied_model: str, tmp_path: Path) -> None:
    alone = Command(tied_model, tmp_path / "alone", ranks)
    start = time.monotonic()
    assert alone.run()[0] == 0
    seconds = time.monotonic() - start
    draw = random.Random(ranks)
    kills = [*KILLS, *(draw.uniform(0.3 * seconds, 0.9 * seconds) for _ in range(6))]
    unequal = []
    for number, kill in enumerate(kills):
        killed = Command(tied_model, tmp_path / f"killed-{number}", ranks)
        killed_and_resumed(killed, kill)
        if differing(killed.last(), alone.last()):
            unequal.append(kill)
    print(f"{ranks} ranks: {len(kills)} kills, {len(kills) - len(unequal)} equal")
    assert unequal == []
