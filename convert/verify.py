"""Verifies a conversion and certifies what it cost: `python -m convert.verify`, `appliance convert verify`.

The 16-bit file must be the model that was trained (`convert.checks`), or nothing else is looked at. Each quantized file is
then measured against it by language (`convert.divergence`), and the one that is to be served must keep to its limit. The
result is `certificate.json`, and the same as a page to read.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from appliance import artifacts, config, promotion
from appliance import recipe as recipes
from appliance.artifacts import Plan
from appliance.console import Command, emit, human_bytes, json_option, note
from appliance.errors import DataError, ModelFileError, VerificationFailed, several
from appliance.recipe import Serve, Verify
from convert import certificate, checks, conversations, divergence, fitting, pre_tokenizer
from convert.conversations import Asked, Messages
from convert.gguf_model import GgufModel
from convert.mapped_model import MappedModel

REVISION = 7  # raised when the checks change
DEFAULTS = Verify()
MIB = 1 << 20
MOST_SHOWN = 5
SIXTEEN_BITS = "F16"
FILE, PAGE = "certificate.json", "certificate.md"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is verified: files by type (the 16-bit one first), the model they were made from, and the rows to measure on.

    `asked` are questions over documents; None where it is not asked what reading these by themselves costs.
    """

    files: Mapping[str, Path]
    merged: Path
    trained: Sequence[Messages]
    heldout: Sequence[Messages] | None
    preferences: Sequence[Messages]
    asked: Sequence[Asked] | None
    languages: Sequence[str]
    gate: str | None
    serve: Serve
    memory_mib: int  # of the machine that will serve; 0: of this one


@click.command(cls=Command)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--merged", type=click.Path(path_type=Path), required=True, help="The folder that the file was made from.")
@click.option(
    "--conversations", "rows", type=click.Path(path_type=Path), required=True, help="JSON lines with messages, as trained."
)
@click.option("--heldout", type=click.Path(path_type=Path), help="Rows that were not trained on, to measure on.")
@click.option(
    "--preferences", type=click.Path(path_type=Path), help="Triplets: their texts must become the same tokens too."
)
@click.option("--quantized", type=click.Path(path_type=Path), multiple=True, help="Also measure this file.")
@click.option("--language", "languages", multiple=True, default=("en",), show_default=True, help="Of the rows; ISO 639-1.")
@click.option("--gate", help="The type of the file that must keep to the limit.")
@click.option("--kl-limit", type=click.FloatRange(min=0), default=DEFAULTS.kl_limit, show_default=True)
@click.option("--prompts", type=click.IntRange(min=1), default=DEFAULTS.prompts, show_default=True)
@click.option("--answer-tokens", type=click.IntRange(min=1), default=DEFAULTS.answer_tokens, show_default=True)
@click.option("--logit-gap", type=click.FloatRange(min=0, max=1), default=DEFAULTS.logit_gap, show_default=True)
@click.option("--passages", "proves_passages", is_flag=True, help="Also: may documents be read once, by themselves?")
@click.option("--passages-questions", type=click.IntRange(min=20), default=DEFAULTS.passages_questions, show_default=True)
@click.option("--passages-kl-limit", type=click.FloatRange(min=0), default=DEFAULTS.passages_kl_limit, show_default=True)
@click.option(
    "--passages-lost-limit", type=click.FloatRange(min=0, max=1), default=DEFAULTS.passages_lost_limit, show_default=True
)
@click.option("--serve", "serve_json", default="{}", help="Serving settings of the recipe, as JSON: will they fit?")
@click.option("--memory-mib", type=click.IntRange(min=0), default=0, help="Of the machine that will serve; 0: of this one.")
@click.option("--name", help="Name of the report; default: the file's.")
@click.option("--dry-run", is_flag=True, help="Say what would be made, and make nothing.")
@json_option
def verify(
    model: Path,
    merged: Path,
    rows: Path,
    heldout: Path | None,
    preferences: Path | None,
    quantized: tuple[Path, ...],
    languages: tuple[str, ...],
    gate: str | None,
    kl_limit: float,
    prompts: int,
    answer_tokens: int,
    logit_gap: float,
    proves_passages: bool,
    passages_questions: int,
    passages_kl_limit: float,
    passages_lost_limit: float,
    serve_json: str,
    memory_mib: int,
    name: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Verify MODEL, a 16-bit GGUF file, against the merged model it was made from; exit 4 when it fails."""
    root = config.artifacts_root()
    files = {SIXTEEN_BITS: model, **_by_type(quantized)}
    if gate is not None and gate not in files:
        raise click.BadParameter(f"{gate!r} is not among the files: {', '.join(files)}.", param_hint="--gate")
    settings = Verify(
        prompts=prompts,
        answer_tokens=answer_tokens,
        logit_gap=logit_gap,
        kl_limit=kl_limit,
        passages_questions=passages_questions,
        passages_kl_limit=passages_kl_limit,
        passages_lost_limit=passages_lost_limit,
    )
    serve = recipes.build_serve(recipes.parse_serve(serve_json, "--serve"), "--serve")
    named = {"conversations": rows, "heldout": heldout, "preferences": preferences}
    data = {key: f"{artifacts.identity(path.parent)}/{path.name}" for key, path in named.items() if path is not None}
    plan = Plan(
        kind="report",
        name=f"{name or model.stem}-verify",
        inputs={"revision": REVISION, "what": "verify", **data},
        parents=[artifacts.identity(each.parent) for each in files.values()] + [artifacts.identity(merged)],
        config={
            **config.plain(settings),
            **{"languages": list(languages), "gate": gate, "memory_mib": memory_mib, "serve": config.plain(serve)},
            **({"passages": True} if proves_passages else {}),
        },
    )
    existing = plan.existing(root)
    state = "unchanged" if existing else "to make" if dry_run else "made"
    if state == "made":
        _check_descent(model, merged, quantized)
        config.apply_quiet_environment()
        subject = Subject(
            files=files,
            merged=merged,
            trained=conversations.read(rows),
            heldout=None if heldout is None else conversations.read(heldout),
            preferences=[] if preferences is None else conversations.read_preferences(preferences),
            asked=_asked(rows, heldout) if proves_passages else None,
            languages=languages,
            gate=gate,
            serve=serve,
            memory_mib=memory_mib,
        )
        with artifacts.create(plan, root) as draft:
            draft.results.update(certify(subject, settings))
            (draft.path / FILE).write_text(json.dumps(draft.results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            (draft.path / PAGE).write_text(certificate.page(name or model.stem, draft.results), encoding="utf-8")
        existing = artifacts.load(plan.location(root))
    results = dict(existing.results) if existing else {}
    emit({"artifact": plan.location(root), "state": state, "results": results}, as_json, f"{plan.location(root)} ({state})")


def _asked(rows: Path, heldout: Path | None) -> list[Asked]:
    """Questions over documents, those first that were not trained on; raises `DataError` for none."""
    found = [
        dataclasses.replace(each, is_held_out=path is heldout)
        for path in (heldout, rows)
        if path is not None
        for each in conversations.read_asked(path)
        if each.documents
    ]
    if found:
        return found
    where = rows if heldout is None else f"{rows} or {heldout}"
    raise DataError(
        f"No row of {where} has documents, so nothing can be said of reading them by themselves; give rows a list of"
        " documents, or leave out --passages."
    )


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


def certify(subject: Subject, settings: Verify) -> dict[str, Any]:
    """All checks and measurements; raises `VerificationFailed` with everything that failed."""
    results = _certify_full(subject, settings)
    rows = subject.trained if subject.heldout is None else subject.heldout
    results["rows"] = "rows that were trained on" if subject.heldout is None else "held-out rows"
    results["files"], results["left_out"] = _measure_files(subject, rows)
    if results["left_out"]:
        note(f"verify: {results['left_out']} answers cannot be measured: too long, or rendered otherwise in a longer text")
    for line in certificate.summary(results):
        note(f"verify: {line}")
    if subject.gate is not None:
        model = artifacts.identity(subject.files[subject.gate].parent)
        results["gate"] = {**_judge(subject.gate, results, settings.kl_limit), "model": model}
    if subject.asked is not None:
        results["passages"] = _prove(subject, settings)
    return results


def _prove(subject: Subject, settings: Verify) -> dict[str, Any]:
    """Of the file that is to be served."""
    from convert import passages  # the engine, without which --help must do

    kind = subject.gate or next(iter(subject.files))
    file = subject.files[kind]
    found = passages.prove(file, subject.asked or [], subject.languages, settings, subject.serve.context_tokens)
    for line in passages.summary(found):
        note(f"verify: {line}")
    model, digest = artifacts.identity(file.parent), artifacts.digest_file(file)
    return {"type": kind, "model": model, "sha256": digest, **found}


def _certify_full(subject: Subject, settings: Verify) -> dict[str, Any]:
    """The 16-bit file against the merged model."""
    tokenizer = pre_tokenizer.load(subject.merged)
    model = MappedModel(subject.merged)
    expected = _expected(tokenizer, subject)
    prompts = _spread([each.token_ids for each in expected if each.is_prompt and not each.variables], settings.prompts)
    longest = max(map(len, prompts)) + settings.answer_tokens
    file = subject.files[SIXTEEN_BITS]
    with GgufModel(file, context_tokens=max(longest, 64)) as gguf:
        problems = checks.compare_vocabulary(gguf, tokenizer, model.vocabulary_rows)
        if problems:  # logits of another vocabulary cannot be compared
            raise _failed(file, problems)
        differing = checks.compare_tokens(gguf, expected)
        problems += differing
        problems += checks.compare_texts(gguf, tokenizer, expected)
        problems += checks.compare_end_of_turn(gguf, tokenizer, expected)
        torture = checks.compare_torture(gguf, tokenizer)
        problems += torture
        wrong, weights = checks.compare_weights(file, model)
        problems += wrong
        paths = checks.greedy_paths(gguf, prompts, settings.answer_tokens)
        found = [gguf.logits(path.tokens[:-1], path.prompt_tokens - 1) for path in paths]
        parts_marks = pre_tokenizer.parts_marks(gguf)
    wanted = [checks.expected_logits(model, path) for path in paths]
    sixteen = checks.compare_paths(found, wanted, settings.logit_gap)
    problems += checks.judge_paths(sixteen)
    whole = [each for each in expected if each.is_whole]
    tokens = sum(len(each.token_ids) for each in whole)
    note(f"verify: {len(whole)} conversations, {tokens:,} token ids, {len(differing)} conversations differ")
    note(f"verify: F16 {checks.in_words(sixteen)}")
    if problems:
        raise _failed(file, problems)
    counted = {
        "conversations": len(whole),
        "heldout": len(subject.heldout or []),
        "preferences": len(subject.preferences),
        "tokens": tokens,
        "mismatches": len(differing),
        "varied": sum(each.what in (checks.WITH_SYSTEM, checks.WITH_TOOLS) for each in expected),
        "torture_lines": len(pre_tokenizer.PROBE.splitlines()),
        "special_tokens": len(tokenizer.added_tokens_decoder),
        # Of the torture text: llama.cpp is known to part such marks from their letters under this pre-tokenizer.
        "combining_marks_left_out": parts_marks,
        **weights,
    }
    return {"tokens": counted, SIXTEEN_BITS: sixteen}


def _expected(tokenizer: Any, subject: Subject) -> list[checks.Rendering]:
    """Every conversation of the data set as training renders it: trained on, held out, preferred and not."""
    return [
        *checks.renderings(tokenizer, subject.trained),
        *checks.renderings(tokenizer, subject.heldout or [], "held-out conversation", varied=0),
        *checks.renderings(tokenizer, subject.preferences, "preference answer", varied=0),
    ]


def _measure_files(subject: Subject, rows: Sequence[Messages]) -> tuple[dict[str, dict[str, Any]], int]:
    """What each file costs, and how many answers of the rows could not be measured."""
    tokenizer = pre_tokenizer.load(subject.merged)
    full_path = subject.files[SIXTEEN_BITS]
    limit = fitting.read(full_path).context_length or subject.serve.context_tokens
    groups = {
        language: divergence.answers(tokenizer, group, limit)
        for language, group in conversations.by_language(rows, subject.languages).items()
    }
    longest = max((len(answer.tokens) for group in groups.values() for answer in group), default=64)
    results: dict[str, dict[str, Any]] = {}
    lost: dict[str, divergence.Measured] = {}
    with GgufModel(full_path, context_tokens=max(longest, 256)) as full:
        results[SIXTEEN_BITS] = {**_cost(subject, full_path), **full.speed()}
        for kind in [kind for kind in subject.files if kind != SIXTEEN_BITS]:
            with GgufModel(subject.files[kind], context_tokens=max(longest, 256)) as quantized:
                if problems := checks.compare_vocabulary(quantized, tokenizer, full.token_count):
                    raise _failed(subject.files[kind], problems)
                lost[kind] = divergence.measure(full, quantized, groups)
                results[kind] = {**_cost(subject, subject.files[kind]), **quantized.speed()}
                results[kind].update(languages=lost[kind].languages, worst=lost[kind].worst)
                results[kind].update(better=_measured(subject.files[kind])[1])
    for kind, each in lost.items():
        if (plain := lost.get(f"{kind}{promotion.PLAIN}")) is not None:
            found = {code: divergence.difference(rows, plain.rows[code]) for code, rows in each.rows.items()}
            results[kind]["against_plain"] = found
    asked = sum(message["role"] == "assistant" for messages in rows for message in messages)
    return results, asked - sum(map(len, groups.values()))


def _cost(subject: Subject, file: Path) -> dict[str, Any]:
    """What a file takes on the machine that is to serve it."""
    machine = fitting.machine_with(subject.memory_mib * MIB or None)
    found = fitting.fit(file, fitting.read(file), subject.serve, machine)
    return {
        "size_bytes": file.stat().st_size,
        "memory_bytes": found.needed_bytes or 0,
        "fits": found.needed_bytes is not None,
        "fits_as_asked": found.is_whole,
        "fit_notes": found.reason,
    }


def _judge(gate: str, results: Mapping[str, Any], kl_limit: float) -> dict[str, Any]:
    """Raises `VerificationFailed` when a language lost more than the limit, when nothing was measured, or when the file does
    not fit its machine. The 16-bit file is what others are measured against.
    """
    file = results["files"][gate]
    if not file["fits"]:
        raise VerificationFailed(f"The {gate} file does not fit the machine that is to serve it: {file['fit_notes']}")
    languages = file.get("languages", {})
    if not languages and gate != SIXTEEN_BITS:
        raise VerificationFailed(
            f"Nothing says what the {gate} file lost: none of the {results['rows']} has an answer that could be measured"
            f" ({results['left_out']} were left out). Give rows whose answers fit into the context."
        )
    # A divergence that is no number is beyond every limit.
    beyond = {language: each for language, each in languages.items() if not each["kl_mean"] <= kl_limit}
    if beyond:
        said = ", ".join(f"{language} {each['kl_mean']:.3f}" for language, each in beyond.items())
        raise VerificationFailed(
            f"The {gate} file lost more than verify.kl_limit = {kl_limit} nats against 16 bits in {said}, on"
            f" {results['rows']}. Serve a larger type ({human_bytes(file['size_bytes'])} now), or raise the limit knowingly."
        )
    return {"type": gate, "kl_limit": kl_limit, "passed": True, "rows": results["rows"]}


def _spread(prompts: Sequence[list[int]], count: int) -> list[list[int]]:
    count = min(count, len(prompts))
    return [prompts[position * len(prompts) // count] for position in range(count)]


def _failed(file: Path, problems: Sequence[str]) -> VerificationFailed:
    more = [f"and {len(problems) - MOST_SHOWN} more"] if len(problems) > MOST_SHOWN else []
    return VerificationFailed(several([*problems[:MOST_SHOWN], *more], f"{file} is not the model that was trained"))


def _by_type(quantized: Sequence[Path]) -> dict[str, Path]:
    """Files by their types; of two of one type, the one for which nothing was measured is called plain."""
    kinds = {file: file.stem.rpartition("-")[2] for file in quantized}
    measured = {kind for file, kind in kinds.items() if any(_measured(file))}
    found: dict[str, Path] = {}
    for file, kind in kinds.items():
        name = kind if kind not in measured or any(_measured(file)) else f"{kind}{promotion.PLAIN}"
        if name in found:
            raise click.BadParameter(f"{found[name]} and {file} would both be called {name}.", param_hint="--quantized")
        found[name] = file
    return found


def _measured(file: Path) -> tuple[bool, list[str]]:
    """Whether an importance matrix was used, and which tensors have a better type than the file's."""
    results = artifacts.load(file.parent).results if (file.parent / artifacts.MANIFEST).exists() else {}
    return bool(results.get("imatrix")), [f"{role} in {better}" for role, better in results.get("better", {}).items()]


if __name__ == "__main__":
    verify()
