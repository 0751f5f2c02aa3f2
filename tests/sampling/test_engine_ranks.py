"""Which ranks can share an engine: errors before anything is loaded. test_shared_engine runs it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3MoeConfig

from prl_lightning.callbacks import RolloutCallback
from prl_lightning.checks.contradictions import ConfigurationError
from prl_lightning.cli import main
from prl_lightning.sampling import SubprocessSampler, VLLMSampler
from prl_lightning.sampling.engine_ranks import EngineRanks, OwnProgress
from prl_lightning.sampling.vllm_requirements import refuse_split
from prl_lightning.types import Completion
from sample_rewards import even_digits
from tiny_runs import ARITHMETIC, memory_of, tiny_overrides

# The sizes of published models.
QWEN_HALF = Qwen2Config(
    num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864, vocab_size=151936
)
QWEN_30B = Qwen3MoeConfig(
    num_attention_heads=32, num_key_value_heads=4, intermediate_size=6144,
    moe_intermediate_size=768, vocab_size=151936,
)  # fmt: skip
LLAMA_1B = LlamaConfig(
    num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192, vocab_size=128256
)
ODD = LlamaConfig(hidden_size=96, num_attention_heads=6, intermediate_size=6, vocab_size=100)


@pytest.mark.parametrize(
    ("config", "ranks", "refused"),
    [
        (QWEN_HALF, 2, []),
        (QWEN_HALF, 4, ["num_attention_heads=14"]),
        # 7 ranks can neither divide 2 heads nor copy them equally often; 4864 = 7 * 695 - 1.
        (QWEN_HALF, 7, ["intermediate_size=4864", "num_key_value_heads=2", "padded to 151936"]),
        (QWEN_30B, 8, []),  # each of 4 heads twice
        (QWEN_30B, 32, []),
        (QWEN_30B, 3, ["num_attention_heads=32", "num_key_value_heads=4", "padded to 151936"]),
        (LLAMA_1B, 16, []),
        (LLAMA_1B, 64, ["num_attention_heads=32"]),
        (ODD, 2, []),
        (ODD, 3, ["padded to 128"]),
    ],
)
def test_what_the_ranks_cannot_divide_is_named(
    config: PretrainedConfig, ranks: int, refused: list[str]
) -> None:
    if not refused:
        refuse_split(config, ranks)
        return
    with pytest.raises(ValueError, match=f"tensor_parallel_size={ranks}: ") as error:
        refuse_split(config, ranks)
    named = str(error.value).partition("no multiple: ")[2]
    assert re.findall(r"\w+=\d+|padded to \d+", named) == refused


def check(model: str, folder: Path, ranks: int, size: int) -> None:
    main([
        "check",
        f"--config={ARITHMETIC}",
        *tiny_overrides(model, folder, "VLLMSampler"),
        f"--rollout.sampler.tensor_parallel_size={size}",
        "--data.prompts_per_epoch=12",
        f"--trainer.devices={ranks}",
        "--trainer.accelerator=cpu",
        "--trainer.strategy=fsdp2",
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "size", "message"),
    [
        (1, 2, r"tensor_parallel_size=2: .*the trainer has 1 "),
        (3, 2, r"tensor_parallel_size=2: .*the trainer has 3 "),
        (4, 4, r"tensor_parallel_size=4: .*num_attention_heads=2"),
        (2, 0, r"tensor_parallel_size=0: must be at least 1"),
    ],
)
def test_the_command_refuses_before_anything_is_loaded(
    tied_model: str, tmp_path: Path, ranks: int, size: int, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check(tied_model, tmp_path, ranks, size)


def test_the_memory_estimate_has_a_ranks_part_of_the_engine(
    tied_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("prl_lightning.checks.memory.MIB", 1)
    found = []
    for size in (1, 2):
        check(tied_model, tmp_path, 2, size)
        sizes = memory_of(capsys.readouterr().out)
        found.append((sizes["engine"], sizes["in all"]))
    assert found[0][0] == 2 * found[1][0]
    assert found[0][1] - found[1][1] == found[1][0]


def test_an_engine_that_runs_beside_the_trainer_is_not_shared() -> None:
    shared = VLLMSampler(tensor_parallel_size=2)
    with pytest.raises(ValueError, match=r"SubprocessSampler.*tensor_parallel_size=2"):
        SubprocessSampler(shared)
    with pytest.raises(ValueError, match=r"overlap=true.*tensor_parallel_size=2"):
        RolloutCallback([even_digits], shared, overlap=True)


def test_a_process_alone_has_no_ranks_to_share_with() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2: .*the trainer has 1 "):
        EngineRanks(2)


GROUPS = [[Completion([row], [-1.0], True)] for row in range(4)]


def test_reports_have_the_ranks_own_indices() -> None:
    reports: list[tuple[Mapping[int, list[Completion]], int]] = []
    progress = OwnProgress(range(1, 3), lambda *report: reports.append(report), is_alone=False)
    progress(dict(enumerate(GROUPS)), 5)
    progress({0: GROUPS[0]}, 0)
    assert reports == [({0: GROUPS[1], 1: GROUPS[2]}, 5), ({}, 0)]


@pytest.mark.parametrize("is_alone", [True, False])
def test_an_exception_of_a_report_waits_for_the_other_ranks(is_alone: bool) -> None:
    calls = []

    def fail(finished: object, tokens: int) -> None:
        calls.append(tokens)
        raise OSError("no space left")

    progress = OwnProgress(range(1), fail, is_alone)
    if is_alone:
        with pytest.raises(OSError, match="no space left"):
            progress({}, 1)
        return
    progress({}, 1)
    progress({}, 2)  # nothing more is reported
    assert calls == [1]
    assert isinstance(progress.error, OSError)
