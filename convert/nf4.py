"""A base in four bits (NF4, Dettmers et al. 2023), as QLoRA trains on it: which matrices, and what they become again.

bitsandbytes' own kernels decide, so that the bytes are those that training computed with. Used to find the better merge: an
adapter learned to correct these values, not the 16-bit ones.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import EnvironmentIncomplete
from convert.divergence import Answer
from convert.lora import Adapter, Change, merged_rows
from convert.mapped_model import FileWeights, MappedModel, blocks

BLOCK_VALUES = 64
MOST_TOKENS = 1024  # of a text that is compared; what stands before is left away
MOST_ANSWER = 512  # of these, an answer's own
MOST_IN_ALL = 4096  # all texts, padded to the longest, as they pass the layers together
MOST_ROWS = 512  # of logits: 311 MB at a vocabulary of 152,000, once for what is expected and once for what is found
ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Nf4:
    """How a base was quantized for training: scales quantized too or not, and the weights that were, by name."""

    covered: frozenset[str]
    transposed: frozenset[str] = frozenset()  # of these: stored (in, out), as GPT-2's are, and turned before
    is_double: bool = True


class MergedWeights:
    """A base with an adapter, merged as they are read.

    `nf4` widens four bits first, as training did; `is_rounded` gives what a merged file would hold, otherwise exact sums.
    """

    def __init__(self, files: FileWeights, adapter: Adapter, nf4: Nf4 | None, *, is_rounded: bool) -> None:
        self._files, self._adapter, self._nf4, self._is_rounded = files, adapter, nf4, is_rounded

    def tensor(self, name: str) -> Any:
        found = self._adapter.replaced[name] if name in self._adapter.replaced else self._files.tensor(name)
        change = self._adapter.changes.get(name)
        if change is None or not change.is_embedding:
            return found
        return _Gathered(found, change, self._is_rounded)

    def rows(self, name: str) -> Iterator[Any]:
        import torch

        stored = self._adapter.replaced.get(name)
        matrix = widened(self._files.tensor(name) if stored is None else stored, name, self._nf4)
        change = self._adapter.changes.get(name)
        if change is None:
            yield from blocks(matrix)
            return
        for rows in merged_rows(matrix if self._is_rounded else matrix.to(torch.float32), change):
            yield rows.to(torch.float32)


class _Gathered:
    """Embeddings whose change is added to the rows that are asked for."""

    def __init__(self, matrix: Any, change: Change, is_rounded: bool) -> None:
        self._matrix, self._change, self._is_rounded = matrix, change, is_rounded

    def __getitem__(self, ids: Any) -> Any:
        import torch

        rows = self._matrix[ids] if self._is_rounded else self._matrix[ids].to(torch.float32)
        return torch.cat(list(merged_rows(rows, dataclasses.replace(self._change, b=self._change.b[ids]))))


def as_trained(model: MappedModel) -> Nf4:
    """What transformers quantizes by default: the weights of linear layers, not the head (integrations/bitsandbytes.py)."""
    from transformers.pytorch_utils import Conv1D

    found = {f"{path}.weight": module for path, module in model.matrices.items() if path.rpartition(".")[2] != "lm_head"}
    return Nf4(frozenset(found), frozenset(name for name, module in found.items() if isinstance(module, Conv1D)))


def widened(weight: Any, name: str, nf4: Nf4 | None) -> Any:
    """What training computed with instead of `weight`: quantized to NF4 and back, in the weight's own type."""
    if nf4 is None or name not in nf4.covered:
        return weight
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise EnvironmentIncomplete(
            "An adapter that was trained on four bits is merged with bitsandbytes, which is not installed; run `make setup`."
        ) from error
    is_transposed = name in nf4.transposed
    quantized, state = functional.quantize_4bit(
        (weight.T if is_transposed else weight).contiguous(),
        blocksize=BLOCK_VALUES,
        compress_statistics=nf4.is_double,
        quant_type="nf4",
    )
    found = functional.dequantize_4bit(quantized, state)
    return found.T.contiguous() if is_transposed else found


def divergences(base: Path, adapter: Adapter, nf4: Nf4, texts: Sequence[Answer]) -> dict[str, float]:
    """How far each way of merging is from the adapter as it was trained: mean KL divergence in nats over the texts.

    "16-bit" adds the adapter to the weights in 16 bits, "round trip" to what four bits made of them. What is compared is how
    answers go on: of all their positions, evenly, as many as 512 rows of logits allow.
    """
    files = FileWeights(MappedModel(base).checkpoint)
    live = MappedModel(base, MergedWeights(files, adapter, nf4, is_rounded=False))
    ways = {
        "16-bit": MappedModel(base, MergedWeights(files, adapter, None, is_rounded=True)),
        "round trip": MappedModel(base, MergedWeights(files, adapter, nf4, is_rounded=True)),
    }
    texts = bounded(texts)
    expected = sampled_logits(live, texts)
    return {way: kl(expected, sampled_logits(model, texts)) / len(expected) for way, model in ways.items()}


def bounded(texts: Sequence[Answer]) -> list[Answer]:
    """The beginning of each answer with what stands right before it; the last texts go where all are too many."""
    found = []
    for text in texts:
        tokens = text.tokens[: text.start + MOST_ANSWER]
        dropped = max(0, len(tokens) - MOST_TOKENS)
        found.append(Answer(tokens[dropped:], text.start - dropped, text.row))
    while len(found) > 1 and len(found) * max(len(text.tokens) for text in found) > MOST_IN_ALL:
        found.pop()
    return found


def sampled_logits(model: MappedModel, texts: Sequence[Answer]) -> Any:
    """Logits `(rows, vocabulary)` at evenly spread positions of the answers, each of which says how its text goes on.

    All in one pass, so that matrices are quantized once; the head sees the chosen positions alone.
    """
    import torch

    places = [(row, at) for row, text in enumerate(texts) for at in range(text.start - 1, len(text.tokens) - 1)]
    rows, positions = zip(*places[:: -(-len(places) // MOST_ROWS)], strict=True)
    longest = max(len(text.tokens) for text in texts)
    # What follows a text in its row changes nothing of it, since a token sees only those before it.
    ids = torch.tensor([[*text.tokens, *[0] * (longest - len(text.tokens))] for text in texts])
    choose = model.module.get_output_embeddings().register_forward_pre_hook(
        lambda _head, inputs: (inputs[0][list(rows), list(positions)][None],)
    )
    try:
        with torch.inference_mode():
            return model.module(input_ids=ids, use_cache=False).logits[0]
    finally:
        choose.remove()


def kl(expected: Any, found: Any) -> float:
    """Kullback-Leibler divergence of two tensors of logits `(rows, vocabulary)`, summed over rows, in nats."""
    import torch

    total = 0.0
    for ours, theirs in zip(expected.split(ROWS_AT_ONCE), found.split(ROWS_AT_ONCE), strict=True):
        log_p, log_q = torch.log_softmax(ours, dim=-1), torch.log_softmax(theirs, dim=-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total


def better(found: Mapping[str, float]) -> str:
    return min(found, key=lambda way: found[way])
