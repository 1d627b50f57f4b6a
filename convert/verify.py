"""Verifies that a GGUF file is the model that was trained: `python -m convert.verify`, `appliance convert verify`.

Three checks, each of which can fail: the file loads and names the same vocabulary; its chat template and tokenizer give the
training tokenizer's ids on every conversation of the data set; and along the merged model's own greedy answers its top
token agrees wherever the merged model is not nearly undecided. Quantized files are measured the same way, not judged.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from appliance import artifacts, config, device
from appliance.artifacts import Plan
from appliance.console import Command, Progress, emit, json_option, note
from appliance.errors import DataError, ModelFileError, VerificationFailed, several
from appliance.recipe import Verify
from appliance.text.chat_template import ChatTemplate, TemplateFailed
from convert.gguf_model import GgufModel

REVISION = 2  # raised when the checks change
DEFAULTS = Verify()
MOST_SHOWN = 5


@dataclass(frozen=True, slots=True)
class AnswerPath:
    """One prompt with the merged model's greedy answer, and its logits `(answer tokens, vocabulary)` at each step."""

    tokens: list[int]
    prompt_tokens: int
    logits: Any


@dataclass(frozen=True, slots=True)
class Rendering:
    """Messages as the training tokenizer renders them: a whole conversation, or the prompt of its last answer."""

    conversation: int
    messages: list[dict[str, str]]
    is_prompt: bool
    token_ids: list[int]


@click.command(cls=Command)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--merged", type=click.Path(path_type=Path), required=True, help="The folder that the file was made from.")
@click.option("--conversations", type=click.Path(path_type=Path), required=True, help="JSON lines with messages.")
@click.option("--quantized", type=click.Path(path_type=Path), multiple=True, help="Also measure this file.")
@click.option("--prompts", type=click.IntRange(min=1), default=DEFAULTS.prompts, show_default=True)
@click.option("--answer-tokens", type=click.IntRange(min=1), default=DEFAULTS.answer_tokens, show_default=True)
@click.option("--logit-gap", type=click.FloatRange(min=0, max=1), default=DEFAULTS.logit_gap, show_default=True)
@click.option("--name", help="Name of the report; default: the file's.")
@click.option("--dry-run", is_flag=True, help="Say what would be made, and make nothing.")
@json_option
def verify(
    model: Path,
    merged: Path,
    conversations: Path,
    quantized: tuple[Path, ...],
    prompts: int,
    answer_tokens: int,
    logit_gap: float,
    name: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Verify MODEL, a 16-bit GGUF file, against the merged model it was made from; exit 4 when it fails."""
    root = config.artifacts_root()
    files = {"F16": model, **{_type_of(each): each for each in quantized}}
    parents = [artifacts.identity(each.parent) for each in files.values()] + [artifacts.identity(merged)]
    settings = Verify(prompts=prompts, answer_tokens=answer_tokens, logit_gap=logit_gap)
    data = artifacts.identity(conversations.parent)
    plan = Plan(
        kind="report",
        name=f"{name or model.stem}-verify",
        inputs={"revision": REVISION, "what": "verify", "conversations": f"{data}/{conversations.name}"},
        parents=parents,
        config=config.plain(settings),
    )
    existing = plan.existing(root)
    state = "unchanged" if existing else "to make" if dry_run else "made"
    if state == "made":
        _check_descent(model, merged, quantized)
        config.apply_quiet_environment()
        with artifacts.create(plan, root) as draft:
            draft.results.update(verify_files(files, merged, read_messages(conversations), settings))
            (draft.path / "verify.json").write_text(json.dumps(draft.results, indent=2) + "\n")
        existing = artifacts.load(plan.location(root))
    results = dict(existing.results) if existing else {}
    emit({"artifact": plan.location(root), "state": state, "results": results}, as_json, f"{plan.location(root)} ({state})")


def _check_descent(model: Path, merged: Path, quantized: Sequence[Path]) -> None:
    """Raises `VerificationFailed` for a file that was made from another one, `ModelFileError` for a missing one."""
    for file in (model, *quantized):
        if not file.is_file():
            raise ModelFileError(f"{file} does not exist; name a .gguf file.")
        artifacts.check_input(file)
    artifacts.check_input(merged)
    for file in quantized:
        if not (file.parent / artifacts.MANIFEST).exists():
            raise VerificationFailed(f"{file} has no manifest, so nothing says what it was made from.")
        if artifacts.identity(model.parent) not in (parents := artifacts.load(file.parent).manifest["parents"]):
            raise VerificationFailed(f"{file} was made from {', '.join(parents)}, not from {model}.")


def read_messages(path: Path) -> list[list[dict[str, str]]]:
    """The conversations of a dataset's file; raises `DataError`."""
    try:
        rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        lacking = [number for number, messages in enumerate(rows, 1) if "user" not in {each["role"] for each in messages}]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no file of conversations ({error}); `appliance data check` makes one.") from error
    if not rows:
        raise DataError(f"{path} holds no conversation, so nothing can be verified.")
    if lacking:
        raise DataError(
            f"{path}: row {lacking[0]} has no user turn; `appliance data check` makes a file that can be verified."
        )
    return rows


def verify_files(
    files: Mapping[str, Path], merged: Path, conversations: Sequence[list[dict[str, str]]], settings: Verify
) -> dict[str, Any]:
    """Runs all checks; raises `VerificationFailed` with everything that failed."""
    tokenizer, model = _load_merged(merged)
    expected = training_renderings(tokenizer, conversations)
    paths = greedy_paths(model, tokenizer, conversations, settings)
    longest = max(len(path.tokens) for path in paths)
    problems: list[str] = []
    results: dict[str, Any] = {}
    with GgufModel(files["F16"], context_tokens=max(longest, 64)) as gguf:
        problems += _check_vocabulary(gguf, tokenizer, model)
        if problems:  # logits of another vocabulary cannot be compared
            raise VerificationFailed(several(problems, f"{files['F16']} is not the model that was trained"))
        found = compare_tokens(gguf, expected)
        problems += found
        tokens = sum(len(each.token_ids) for each in expected if not each.is_prompt)
        results["tokens"] = {"conversations": len(conversations), "tokens": tokens, "mismatches": len(found)}
        results["F16"] = compare_paths(gguf, paths, settings.logit_gap)
    note(f"verify: {len(conversations)} conversations, {tokens:,} token ids, {len(found)} conversations differ")
    note(f"verify: F16 {_in_words(results['F16'])}")
    if results["F16"]["steps"] == results["F16"]["ties"]:
        problems.append(f"no step could be judged: {_in_words(results['F16'])}; ask for more prompts or answer tokens")
    if results["F16"]["disagreements"]:
        problems.append(f"the F16 file's top token differs: {_in_words(results['F16'])}")
    if problems:
        shown = [*problems[:MOST_SHOWN], *([f"and {len(problems) - MOST_SHOWN} more"] if len(problems) > MOST_SHOWN else [])]
        raise VerificationFailed(several(shown, f"{files['F16']} is not the model that was trained"))
    for kind in [kind for kind in files if kind != "F16"]:
        with GgufModel(files[kind], context_tokens=max(longest, 64)) as gguf:
            if problems := _check_vocabulary(gguf, tokenizer, model):
                raise VerificationFailed(several(problems, f"{files[kind]} is another model"))
            results[kind] = compare_paths(gguf, paths, settings.logit_gap)
        note(f"verify: {kind} {_in_words(results[kind])}")
    return results


def greedy_paths(
    model: Any, tokenizer: Any, conversations: Sequence[list[dict[str, str]]], settings: Verify
) -> list[AnswerPath]:
    """The merged model's greedy answers to prompts spread evenly over the data, with its logits along them."""
    import torch

    count = min(settings.prompts, len(conversations))
    chosen = [conversations[position * len(conversations) // count] for position in range(count)]
    paths = []
    progress = Progress("verify: answers of the merged model", count)
    for position, messages in enumerate(chosen, 1):
        opening = messages[: 1 + next(i for i, message in enumerate(messages) if message["role"] == "user")]
        rendered = tokenizer.apply_chat_template(opening, tokenize=True, add_generation_prompt=True, return_dict=True)
        prompt = torch.tensor([rendered["input_ids"]])
        with torch.inference_mode():
            whole = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=settings.answer_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
            logits = model(input_ids=whole).logits[0, prompt.shape[1] - 1 : -1].float().numpy()
        paths.append(AnswerPath(whole[0].tolist(), prompt.shape[1], logits))
        progress.update(position)
    return paths


def training_renderings(tokenizer: Any, conversations: Sequence[list[dict[str, str]]]) -> list[Rendering]:
    """What the merged model's tokenizer makes of every conversation, and of the prompt that serving would see."""
    renderings = []
    for number, messages in enumerate(conversations, 1):
        last_answer = max((i for i, each in enumerate(messages) if each["role"] == "assistant"), default=len(messages))
        for part, is_prompt in ((messages, False), (messages[:last_answer], True)):
            rendered = tokenizer.apply_chat_template(part, tokenize=True, return_dict=True, add_generation_prompt=is_prompt)
            renderings.append(Rendering(number, part, is_prompt, list(rendered["input_ids"])))
    return renderings


def compare_tokens(gguf: GgufModel, expected: Sequence[Rendering]) -> list[str]:
    """What differs between the ids that serving would use and those of training, one line per conversation."""
    source = gguf.metadata("tokenizer.chat_template")
    if source is None:
        return ["the file has no chat template"]
    problems: dict[int, str] = {}
    try:
        template = ChatTemplate(source, gguf.special_tokens())
        for each in expected:
            served = gguf.tokenize(template.render(each.messages, add_generation_prompt=each.is_prompt))
            if served != each.token_ids:
                what = f"conversation {each.conversation}{', prompt of its last answer' if each.is_prompt else ''}"
                problems.setdefault(each.conversation, f"{what}: {_difference(served, each.token_ids)}")
    except TemplateFailed as error:
        return [*problems.values(), str(error)]
    return list(problems.values())


def compare_paths(gguf: GgufModel, paths: Sequence[AnswerPath], logit_gap: float) -> dict[str, Any]:
    """Top-token agreement along the greedy answers; steps whose top two logits are closer than the gap are ties."""
    import numpy

    steps = ties = disagreements = agreed = 0
    largest = 0.0
    for path in paths:
        first = path.prompt_tokens - 1
        found = gguf.logits(path.tokens[:-1], first)[:, : path.logits.shape[1]]
        if not (numpy.isfinite(found).all() and numpy.isfinite(path.logits).all()):
            raise VerificationFailed("The model computes values that are no numbers (NaN): its training diverged.")
        top_two = numpy.sort(path.logits, axis=1)[:, -2:]
        is_tie = top_two[:, 1] - top_two[:, 0] <= logit_gap
        is_same = found.argmax(axis=1) == path.logits.argmax(axis=1)
        steps += len(is_same)
        ties += int(is_tie.sum())
        agreed += int(is_same.sum())
        disagreements += int((~is_same & ~is_tie).sum())
        largest = max(largest, float(numpy.abs(found - path.logits).max()))
    return {
        "prompts": len(paths),
        "steps": steps,
        "ties": ties,
        "disagreements": disagreements,
        "agreement_ratio": agreed / steps,
        "largest_logit_difference": largest,
    }


def _load_merged(merged: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(device.usable_cores())
    try:
        tokenizer = AutoTokenizer.from_pretrained(merged, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{merged} cannot be loaded: {error}") from error
    return tokenizer, model.eval()


def _difference(served: Sequence[int], trained: Sequence[int]) -> str:
    pairs = enumerate(zip(served, trained, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(served), len(trained)))
    return f"{len(served)} token ids against {len(trained)}, first difference at {place}"


def _check_vocabulary(gguf: GgufModel, tokenizer: Any, model: Any) -> list[str]:
    problems = []
    if gguf.token_count != model.config.get_text_config().vocab_size:
        problems.append(f"the file has {gguf.token_count} tokens, the model {model.config.get_text_config().vocab_size}")
    if (eos := gguf.metadata("tokenizer.ggml.eos_token_id")) != str(tokenizer.eos_token_id):
        problems.append(f"the file's end-of-turn token is {eos}, the tokenizer's {tokenizer.eos_token_id}")
    return problems


def _in_words(result: Mapping[str, Any]) -> str:
    return (
        f"top token agrees at {result['agreement_ratio']:.1%} of {result['steps']} steps of {result['prompts']} prompts"
        f" ({result['disagreements']} differ beyond the gap, {result['ties']} ties),"
        f" logits differ by at most {result['largest_logit_difference']:.4f}"
    )


def _type_of(path: Path) -> str:
    return path.stem.rpartition("-")[2]


if __name__ == "__main__":
    verify()
