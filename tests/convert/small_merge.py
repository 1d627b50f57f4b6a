"""A model of two narrow layers and LoRA adapters of it, with random weights: what tests of merging merge."""

import json
import shutil
from pathlib import Path
from typing import Any

from appliance.recipe import Starter
from appliance.training import starter
from tests.running import call

SHAPE = Starter(layers=2, hidden=64, feed_forward=96, heads=2, head_width=32, context_tokens=64)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_base(folder: Path) -> Path:
    import torch

    tokenizer = starter.make_tokenizer(["een paar woorden voor de woordenlijst"], 512)
    torch.manual_seed(1)
    starter.save(starter.make_model(SHAPE, tokenizer), tokenizer, folder)
    return folder


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", local_files_only=True).eval()


def make_adapter(base: Path, folder: Path, **settings: Any) -> Any:
    """A LoRA adapter with random factors, saved; returns base and adapter as PEFT runs them."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(load(base), LoraConfig(**options))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


def logits(model: Any) -> Any:
    import torch

    ids = torch.arange(3, 43)[None]
    with torch.inference_mode():
        return model(input_ids=ids).logits


def merged(root: Path, adapter: Path, base: Path) -> Path:
    result = call("convert", "merge", adapter, "--base", base, "--json")
    assert result.exit_code == 0, result.stderr
    folder = Path(json.loads(result.stdout)["artifact"])
    assert folder.parent.parent == root
    return folder


def copied_untied(base: Path, folder: Path) -> Path:
    import torch

    model = load(base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
