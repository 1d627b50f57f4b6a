"""A base in four bits (NF4, Dettmers et al. 2023), as QLoRA trains on it: which matrices, and what they become again.

bitsandbytes' own kernels decide, so that the bytes are those that training computed with. Used to find the better merge: an
adapter learned to correct these values, not the 16-bit ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import EnvironmentIncomplete
from convert.lora import Adapter, merged_rows
from convert.mapped_model import FileWeights, MappedModel, blocks

BLOCK_VALUES = 64
MOST_TOKENS = 256  # of a text that is compared
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
        return self._adapter.replaced[name] if name in self._adapter.replaced else self._files.tensor(name)

    def rows(self, name: str) -> Iterator[Any]:
        import torch

        matrix = widened(self.tensor(name), name, self._nf4)
        change = self._adapter.changes.get(name)
        if change is None:
            yield from blocks(matrix)
            return
        for rows in merged_rows(matrix if self._is_rounded else matrix.to(torch.float32), change):
            yield rows.to(torch.float32)


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


def divergences(base: Path, adapter: Adapter, nf4: Nf4, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """How far each way of merging is from the adapter as it was trained: mean KL divergence in nats over the texts.

    "16-bit" adds the adapter to the weights in 16 bits, "round trip" to what four bits made of them. Of a text its first 256
    tokens are read, and of those as many positions are compared, evenly, as 512 rows of logits allow for all texts.
    """
    files = FileWeights(MappedModel(base).checkpoint)
    live = MappedModel(base, MergedWeights(files, adapter, nf4, is_rounded=False))
    ways = {
        "16-bit": MappedModel(base, MergedWeights(files, adapter, None, is_rounded=True)),
        "round trip": MappedModel(base, MergedWeights(files, adapter, nf4, is_rounded=True)),
    }
    texts = [ids[:MOST_TOKENS] for ids in texts]
    expected = sampled_logits(live, texts)
    return {way: kl(expected, sampled_logits(model, texts)) / len(expected) for way, model in ways.items()}


def sampled_logits(model: MappedModel, texts: Sequence[Sequence[int]]) -> Any:
    """Logits `(rows, vocabulary)` at evenly spread positions of all texts: one pass, so that matrices are quantized once."""
    import torch

    longest = max(map(len, texts))
    step = -(-longest * len(texts) // MOST_ROWS)
    places = torch.arange(0, longest, step)
    # What follows a text in its row changes nothing of it, since a token sees only those before it.
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    with torch.inference_mode():
        found = model.module(input_ids=ids, use_cache=False, logits_to_keep=places).logits
    return torch.cat([found[row, places < len(text)] for row, text in enumerate(texts)])


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
