"""LoRA adapters with random factors: as PEFT saves them, as PEFT computes them, and as llama.cpp applies them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write(base: Path, folder: Path, targets: Sequence[str], **settings: Any) -> Path:
    """A LoRA adapter as PEFT saves it, with random factors that matter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    options = {"r": 8, "lora_alpha": 16, "target_modules": list(targets), "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, local_files_only=True), LoraConfig(**options))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)
    model.save_pretrained(folder)
    return folder


def live_logits(base: Path, adapter: Path, ids: Sequence[int]) -> Any:
    """What PEFT computes of an adapter on its base in float32, not merged."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    with torch.inference_mode():
        return PeftModel.from_pretrained(model, adapter).eval()(input_ids=torch.tensor([list(ids)])).logits[0].numpy()


def switch_on(model: Any, adapter: Path) -> None:
    """Applies an adapter's file to a loaded model (a `GgufModel`), as a server does; it goes with the model."""
    import ctypes

    from llama_cpp import llama_cpp as c

    handle = c.llama_adapter_lora_init(model._model, str(adapter).encode())
    assert handle, adapter
    adapters = (c.llama_adapter_lora_p_ctypes * 1)(handle)
    assert c.llama_set_adapters_lora(model._context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
