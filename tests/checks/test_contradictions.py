"""Contradictions before anything is loaded, all at once, and what a run asks for."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch.optim import lr_scheduler
from transformers import AutoConfig, AutoModelForCausalLM

from prl_lightning.callbacks import LastCheckpoint, RolloutCallback
from prl_lightning.checks import memory
from prl_lightning.checks.cautions import (
    warn_of_slow_precision,
)
from prl_lightning.checks.contradictions import (
    ConfigurationError,
    contradictions,
)
from prl_lightning.checks.lightning_options import lightning_errors
from prl_lightning.cli import main
from prl_lightning.data import PromptDataModule
from prl_lightning.functional import EngineCorrection
from prl_lightning.models.loading import load_tokenizer
from prl_lightning.module import PRLModule
from prl_lightning.objective import Objective
from prl_lightning.sampling import HFSampler, SubprocessSampler
from prl_lightning.trainer import FSDP2Strategy, PRLTrainer
from random_models import random_model
from sample_rewards import even_digits
from tiny_runs import ARITHMETIC, fit, memory_of, tiny_overrides, write_prompts


@pytest.fixture
def bare_model(tied_model: str, tmp_path: Path) -> str:
    """A model's folder without its weights: whoever loads them fails."""
    folder = tmp_path / "bare"
    shutil.copytree(tied_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return str(folder)


def test_contradictions_are_named_all_at_once(bare_model: str, tmp_path: Path) -> None:
    overrides = [
        *tiny_overrides(bare_model, tmp_path),
        "--trainer.accumulate_grad_batches=3",
        "--rollout.max_new_tokens=100000",
        "--data.train=nowhere.jsonl",
        "--model.objective.steps=0",
        "--model.objective.engine_correction={high: 2}",
        "--rollout.overlap=true",
        "--rollout.sampler=SubprocessSampler",
        "--rollout.sampler.sampler=HFSampler",
    ]
    with pytest.raises(ConfigurationError) as raised:
        fit(*overrides)
    first, *found = str(raised.value).split("\n- ")
    assert len(found) == 5
    for words in (
        r"\(16\) is not a multiple of trainer.accumulate_grad_batches \(3\)",
        "max_new_tokens=100000 = 100016 tokens, but the model takes",
        "no file 'nowhere.jsonl'",
        "model.objective.steps=0",
        "engine_correction has no effect with rollout.overlap=true",
    ):
        assert any(re.search(words, message) for message in found), words
    assert not (tmp_path / "run").exists()


@pytest.mark.process
def test_check_takes_what_fit_takes_and_what_it_has_written(
    tied_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(*tiny_overrides(tied_model, tmp_path))
    written = tmp_path / "run" / "version_0" / "config.yaml"
    main(["check", "--config", str(written), "--ckpt_path=last"])
    assert "4 prompts x 4 completions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--model.policy=no/such/folder/as.this", r"policy='no/such/folder/as\.this' cannot"),
        ("--data.group_size=1", r"data\.group_size=1, but .*outcome='grpo' compares"),
        ("--data.train=heldout.jsonl:test", r"heldout\.jsonl:test names a split, but a file has"),
        ("--data.train=null", r"data\.train is missing"),
        ("--evaluation.pass_at=[0, 2]", r"evaluation\.pass_at=\(0, 2\)"),
        ("--model.optimizer.init_args.lr=-1", r"model\.optimizer.*-1"),
        (
            "--rollout.limits={workers: 0, seconds: 3}",
            r"seconds=3\.0.*workers=0",
        ),
        ("--rollout.limits.failure_value=0.5", r"failure_value=0\.5.*solved_at=0\.5"),
        ("--rollout.stop=['<|im_end|>', 99]", r"rollout\.stop.*\[99\].*20 tokens"),
        ("--rollout.stop=['']", r"rollout\.stop=\[''\]"),
        (
            "--trainer.callbacks+={class_path: StochasticWeightAveraging, init_args: {swa_lrs: 1}}",
            r"trainer\.callbacks has StochasticWeightAveraging",
        ),
        (
            "--trainer={strategy: fsdp2, callbacks: [EMAWeightAveraging]}",
            r"trainer\.callbacks has EMAWeightAveraging.*trainer\.strategy=FSDP2Strategy",
        ),
        (
            "--trainer.callbacks+={class_path: EarlyStopping, init_args: {monitor: val/a/pass@2}}",
            r"EarlyStopping\(monitor='val/a/pass@2'\).*'val/tiny/pass@2'",
        ),
        (
            "--trainer.callbacks+={class_path: ModelCheckpoint, "
            "init_args: {monitor: val/tiny/pass@3}}",
            r"ModelCheckpoint\(monitor='val/tiny/pass@3'\).*'val/tiny/pass@2'",
        ),
        ("--trainer.strategy=deepspeed_stage_3", r"trainer\.strategy='deepspeed_stage_3'.*fsdp2"),
        ("--trainer.strategy=xla", r"trainer\.strategy='xla'.*GPU"),
        (
            "--trainer={strategy: {class_path: ModelParallelStrategy}, devices: 2}",
            r"trainer\.strategy\.tensor_parallel_size=auto.*fsdp2",
        ),
        ("--model.lora={init_lora_weights: pissa}", r"model\.lora\.init_lora_weights='pissa'"),
        ("--model.lora={target_modules: [embed_tokens]}", r"model\.lora.*model\.embed_tokens"),
        ("--trainer.plugins=lightning.pytorch.plugins.io.AsyncCheckpointIO", "AsyncCheckpointIO"),
    ],
)
def test_a_contradiction_is_named(
    change: str, message: str, tied_model: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        main(["check", "--config", str(ARITHMETIC), *tiny_overrides(tied_model, tmp_path), change])


def test_options_of_lightning_that_would_change_an_update_are_named_at_once(
    tied_model: str, tmp_path: Path
) -> None:
    overrides = [
        *tiny_overrides(tied_model, tmp_path),
        "--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau",
        "--model.lr_scheduler.monitor=reward",
        "--trainer.limit_train_batches=0.5",
        "--trainer.callbacks+=GradientAccumulationScheduler",
        "--trainer.callbacks.scheduling={4: 2}",
        "--trainer.callbacks+=LearningRateFinder",
        "--trainer.callbacks+=BatchSizeFinder",
    ]
    with pytest.raises(ConfigurationError) as raised:
        main(["check", "--config", str(ARITHMETIC), *overrides])
    for words in (
        r"- model\.lr_scheduler=ReduceLROnPlateau\(monitor='reward'\)",
        r"- trainer\.limit_train_batches=0\.5 .*all of its 2 micro",
        r"- trainer\.callbacks has GradientAccumulationScheduler.*data\.updates_per_epoch",
        r"- trainer\.callbacks has LearningRateFinder",
        r"- trainer\.callbacks has BatchSizeFinder",
    ):
        assert re.search(words, str(raised.value)), words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, None),
        ({"limit_train_batches": 1}, r"trainer\.limit_train_batches=1 "),
        ({"limit_train_batches": 0}, r"trainer\.limit_train_batches=0 "),
        ({"overfit_batches": 1}, r"trainer\.overfit_batches=1 "),
        ({"limit_train_batches": 8}, None),
        ({"overfit_batches": 1.0}, None),
        ({"fast_dev_run": True}, None),
    ],
)
def test_an_epoch_is_not_cut(options: dict[str, Any], message: str | None) -> None:
    trainer = PRLTrainer(accelerator="cpu", logger=False, accumulate_grad_batches=2, **options)
    errors = list(lightning_errors(trainer, PromptDataModule("no/model", updates_per_epoch=4)))
    assert len(errors) == (message is not None)
    assert message is None or re.search(message, errors[0])


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer), r"\(monitor=None\)"),
        (lambda optimizer: lr_scheduler.LinearLR(optimizer, 7), "lr_scheduler cannot be created"),
        (lambda optimizer: lr_scheduler.LinearLR(optimizer), None),
    ],
)
def test_a_schedule_counts_updates(
    schedule: Any, message: str | None, tied_model: str, tmp_path: Path
) -> None:
    train = str(write_prompts(tmp_path / "train.jsonl"))
    rollout = RolloutCallback([even_digits], HFSampler(), max_new_tokens=8)
    trainer = PRLTrainer(accelerator="cpu", logger=False, callbacks=[rollout])
    module, data = PRLModule(tied_model, lr_scheduler=schedule), PromptDataModule(tied_model, train)
    errors = contradictions(trainer, module, data, rollout.settings, trains=True)
    assert len(errors) == (message is not None)
    assert message is None or re.search(message, errors[0])


class Uploads(DummyLogger):
    """What an MLFlowLogger has."""

    def __init__(self, log_model: Any) -> None:
        super().__init__()
        self._log_model = log_model
        self._checkpoint_callback = None


@pytest.mark.parametrize(
    ("log_model", "strategy", "callbacks", "message"),
    [
        (True, "auto", [LastCheckpoint(), ModelCheckpoint()],
         r"Uploads\(log_model=True\).*callbacks has LastCheckpoint, ModelCheckpoint"),
        ("all", "fsdp2", [LastCheckpoint()], r"Uploads\(log_model='all'\).*=FSDP2Strategy saves"),
        (True, FSDP2Strategy(save_distributed_checkpoint=False), [LastCheckpoint()], None),
        ("all", "auto", [LastCheckpoint(), ModelCheckpoint()], None),
        (False, "fsdp2", [LastCheckpoint(), ModelCheckpoint()], None),
    ],
)  # fmt: skip
def test_a_logger_that_would_not_upload_is_a_mistake(
    log_model: Any, strategy: Any, callbacks: list[Callback], message: str | None
) -> None:
    logger, options = Uploads(log_model), {"accelerator": "cpu", "devices": 1}
    trainer = PRLTrainer(logger=logger, strategy=strategy, callbacks=callbacks, **options)
    errors = list(lightning_errors(trainer, PromptDataModule("no/model")))
    assert len(errors) == (message is not None)
    assert message is None or re.search(message, errors[0])


def test_an_architecture_that_cannot_work_is_named_before_its_weights_are_read(
    bare_model: str, tmp_path: Path
) -> None:
    AutoConfig.for_model("gptj").save_pretrained(bare_model)
    message = r"model\.policy.*'gptj' has a bias of the output head"
    with pytest.raises(ConfigurationError, match=message):
        fit(*tiny_overrides(bare_model, tmp_path))


def test_an_architecture_that_the_engine_cannot_sample_from_is_named(
    bare_model: str, tmp_path: Path
) -> None:
    AutoConfig.for_model("gpt_oss").save_pretrained(bare_model)
    overrides = [*tiny_overrides(bare_model, tmp_path), "--rollout.sampler=VLLMSampler"]
    with pytest.raises(ConfigurationError, match=r"model\.policy.*'gpt_oss'.*HFSampler"):
        fit(*overrides)


def test_a_reference_that_nothing_reads_is_a_mistake(tied_model: str, tmp_path: Path) -> None:
    overrides = [*tiny_overrides(tied_model, tmp_path), "--model.reference=owner/other"]
    no_kl = ["--model.objective.kl=none"]
    with pytest.raises(ConfigurationError, match=r"reference='owner/other' is not used"):
        main(["check", "--config", str(ARITHMETIC), *overrides, *no_kl])


def test_an_adapter_without_peft_is_a_mistake(
    tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "peft" else find(name)
    )
    overrides = [*tiny_overrides(tied_model, tmp_path), "--model.lora={r: 2}"]
    with pytest.raises(ConfigurationError, match=r"model\.lora needs peft.*prl-lightning\[lora\]"):
        main(["check", "--config", str(ARITHMETIC), *overrides])


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("VLLMSampler, init_args: {sleeps: true}", r"sleeps=true.*there is no GPU"),
        ("SubprocessSampler, init_args: {gpus: [7]}", r"gpus=\[7\], but this process sees 0 GPUs"),
    ],
)
def test_a_run_needs_its_devices_and_a_check_does_not(
    sampler: str, message: str, tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    overrides = [
        *tiny_overrides(tied_model, tmp_path),
        f"--rollout.sampler={{class_path: prl_lightning.sampling.{sampler}}}",
        "--trainer.accelerator=cpu",
    ]
    main(["check", "--config", str(ARITHMETIC), *overrides])
    with pytest.raises(ConfigurationError, match=message):
        fit(*overrides)


def test_an_engine_needs_a_gpu_for_each_process(tied_model: str, tmp_path: Path) -> None:
    overrides = [
        *tiny_overrides(tied_model, tmp_path),
        "--rollout.sampler={class_path: prl_lightning.sampling.SubprocessSampler, "
        "init_args: {sampler: prl_lightning.sampling.HFSampler, gpus: [0]}}",
        *("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"),
    ]
    with pytest.raises(ConfigurationError, match=r"gpus=\[0\], but the trainer has 2 processes"):
        main(["check", "--config", str(ARITHMETIC), *overrides])


def test_a_reward_in_the_folder_of_the_configuration_is_found(
    tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another working directory, and named by a relative path."""
    for name in ("own", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "own" / "beside_config.py").write_text(
        "def short(completions, gold):\n    return [float(len(c) < 5) for c in completions]\n"
    )
    (tmp_path / "own" / "run.yaml").write_text("rollout: {rewards: [beside_config.short]}\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path / "work")
    overrides = tiny_overrides(tied_model, tmp_path)
    overrides = [flag for flag in overrides if "sample_rewards" not in flag]
    main(["check", f"--config={ARITHMETIC}", "--config=../own/run.yaml", *overrides])
    # Servers and other ranks get the path, whatever their working directory.
    assert str(tmp_path / "own") in sys.path


def test_steps_that_no_completion_fills_are_said(tied_model: str, tmp_path: Path) -> None:
    overrides = [*tiny_overrides(tied_model, tmp_path), "--model.objective.steps=8"]
    with pytest.warns(UserWarning, match=r"steps=8, but rollout\.max_new_tokens=8"):
        main(["check", "--config", str(ARITHMETIC), *overrides])


@pytest.fixture
def chat_model(tied_model: str, tmp_path: Path) -> str:
    """Its chat template closes a turn with a special token that is no stop token."""
    shutil.copytree(tied_model, tmp_path / "chat")
    tokenizer = load_tokenizer(tied_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["?"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '?\n' }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    return str(tmp_path / "chat")


@pytest.mark.parametrize(
    ("settings", "is_said"),
    [
        ([], True), (["--rollout.stop=['=']"], True),
        (["--rollout.stop=['?']"], False), (["--rollout.stop=[STOP]"], False),
        (["--data.format.chat_template=false"], False),
    ],
)  # fmt: skip
def test_an_end_of_turn_that_ends_no_completion_is_said(
    settings: list[str], is_said: bool, chat_model: str, tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:  # fmt: skip
    index = load_tokenizer(chat_model).convert_tokens_to_ids("?")
    settings = [text.replace("STOP", str(index)) for text in settings]
    main(["check", "--config", str(ARITHMETIC), *tiny_overrides(chat_model, tmp_path), *settings])
    said = [str(one.message) for one in recwarn if "rollout.stop to ['?']" in str(one.message)]
    assert len(said) == is_said


def test_a_run_from_python_is_refused_the_same(tied_model: str, tmp_path: Path) -> None:
    """All at once, and before the policy is loaded."""
    train = write_prompts(tmp_path / "train.jsonl")
    module = PRLModule(
        "never/loaded", Objective(outcome="rloo", engine_correction=EngineCorrection())
    )
    data = PromptDataModule(tied_model, train=str(train), prompts_per_epoch=4, group_size=1)
    sampler = SubprocessSampler(HFSampler())
    rollout = RolloutCallback([even_digits], sampler, max_new_tokens=8, overlap=True)
    trainer = PRLTrainer(accelerator="cpu", logger=False, callbacks=[rollout], max_epochs=1)
    with pytest.raises(ConfigurationError, match=r"(?s)data\.group_size=1.*engine_correction"):
        trainer.fit(module, datamodule=data)


def test_prompts_that_follow_results_are_not_sampled_several_iterations_ahead(
    bare_model: str, tmp_path: Path
) -> None:
    overrides = [
        *tiny_overrides(bare_model, tmp_path, "SubprocessSampler"),
        *("--rollout.sampler.sampler=HFSampler", "--rollout.overlap=true"),
        "--data.difficulty={passes: 2}",
        "--data.train={class_path: prl_lightning.data.ReasoningGym, init_args: {tasks: "
        "{chain_sum: {level: 0}}, size: 100, curriculum: {}}}",
    ]
    with pytest.raises(ConfigurationError, match=r"(?s)max_staleness=2.*data\.difficulty and data"
                       r"\.train has ReasoningGym with a curriculum"):  # fmt: skip
        fit(*overrides, "--rollout.max_staleness=2")


@pytest.mark.process
def test_an_evaluation_is_not_bothered_by_what_only_training_needs(
    tied_model: str, tmp_path: Path
) -> None:
    overrides = [*tiny_overrides(tied_model, tmp_path), "--trainer.accumulate_grad_batches=3"]
    main(["validate", "--config", str(ARITHMETIC), *overrides, "--data.train=nowhere.jsonl"])
    assert (tmp_path / "run" / "version_0" / "evaluation.json").exists()


def test_check_says_what_a_run_asks_for_without_loading_weights(
    bare_model: str, tied_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [
        *tiny_overrides(bare_model, tmp_path),
        "--model.objective.beta=0.1",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.max_epochs=7",
        "--rollout.refill=2",
    ]
    main(["check", "--config", str(ARITHMETIC), *overrides])
    said = capsys.readouterr().out
    assert "4 prompts x 4 completions = 16 per epoch; / 1 updates = 16 per update; / 2" in said
    assert "at most 2 x 4 = 8 prompts x 4 completions sampled an epoch" in said
    assert "at most 32 x (16 + 8) = 768 an epoch" in said
    assert "7 epochs x 1 = 7 updates" in said
    assert not (tmp_path / "run").exists()


def test_check_adds_up_what_a_run_takes_without_a_gpu(
    tied_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = tiny_overrides(tied_model, tmp_path, "VLLMSampler")
    main(["check", "--config", str(ARITHMETIC), *overrides, "--rollout.sampler.cache_gib=2"])
    said = capsys.readouterr().out
    numbers = memory_of(said)
    # 16 completions in two micro-batches of 16 + 8 tokens each.
    assert "192 tokens in a micro-batch" in said
    # By hand: a layer keeps about 10 rows of the hidden size and 4 of the inner one.
    per_token = int(re.findall(r"([\d,]+) KiB a token", said)[0])
    by_hand = 2 * (10 * 64 + 4 * 64) * 4 / 1024
    assert by_hand / 2 < per_token < by_hand * 2
    assert numbers["code"] > 1000
    assert numbers["in all"] >= 2048 + numbers["code"]


def test_activations_of_experts_are_counted(tmp_path: Path) -> None:
    """Their kernels refuse float32 on tensors without memory."""
    model = random_model("qwen3_moe")
    model.config.save_pretrained(tmp_path)
    module = PRLModule(str(tmp_path))
    whole, half = (memory._activations(module, kind) for kind in ("32-true", "bf16-true"))
    assert whole is not None
    assert half is not None
    assert half > 0
    assert 1.5 * half < whole <= 2 * half


def test_activations_that_cannot_be_counted_are_said_to_be_unknown(
    tied_model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any) -> float:
        raise RuntimeError("depends on data")

    monkeypatch.setattr(memory, "_kept_bytes", fail)
    main(["check", "--config", str(ARITHMETIC), *tiny_overrides(tied_model, tmp_path)])
    said = capsys.readouterr().out
    assert re.search(r"activations +unknown for this architecture", said)
    assert re.search(r"in all +[\d,]+ MiB", said)


@pytest.mark.parametrize(
    ("precision", "has_instructions", "warns"),
    [("bf16-mixed", False, True), ("bf16-true", False, True), ("bf16-mixed", True, False),
     ("32-true", False, False)],
)  # fmt: skip
def test_slow_bf16_on_a_cpu_is_a_warning(
    precision: Any, has_instructions: bool, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = {"avx2": True, "avx512_bf16": has_instructions, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    trainer = PRLTrainer(accelerator="cpu", logger=False, precision=precision)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_slow_precision(trainer)
    said = [str(one.message) for one in caught if "bfloat16 instructions" in str(one.message)]
    assert bool(said) == warns
    assert all(f"trainer.precision={precision}" in one for one in said)


def test_check_accepts_an_evaluation(
    tied_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ARITHMETIC.parent / "eval" / "math.yaml"
    heldout = write_prompts(tmp_path / "heldout.jsonl")
    changes = [
        f"--model.policy={tied_model}",
        f"--evaluation.sets={{tiny: {heldout}}}",
        "--rollout.max_new_tokens=8",
        "--rollout.sampler=HFSampler",
    ]
    main(["check", "--config", str(config), *changes])
    said = capsys.readouterr().out
    assert "data.train is not set" in said
    assert "tiny: 16 samples" in said
    assert "gradient" not in said
    with pytest.raises(ConfigurationError, match=r"data\.train is missing"):
        main(["check", "--config", str(config), *changes, "--evaluation.sets={}"])


@pytest.mark.parametrize(
    ("changes", "copies"),
    [
        # Policy, gradient, two moments of Adam, reference.
        (["--model.objective.beta=0.1"], [1, 1, 2, 1]),
        (["--model.objective.beta=0"], [1, 1, 2]),
        (["--model.objective.beta=0", "--trainer.precision=bf16-true"], [0.5, 0.5, 1]),
        (["--model.objective.beta=0.1", "--trainer.strategy=fsdp2", "--trainer.devices=4"],
         [0.25, 0.25, 0.5, 0.25]),
        (["--model.objective.beta=0", "--model.optimizer={class_path: torch.optim.SGD, "
          "init_args: {lr: 0.1, momentum: 0.9}}"], [1, 1, 1]),
        (["--model.objective.beta=0.1", "--model.lora={r: 2}"], [1]),
    ],
)  # fmt: skip
def test_the_memory_estimate_counts_every_copy_of_the_weights(
    changes: list[str], copies: list[float], tied_model: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("prl_lightning.checks.memory.MIB", 1)  # in bytes, to be exact
    main(["check", "--config", str(ARITHMETIC), *tiny_overrides(tied_model, tmp_path), *changes])
    lines = re.findall(r"^  \w.*? ([\d,]+) MiB$", capsys.readouterr().out, flags=re.MULTILINE)
    model = AutoModelForCausalLM.from_pretrained(tied_model)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert [int(line.replace(",", "")) for line in lines] == [round(size * n) for n in copies]
