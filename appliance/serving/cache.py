"""The prefix cache: a radix tree of token prefixes whose cells are kept after their request has ended.

Each node has the cells of its own token range and no others: in a parked sequence of the KV memory, as bytes in ordinary
memory, or both. Cells in the KV memory that no running answer needs slow every batch down (llama.cpp's flash attention on a
CPU splits all cells among its threads, and masked ones are no work: `ggml-cpu/ops.cpp`), while bytes come back in a
thousandth of the time that reading takes. So the KV memory holds what is in use, and what the last answers left until the
next one begins. A node belongs to a tenant, or to nobody: then every tenant finds it. Adapters have trees of their own,
because the same tokens give other cells there. `PrefixCache` does not know requests, budgets or files.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Self

from appliance.serving.decoder import Adapter, Decoder, SavedCells, SnapshotRefused

SPLIT_TOKENS = 32  # a shorter end of a node is not worth a sequence of its own

logger = logging.getLogger("appliance.serving")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """A node's cells as bytes. They begin at `start`, which may be before the node: it was split since."""

    cells: SavedCells
    start: int


@dataclasses.dataclass(slots=True, eq=False)
class Node:
    """Tokens from position `start` on, whose cells are in `sequence`, in `saved`, or in both. A root has none of these."""

    tokens: tuple[int, ...]
    start: int
    sequence: int | None
    owner: str | None
    parent: Self | None
    children: dict[tuple[str | None, int], "Node"] = dataclasses.field(default_factory=dict)
    saved: Saved | None = None
    users: int = 0  # running jobs that share cells of this node or of one below it
    used_at: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def saved_tokens(self) -> int:
        return 0 if self.saved is None else self.end - self.saved.start

    @property
    def rank(self) -> tuple[bool, int, int]:
        """The lowest goes first: tenants' before common ones, long unused ones before others, ends before beginnings.

        A node ranks above all that are below it in the tree.
        """
        return self.owner is None, self.used_at, -self.start


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix: `length` tokens, of which `node` holds the last."""

    node: Node
    length: int

    @property
    def cells_to_load(self) -> int:
        """What has to come back into the KV memory before the prefix can be attached."""
        return sum(node.saved_tokens for node in _path(self.node) if node.sequence is None)


class PrefixCache:
    """Prefixes in the sequences `sequences` of `decoder`, and at most `saved_limit` tokens of them as bytes."""

    def __init__(self, decoder: Decoder, sequences: Sequence[int], saved_limit: int) -> None:
        self._decoder = decoder
        self._sequences = sequences
        self._free = list(sequences)
        self._roots: dict[Adapter | None, Node] = {}
        self._nodes: set[Node] = set()
        self._clock = 0
        self.saved_limit = saved_limit
        self.saved_tokens = 0
        self.cells = 0  # of the KV memory

    @property
    def free_cells(self) -> int:
        """Cells of nodes that nobody uses."""
        return sum(len(node.tokens) for node in self._nodes if node.sequence is not None and not node.users)

    def match(self, adapter: Adapter | None, owner: str | None, tokens: Sequence[int], limit: int) -> Match:
        """The longest prefix of `tokens[:limit]` that `owner` may use."""
        root = self._roots.get(adapter) or _root()
        owners = (None,) if owner is None else (None, owner)
        return _longest(Match(root, 0), owners, tuple(tokens[:limit]))

    def attach(self, match: Match, slot: int) -> Match:
        """Lets `slot` hold the cells of a prefix too; they stay until `unlock` of the node returned.

        There must be room for `cells_to_load`. Less than the match is attached when saved cells cannot be loaded.
        """
        match = self._loaded(match)
        node = self.lock(match.node)
        if node.end - match.length >= SPLIT_TOKENS and (sequence := self._take_sequence()) is not None:
            self.unlock(node)
            node = self.lock(self._split(node, match.length, sequence))
        for each in _path(node):
            assert each.sequence is not None
            self._decoder.copy(each.sequence, slot, each.start, min(each.end, match.length))
        self._touch(node)
        return Match(node, match.length)

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

        Returns the node with the last of them and how many are now the cache's; (None, 0) when there is nothing new or no
        sequence to be had.
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
            node, added = self._continue(match, owner, tuple(tokens[match.length :]), source, held)
        finally:
            self.unlock(match.node)
        if node is not None:
            self._touch(node)
        return node, added

    def park(self, needed: int = 0) -> None:
        """Takes cells that nobody uses out of the KV memory; the last used are saved first, as far as the limit goes.

        What cannot be saved stays until `needed` cells would not become free otherwise, and then is lost.
        """
        target = self.cells - needed
        for node in self._unused(is_last_first=True):
            if self._save(node):
                self._unload(node)
        for node in self._unused():
            surplus = self.cells - target
            if surplus <= 0:
                return
            if surplus < len(node.tokens) and not node.children:
                assert node.sequence is not None
                self._decoder.remove(node.sequence, node.end - surplus, -1)
                node.tokens = node.tokens[:-surplus]
                self.cells -= surplus
            else:
                self._forget(node)

    def save_one(self) -> bool:
        """Saves cells that nobody uses, so that they can leave the KV memory at once later; False when all are."""
        unsaved = (node for node in self._unused(is_last_first=True) if node.saved is None)
        return any(self._save(node) for node in unsaved)

    def clear(self) -> None:
        """Forgets every node, after the decoder has forgotten its sequences."""
        self._free = list(self._sequences)
        self._roots.clear()
        self._nodes.clear()
        self.cells = self.saved_tokens = 0

    def _continue(
        self, match: Match, owner: str | None, rest: tuple[int, ...], source: int, held: Sequence[Node]
    ) -> tuple[Node | None, int]:
        """A node that holds `rest` behind the match, and how many cells are the cache's by now."""
        node, end = match.node, match.length + len(rest)
        others = node.users - 1 - (node in held)
        is_own = node.owner == owner and others == 0 and not node.children
        if match.length == node.end and is_own and node.sequence is not None and node.saved is None:
            self._decoder.copy(source, node.sequence, match.length, end)
            node.tokens += rest
            self.cells += len(rest)
            return node, len(rest)
        if (sequence := self._take_sequence()) is None:
            return None, 0
        added = len(rest)
        if match.length < node.end:
            if (second := self._take_sequence()) is None:
                self._free.append(sequence)
                return None, 0
            added += 0 if node.sequence is not None else match.length - node.start
            node = self._split(node, match.length, second, source)
        self._decoder.copy(source, sequence, match.length, end)
        child = Node(rest, match.length, sequence, owner, node)
        node.children[owner, rest[0]] = child
        self._nodes.add(child)
        self.cells += len(rest)
        return child, added

    def _split(self, node: Node, position: int, sequence: int, source: int | None = None) -> Node:
        """Gives the tokens before `position` to a new node above, with cells in `sequence`; returns that.

        Where the node's cells are not in the KV memory, `source` holds those before `position` too.
        """
        assert node.parent is not None
        count = position - node.start
        if node.sequence is not None:
            self._decoder.copy(node.sequence, sequence, node.start, position)
            self._decoder.remove(node.sequence, node.start, position)
            self._lose_saved(node)
        else:
            assert source is not None
            self._decoder.copy(source, sequence, node.start, position)
            self.cells += count
        head = Node(node.tokens[:count], node.start, sequence, node.owner, node.parent)
        head.users, head.used_at = node.users, node.used_at
        node.parent.children[node.owner, head.tokens[0]] = head
        node.tokens, node.start, node.parent = node.tokens[count:], position, head
        head.children[node.owner, node.tokens[0]] = node
        self._nodes.add(head)
        return head

    def _loaded(self, match: Match) -> Match:
        """The match, or as much of it as the KV memory holds after its saved cells were loaded."""
        loaded, refused = match, None
        self.lock(match.node)
        for node in reversed(list(_path(match.node))):
            try:
                is_there = node.sequence is not None or self._load(node)
            except SnapshotRefused as error:
                logger.warning("event=prefix_not_loaded tokens=%d reason=%r", len(node.tokens), str(error))
                is_there, refused = False, node
            if not is_there:
                assert node.parent is not None
                loaded = Match(node.parent, node.start)
                break
        self.unlock(match.node)
        if refused is not None and not refused.users:
            self._forget(refused)
        return loaded

    def _load(self, node: Node) -> bool:
        """False when there is no sequence for it now. Raises `SnapshotRefused`."""
        assert node.saved is not None
        if (sequence := self._take_sequence()) is None:
            return False
        try:
            self._decoder.restore(sequence, node.saved.cells)
        except SnapshotRefused:
            self._free.append(sequence)
            raise
        if node.saved.start < node.start:
            self._decoder.remove(sequence, node.saved.start, node.start)
        node.sequence = sequence
        self.cells += len(node.tokens)
        return True

    def _unload(self, node: Node) -> None:
        assert node.sequence is not None
        self._decoder.remove(node.sequence, 0, -1)
        self._free.append(node.sequence)
        node.sequence = None
        self.cells -= len(node.tokens)

    def _save(self, node: Node) -> bool:
        """Whether the cells of a node in the KV memory are saved now, at the price of nodes below it in rank."""
        if node.saved is not None:
            return True
        if not self._make_place(node):
            return False
        assert node.sequence is not None
        node.saved = Saved(self._decoder.save(node.sequence), node.start)
        self.saved_tokens += node.saved_tokens
        return True

    def _make_place(self, node: Node) -> bool:
        surplus = self.saved_tokens + len(node.tokens) - self.saved_limit
        spare = [each for each in self._nodes if each.saved is not None and each.sequence is not None and each.users]
        lower = [each for each in self._nodes if each.saved is not None and not each.users and each.rank < node.rank]
        if surplus > sum(each.saved_tokens for each in (*spare, *lower)):
            return False
        for each in (*spare, *sorted(lower, key=lambda each: each.rank)):
            if self.saved_tokens + len(node.tokens) <= self.saved_limit:
                break
            if each.users:
                self._lose_saved(each)
            else:
                self._forget(each)
        return True

    def _lose_saved(self, node: Node) -> None:
        self.saved_tokens -= node.saved_tokens
        node.saved = None

    def _take_sequence(self) -> int | None:
        if not self._free:
            for node in self._unused():
                if self._save(node):
                    self._unload(node)
                else:
                    self._forget(node)
                break
        return self._free.pop() if self._free else None

    def _unused(self, *, is_last_first: bool = False) -> Iterator[Node]:
        """Nodes in the KV memory that nobody uses, by rank; those that are gone by their turn are left out."""
        found = [node for node in self._nodes if node.sequence is not None and not node.users]
        for node in sorted(found, key=lambda node: node.rank, reverse=is_last_first):
            if node.sequence is not None:
                yield node

    def _forget(self, node: Node) -> None:
        """The node, and all that continues it; nobody uses them."""
        for child in list(node.children.values()):
            self._forget(child)
        assert node.parent is not None
        del node.parent.children[node.owner, node.tokens[0]]
        self._nodes.remove(node)
        self._lose_saved(node)
        if node.sequence is not None:
            self._unload(node)

    def _touch(self, node: Node) -> None:
        self._clock += 1
        for each in _path(node):
            each.used_at = self._clock


def _root() -> Node:
    return Node((), 0, None, None, None)


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
