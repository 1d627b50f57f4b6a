"""Which rows are measured with which server, in which order; and one turn of it, with its failures kept to itself.

Rows of `CHATS` share one running server; each of `OWN` starts its own, in a way that suits it.
"""

import dataclasses
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

from appliance.errors import ServerError
from benchmarks import starts, workloads
from benchmarks.documents import documents
from benchmarks.figures import Figure
from benchmarks.overload import overload
from benchmarks.servers import SERVERS, Running, running
from benchmarks.workloads import Trial

OURS, LLAMA_SERVER, LLAMA_CPP_SERVER, EXAMPLE = SERVERS
LIKE_WITH_LIKE = (OURS, LLAMA_SERVER)
# llama_cpp.server answers one request after the other: eight streams say nothing that four do not.
STREAMS: Mapping[str, Sequence[int]] = {LLAMA_CPP_SERVER: (1, 4)}
ALL_STREAMS = (1, 4, 8)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChatRows:
    """Measured on a server that is running; with some servers in the first `rounds` only."""

    servers: Sequence[str]
    run: Callable[[Trial, Running], Awaitable[Sequence[Figure]]]
    rounds: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OwnRows:
    """Measured on servers that it starts itself; in the first `rounds` only where more would tell nothing new."""

    servers: Sequence[str]
    run: Callable[[Trial], Awaitable[Sequence[Figure]]]
    rounds: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one server does in one go: one of `OWN`, or several of `CHATS`."""

    server: str
    round: int
    rows: Sequence[str]


async def _decode(trial: Trial, run: Running) -> Sequence[Figure]:
    figures: list[Figure] = []
    for streams in STREAMS.get(trial.server.name, ALL_STREAMS):
        figures += await workloads.decode(trial, run, streams)
    return figures


async def _decode_4(trial: Trial) -> Sequence[Figure]:
    """With the model of the second quantization."""
    async with running(trial.server, trial.launch) as run:
        await workloads.warm_up(trial, run)
        figures = await workloads.decode(trial, run, 4)
    return [dataclasses.replace(figure, row="decode-4-q4_0") for figure in figures if figure.row == "decode-4"]


CHATS: Mapping[str, ChatRows] = {
    "start": ChatRows(servers=LIKE_WITH_LIKE, run=starts.start),  # the first request of all, so first
    "decode": ChatRows(servers=tuple(SERVERS), run=_decode, rounds={EXAMPLE: 1, LLAMA_CPP_SERVER: 1}),
    "cold": ChatRows(servers=LIKE_WITH_LIKE, run=workloads.cold),
    "beside": ChatRows(servers=LIKE_WITH_LIKE, run=workloads.beside),
    "schema": ChatRows(servers=LIKE_WITH_LIKE, run=workloads.schema, rounds=dict.fromkeys(LIKE_WITH_LIKE, 1)),
}
OWN: Mapping[str, OwnRows] = {
    "cold-start": OwnRows(servers=LIKE_WITH_LIKE, run=starts.cold_start, rounds=2),
    "prefix": OwnRows(servers=LIKE_WITH_LIKE, run=workloads.prefix),
    "documents": OwnRows(servers=LIKE_WITH_LIKE, run=documents, rounds=1),
    "q4_0": OwnRows(servers=(OURS, LLAMA_CPP_SERVER), run=_decode_4, rounds=1),
    "memory": OwnRows(servers=(OURS, LLAMA_SERVER, LLAMA_CPP_SERVER), run=workloads.memory, rounds=1),
    "overload": OwnRows(servers=LIKE_WITH_LIKE, run=overload, rounds=1),
}
ROWS: Sequence[str] = (*CHATS, *OWN)


def turns(rounds: int, rows: Sequence[str], servers: Sequence[str], *, are_all: bool = False) -> Iterator[Turn]:
    """Phase by phase, each with every server in turn; who begins moves on from round to round.

    `are_all` asks for so many rounds of each row, also where fewer tell enough.
    """
    chats = [row for row in CHATS if row in rows]
    for number in range(1, rounds + 1):
        first = (number - 1) % len(servers)
        order = [*servers[first:], *servers[:first]]
        for server in order:
            known = tuple(row for row in chats if server in CHATS[row].servers)
            if suiting := tuple(row for row in known if are_all or number <= CHATS[row].rounds.get(server, number)):
                yield Turn(server=server, round=number, rows=suiting)
        for row, own in OWN.items():
            if row not in rows or not (are_all or own.rounds is None or number <= own.rounds):
                continue
            yield from (Turn(server=server, round=number, rows=(row,)) for server in order if server in own.servers)


async def take(turn: Turn, trial: Trial) -> Sequence[Figure]:
    """Measures; a server that does not start, dies or answers wrongly costs the rows that it kept from being had."""
    if turn.rows[0] in OWN:
        try:
            return await OWN[turn.rows[0]].run(trial)
        except ServerError as error:
            return [trial.failed(turn.rows[0], error)]
    figures: list[Figure] = []
    try:
        if "start" in turn.rows and trial.round == 1:
            figures.append(trial.figure("start-first", await starts.first_start(trial)))
        async with running(trial.server, trial.launch) as run:
            if "start" not in turn.rows:
                await workloads.warm_up(trial, run)
            for row in turn.rows:
                try:
                    figures += await CHATS[row].run(trial, run)
                except ServerError as error:
                    figures.append(trial.failed(row, error))
    except ServerError as error:
        figures += [trial.failed(row, error) for row in turn.rows]
    return figures
