"""Training steps of tiny models: is all on the GPU, and does nothing wait for it?"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fake_gpu import bf16_mixed, fake_gpu, fake_model, say, to_gpu
from micro_batch import OBJECTIVES, WithoutTrainer, micro_batch
from prl_lightning.arithmetic import make_tokenizer
from prl_lightning.models.causal_lm import LogprobModel
from prl_lightning.models.step_splitter import StepSplitter
from waits import Waits, package_line

TINY = {
    "vocab_size": 24,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": TINY,
    "qwen3": TINY,
    "mistral": TINY | {"sliding_window": 4},
    "qwen3_moe": TINY | EXPERTS,
}


@dataclass(frozen=True)
class Case:
    """One training step.

    Attributes:
        objective: a name of OBJECTIVES.
    """

    architecture: str = "qwen2"
    objective: str = "token"
    packed: bool = True
    autocast: bool = True
    gradient_checkpointing: bool = False

    def __str__(self) -> str:
        rows = "packed" if self.packed else "padded"
        precision = "bf16-mixed" if self.autocast else "float32"
        kept = ", checkpointing" if self.gradient_checkpointing else ""
        return f"{self.architecture}, {self.objective}, {rows}, {precision}{kept}"


def cases() -> Iterator[Case]:
    """Every architecture with one objective, and every objective with one architecture."""
    for packed in (True, False):
        for autocast in (True, False):
            for architecture in ARCHITECTURES:
                case = Case(architecture, packed=packed, autocast=autocast)
                yield case
                yield replace(case, gradient_checkpointing=True)
            for objective in list(OBJECTIVES)[1:]:
                yield Case(objective=objective, packed=packed, autocast=autocast)


def on_fake_gpu(case: Case) -> dict[str, str]:
    """What of a step is not on the GPU, and what waits for it."""
    autocast = bf16_mixed if case.autocast else nullcontext
    objective, sizes = OBJECTIVES[case.objective], ARCHITECTURES[case.architecture]
    module, real = WithoutTrainer("", objective, autocast), micro_batch(objective)
    with fake_gpu() as mode:
        module.policy = fake_model(
            case.architecture, sizes, gradient_checkpointing=case.gradient_checkpointing
        )
        reference = fake_model(case.architecture, sizes).requires_grad_(False)
        module.references.models["model_0"] = reference
        if not case.packed:
            module.pad()
        module.splitter = StepSplitter(objective.steps, make_tokenizer())
        module.process_term._apply(lambda state: mode.from_tensor(state).to("cuda"))
        batch = to_gpu(mode, real)
        module.splitter(batch.completion_ids, batch.completion_mask)  # its tables move, once a run
        with Waits() as waits:
            with autocast():
                loss = module.training_step(batch, 0)
            loss.backward()
    gradients = {name: weight.grad for name, weight in module.policy.named_parameters()}
    return {
        name: "none" if value is None else str(value.device)
        for name, value in (module.logged | gradients).items()
        if value is None or value.device.type != "cuda"
    } | dict.fromkeys(waits.found, "waits")


def devices() -> dict[str, str]:
    """A training step on a fake GPU: "ok", or what is wrong with it, for each case."""
    results = {}
    for case in cases():
        try:
            faults = on_fake_gpu(case)
            results[str(case)] = "ok" if not faults else str(faults)
        except Exception as error:
            line = package_line(traceback.extract_tb(error.__traceback__))
            results[str(case)] = f"{type(error).__name__} at {line}: {error}"
        say(str(case), results[str(case)])
    return results


def waits() -> dict[str, dict[str, list[str]]]:
    """What a training step and its backward pass wait for, on the CPU as if it were a GPU."""
    results = {}
    for name, packed in [*((name, True) for name in OBJECTIVES), ("token", False)]:
        objective = OBJECTIVES[name]
        module, batch = WithoutTrainer("", objective), micro_batch(objective)
        config = AutoConfig.for_model("qwen2", **TINY)
        module.policy, reference = (
            LogprobModel(AutoModelForCausalLM.from_config(config)) for _ in range(2)
        )
        module.references.models["model_0"] = reference.requires_grad_(False)
        module.splitter = StepSplitter(objective.steps, make_tokenizer())
        if not packed:
            module.pad()
        # The package looks at values where it is not on a GPU.
        with patch.object(Tensor, "is_cuda", True):
            with Waits() as forward:
                loss = module.training_step(batch, 0)
            with Waits() as backward:
                loss.backward()
        case = f"{name}, {'packed' if packed else 'padded'} rows"
        results[case] = {"forward": forward.found, "backward": backward.found}
        say(case, results[case])
    return results
