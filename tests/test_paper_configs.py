"""The papers' experiments run: tiny models, two ranks, rows in the Hub's columns.

With -m example one of v1, and of v2 the mixture of experts; the others with -m slow.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from prl_lightning.arithmetic import make_tokenizer
from ranks import Record, run_all

pytestmark = pytest.mark.process

CONFIGS = Path(__file__).parents[1] / "configs" / "paper"
MODELS = sorted(file.stem for file in CONFIGS.glob("v?-*.yaml"))
KINDS = {
    "v1-qwen2.5-math-1.5b": "qwen2",
    "v1-qwen2.5-math-7b": "qwen2",
    "v1-llama-3.2-1b": "llama",
    "v1-llama-3.2-3b": "llama",
    "v2-qwen3-1.7b": "qwen3",
    "v2-qwen3-4b": "qwen3",
    "v2-qwen3-30b-a3b": "qwen3_moe",
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # vLLM's least on a CPU
    "max_position_embeddings": 4096,
    "bos_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# A row of each dataset as the Hub has it, without columns that nothing reads.
WORKED = {"problem": "7-3?", "solution": "It is \\boxed{4}.", "answer": "4"}
HUB = {
    "ScaleML-RLHF/numina_math_15_all:train": {"problem": "7-3?", "answer": "4"},
    "open-r1/DAPO-Math-17k-Processed/en:train": {
        "prompt": "7-3?",
        "solution": "4",
        "data_source": "math_dapo",
        "reward_model": {"ground_truth": "4", "style": "rule-lighteval/MATH_v2"},
    },
    "HuggingFaceH4/MATH-500:test": WORKED,
    "HuggingFaceH4/aime_2024:train": WORKED,
    "math-ai/aime25:test": {"problem": "7-3?", "answer": "4"},
    "math-ai/minervamath:test": {"question": "7-3?", "answer": "4"},
    "math-ai/amc23:test": {"question": "7-3?", "answer": 4.0},
    "math-ai/olympiadbench:test": {"question": "7-3?", "final_answer": ["4"]},
}


def save_model(kind: str, folder: Path) -> str:
    tokenizer = make_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    special = EXPERTS if kind == "qwen3_moe" else {}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **SIZES, **ids, **special)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(folder: Path, source: str, count: int) -> str:
    file = folder / f"{source.split('/')[1]}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{json.dumps(HUB[source])}\n" * count)
    return str(file)


def overrides(name: str, folder: Path) -> list[str]:
    """Smaller, on a CPU; objective, columns, templates, strategy and precision as they are."""
    config = yaml.safe_load((CONFIGS / f"{name[:2]}.yaml").read_text())
    named = config["evaluation"]["sets"]
    sets = {key: write_rows(folder, source, 1) for key, source in named.items()}
    return [
        f"--config={CONFIGS / f'{name[:2]}.yaml'}",
        f"--config={CONFIGS / f'{name}.yaml'}",
        f"--model.policy={save_model(KINDS[name], folder / 'model')}",
        f"--data.train={write_rows(folder, config['data']['train'], 8)}",
        f"--evaluation.sets={json.dumps(sets)}",
        "--data.prompts_per_epoch=8",
        "--rollout.max_new_tokens=12",
        "--rollout.rewards+=sample_rewards.even_digits",
        "--rollout.sampler.init_args.sleeps=false",
        "--rollout.sampler.init_args.enforce_eager=true",
        "--rollout.sampler.init_args.cache_gib=0.1",
        f"--trainer.default_root_dir={folder / 'run'}",
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        "--trainer.num_nodes=1",
        "--trainer.accumulate_grad_batches=5",
        "--trainer.max_epochs=1",
        "--trainer.check_val_every_n_epoch=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.callbacks+=recorded.Record",
        f"--trainer.callbacks.file={folder / 'record.pt'}",
    ]


# Runs that share their processes. The mixture of experts comes first: vLLM makes its groups with
# the first engine of a process, and one of experts only for such a model. The others are slow:
# test_readme has them checked, and tests/models/test_architectures.py has their architectures.
TOGETHER = (
    ("v2-qwen3-30b-a3b", "v1-qwen2.5-math-1.5b"),
    ("v1-qwen2.5-math-7b", "v1-llama-3.2-1b", "v1-llama-3.2-3b", "v2-qwen3-1.7b", "v2-qwen3-4b"),
)


@pytest.fixture(scope="module")
def record_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Record]:
    root = tmp_path_factory.mktemp("paper")

    @cache
    def records(names: tuple[str, ...]) -> dict[str, Record]:
        return run_all(root, 2, {name: overrides(name, root / name) for name in names}, config=None)

    return lambda name: next(records(names)[name] for names in TOGETHER if name in names)


SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."
ADDED = r" Let's think step by step and output the final answer within \boxed{}"
SETTINGS = {  # of the papers' tables
    "v1": {"steps": 256, "prompts": (128, 1), "limits": (1024, 3072), "samples": 8},
    "v2": {"steps": "token", "prompts": (256, 4), "limits": (2048, 8192), "samples": 16},
}


@pytest.mark.parametrize("version", SETTINGS)
def test_settings_are_the_papers(version: str) -> None:
    config = yaml.safe_load((CONFIGS / f"{version}.yaml").read_text())
    model, data, rollout = config["model"], config["data"], config["rollout"]
    evaluation = config["evaluation"]
    objective = model["objective"]
    assert (objective["outcome"], objective["kl"], objective["beta"]) == ("grpo", "process", 0.01)
    assert objective["unbiased_std"]  # the authors' code divides by n - 1
    assert model["optimizer"]["init_args"] == {"lr": 1e-6, "fused": True}
    assert rollout["temperature"] == evaluation["temperature"] == 1.0
    assert data["group_size"] == 5
    assert data["format"]["template"] == "{prompt}" + ADDED
    found = {
        "steps": objective["steps"],
        "prompts": (data["prompts_per_epoch"], data["updates_per_epoch"]),
        "limits": (data["max_prompt_tokens"], rollout["max_new_tokens"]),
        "samples": evaluation["samples"],
    }
    assert found == SETTINGS[version]
    assert data["format"].get("system_prompt") == (SYSTEM if version == "v1" else None)


def test_every_file_is_tested() -> None:
    assert sorted(KINDS) == MODELS == sorted(name for names in TOGETHER for name in names)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if names is TOGETHER[-1] else pytest.mark.example)
        for names in TOGETHER
        for name in names
    ],
)
def test_a_papers_experiment_trains(name: str, record_of: Callable[[str], Record]) -> None:
    record: dict[str, Any] = record_of(name)
    metrics = record["metrics"]
    updates = {"v1": 1, "v2": 4}[name[:2]]
    assert metrics["rollout/reward/even_digits"] > 0
    samples = {"v1": 8, "v2": 16}[name[:2]]
    sets = ["math500", "minerva_math", "olympiad_bench", "aime24", "amc23"]
    for evaluated in sets + ["aime25"] * (name[:2] == "v2"):
        # A set of one problem: one of its n samples is right, or none is.
        mean = metrics[f"val/{evaluated}/mean@{samples}"]
        assert metrics[f"val/{evaluated}/pass@{samples}"] == float(mean > 0)
    assert record["steps"] == updates
    moved = {n: not torch.equal(record["after"][n], w) for n, w in record["before"].items()}
    assert all(moved.values()), [n for n, has_moved in moved.items() if not has_moved]


@pytest.mark.example
def test_experts_and_router_train(record_of: Callable[[str], Record]) -> None:
    gradient = record_of("v2-qwen3-30b-a3b")["gradient"]
    routers = [g for n, g in gradient.items() if n.endswith("mlp.gate.weight")]
    experts = [g for n, g in gradient.items() if ".experts." in n]
    assert len(routers) == SIZES["num_hidden_layers"]
    assert all(g.abs().sum(1).gt(0).all() for g in routers)
    assert experts
    assert all(g.flatten(1).abs().sum(1).gt(0).all() for g in experts)
