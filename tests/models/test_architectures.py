"""Each architecture: log-probabilities of transformers' own logits, and the update they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from architectures import ARCHITECTURES, PADDED, tiny
from own_logits import by_the_models_own_logits
from prl_lightning.models.causal_lm import LogprobModel
from prl_lightning.models.packed_attention import OF_PLACES, packed_attention
from random_models import batch_of

TEMPERATURE = 0.7
LENGTHS = [1, 13, 4, 2]  # of completions; with its prompt, each exceeds the windows


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_values_and_an_update_are_those_of_the_models_own_logits(name: str) -> None:
    """transformers' own attention ("eager") is the measure: "sdpa" leaves out caps and sinks."""
    alone, ours = tiny(name), LogprobModel(tiny(name))
    alone.set_attn_implementation("eager")
    assert ours.is_packed == (name not in PADDED)
    batch = batch_of(LENGTHS)
    batch.temperature = TEMPERATURE
    rows = [
        (ids[:start].tolist(), ids[start : start + length].tolist())
        for ids, start, length in zip(batch.input_ids, batch.prompt_lengths, LENGTHS, strict=True)
    ]
    expected = [by_the_models_own_logits(alone, *row, TEMPERATURE) for row in rows]
    found = [x[batch.completion_mask] for x in ours(batch)]
    values = [torch.cat(x) for x in zip(*expected, strict=True)]
    for mine, theirs in zip(found, values, strict=True):
        torch.testing.assert_close(mine, theirs, atol=3e-5, rtol=0)
    for model, logprobs in ((ours.causal_lm, found[0]), (alone, values[0])):
        logprobs.square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    moved = 0.0
    for (key, mine), theirs, start in zip(
        ours.causal_lm.named_parameters(), alone.parameters(), tiny(name).parameters(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0, msg=key)
        moved += (mine - start).square().sum().item()
    assert 0.01 < moved < 1.01  # the update is clipped to 1; something was compared


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("cohere", {"logit_scale": 0.0625}, {"scale": 0.0625}),
        ("falcon_h1", {"lm_head_multiplier": 0.5}, {"scale": 0.5}),
        ("gemma2", {"final_logit_softcapping": 30.0}, {"scale": 1.0, "cap": 30.0}),
        ("gemma2", {"final_logit_softcapping": None}, {"scale": 1.0}),
        ("gemma3_text", {"final_logit_softcapping": 7.5}, {"scale": 1.0, "cap": 7.5}),
        ("granite", {"logits_scaling": 8.0}, {"scale": 0.125}),
        # Two fields that do not mention logits scale its hidden states.
        ("minicpm3", {}, {"scale": 0.1}),
        ("nanochat", {"final_logit_softcapping": 15.0}, {"scale": 1.0, "cap": 15.0}),
        ("recurrent_gemma", {"logits_soft_cap": 20.0}, {"scale": 1.0, "cap": 20.0}),
        ("xlstm", {"output_logit_soft_cap": 30.0}, {"scale": 1.0, "cap": 30.0}),
    ],
)
def test_scaling_and_capping_are_recognized_without_weights(
    kind: str, fields: dict[str, Any], expected: dict[str, float]
) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
        assert LogprobModel(model).logit_transform == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits.clamp(-20, 20),
        lambda logits: logits + 0.1,
        lambda logits: logits * torch.tensor([1.0, 1.0, 1.0, 2.0]),
        lambda logits: 30 * torch.nn.functional.softsign(logits / 30),
        lambda logits: logits / logits.norm(dim=-1, keepdim=True),
    ],
)
def test_any_other_change_of_the_logits_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    model = tiny("qwen2")
    model.lm_head.register_forward_hook(lambda module, args, logits: change(logits))
    with pytest.raises(ValueError, match=r"model\.policy.*'qwen2' transforms its logits"):
        LogprobModel(model)


@pytest.mark.parametrize("name", [*OF_PLACES, "is_causal"])
def test_attention_that_depends_on_places_in_a_row_is_not_packed(name: str) -> None:
    rows = torch.zeros(1, 1, 1, 32)
    value: Any = False if name == "is_causal" else rows
    with pytest.raises(TypeError, match="'packing'"):
        packed_attention(torch.nn.Module(), rows, rows, rows, None, None, **{name: value})


def test_a_cap_on_scores_and_sinks_change_the_values() -> None:
    """The first test would pass if both sides ignored them."""
    batch = batch_of(LENGTHS)
    capped, loose = (tiny("gemma2", attn_logit_softcapping=cap) for cap in (1.0, None))
    sinks, none = tiny("gpt_oss"), tiny("gpt_oss")
    for name, weight in none.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.constant_(weight, -1e4)
    for left, right in ((capped, loose), (sinks, none)):
        difference = LogprobModel(left)(batch)[0] - LogprobModel(right)(batch)[0]
        assert difference.abs().max() > 1e-3
