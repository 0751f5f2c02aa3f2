"""A tokenizer that knows every text, and a sampler that plays by its seed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from prl_lightning.sampling import Progress, Sampler, SamplingConfig
from prl_lightning.types import Completion, Prompt

START, END = "<|im_start|>", "<|im_end|>"
# ChatML with calls between tags, as many published models have it.
CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
# Tools{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}
<tool_response>
{{ message.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif %}
{%- else %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def save_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> str:
    """One token per byte, and the two of a chat."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=START)
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return str(folder)


class Player(Sampler):
    """Adds digits with ``+``, or stops; a function of the prompt's seed and length alone."""

    dtype = "float32"

    def start(self, model: str, max_model_tokens: int) -> None:
        pass

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for _ in weights:
            pass

    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        return [
            [
                _turn(random.Random(f"{prompt.seed + sample} {prompt.token_ids}"))
                for sample in range(config.n)
            ]
            for prompt in prompts
        ]

    def stop(self) -> None:
        pass


class PlayerAhead(Player):
    is_concurrent = True


def _turn(draw: random.Random) -> Completion:
    """A digit and ``+`` (tokens of the arithmetic tokenizer), or a digit and the end."""
    digit, last = draw.randrange(3, 13), draw.choice((13, 13, 1))
    return Completion([digit, last], [-draw.uniform(0.5, 4.0) for _ in range(2)], True)
