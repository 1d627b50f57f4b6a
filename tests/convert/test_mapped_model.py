"""A model computed from mapped files gives what transformers computes with all of it in memory, however it is stored."""

from pathlib import Path
from typing import Any

import pytest

from appliance.errors import ModelFileError
from convert import mapped_model
from convert.mapped_model import MappedModel
from tests.running import Trained

IDS = list(range(3, 60))


def whole(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([IDS])).logits[0].numpy()


def test_logits_are_those_of_the_whole_model(trained: Trained) -> None:
    import numpy as np

    found = MappedModel(trained.made["merge"]).logits(IDS)
    np.testing.assert_allclose(found, whole(trained.made["merge"]), atol=2e-5)


@pytest.mark.parametrize("kind", ["gpt2", "untied", "bias and softcap"])
def test_other_ways_of_storing(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, Qwen2Config

    shape = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    configs = {
        "gpt2": GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=2, n_positions=128),
        "untied": Qwen2Config(**shape, num_key_value_heads=1, tie_word_embeddings=False),
        "bias and softcap": Gemma2Config(**shape, num_key_value_heads=1, head_dim=32, attention_bias=True),
    }
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(configs[kind]).to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    monkeypatch.setattr(mapped_model, "BLOCK_BYTES", 5000)  # several blocks for each matrix
    found = MappedModel(tmp_path / "model")
    np.testing.assert_allclose(found.logits(IDS), whole(tmp_path / "model"), rtol=1e-4, atol=1e-4)
    assert len(found.matrices) == {"gpt2": 9, "untied": 15, "bias and softcap": 15}[kind]


def test_what_lacks_a_tensor_is_refused(trained: Trained, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(trained.made["merge"], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match=r"has no model\.layers\.1\.mlp\.up_proj\.weight"):
        MappedModel(folder)
