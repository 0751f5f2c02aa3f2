"""Tokens that the policy did not sample, such as a tool's output, are context and nothing else."""

import torch

from own_logits import by_the_models_own_logits
from prl_lightning.data import RolloutBuffer
from prl_lightning.models.loading import load_causal_lm, load_policy, load_reference
from prl_lightning.objective import Objective
from prl_lightning.types import Completion, Prompt, Rollout

TEMPERATURE, BETA = 0.7, 0.5
PROMPT = Prompt([4, 5, 6], "")
# Unsampled tokens in the middle, at both ends, and none; the last row is another prompt's.
ROWS = [
    (PROMPT, [7, 8, 9, 10, 11, 12], [True, True, False, False, True, True]),
    (PROMPT, [9, 3, 14, 5], [False, True, True, False]),
    (PROMPT, [13, 12, 1], [True, True, True]),
    (Prompt([15, 3], ""), [6, 7, 8, 1], [True, False, True, True]),
]
ADVANTAGES = [0.75, -1.25, 0.5, 2.0]


def test_log_probabilities_loss_and_gradient_are_those_of_sampled_tokens(
    tied_model: str, untied_model: str
) -> None:
    rollouts = [
        Rollout(
            prompt,
            Completion(ids, [-1.0] * len(ids), True, is_sampled),
            text="",
            temperature=TEMPERATURE,
            outcome_advantage=torch.tensor(advantage),
        )
        for (prompt, ids, is_sampled), advantage in zip(ROWS, ADVANTAGES, strict=True)
    ]
    buffer = RolloutBuffer(num_updates=1)
    buffer.fill(rollouts)
    batch = buffer[0]
    assert batch.completion_lengths.tolist() == [6, 4, 3, 4]
    assert (batch.update_tokens, batch.num_tokens, batch.update_sequences) == (12, 12, 4)

    policy = load_policy(tied_model)
    with torch.no_grad():
        ref_logprobs, _ = load_reference(untied_model)(batch)
    logprobs, _ = policy(batch)
    assert not logprobs[~batch.completion_mask].any()
    loss, _ = Objective(beta=BETA).loss(logprobs, ref_logprobs[..., None], batch, None)
    loss.backward()

    # The same by the models' own logits, one row at a time and written out (v2, Eq. 5.1): a token
    # is charged for its own log-ratio and those of the sampled tokens after it.
    model, reference = load_causal_lm(tied_model), load_causal_lm(untied_model)
    expected = torch.zeros(())
    for row, (prompt, ids, is_sampled) in enumerate(ROWS):
        own, _ = by_the_models_own_logits(model, prompt.token_ids, ids, TEMPERATURE)
        ref, _ = by_the_models_own_logits(reference, prompt.token_ids, ids, TEMPERATURE)
        sampled = [place for place, is_own in enumerate(is_sampled) if is_own]
        torch.testing.assert_close(logprobs[row, sampled], own[sampled], rtol=1e-4, atol=1e-5)
        for place in sampled:
            later = [at for at in sampled if at >= place]
            advantage = ADVANTAGES[row] - BETA * (own - ref)[later].sum()
            ratio = (own[place] - own[place].detach()).exp()
            expected = expected - advantage.detach() * ratio / 12
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    theirs = dict(model.named_parameters())
    for name, parameter in policy.causal_lm.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5)
