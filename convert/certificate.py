"""The certificate of a conversion as a page to read: what was compared, what was lost, whether it keeps to its limits."""

from collections.abc import Mapping, Sequence
from typing import Any

from appliance.console import human_bytes
from convert import answer_facts

EXEMPT = (
    "; combining marks (vowel signs of Hindi and Thai) were left out of these lines, since llama.cpp is known to split them"
    " otherwise than this tokenizer does: the conversations above, which agree, were compared with all of theirs."
)
NOISE_ERRORS = 2  # standard errors within which a difference says nothing


def page(name: str, results: Mapping[str, Any]) -> str:
    """Markdown of `certificate.json`."""
    return "\n".join(
        [
            f"# Certificate of {name}",
            "",
            *_faithful(results),
            "",
            *_sizes(results["files"]),
            "",
            *_languages(results["files"]),
            *_against_plain(results["files"]),
            "",
            *_worst(results["files"]),
            *_limits(results),
            "",
            *_passages(results.get("passages")),
        ]
    )


def summary(results: Mapping[str, Any]) -> list[str]:
    """A line for each file: its size, its speed here, and its worst language."""
    lines = []
    for kind, each in results["files"].items():
        worst = worst_language(each.get("languages") or {})
        lost = f"KL {worst[1]['kl_mean']:.4f} at most ({worst[0]})" if worst else "the reference"
        speed = f"{each['decode_tokens_per_second']:.0f} tokens/s here"
        lines.append(f"{kind:<13} {human_bytes(each['size_bytes']):>10}  {speed:<18} {lost}")
    return lines


def worst_language(languages: Mapping[str, Mapping[str, Any]]) -> tuple[str, Mapping[str, Any]] | None:
    return max(languages.items(), key=lambda item: item[1]["kl_mean"], default=None)


def _faithful(results: Mapping[str, Any]) -> list[str]:
    tokens, f16 = results["tokens"], results["F16"]
    parts = [(tokens["heldout"], "held out"), (tokens["preferences"], "answers of preferences")]
    more = "".join(f"{count} of them {said}; " for count, said in parts if count)
    lines = [
        "## The 16-bit file is the model that was trained",
        "",
        f"- {tokens['conversations']} conversations ({more}{tokens['tokens']:,} tokens) have the same text and token ids in"
        f" training and in serving, and their ids become the same text; {tokens['varied']} were also rendered with a system"
        " message or tools.",
        f"- {tokens['torture_lines']} lines of many scripts, signs and spaces become the same tokens, and text again"
        f"{EXEMPT if tokens['combining_marks_left_out'] else '.'}",
        f"- {tokens['special_tokens']} special tokens stand for themselves; an answer's last token ends generation.",
        f"- {tokens['matrices']} matrices have the sum and the norm that they have in the model,"
        f" {tokens['vectors']} norms and biases its values.",
    ]
    if tokens["not_compared"]:
        lines.append(
            f"- {tokens['not_compared']} tensors, which the converter splits or changes, were not compared by themselves."
        )
    return [
        *lines,
        f"- Along {f16['prompts']} greedy answers of {f16['steps']} tokens the top token is the same in"
        f" {f16['agreement_ratio']:.1%}; logits differ by {f16['mean_logit_difference']:.4f} on average,"
        f" {f16['largest_logit_difference']:.4f} at most.",
    ]


def _sizes(files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = [
        [
            kind,
            human_bytes(each["size_bytes"]),
            f"{each['prompt_tokens_per_second']:.0f}",
            f"{each['decode_tokens_per_second']:.0f}",
            human_bytes(each["memory_bytes"]),
            "yes" if each["fits"] else "no",
        ]
        for kind, each in files.items()
    ]
    head = ["File", "Size", "Reads tokens/s", "Writes tokens/s", "Memory to serve", "Fits"]
    better = [f"{kind}: {', '.join(each['better'])}." for kind, each in files.items() if each.get("better")]
    said = ["", "Better types where they save most (`convert sensitivity`):", "", *(f"- {line}" for line in better)]
    return ["## Files", "", *_table(head, rows), *(said if better else [])]


def _languages(files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = [
        [
            kind,
            language,
            f"{each['tokens']:,}",
            f"{each['kl_mean']:.4f} ± {each['kl_error']:.4f}",
            f"{each['kl_p99']:.3f}",
            f"{each['same_top_ratio']:.1%}",
            f"{each['perplexity']:.3f}",
            f"{each['perplexity_f16']:.3f}",
        ]
        for kind, file in files.items()
        for language, each in (file.get("languages") or {}).items()
    ]
    head = ["File", "Language", "Tokens", "KL (nats)", "KL, 99 of 100", "Same top token", "Perplexity", "of 16 bits"]
    return ["## What quantization cost, by language", "", *_table(head, rows)]


def _against_plain(files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each file beside which a plain one was measured: is any language worse for it?"""
    return [
        line
        for kind, each in files.items()
        if each.get("against_plain")
        for line in ("", verdict(kind, each, each["against_plain"]))
    ]


def verdict(kind: str, file: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether what was measured for a file made a language worse than it is in the plain one, by more than noise."""
    cause = "The importance matrix" if not file.get("better") else "The importance matrix, with the better types,"
    worse = [code for code, each in found.items() if _sign(each) > 0]
    untold = [code for code, each in found.items() if each["error"] is None]
    said = f"makes {', '.join(worse)} worse by more than noise" if worse else "makes no language worse by more than noise"
    figures = ", ".join(f"{code} {_signed(each)}" for code, each in found.items())
    more = f"; one conversation is too few to tell ({', '.join(untold)})" if untold else ""
    return (
        f"{cause} of {kind} {said}: KL against the plain file {figures} (± a standard error, conversations paired;"
        f" noise is {NOISE_ERRORS} of them){more}."
    )


def _sign(difference: Mapping[str, Any]) -> int:
    """1 for worse, -1 for better, 0 within noise or when nothing can be told."""
    mean, error = difference["kl_difference"], difference["error"]
    if error is None or abs(mean) <= NOISE_ERRORS * error:
        return 0
    return 1 if mean > 0 else -1


def _signed(difference: Mapping[str, Any]) -> str:
    error = difference["error"]
    words = {1: "worse", 0: "within noise", -1: "better"}
    end = "" if error is None else f" ± {error:.4f} ({words[_sign(difference)]})"
    return f"{difference['kl_difference']:+.4f}{end}"


def _worst(files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for kind, file in files.items():
        if not (worst := file.get("worst")):
            continue
        rows = [
            [f"{each['kl']:.3f}", each["language"], _quoted(each["after"]), _quoted(each["f16"]), _quoted(each["quantized"])]
            for each in worst
        ]
        lines += [f"## Where {kind} differs most", "", *_table(["KL", "Language", "After", "16 bits", kind], rows), ""]
    return lines


def _limits(results: Mapping[str, Any]) -> list[str]:
    gate = results.get("gate")
    if not gate:
        return ["No limits were set."]
    state = "keeps to" if gate["passed"] else "EXCEEDS"
    return [f"{gate['type']} {state} the limit of {gate['kl_limit']} nats in every language ({gate['rows']})."]


def _passages(proof: Mapping[str, Any] | None) -> list[str]:
    """What reading documents by themselves costs, and whether serving may."""
    if proof is None:
        return []
    rows = [
        [
            reread,
            name,
            str(each["questions"]),
            f"{each['kl_mean']:.4f}",
            f"{each['same_top_ratio']:.1%}",
            f"{each['facts_kept']} of {each['facts']}",
            str(each["facts_added"]),
            f"{each['chrf']:.1f}",
            f"{each['right_facts']} ({each['right_facts_full']}) of {each['expected_facts']}",
        ]
        for reread, groups in proof.get("readings", {}).items()
        for name, each in groups.items()
    ]
    head = ["Read again", "Language, documents", "Questions", "KL (nats)", "Same top token", "Facts kept", "Others said"]
    head += ["chrF", "Right facts (in place)"]
    allowed = proof["allowed_reread_tokens"]
    decision = "in their place" if allowed is None else f"by themselves, {allowed} tokens of each again"
    changed = [
        f"- {each['group']}: {_quoted(each['in_place'])} became {_quoted(each['by_themselves'])}"
        for each in proof.get("changed", ())
    ]
    return [
        f"## Documents read by themselves ({proof['type']})",
        "",
        *([*_table(head, rows), "", *_how_sure(proof)] if rows else []),
        *(["Answers that changed with nothing read again:", "", *changed, ""] if changed else []),
        f'With `serve.documents = "auto"` they are read {decision}: {proof["reason"]}.',
        "",
    ]


def _how_sure(proof: Mapping[str, Any]) -> list[str]:
    counts = answer_facts.pooled(next(iter(proof["readings"].values())))
    bound = answer_facts.at_most(counts)
    refused = sum(proof["refused"].values())
    more = f" {refused} prompts were read in place after all." if refused else ""
    lost, facts = counts["facts"] - counts["facts_kept"], counts["facts"]
    return [
        f"{proof['held_out']} of {proof['questions']} questions were held out, over at most {proof['most_documents']}"
        f" documents; {proof['left_out']} did not fit. With nothing read again {lost} of {facts} facts were lost: fewer than"
        f" {bound:.1%}, with 95 % certainty.{more}",
        "",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def _quoted(text: str) -> str:
    return "`" + text.replace("\n", "⏎").replace("|", "¦").replace("`", "'") + "`"
