"""Models whose files name weights otherwise than transformers' code does, as many on the hub: all of the path takes them."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from appliance import artifacts
from convert import checkpoint, gguf_names
from convert.mapped_model import MappedModel
from tests.convert import adapters, families, quick_converter
from tests.convert.families import FAMILIES
from tests.convert.test_families import distance, logits, output
from tests.running import call

IDS = list(range(20, 60))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_converter.install(monkeypatch)


def renamed(folder: Path, target: Path, rename: Callable[[str], str]) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {rename(name): each for name, each in tensors.items()}, target / "model.safetensors", metadata={"format": "pt"}
    )
    return target


def made_of(base: Path, adapter: Path) -> dict[str, Any]:
    merged = output(call("convert", "merge", adapter, "--base", base, "--json"))["artifact"]
    return {
        "mapped": MappedModel(merged).logits(IDS),
        "file": output(call("convert", "gguf", merged, "--json"))["file"],
        "adapter": output(call("convert", "adapter", adapter, "--base", base, "--json"))["file"],
    }


def tensors(file: Path) -> dict[str, Any]:
    return {each.name: each.data for each in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize(
    ("family", "prefix"), [("GPT-2", "transformer."), ("Llama 3.2", "model.")], ids=["GPT-2", "without the base's prefix"]
)
def test_same_model_under_other_names(family: str, prefix: str, root: Path, tmp_path: Path) -> None:
    """openai-community/gpt2 has no "transformer."."""
    base = families.write_model(FAMILIES[family], tmp_path / "base")
    published = renamed(base, tmp_path / "published" / "base", lambda name: name.removeprefix(prefix))
    adapter = adapters.write(base, tmp_path / "adapter", FAMILIES[family].targets)
    expected, found = made_of(base, adapter), made_of(published, adapter)
    np.testing.assert_array_equal(found["mapped"], expected["mapped"])
    np.testing.assert_allclose(found["mapped"], adapters.live_logits(base, adapter, IDS), rtol=0.2, atol=0.2)
    for kind in ("file", "adapter"):
        ours, theirs = tensors(found[kind]), tensors(expected[kind])
        assert ours.keys() == theirs.keys()
        for name, each in ours.items():
            np.testing.assert_array_equal(each, theirs[name], err_msg=name)
    assert root.exists()


@pytest.mark.usefixtures("root")
def test_merge_on_four_bits_under_other_names(tmp_path: Path) -> None:
    """Which weights were in four bits is known by the names that transformers has."""
    base = families.write_model(FAMILIES["GPT-2"], tmp_path / "base")
    published = renamed(base, tmp_path / "published" / "base", lambda name: name.removeprefix("transformer."))
    adapter = adapters.write(base, tmp_path / "adapter", FAMILIES["GPT-2"].targets)
    made = [
        output(call("convert", "merge", adapter, "--base", each, "--trained-on", "nf4", "--json"))["artifact"]
        for each in (base, published)
    ]
    results = [artifacts.load(each).results for each in made]
    assert results[0]["kl_to_trained"] == pytest.approx(results[1]["kl_to_trained"])
    assert results[0]["merged_into"] == results[1]["merged_into"] == "round trip"
    np.testing.assert_array_equal(*(MappedModel(each).logits(IDS) for each in made))


@pytest.mark.parametrize("is_published", [False, True], ids=["as saved", "as published"])
@pytest.mark.parametrize("architecture", ["GPT-NeoX", "Nemotron-H"])
def test_head_and_first_word_of_other_files(tmp_path: Path, architecture: str, is_published: bool) -> None:
    """GPT-NeoX files have "embed_out.", Nemotron-H's "backbone."; neither head is the embeddings."""
    import torch
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, NemotronHConfig

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    settings: Any = (
        GPTNeoXConfig(**shape, num_hidden_layers=1, tie_word_embeddings=False)
        if architecture == "GPT-NeoX"
        else NemotronHConfig(**shape, layers_block_type=["attention", "mlp"], num_key_value_heads=1, head_dim=16)
    )
    torch.manual_seed(9)
    model = AutoModelForCausalLM.from_config(settings).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "base")
    words = {"lm_head.": "embed_out."} if architecture == "GPT-NeoX" else {"model.": "backbone."}
    old, new = next(iter(words.items()) if is_published else ((b, a) for a, b in words.items()))
    rename = lambda name: new + name.removeprefix(old) if name.startswith(old) else name  # noqa: E731
    folder = renamed(tmp_path / "base", tmp_path / "renamed", rename)
    read = checkpoint.read(folder)
    assert not read.is_tied
    assert read.stored_name("embed_out.weight") == read.stored_name("lm_head.weight") is not None
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].numpy()
    np.testing.assert_allclose(MappedModel(folder).logits(IDS), expected, rtol=1e-4, atol=1e-4)


def _gemma_3_with_eyes(tokens: int) -> Any:
    """As google/gemma-3-4b-it."""
    from transformers import Gemma3Config

    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"boi_token_index": 3, "eoi_token_index": 4, "image_token_index": 5, "mm_tokens_per_image": 4}
    text = families._gemma_3(tokens).to_dict()
    return Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, **special)


def _ministral_3_with_eyes(tokens: int) -> Any:
    """As mistralai/Ministral-3-3B-Instruct-2512-BF16."""
    from transformers import Mistral3Config

    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 32}
    vision = {**vision, "image_size": 28, "patch_size": 14, "model_type": "pixtral"}
    return Mistral3Config(text_config=families._ministral(tokens).to_dict(), vision_config=vision)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("Gemma 3", _gemma_3_with_eyes), ("Ministral 3", _ministral_3_with_eyes)],
    ids=["Gemma", "Mistral"],
)
@pytest.mark.usefixtures("root")
def test_language_model_among_others(family: str, settings: Callable[[int], Any], tmp_path: Path) -> None:
    """Files say "language_model.model.", transformers "model.language_model."; texts pass the language model alone."""
    import transformers

    targets = r".*language_model.*\.(q_proj|v_proj|up_proj|down_proj)"
    with pytest.MonkeyPatch.context() as patch:  # transformers knows both families here, Ministral here alone
        patch.setattr(transformers, "AutoModelForCausalLM", transformers.AutoModelForImageTextToText)
        base = families.write_model(dataclasses.replace(FAMILIES[family], settings=settings), tmp_path / "base")
        adapter = adapters.write(base, tmp_path / "adapter", [], target_modules=targets)
        live = adapters.live_logits(base, adapter, IDS)
    assert "language_model.model.layers.0.mlp.up_proj.weight" in checkpoint.read(base).tensors
    made = made_of(base, adapter)
    assert distance(made["mapped"], live) < 0.05
    assert distance(made["mapped"], MappedModel(base).logits(IDS)) > 0.3
    assert distance(logits(made["file"], IDS), live) < 0.05
    full = output(call("convert", "gguf", base, "--json"))["file"]
    assert distance(logits(full, IDS, made["adapter"]), live) < 0.05
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "Waar is de balie?"}, {"role": "assistant", "content": "Naast de brug."}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    limits = ("--prompts", "1", "--answer-tokens", "8")
    report = output(call("convert", "verify", full, "--merged", base, "--conversations", rows, "--json", *limits))
    assert report["results"]["tokens"]["not_compared"] == 0  # what sees is not in the file, and not counted
    output(call("convert", "imatrix", base, "--conversations", rows, "--json"))


def test_names_in_a_file_of_two_models_are_not_mixed_up(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text("{}")
    names = ("model.layers.0.w.weight", "language_model.model.layers.0.w.weight", "model.norm.weight")
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "model.safetensors")
    model = checkpoint.read(tmp_path)
    assert model.stored_name("language_model.model.layers.0.w.weight") == names[1]
    assert model.stored_name("layers.0.w.weight") is None
    assert model.stored_name("model.language_model.norm.weight") == names[2]


def test_gguf_names_pass_over_where_the_language_model_is() -> None:
    settings = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"num_hidden_layers": 2}}
    name_of = gguf_names.tensor_names(settings)
    assert name_of("model.language_model.layers.1.mlp.up_proj.weight") == "blk.1.ffn_up.weight"
