"""The report of `benchmarks.serve`: medians, p95, ratios with their spread, and which targets are reached. Measures nothing.

A ratio is taken within each round, where both servers ran minutes apart at most; its median, least and most are told.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from benchmarks.figures import Figure, percentile

OURS, LLAMA_SERVER, LLAMA_CPP_SERVER = "ours", "llama-server", "llama_cpp.server"
EQUAL = 0.98  # of a target of 1.0: counts as equal, and wants a reason
MEGABYTE = 1_000_000

Verdict = Literal["reached", "equal", "missed", "not measured"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What ours : peer must be. With `is_difference` it is ours - peer; without a peer it is ours alone."""

    peer: str | None
    limit: float
    is_least: bool = False
    is_difference: bool = False
    quantization: str | None = None  # that it was set for; None: any

    def value(self, ours: float, peer: float | None) -> float:
        if peer is None:
            return ours
        return ours - peer if self.is_difference else ours / peer

    def verdict(self, value: float) -> Verdict:
        if value >= self.limit if self.is_least else value <= self.limit:
            return "reached"
        return "equal" if self.is_least and self.limit == 1.0 and value >= EQUAL else "missed"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. `scale` turns a figure's unit into the one that is shown."""

    title: str
    unit: str
    scale: float = 1.0
    targets: Sequence[Target] = ()

    def said(self, value: float) -> str:
        return _three_digits(value * self.scale)


def _at_least(peer: str, limit: float, quantization: str | None = None) -> Target:
    return Target(peer=peer, limit=limit, is_least=True, quantization=quantization)


def _at_most(peer: str | None, limit: float, *, is_difference: bool = False) -> Target:
    return Target(peer=peer, limit=limit, is_difference=is_difference)


MEMORY = Row(
    title="peak anonymous memory",
    unit="MB",
    scale=1 / MEGABYTE,
    targets=(_at_most(LLAMA_SERVER, 120 * MEGABYTE, is_difference=True), _at_most(LLAMA_CPP_SERVER, 0.6)),
)
ROWS: Mapping[str, Row] = {
    "decode-1": Row(title="decode, 1 stream", unit="tokens/s", targets=(_at_least(LLAMA_SERVER, 1.0),)),
    "decode-4": Row(
        title="decode, 4 streams",
        unit="tokens/s",
        targets=(_at_least(LLAMA_SERVER, 1.0), _at_least(LLAMA_CPP_SERVER, 1.7, "Q4_K_M")),
    ),
    "decode-8": Row(title="decode, 8 streams", unit="tokens/s", targets=(_at_least(LLAMA_SERVER, 1.0),)),
    "decode-4-q4_0": Row(title="decode, 4 streams, Q4_0", unit="tokens/s", targets=(_at_least(LLAMA_CPP_SERVER, 2.2),)),
    "schema": Row(title="decode, bound to a JSON schema", unit="tokens/s"),
    "ttft-cold": Row(title="first token, 500 tokens never seen", unit="s"),
    "ttft-prefix-held": Row(
        title="first token, prefix of 1,000 tokens held", unit="s", targets=(_at_most(LLAMA_SERVER, 1.0),)
    ),
    "ttft-prefix-pushed": Row(title="first token, prefix pushed out", unit="s", targets=(_at_most(LLAMA_SERVER, 0.5),)),
    "ttft-prefix-restart": Row(
        title="first token, prefix after a restart", unit="s", targets=(_at_most(LLAMA_SERVER, 0.5),)
    ),
    "documents-cold": Row(title="first token, 10 documents never seen", unit="s"),
    "documents-exact": Row(title="first token, 10 known documents in a new combination, read in their place", unit="s"),
    "documents-new": Row(
        title="first token, 10 known documents in a new combination", unit="s", targets=(_at_most(LLAMA_SERVER, 0.15),)
    ),
    "documents-reuse": Row(title="the same, of llama-server with --cache-reuse", unit="s"),
    "documents-restart": Row(title="first token, known documents after a restart", unit="s"),
    "ttft-beside-long": Row(
        title="first token, short beside 2,000 tokens", unit="s", targets=(_at_most(LLAMA_SERVER, 0.5),)
    ),
    "memory-anonymous": MEMORY,
    "memory-resident": Row(title="peak resident memory", unit="MB", scale=1 / MEGABYTE),
    "start-first": Row(title="start to first token, file never seen", unit="s"),
    "start-warm": Row(title="start to first token, warm disk", unit="s", targets=(_at_most(LLAMA_SERVER, 1.5),)),
    "start-cold": Row(title="start to first token, cold disk", unit="s", targets=(_at_most(LLAMA_SERVER, 1.5),)),
    "overload-held": Row(title="throughput held at 4x overload", unit="of capacity"),
    "overload-ttft": Row(title="first token at 4x overload", unit="s"),
    "own-cost": Row(title="outside decode calls, 1 stream", unit="ms/token", targets=(_at_most(None, 0.3),)),
    **{
        f"cpu-{what}-{streams}": Row(title=f"CPU of {whose}, {streams} streams", unit="ms/token")
        for what, whose in (("total", "all processes"), ("http", "the HTTP process"), ("client", "the client"))
        for streams in (1, 4, 8)
    },
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A target and what came of it: the median over rounds, the least and the most."""

    row: str
    target: Target
    verdict: Verdict
    median: float | None = None
    least: float | None = None
    most: float | None = None
    rounds: int = 0

    def told(self) -> str:
        target = self.target
        scale, unit = (1 / MEGABYTE, " MB") if target.is_difference else (1.0, "")
        symbol = "≥" if target.is_least else "≤"
        limit = f"{symbol} {'+' if target.is_difference else ''}{target.limit * scale:g}{unit}"
        against = "" if target.peer is None else f" {'more than' if target.is_difference else 'of'} {target.peer}"
        if self.median is None or self.least is None or self.most is None:
            return f"{ROWS[self.row].title}: not measured (wanted {limit}{against})"
        found = ", ".join(_three_digits(each * scale) for each in (self.median, self.least, self.most))
        median, least, most = found.split(", ")
        return f"{ROWS[self.row].title}: {median}{unit} ({least} to {most}){against}, wanted {limit}"


def judge(figures: Sequence[Figure], quantization: str) -> Sequence[Judged]:
    """Every target that applies, misses first. A row that nobody was asked to measure has none."""
    present = {figure.row for figure in figures}
    found = [
        _judged(name, target, figures)
        for name, row in ROWS.items()
        for target in row.targets
        if name in present and target.quantization in (None, quantization)
    ]
    order = ("missed", "not measured", "equal", "reached")
    return sorted(found, key=lambda judged: order.index(judged.verdict))


def ratios(figures: Sequence[Figure], row: str, peer: str) -> Sequence[float]:
    """Ours : peer of each round that has both."""
    ours, theirs = _by_round(figures, row, OURS), _by_round(figures, row, peer)
    return [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys()) if theirs[number]]


def summary(figures: Sequence[Figure]) -> Mapping[str, Mapping[str, Mapping[str, float]]]:
    """By row and server: median of the rounds, p95 of all values, least and most."""
    table: dict[str, dict[str, Mapping[str, float]]] = {}
    for row, server in dict.fromkeys((figure.row, figure.server) for figure in figures):
        of_rounds = list(_by_round(figures, row, server).values())
        values = [value for figure in _of(figures, row, server) for value in figure.values]
        if values:
            table.setdefault(row, {})[server] = {
                "median": statistics.median(of_rounds),
                "p95": percentile(values, 95),
                "least": min(of_rounds),
                "most": max(of_rounds),
                "rounds": len(of_rounds),
            }
    return table


def result(figures: Sequence[Figure], head: Mapping[str, Any], *, is_judged: bool) -> dict[str, Any]:
    """All that a run found, as plain data."""
    judged = judge(figures, str(head.get("quantization", ""))) if is_judged else []
    return {
        "head": head,
        "targets": [{**dataclasses.asdict(each), "told": each.told()} for each in judged],
        "summary": summary(figures),
        "figures": [dataclasses.asdict(figure) for figure in figures],
    }


def markdown(found: Mapping[str, Any]) -> str:
    """The same for a person."""
    figures = [Figure(**each) for each in found["figures"]]
    lines = ["# Servers side by side", ""]
    for key, value in found["head"].items():
        told = value.items() if isinstance(value, Mapping) else [("", value)]
        lines += [f"- {key}{f', {name}' if name else ''}: {text}" for name, text in told]
    if found["targets"]:
        lines += ["", "## Targets, misses first", ""]
        lines += [f"- **{each['verdict']}**: {each['told']}" for each in found["targets"]]
    lines += ["", "## Medians of the rounds", "", *_table(figures), "", *_overload_table(figures)]
    if problems := [figure for figure in figures if figure.problem]:
        lines += ["", "## What failed"]
        for figure in problems:
            lines += ["", f"{figure.row}, {figure.server}, round {figure.round}:", "", "```", figure.problem, "```"]
    return "\n".join(lines).rstrip() + "\n"


def _judged(name: str, target: Target, figures: Sequence[Figure]) -> Judged:
    ours = _by_round(figures, name, OURS)
    theirs = ours if target.peer is None else _by_round(figures, name, target.peer)
    values = [
        target.value(ours[number], None if target.peer is None else theirs[number])
        for number in sorted(ours.keys() & theirs.keys())
    ]
    if not values:
        return Judged(row=name, target=target, verdict="not measured")
    median = statistics.median(values)
    return Judged(
        row=name,
        target=target,
        verdict=target.verdict(median),
        median=median,
        least=min(values),
        most=max(values),
        rounds=len(values),
    )


def _table(figures: Sequence[Figure]) -> Iterator[str]:
    table = summary(figures)
    servers = list(dict.fromkeys(figure.server for figure in figures))
    peers = [server for server in servers if server != OURS]
    yield f"| | unit | {' | '.join(servers)} | {' | '.join(f'ours : {peer} (spread)' for peer in peers)} |"
    yield "|---" * (2 + len(servers) + len(peers)) + "|"
    for name, row in ROWS.items():
        if name not in table:
            continue
        cells = [_cell(row, table[name].get(server)) for server in servers]
        compared = [_ratio_cell(ratios(figures, name, peer)) for peer in peers]
        yield f"| {row.title} | {row.unit} | {' | '.join([*cells, *compared])} |"


def _cell(row: Row, told: Mapping[str, float] | None) -> str:
    if told is None:
        return "–"
    p95 = f" (p95 {row.said(told['p95'])})" if row.unit == "s" else ""
    return f"{row.said(told['median'])}{p95}"


def _ratio_cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    median, least, most = (f"{each:.2f}" for each in (statistics.median(values), min(values), max(values)))
    return f"**{median}** ({least}–{most}, {len(values)})"


def _overload_table(figures: Sequence[Figure]) -> Iterator[str]:
    """Counts of the requests, which have no ratio."""
    found = [figure for figure in figures if figure.row == "overload-held" and figure.values]
    if not found:
        return
    yield "## 4x overload, open-loop Poisson arrivals"
    yield ""
    yield "| | round | requests/s | sent | served | refused | told when | gave up | failed | tokens/s | TTFT p50, p95 s |"
    yield "|---" * 11 + "|"
    for figure in found:
        told = figure.details
        percentiles = (told["first_token_p50"], told["first_token_p95"])
        first = ", ".join("–" if seconds is None else f"{seconds:.2f}" for seconds in percentiles)
        counts = (told[key] for key in ("sent", "served", "refused", "refused_with_time", "gave_up", "failed"))
        rate = f"{told['tokens_per_second']:.1f} of {told['capacity tokens per second']:.1f}"
        cells = [figure.server, figure.round, f"{told['requests per second']:.1f}", *counts, rate, first]
        yield f"| {' | '.join(map(str, cells))} |"


def _of(figures: Sequence[Figure], row: str, server: str) -> Sequence[Figure]:
    return [figure for figure in figures if (figure.row, figure.server) == (row, server)]


def _by_round(figures: Sequence[Figure], row: str, server: str) -> Mapping[int, float]:
    return {figure.round: value for figure in _of(figures, row, server) if (value := figure.value) is not None}


def _three_digits(value: float) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"
