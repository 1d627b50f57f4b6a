"""The optimizer of the starter base: Muon for the matrices inside the layers, AdamW for embeddings and norms.

From scratch on a few thousand tokens, Muon (Jordan et al. 2024, `torch.optim.Muon`) reaches in 150 steps a loss that AdamW
does not reach in 500; `docs/decisions.md` has the figures. Trainer and scheduler know one optimizer, hence the pair.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer


class MuonWithAdamW(Optimizer):  # type: ignore[misc]
    """Two optimizers as one: their parameter groups are shared, so that a scheduler sets all learning rates."""

    def __init__(self, model: Any, *, muon_learning_rate: float, learning_rate: float) -> None:
        named = list(model.named_parameters())
        is_matrix = {name: value.ndim == 2 and "embed" not in name and "lm_head" not in name for name, value in named}
        muon = Muon([v for n, v in named if is_matrix[n]], lr=muon_learning_rate, weight_decay=0.0)
        adamw = AdamW([v for n, v in named if not is_matrix[n]], lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self._pair = (muon, adamw)
        # The group dictionaries are the same objects in all three, so that each step sees what a scheduler writes.
        super().__init__([group for each in self._pair for group in each.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for each in self._pair:
            each.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"pair": [each.state_dict() for each in self._pair]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for each, state in zip(self._pair, state_dict["pair"], strict=True):
            each.load_state_dict(state)
        self.param_groups = [group for each in self._pair for group in each.param_groups]
