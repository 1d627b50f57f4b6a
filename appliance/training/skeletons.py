"""A model without contents: its layers and their sizes, to be looked at before a weight is loaded."""

from pathlib import Path
from typing import Any

import torch


def load_config(base: Path) -> Any:
    """The configuration of a model on disk."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base, local_files_only=True)


def make(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model that a configuration describes, on torch's meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
