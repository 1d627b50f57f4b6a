"""A causal language model computed in float32 from files that stay on disk: what verification and calibration compute with.

Matrices are widened some rows at a time when they are multiplied, so that anonymous memory is one block of rows and the
activations, however large the model is. The architecture's own code runs, with hooks on its modules. The rows come from
`Weights`, which may change them on the way: an adapter that is not merged yet, or a base in four bits.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from appliance import device
from appliance.errors import ModelFileError
from convert import checkpoint
from convert.checkpoint import Checkpoint

BLOCK_BYTES = 1 << 26  # of float32 rows at a time
LARGEST_KEPT_BYTES = 1 << 25  # norms and biases are kept in memory; a larger tensor that is no matrix is not known here


class Weights(Protocol):
    """The tensors of a model by name; matrices in blocks of rows."""

    def tensor(self, name: str) -> Any:
        """As the file has it, mapped; raises KeyError."""

    def rows(self, name: str) -> Iterator[Any]:
        """A matrix in float32, some rows at a time, in their order."""


class FileWeights:
    """The tensors of a checkpoint, unchanged."""

    def __init__(self, model: Checkpoint) -> None:
        from safetensors import SafetensorError, safe_open

        self._files: dict[str, Any] = {}
        for shard in model.shards:
            try:
                opened: Any = safe_open(shard, framework="pt")
            except SafetensorError as error:
                raise ModelFileError(f"{shard} is damaged ({error}); fetch the model again.") from error
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def tensor(self, name: str) -> Any:
        return self._files[name].get_tensor(name)

    def rows(self, name: str) -> Iterator[Any]:
        yield from blocks(self.tensor(name))


def blocks(matrix: Any) -> Iterator[Any]:
    """A matrix in float32, some rows at a time."""
    import torch

    step = max(1, BLOCK_BYTES // (4 * matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        yield matrix[start : start + step].to(torch.float32)


class MappedModel:
    """The model of a folder; `matrices` names the modules that multiply by one, in the order of the model's parts."""

    def __init__(self, folder: Path, weights: Weights | None = None) -> None:
        import accelerate
        import torch
        from transformers import AutoConfig

        torch.set_num_threads(device.usable_cores())
        self.checkpoint = checkpoint.read(folder)
        self._weights = FileWeights(self.checkpoint) if weights is None else weights
        try:
            settings = AutoConfig.from_pretrained(folder, local_files_only=True)
            with accelerate.init_empty_weights(include_buffers=False):
                self.module = _maker(settings).from_config(settings, dtype=torch.float32).eval()
        except (OSError, ValueError, KeyError) as error:
            raise ModelFileError(f"{folder} cannot be loaded: {error}") from error
        self.vocabulary_rows = int(settings.get_text_config().vocab_size)
        self.matrices: dict[str, Any] = {}
        for path, module in self.parts():
            self._fill(path, module)

    def logits(self, tokens: Sequence[int]) -> Any:
        """Next-token logits `(len(tokens), vocabulary)`, float32, in one pass."""
        import torch

        with torch.inference_mode():
            return self.module(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].numpy()

    def run(self, ids: Any) -> None:
        """All layers in one pass over token ids `(texts, tokens)`, without the head: for hooks on `matrices`."""
        import torch

        with torch.inference_mode():
            self.module.base_model(input_ids=ids, use_cache=False)

    def rows(self, path: str) -> Iterator[Any]:
        """The weights of one of `matrices`, or of the embeddings, in float32, some rows at a time."""
        return self._weights.rows(self.stored_name(path))

    def stored_name(self, path: str) -> str:
        """Under which these weights are in `checkpoint`."""
        return self._file_name(f"{path}.weight", self.module.get_submodule(path))

    @property
    def embeddings(self) -> str:
        """The path of the module."""
        wanted = self.module.get_input_embeddings()
        return next(str(path) for path, each in self.module.named_modules() if each is wanted)

    def parts(self) -> Iterator[tuple[str, Any]]:
        """All modules by path, but for those of a multimodal model that see and hear: texts do not pass them."""
        decoder, head = self.module.get_decoder(), self.module.get_output_embeddings()
        inside = next(path for path, each in self.module.named_modules() if each is decoder)
        is_whole = decoder is self.module.base_model
        for path, module in self.module.named_modules():
            if is_whole or module is head or f"{path}.".startswith(f"{inside}."):
                yield path, module

    def _fill(self, path: str, module: Any) -> None:
        import torch
        from transformers.pytorch_utils import Conv1D

        own = dict(module.named_parameters(recurse=False))
        if not own:
            return
        names = {each: self._file_name(f"{path}.{each}", module) for each in own}
        if isinstance(module, torch.nn.Embedding):
            _gather(module, functools.partial(self._weights.tensor, names["weight"]))
            return
        is_matrix = isinstance(module, torch.nn.Linear | Conv1D)
        for each, name in names.items():
            if is_matrix and each == "weight":
                continue
            tensor = self._weights.tensor(name)
            if 4 * tensor.numel() > LARGEST_KEPT_BYTES:
                raise ModelFileError(
                    f"{self.checkpoint.folder}: {name} ({tuple(tensor.shape)}) is no matrix of a linear layer; models with"
                    " such weights (mixtures of experts) cannot be verified here."
                )
            setattr(module, each, torch.nn.Parameter(tensor.to(torch.float32), requires_grad=False))
        if is_matrix:
            rows = functools.partial(self._weights.rows, names["weight"])
            module.forward = functools.partial(_multiply, module, rows, isinstance(module, Conv1D))
            self.matrices[path] = module

    def _file_name(self, parameter: str, module: Any) -> str:
        """The name in the files: a tied head need not be stored, it is the embeddings.

        Where it is stored, it is taken: transformers does not tie what differs, whatever the settings say.
        """
        if (name := self.checkpoint.stored_name(parameter)) is not None:
            return name
        is_tied_head = self.checkpoint.is_tied and module is self.module.get_output_embeddings()
        if is_tied_head and (name := self.checkpoint.stored_name(f"{self.embeddings}.weight")) is not None:
            return name
        raise ModelFileError(f"{self.checkpoint.folder} has no {parameter}, which its architecture needs.")


def _maker(settings: Any) -> Any:
    """The class of transformers that makes a model for texts, with a language model alone or with one among others."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if type(settings) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText


def _multiply(module: Any, rows: Callable[[], Iterator[Any]], is_transposed: bool, inputs: Any) -> Any:
    """`inputs @ W.T + bias`, W in blocks of rows; GPT-2's layers store W transposed."""
    import torch

    sums: Any
    flat = inputs.reshape(-1, inputs.shape[-1])
    if is_transposed:
        start, sums = 0, 0.0
        for block in rows():
            sums = sums + flat[:, start : start + block.shape[0]] @ block
            start += block.shape[0]
    else:
        sums = torch.cat([flat @ block.T for block in rows()], dim=1)
    if module.bias is not None:
        sums = sums + module.bias
    return sums.reshape(*inputs.shape[:-1], sums.shape[-1])


def _gather(module: Any, matrix: Callable[[], Any]) -> None:
    """Lets an embedding hold only the rows that a call asks for, in float32."""
    import torch

    module.padding_idx = None

    def before(each: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        ids, places = torch.unique(arguments[0], return_inverse=True)
        each.weight = torch.nn.Parameter(matrix()[ids].to(torch.float32), requires_grad=False)
        return (places, *arguments[1:])

    def after(each: Any, _arguments: tuple[Any, ...], _result: Any) -> None:
        each.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
