"""What must be equal between a merged model and the 16-bit GGUF file made of it: each check returns what differs, in words.

Token ids both ways, the chat template as serving renders it, special tokens and the end of a turn, each matrix' sum and
norm, the values of norms and biases, and the logits along the file's own greedy answers. Where top tokens agree at every
step of such a path, both sides would have written the same text.
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import DataError, VerificationFailed
from appliance.text import passages
from appliance.text.chat_template import ChatTemplate, TemplateFailed
from convert import conversations, gguf_names
from convert.conversations import Messages
from convert.gguf_model import GgufModel, GgufVocabulary
from convert.mapped_model import MappedModel
from convert.pre_tokenizer import probe_texts, unequal

# Mean difference of logits along a path, in standard deviations of a row: of faithful files 0.0003 (two layers) to 0.001 (28
# layers), since 16 bits round what is multiplied in each layer (docs/decisions.md).
MOST_DIFFERENCE = 0.005
# Of a matrix' sum and of its norm, in units of the norm; rounding float32 changes the sum by 2e-4 (F16) or 8e-4 (BF16).
MOST_SUM_DIFFERENCE, MOST_NORM_DIFFERENCE = 5e-3, 1e-3
ROWS_AT_ONCE = 1024
# Of the values of a norm or bias, in units of the largest; a base of 16 bits to which the converter adds 1 is rounded again.
MOST_VALUE_DIFFERENCE = 1e-3
SCALING = {"FalconH1ForCausalLM", "JAISLMHeadModel"}  # whose converters multiply weights by factors of the settings
# Whose converters write norms as they are computed with, 1 + w (conversion/gemma.py, nemotron.py), and others that change
# norms in ways of their own.
ONE_MORE = {
    *("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    *("Gemma3TextModel", "NemotronForCausalLM"),
}
CHANGED_NORMS = {
    *("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration", "Qwen4ExpForCausalLM"),
    *("MiniMaxM3SparseForCausalLM", "MuseGlimmerForConditionalGeneration", "Plamo2ForCausalLM", "Plamo3ForCausalLM"),
}
# Of tokens whose tokenizer calls them ordinary, as DeepSeek's and Cohere's do with those of roles, and which the converter
# makes control tokens all the same (conversion/base.py, does_token_look_special).
LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
VARIED = 8  # conversations that are also rendered with a system message and with tools
WITH_SYSTEM, WITH_TOOLS = " with a system message", " with tools"
SYSTEM = {"role": "system", "content": "Answer briefly. Antwoord kort. Odpowiadaj krótko."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "opening_hours",
            "description": "When a place is open.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]


@dataclass(frozen=True, slots=True)
class Rendering:
    """Messages as the training tokenizer renders them: a whole conversation, or the prompt of its last answer."""

    name: str  # of the conversation
    messages: Messages
    is_prompt: bool
    text: str
    token_ids: list[int]
    variables: Mapping[str, Any]
    what: str = ""

    @property
    def is_whole(self) -> bool:
        """A conversation as the data set has it."""
        return not self.is_prompt and not self.what


@dataclass(frozen=True, slots=True)
class AnswerPath:
    """One prompt with the 16-bit file's greedy answer."""

    tokens: Sequence[int]
    prompt_tokens: int


def renderings(
    tokenizer: Any, rows: Sequence[Messages], called: str = "conversation", varied: int = VARIED
) -> list[Rendering]:
    """What the merged model's tokenizer makes of every conversation, and of the prompt that serving would see.

    The first few also with a system message and with tools, where the template takes them. Raises `VerificationFailed` where
    it refuses a conversation, `ModelFileError` for a model without a template.
    """
    found = []
    for number, messages in enumerate(rows, 1):
        name = f"{called} {number}"
        last_answer = max((i for i, each in enumerate(messages) if each["role"] == "assistant"), default=len(messages))
        found.append(_rendered(tokenizer, name, messages, is_prompt=False))
        found.append(_rendered(tokenizer, name, messages[:last_answer], is_prompt=True, what=", prompt of its last answer"))
        if number > varied:
            continue
        if messages[0]["role"] != "system":
            found.append(_rendered(tokenizer, name, [SYSTEM, *messages], is_prompt=False, what=WITH_SYSTEM))
        found.append(_rendered(tokenizer, name, messages[:last_answer], is_prompt=True, what=WITH_TOOLS, tools=TOOLS))
    return [each for each in found if each is not None]


def _rendered(
    tokenizer: Any, name: str, messages: Messages, *, is_prompt: bool, what: str = "", **variables: Any
) -> Rendering | None:
    """None where the template refuses what was added here (Gemma's takes no system message)."""
    try:
        pieces = conversations.pieces(tokenizer, messages, f"{name}{what}", add_generation_prompt=is_prompt, **variables)
    except DataError as error:
        if what in (WITH_SYSTEM, WITH_TOOLS):
            return None
        raise VerificationFailed(str(error)) from error
    ids = conversations.ids_of(tokenizer, pieces)
    return Rendering(name, messages, is_prompt, "".join(pieces), ids, variables, what)


def compare_vocabulary(gguf: GgufVocabulary, tokenizer: Any, rows: int) -> list[str]:
    """Size, end of turn, and every token that stands for itself."""
    problems = []
    if gguf.token_count != rows:
        problems.append(f"the file has {gguf.token_count} tokens, the model {rows}")
    for name, said in (("eos", "end-of-turn"), ("bos", "first")):
        ours, theirs = gguf.metadata(f"tokenizer.ggml.{name}_token_id"), getattr(tokenizer, f"{name}_token_id")
        if theirs is not None and ours != str(theirs):
            problems.append(f"the file's {said} token is {ours}, the tokenizer's {theirs}")
    for token, added in sorted(tokenizer.added_tokens_decoder.items()):
        text = str(added)
        if (found := gguf.tokenize(text)) == [token]:
            continue
        # Gemma's vocabulary writes runs of spaces so, and nobody else writes this sign: the spaces must be alike.
        spaced = text.replace("▁", " ")
        if spaced == text or gguf.tokenize(spaced) != list(tokenizer(spaced, add_special_tokens=False)["input_ids"]):
            problems.append(f"the token {text!r} has the id {token} in training and {found} in the file")
    return problems


def compare_tokens(gguf: GgufVocabulary, expected: Sequence[Rendering]) -> list[str]:
    """What differs between the text and ids that serving would use and those of training, one line per conversation."""
    source = gguf.metadata("tokenizer.chat_template")
    if source is None:
        return ["the file has no chat template"]
    problems: dict[str, str] = {}
    try:
        template = ChatTemplate(source, gguf.special_tokens())
        for each in expected:
            rendered = functools.partial(template.render, add_generation_prompt=each.is_prompt, **each.variables)
            pieces = passages.pieces(*conversations.parted(each.messages), rendered)
            text, served = "".join(pieces), [token for piece in pieces for token in gguf.tokenize(piece)]
            if served != each.token_ids:
                problems.setdefault(each.name, f"{each.name}{each.what}: {unequal(served, each.token_ids)}")
            elif text != each.text:
                problems.setdefault(each.name, f"{each.name}{each.what}: {_texts(text, each)}")
    except TemplateFailed as error:
        return [*problems.values(), str(error)]
    return list(problems.values())


def compare_texts(gguf: GgufVocabulary, tokenizer: Any, expected: Sequence[Rendering]) -> list[str]:
    """Every conversation's ids back to text, as an answer is sent: without what stands for itself."""
    problems = []
    for each in expected:
        if each.is_whole and (said := _back(gguf, tokenizer, each.token_ids)) is not None:
            problems.append(f"{each.name} {said}")
    return problems


def _back(gguf: GgufVocabulary, tokenizer: Any, ids: Sequence[int]) -> str | None:
    """How a text comes back wrong; None where it is the tokenizer's own.

    What the converter takes for control by its looks is left out on both sides, whatever the tokenizer says of it.
    """
    added = tokenizer.added_tokens_decoder
    made = {
        token for token in set(ids) & added.keys() if LOOKS_SPECIAL.fullmatch(str(added[token])) and gguf.is_control(token)
    }
    kept = [token for token in ids if token not in made]
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    back = gguf.detokenize(ids).strip()
    if back == text:
        return None
    place = max(0, _first_difference(back, text) - 10)
    return f"comes back as {back[place : place + 30]!r} instead of {text[place : place + 30]!r}"


def compare_end_of_turn(gguf: GgufVocabulary, tokenizer: Any, expected: Sequence[Rendering]) -> list[str]:
    """Generation must end with what training ends an answer with."""
    whole = next((each for each in expected if each.is_whole and each.messages[-1]["role"] == "assistant"), None)
    if whole is None:
        return []
    start = max(index for index in range(len(whole.token_ids)) if _ends_with(whole, tokenizer, index))
    closing = whole.token_ids[start:]
    if any(gguf.is_end(token) for token in closing):
        return []
    return [
        f"an answer ends with {tokenizer.decode(closing)!r}, which ends no generation in the file: it would write on and on"
    ]


def _ends_with(whole: Rendering, tokenizer: Any, index: int) -> bool:
    """Whether the answer's last characters lie before this token."""
    answer = str(whole.messages[-1]["content"]).rstrip()
    return index == 0 or str(tokenizer.decode(whole.token_ids[:index])).rstrip().endswith(answer[-20:])


def compare_torture(gguf: GgufVocabulary, tokenizer: Any) -> list[str]:
    """Every line of a text of many scripts, signs and spaces: to ids, and back; as it could be served."""
    problems = []
    for line in probe_texts(gguf, tokenizer):
        expected = list(tokenizer(line, add_special_tokens=False)["input_ids"])
        if (served := gguf.tokenize(line)) != expected:
            problems.append(f"{line.strip()[:30]!r}: {unequal(served, expected)}")
        if (said := _back(gguf, tokenizer, expected)) is not None:
            problems.append(f"{line.strip()[:30]!r} {said}")
    return problems


def compare_weights(file: Path, model: MappedModel) -> tuple[list[str], dict[str, int]]:
    """Matrices of a 16-bit file must have the sum and the norm of the model's, norms and biases its values, in any order.

    Logits of a deep model hardly show a tensor that is a little off; this does, and costs one reading of both. Returns what
    differs, and how many were compared: not those that the converter splits, scales or changes in ways of its own.
    """
    matrices = (model.embeddings, *model.matrices)
    parameters = {
        f"{path}.{name}": each for path, part in model.parts() for name, each in part.named_parameters(recurse=False)
    }
    vectors = {name: value for name, value in parameters.items() if value.ndim == 1 and value.numel()}
    names = set(model.checkpoint.settings.get("architectures") or [])
    if SCALING & names:
        return [], {"matrices": 0, "vectors": 0, "not_compared": len(matrices) + len(vectors)}
    package = gguf_names.gguf_package()
    tensors = {each.name: each for each in package.GGUFReader(file).tensors}
    name_of = gguf_names.tensor_names(model.checkpoint.settings)
    problems, compared = [], {"matrices": 0, "vectors": 0, "not_compared": 0}
    for path in matrices:
        is_tied = path != model.embeddings and model.stored_name(path) == model.stored_name(model.embeddings)
        if is_tied and name_of(f"{path}.weight") not in tensors:
            continue  # a head that is the embeddings in the file too: these are compared
        tensor = _same_size(tensors, name_of(f"{path}.weight"), math.prod(_shape(model, path)))
        compared["not_compared" if tensor is None else "matrices"] += 1
        if tensor is not None:
            problems += _unequal_sums(tensor, model.rows(path), package)
    for name, values in vectors.items():
        is_norm = name.endswith("norm.weight")
        is_known = name.endswith((".weight", ".bias")) and not (is_norm and CHANGED_NORMS & names)
        tensor = _same_size(tensors, name_of(name), values.numel()) if is_known else None
        compared["not_compared" if tensor is None else "vectors"] += 1
        if tensor is not None:
            problems += _unequal_values(tensor, values.detach().numpy() + (1 if is_norm and ONE_MORE & names else 0))
    return problems, compared


def _shape(model: MappedModel, path: str) -> Sequence[int]:
    shape: Sequence[int] = model.checkpoint.tensors[model.stored_name(path)].shape
    return shape


def _same_size(tensors: Mapping[str, Any], name: str | None, values: int) -> Any:
    """The file's tensor; None where the converter splits it or writes it otherwise."""
    if name == "output.weight" and name not in tensors:
        name = "token_embd.weight"  # what is computed with, then
    found = tensors.get(name or "")
    return found if found is not None and found.n_elements == values else None


def _unequal_sums(tensor: Any, rows: Iterable[Any], package: Any) -> list[str]:
    found = _sums(package.quants.dequantize(each, tensor.tensor_type) for each in _pieces(tensor.data))
    expected = _sums(each.numpy() for each in rows)
    off = [abs(ours - theirs) / (expected[1] or 1.0) for ours, theirs in zip(found, expected, strict=True)]
    if off[0] <= MOST_SUM_DIFFERENCE and off[1] <= MOST_NORM_DIFFERENCE:
        return []
    return [
        f"{tensor.name} is not the model's: its values sum up to {found[0]:.4g} and have the norm {found[1]:.4g},"
        f" the model's {expected[0]:.4g} and {expected[1]:.4g}"
    ]


def _unequal_values(tensor: Any, expected: Any) -> list[str]:
    """Of a norm or a bias: few values, each compared; sorted, as biases change their order with their matrix."""
    import numpy

    found, wanted = numpy.sort(tensor.data.reshape(-1)), numpy.sort(expected.reshape(-1))
    off = float(numpy.abs(found - wanted).max())
    if off <= MOST_VALUE_DIFFERENCE * (float(numpy.abs(wanted).max()) or 1.0):
        return []
    return [f"{tensor.name} is not the model's: its values from {found[0]:.4g} to {found[-1]:.4g} differ by up to {off:.4g}"]


def _pieces(matrix: Any) -> Iterator[Any]:
    return (matrix[start : start + ROWS_AT_ONCE] for start in range(0, len(matrix), ROWS_AT_ONCE))


def _sums(blocks: Iterable[Any]) -> tuple[float, float]:
    """The sum of all values, and their Euclidean norm."""
    total = squares = 0.0
    for block in blocks:
        total += float(block.sum())
        squares += float((block * block).sum())
    return total, math.sqrt(squares)


def greedy_paths(gguf: GgufModel, prompts: Sequence[Sequence[int]], answer_tokens: int) -> list[AnswerPath]:
    """The file's own greedy answers."""
    return [AnswerPath([*ids, *gguf.greedy(ids, answer_tokens)], len(ids)) for ids in prompts]


def expected_logits(model: MappedModel, path: AnswerPath) -> Any:
    """The merged model's logits `(steps, vocabulary)` along a path; those of the prompt are not computed."""
    import torch

    ids = torch.tensor([list(path.tokens[:-1])])
    steps = len(path.tokens) - path.prompt_tokens
    with torch.inference_mode():
        return model.module(input_ids=ids, use_cache=False, logits_to_keep=steps).logits[0].numpy()


def compare_paths(found: Sequence[Any], expected: Sequence[Any], logit_gap: float) -> dict[str, Any]:
    """Top-token agreement of logits `(steps, vocabulary)` along each path, the merged model's being the expected ones.

    Steps whose top two logits are closer than the gap are ties. Raises `VerificationFailed` for values that are no numbers.
    """
    import numpy

    steps = ties = disagreements = agreed = 0
    largest = relative = extreme = total = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        ours = ours[:, : theirs.shape[1]]
        if not (numpy.isfinite(ours).all() and numpy.isfinite(theirs).all()):
            raise VerificationFailed("The model computes values that are no numbers (NaN): its training diverged.")
        top_two = numpy.partition(theirs, -2, axis=1)[:, -2:]
        is_tie = top_two[:, 1] - top_two[:, 0] <= logit_gap
        is_same = ours.argmax(axis=1) == theirs.argmax(axis=1)
        difference = numpy.abs(ours - theirs)
        steps += len(is_same)
        ties += int(is_tie.sum())
        agreed += int(is_same.sum())
        disagreements += int((~is_same & ~is_tie).sum())
        largest = max(largest, float(difference.max()))
        spread = numpy.maximum(theirs.std(axis=1), numpy.finfo(theirs.dtype).tiny)
        extreme = max(extreme, float((difference.max(axis=1) / spread).max()))
        relative = max(relative, float((difference.mean(axis=1) / spread).mean()))
        total += float(difference.mean(axis=1).sum())
    return {
        "prompts": len(found),
        "steps": steps,
        "ties": ties,
        "disagreements": disagreements,
        "agreement_ratio": agreed / steps,
        "largest_logit_difference": largest,
        "mean_logit_difference": total / steps,
        "mean_difference_ratio": relative,
        "largest_difference_ratio": extreme,
    }


def judge_paths(result: Mapping[str, Any]) -> list[str]:
    """What of a 16-bit file's comparison is too far from the merged model."""
    if result["steps"] == result["ties"]:
        return [f"no step could be judged: {in_words(result)}; ask for more prompts or answer tokens"]
    if result["disagreements"]:
        return [f"the F16 file's top token differs: {in_words(result)}"]
    if result["mean_difference_ratio"] > MOST_DIFFERENCE:
        return [
            f"the F16 file's logits differ by {result['mean_difference_ratio']:.4f} of their spread on average"
            f" (at most {MOST_DIFFERENCE}): {in_words(result)}"
        ]
    return []


def in_words(result: Mapping[str, Any]) -> str:
    return (
        f"top token agrees at {result['agreement_ratio']:.1%} of {result['steps']} steps of {result['prompts']} prompts"
        f" ({result['disagreements']} differ beyond the gap, {result['ties']} ties),"
        f" logits differ by at most {result['largest_logit_difference']:.4f}"
    )


def _texts(served: str, each: Rendering) -> str:
    place = _first_difference(served, each.text)
    return f"the same ids, and another text from character {place} on: {served[place : place + 20]!r}"


def _first_difference(ours: str, theirs: str) -> int:
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
