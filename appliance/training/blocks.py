"""What each token of a prompt sees where documents are read each by itself, as serving does when it has read them before.

What stands before the documents sees itself, each document itself, what follows them everything before it; always causally,
and positions go on as if all were one text. So a document's keys and values are those of the document alone, moved.
Main entries: `of_row`, `mask`; `require_apart` tries whether a base obeys such a mask.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from appliance.errors import RecipeError
from appliance.training import processes

FOLLOWS = -1  # of what follows the documents, of a row without any, and of padding, which comes last
BLOCK_TOKENS = 8
TOLERANCE = 1e-4  # of the largest logit: what one document does to the next is either 0 or plain to see
REMEDY = 'take "passages" out of phases, and let documents be read in their place (serve.documents = "exact").'


def of_row(tokens: int, bounds: Sequence[int]) -> list[int]:
    """The number of each token's block: 0 before the documents, then a number for each, then `FOLLOWS`."""
    found = [FOLLOWS] * tokens
    for number, (start, end) in enumerate(itertools.pairwise((0, *bounds))):
        found[start:end] = [number] * (end - start)
    return found


def mask(blocks: Any, dtype: Any) -> Any:
    """`(rows, tokens)` numbers of blocks as what is added to scores of attention, `(rows, 1, tokens, tokens)`.

    0 where a token sees another, else the least number: `sdpa` and `eager` attention both understand it so, where the latter
    would take booleans for numbers (transformers 5.23).
    """
    import torch

    tokens = blocks.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=blocks.device).tril()
    asks = blocks[:, :, None]
    sees = causal & ((asks == blocks[:, None, :]) | (asks == FOLLOWS))
    hidden = torch.zeros(sees.shape, dtype=dtype, device=blocks.device)
    return hidden.masked_fill_(~sees, torch.finfo(dtype).min)[:, None]


def weight_type(model: Any) -> Any:
    """Of what a model computes, which a mask must have."""
    return model.get_input_embeddings().weight.dtype


def require_apart(trainer: Any, longest_tokens: int) -> None:
    """Raises `RecipeError` unless documents do not see each other in this base, and what follows sees them.

    Every process must call it. Layers that look back a window only would lose it under a mask of ours, so that rows must fit
    into the window.
    """
    config = trainer.model.config.get_text_config()
    if (window := _window(config)) is not None and window < longest_tokens:
        processes.fail(
            RecipeError(
                f"passages: this base ({config.model_type!r}) looks back {window} tokens in some layers, and the longest row"
                f" has {longest_tokens}; {REMEDY}"
            )
        )
    try:
        between, after = _changes(trainer)
    except (TypeError, RuntimeError) as error:  # a model that takes no such mask
        processes.fail(RecipeError(f"passages: this base cannot be given documents apart ({error}); {REMEDY}"))
    if between > TOLERANCE or after < TOLERANCE:
        wrong = f"changed by {between:.1%}" if between > TOLERANCE else "did not change, nor did what follows,"
        processes.fail(
            RecipeError(
                f"passages: this base ({config.model_type!r}) does not read documents apart: its outputs for one {wrong}"
                f" with the document before it; {REMEDY}"
            )
        )


def _window(config: Any) -> int | None:
    """How far the layers look back that look back least; None where all see everything."""
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    named = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    sizes = [getattr(config, name, None) for kind, name in named.items() if kind in kinds]
    return min((size for size in sizes if size), default=None)


def _changes(trainer: Any) -> tuple[float, float]:
    """How much the outputs for the second document, and for what follows, change with the first, as parts of the largest."""
    import torch

    model = trainer.model
    ids = torch.arange(4 * BLOCK_TOKENS, device=trainer.args.device).reshape(
        4, BLOCK_TOKENS
    )  # before, two documents, what follows
    changed = ids.clone()
    changed[1] = changed[1].flip(0)
    bounds = [BLOCK_TOKENS, 2 * BLOCK_TOKENS, 3 * BLOCK_TOKENS]
    added = mask(torch.tensor([of_row(ids.numel(), bounds)], device=ids.device), weight_type(model))
    was_training = model.training
    model.eval()
    found = []
    for each in (ids, changed):
        with torch.no_grad(), trainer.compute_loss_context_manager():
            output = model(input_ids=each.reshape(1, -1), attention_mask=added, use_cache=False)
        found.append(output.logits[0].float())
    model.train(was_training)
    change = (found[0] - found[1]).abs().amax(-1) / found[0].abs().max()
    return float(change[bounds[1] : bounds[2]].max()), float(change[bounds[2] :].max())
