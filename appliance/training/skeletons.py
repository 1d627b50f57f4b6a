"""A model without contents: its layers and their sizes, to be looked at before a weight is loaded."""

import json
from pathlib import Path
from typing import Any

import torch


def load_config(base: Path) -> Any:
    """The configuration of a model on disk."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base, local_files_only=True)


def make(config: Any, dtype: torch.dtype = torch.float32, layers: int | None = None) -> Any:
    """The model that a configuration describes, on torch's meta device; with fewer decoder layers where they are named."""
    from transformers import AutoModelForCausalLM

    chosen = _with_layers(config, layers) if layers else config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(chosen, dtype=dtype)


def _with_layers(config: Any, layers: int) -> Any:
    values = json.loads(config.to_json_string(use_diff=False))
    text = values.get("text_config", values)
    text["num_hidden_layers"] = layers
    for key, value in text.items():  # one entry a layer: kinds of attention, widths
        if isinstance(value, list) and len(value) == config.get_text_config().num_hidden_layers:
            text[key] = [value[layer % len(value)] for layer in range(layers)]
    return type(config).from_dict(values)
