"""The certificate of a conversion as a page to read: what was compared, what was lost, whether it keeps to its limits."""

from collections.abc import Mapping, Sequence
from typing import Any

from appliance.console import human_bytes


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
            "",
            *_worst(results["files"]),
            *_limits(results),
            "",
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
    return [
        "## The 16-bit file is the model that was trained",
        "",
        f"- {tokens['conversations']} conversations ({tokens['tokens']:,} tokens) have the same text and token ids in"
        f" training and in serving; {tokens['varied']} of these renderings with a system message or tools.",
        f"- {tokens['torture_lines']} lines of many scripts, signs and spaces become the same tokens, and text again.",
        f"- {tokens['special_tokens']} special tokens stand for themselves; an answer's last token ends generation.",
        f"- {tokens['matrices']} matrices have the sum and the norm that they have in the model.",
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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def _quoted(text: str) -> str:
    return "`" + text.replace("\n", "⏎").replace("|", "¦").replace("`", "'") + "`"
