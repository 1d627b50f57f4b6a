"""The prefix cache: a radix tree of token prefixes whose cells stay in the KV memory after their request has ended.

Each node is one parked sequence that holds the cells of its own token range and no others. A node belongs to a tenant, or
to nobody: then every tenant finds it. Adapters have trees of their own, because the same tokens give other cells there.
`PrefixCache` knows which nodes are in use and which may go; it does not know requests, budgets or files.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Self

from appliance.serving.decoder import Adapter, Decoder

SPLIT_TOKENS = 32  # a shorter end of a node is not worth a sequence of its own


@dataclasses.dataclass(slots=True, eq=False)
class Node:
    """Tokens from position `start` on, whose cells `sequence` holds. A root has neither tokens nor a sequence."""

    tokens: tuple[int, ...]
    start: int
    sequence: int
    owner: str | None
    parent: Self | None
    children: dict[tuple[str | None, int], "Node"] = dataclasses.field(default_factory=dict)
    users: int = 0  # running jobs that share cells of this node or of one below it
    used_at: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix: `length` tokens, of which `node` holds the last."""

    node: Node
    length: int


class PrefixCache:
    """Prefixes in the sequences `sequences` of `decoder`, least recently used first out."""

    def __init__(self, decoder: Decoder, sequences: Sequence[int]) -> None:
        self._decoder = decoder
        self._sequences = sequences
        self._free = list(sequences)
        self._roots: dict[Adapter | None, Node] = {}
        self._nodes: set[Node] = set()
        self._clock = 0
        self.cells = 0

    @property
    def free_cells(self) -> int:
        """Cells of nodes that nobody uses."""
        return sum(len(node.tokens) for node in self._nodes if not node.users)

    def match(self, adapter: Adapter | None, owner: str | None, tokens: Sequence[int], limit: int) -> Match:
        """The longest prefix of `tokens[:limit]` that `owner` may use."""
        root = self._roots.get(adapter) or _root()
        owners = (None,) if owner is None else (None, owner)
        return _longest(Match(root, 0), owners, tuple(tokens[:limit]))

    def attach(self, match: Match, slot: int) -> Node:
        """Lets `slot` hold the cells of a prefix too; they stay until `unlock` of the node returned."""
        node = match.node
        if node.end - match.length >= SPLIT_TOKENS and self._free:
            node = self._split(node, match.length, self._free.pop())
        for each in _path(node):
            self._decoder.copy(each.sequence, slot, each.start, min(each.end, match.length))
        self._touch(node)
        return self.lock(node)

    def lock(self, node: Node) -> Node:
        for each in _path(node):
            each.users += 1
        return node

    def unlock(self, node: Node) -> None:
        for each in _path(node):
            each.users -= 1

    def insert(
        self, adapter: Adapter | None, owner: str | None, tokens: Sequence[int], source: int, held: Sequence[Node] = ()
    ) -> tuple[Node | None, int]:
        """Keeps the cells of `tokens` that sequence `source` holds, as far as they are new.

        Returns the node that they are in and their number; (None, 0) when there is nothing new or no sequence to be had.
        `held` are nodes that the caller has locked: one of these may grow, while others' locked nodes may not.
        """
        self._roots = {key: root for key, root in self._roots.items() if root.children}  # clients choose the scales
        self._roots.setdefault(adapter, _root())
        match = self.match(adapter, owner, tokens, len(tokens))
        self._touch(match.node)
        if match.length == len(tokens):
            return None, 0
        self.lock(match.node)  # so that making room for it does not take away what it continues
        try:
            node = self._continue(match, owner, tuple(tokens[match.length :]), source, held)
        finally:
            self.unlock(match.node)
        if node is None:
            return None, 0
        added = len(tokens) - match.length
        self.cells += added
        self._touch(node)
        return node, added

    def make_room(self, cells: int) -> None:
        """Gives up cells that nobody uses: ends of prefixes before their beginnings, tenants' before common ones."""
        while cells > 0 and (node := self._oldest_leaf()) is not None:
            count = min(cells, len(node.tokens))
            if count == len(node.tokens):
                self._free.append(self._drop(node))
            else:
                self._decoder.remove(node.sequence, node.end - count, -1)
                node.tokens = node.tokens[:-count]
                self.cells -= count
            cells -= count

    def clear(self) -> None:
        """Forgets every node, after the decoder has forgotten its sequences."""
        self._free = list(self._sequences)
        self._roots.clear()
        self._nodes.clear()
        self.cells = 0

    def _continue(
        self, match: Match, owner: str | None, rest: tuple[int, ...], source: int, held: Sequence[Node]
    ) -> Node | None:
        """A node that holds `rest` behind the match."""
        node, end = match.node, match.length + len(rest)
        if match.length < node.end:
            if (sequence := self._take_sequence()) is None:
                return None
            node = self._split(node, match.length, sequence)
        others = node.users - 1 - (node in held)
        if node.parent is not None and not node.children and node.owner == owner and others == 0:
            self._decoder.copy(source, node.sequence, match.length, end)
            node.tokens += rest
            return node
        if (sequence := self._take_sequence()) is None:
            return None
        self._decoder.copy(source, sequence, match.length, end)
        child = Node(rest, match.length, sequence, owner, node)
        node.children[owner, rest[0]] = child
        self._nodes.add(child)
        return child

    def _split(self, node: Node, position: int, sequence: int) -> Node:
        """Gives the tokens before `position` to a new node above; returns that."""
        assert node.parent is not None
        count = position - node.start
        self._decoder.copy(node.sequence, sequence, node.start, position)
        self._decoder.remove(node.sequence, node.start, position)
        head = Node(node.tokens[:count], node.start, sequence, node.owner, node.parent, {}, node.users, node.used_at)
        node.parent.children[node.owner, head.tokens[0]] = head
        node.tokens, node.start, node.parent = node.tokens[count:], position, head
        head.children[node.owner, node.tokens[0]] = node
        self._nodes.add(head)
        return head

    def _take_sequence(self) -> int | None:
        if self._free:
            return self._free.pop()
        node = self._oldest_leaf()
        return None if node is None else self._drop(node)

    def _drop(self, node: Node) -> int:
        """Frees the node's cells; returns its sequence."""
        assert node.parent is not None
        self._decoder.remove(node.sequence, 0, -1)
        del node.parent.children[node.owner, node.tokens[0]]
        self._nodes.remove(node)
        self.cells -= len(node.tokens)
        return node.sequence

    def _oldest_leaf(self) -> Node | None:
        leaves = (node for node in self._nodes if not node.users and not node.children)
        return min(leaves, key=lambda node: (node.owner is None, node.used_at), default=None)

    def _touch(self, node: Node) -> None:
        self._clock += 1
        for each in _path(node):
            each.used_at = self._clock


def _root() -> Node:
    return Node((), 0, -1, None, None)


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences of the same type begin with alike."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # comparing slices runs in C, a loop over tokens does not
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _longest(best: Match, owners: Sequence[str | None], tokens: tuple[int, ...]) -> Match:
    """The longest match through `best`, which covers its node whole."""
    node, length = best.node, best.length
    if length == len(tokens):
        return best
    for owner in owners:
        if (child := node.children.get((owner, tokens[length]))) is None:
            continue
        found = Match(child, length + common_length(child.tokens, tokens[length:]))
        if found.length == child.end:
            found = _longest(found, owners, tokens)
        if found.length > best.length:
            best = found
    return best


def _path(node: Node) -> Iterator[Node]:
    """The node and those above it, without the root."""
    at: Node | None = node
    while at is not None and at.parent is not None:
        yield at
        at = at.parent
