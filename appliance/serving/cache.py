"""The prefix cache: a radix tree of token prefixes, whose cells are kept as bytes after their request has ended.

Bytes come back into a slot in a thousandth of the time that reading takes (and cost no other answer anything meanwhile). A
node belongs to a tenant, or to nobody: then every tenant finds it. Adapters have trees of their own, because the same
tokens give other cells there. `PrefixCache` does not know slots, requests or files.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Self

from appliance.serving import passages
from appliance.serving.decoder import Adapter, SavedCells, SavedPart
from appliance.serving.runs import Finder


@dataclasses.dataclass(slots=True, eq=False)
class Saved:
    """Cells of a run of tokens, of which the nodes that follow each other in the tree hold parts.

    Together they cover it whole, but for one that is mapped: its first tokens may be with nodes that were there before.
    """

    cells: SavedCells
    is_mapped: bool  # in the pages of a file, which the kernel may drop


@dataclasses.dataclass(slots=True, eq=False)
class Node:
    """Tokens from position `start` on, whose cells are a part of `saved`. A root has neither."""

    tokens: tuple[int, ...]
    start: int
    owner: str | None
    parent: Self | None
    saved: Saved | None
    children: dict[tuple[str | None, int], "Node"] = dataclasses.field(default_factory=dict)
    used_at: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def rank(self) -> "Rank":
        """The lowest goes first: tenants' before common ones, what can be put together again before what was read, long
        unused ones before others, ends before beginnings.

        A node ranks above all that are below it in the tree.
        """
        return _rank(self.owner, self.tokens, self.used_at, self.start)


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix: `length` tokens, of which `node` holds the last."""

    node: Node
    length: int


class PrefixCache:
    """At most `limit` tokens in memory, and `mapped_limit` in the pages of files. `join` copies saved cells."""

    def __init__(self, join: Callable[[Sequence[SavedPart]], SavedCells], limit: int, mapped_limit: int = 0) -> None:
        self._join = join
        self._roots: dict[Adapter | None, Node] = {}
        self._nodes: set[Node] = set()
        self._clock = 0
        self._limits = {False: limit, True: mapped_limit}
        self._held = {False: 0, True: 0}  # tokens, by whether they are mapped

    @property
    def tokens(self) -> int:
        """In memory."""
        return self._held[False]

    @property
    def limit(self) -> int:
        """Of `tokens`."""
        return self._limits[False]

    def has_room(self, tokens: int, *, is_mapped: bool) -> bool:
        """Whether nothing would have to leave for so many."""
        return self._held[is_mapped] + tokens <= self._limits[is_mapped]

    def match(self, adapter: Adapter | None, owner: str | None, tokens: Sequence[int]) -> Match:
        """The longest prefix of `tokens` that `owner` may use."""
        root = self._roots.get(adapter) or _root()
        owners = (None,) if owner is None else (None, owner)
        return _longest(Match(root, 0), owners, tuple(tokens))

    def parts(self, match: Match) -> list[SavedPart]:
        """The cells of a match, which counts as used now. They stay what they are, whatever becomes of the tree."""
        self._touch(match.node)
        found: list[SavedPart] = []
        for node in reversed(list(_path(match.node))):
            assert node.saved is not None
            start, end, cells = node.start, min(node.end, match.length), node.saved.cells
            if found and found[-1].cells is cells:
                start = found.pop().start
            found.append(SavedPart(cells, start, end))
        return found

    def insert(
        self,
        adapter: Adapter | None,
        owner: str | None,
        tokens: Sequence[int],
        save: Callable[[], SavedPart],
        *,
        is_mapped: bool = False,
    ) -> bool:
        """Keeps the cells of `tokens`, as far as they are new; False when nodes of a higher rank take all the place.

        `save` gives cells from position 0 to at least the end, and is called when there is place for them.
        """
        self._roots = {key: root for key, root in self._roots.items() if root.children}  # clients choose the scales
        self._roots.setdefault(adapter, _root())
        match = self.match(adapter, owner, tokens)
        self._touch(match.node)
        if match.length == len(tokens):
            return True
        is_alike = passages.is_stitched(tokens) == passages.is_stitched(match.node.tokens)  # else one goes with the other
        is_end = match.length == match.node.end
        is_grown = is_end and is_alike and self._can_grow(match.node, owner, is_mapped=is_mapped)
        start = match.node.start if is_grown else match.length  # one piece is taken back faster than two
        rank = _rank(owner, tokens, self._clock, start)
        if not self._make_place(len(tokens) - match.length, match.node, rank, is_mapped=is_mapped):
            return False
        above = self._above(match, is_grown=is_grown)
        part = save()
        is_whole = is_mapped or (start, len(tokens)) == (part.start, part.end)
        cells = part.cells if is_whole else self._join([SavedPart(part.cells, start, len(tokens))])
        node = Node(tuple(tokens[start:]), start, owner, above, Saved(cells, is_mapped))
        above.children[owner, node.tokens[0]] = node
        self._nodes.add(node)
        self._held[is_mapped] += len(node.tokens)
        self._touch(node)
        return True

    @property
    def common_tokens(self) -> int:
        """In memory, and nobody's: what a tenant's cannot push out."""
        return sum(len(node.tokens) for node in self._nodes if _is_common(node.owner, node.tokens) and not _is_mapped(node))

    def touch(self, match: Match) -> None:
        """Counts as used now."""
        self._touch(match.node)

    def forget(self, match: Match) -> None:
        """Drops all cells of the match, and what continues them."""
        *_, first = _path(match.node)
        self._forget(first)

    def erase(self, find: Finder) -> int:
        """Drops all cells from where `find` finds something in their token ids; returns of how many tokens."""
        before = sum(self._held.values())
        leaves = [node for node in self._nodes if not node.children]
        while leaves:
            if (leaf := leaves.pop()) not in self._nodes:
                continue  # went with another
            path = list(_path(leaf))[::-1]
            position = find(passages.texts([token for node in path for token in node.tokens]))
            if position is None:
                continue
            node = next(node for node in path if node.end > position)
            if _is_mapped(node):  # its file holds the rest
                node = next(each for each in path if each.saved is node.saved)
            elif position > node.start:
                self._split(node, position)
            self._forget(node)
            if (above := node.parent) in self._nodes and not above.children:
                leaves.append(above)  # what is left may end with the beginning of one
        return before - sum(self._held.values())

    def clear(self) -> None:
        self._roots.clear()
        self._nodes.clear()
        self._held = {False: 0, True: 0}

    def _above(self, match: Match, *, is_grown: bool) -> Node:
        """The node below which a new one goes."""
        if is_grown:
            assert match.node.parent is not None
            above = match.node.parent
            self._forget(match.node)
            return above
        return self._split(match.node, match.length) if match.length < match.node.end else match.node

    def _can_grow(self, node: Node, owner: str | None, *, is_mapped: bool) -> bool:
        """Whether the node may be replaced by a longer one."""
        if node.saved is None or node.children or node.owner != owner or node.saved.is_mapped or is_mapped:
            return False
        return node.parent is not None and node.parent.saved is not node.saved

    def _split(self, node: Node, position: int) -> Node:
        """Gives the tokens before `position` to a new node above; returns that. No cells are copied."""
        assert node.parent is not None
        count = position - node.start
        head = Node(node.tokens[:count], node.start, node.owner, node.parent, node.saved, used_at=node.used_at)
        node.parent.children[node.owner, head.tokens[0]] = head
        node.tokens, node.start, node.parent = node.tokens[count:], position, head
        head.children[node.owner, node.tokens[0]] = node
        self._nodes.add(head)
        return head

    def _make_place(self, count: int, above: Node, rank: "Rank", *, is_mapped: bool) -> bool:
        """Whether so many tokens find place now, at the price of nodes of lower rank than theirs."""
        surplus = self._held[is_mapped] + count - self._limits[is_mapped]
        kept = set(_path(above))
        lower = [each for each in self._nodes - kept if each.rank < rank and _is_mapped(each) == is_mapped]
        if surplus > sum(len(each.tokens) for each in lower):
            return False
        for each in sorted(lower, key=lambda each: each.rank):
            if self._held[is_mapped] + count <= self._limits[is_mapped]:
                break
            if each in self._nodes:
                self._forget(each)
        return True

    def _forget(self, node: Node) -> None:
        """The node, and all that continues it."""
        assert node.parent is not None
        del node.parent.children[node.owner, node.tokens[0]]
        for each in _subtree(node):
            self._nodes.remove(each)
            self._held[_is_mapped(each)] -= len(each.tokens)
        saved, above = node.saved, node.parent
        if saved is not None and above.saved is saved and not saved.is_mapped:
            first = [each for each in _path(above) if each.saved is saved][-1]
            saved.cells = self._join([SavedPart(saved.cells, first.start, node.start)])

    def _touch(self, node: Node) -> None:
        self._clock += 1
        for each in _path(node):
            each.used_at = self._clock


Rank = tuple[bool, bool, int, int]


def _rank(owner: str | None, tokens: Sequence[int], used_at: int, start: int) -> Rank:
    """What was put together from documents goes before they do: it holds their cells once more, for one conversation."""
    return _is_common(owner, tokens), not passages.is_stitched(tokens), used_at, -start


def _is_common(owner: str | None, tokens: Sequence[int]) -> bool:
    """Whether it is a prefix that always stays. Nobody's documents are many, and on disk."""
    return owner is None and not passages.is_alone(tokens)


def _root() -> Node:
    return Node((), 0, None, None, None)


def _is_mapped(node: Node) -> bool:
    return node.saved is not None and node.saved.is_mapped


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


def _subtree(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children.values():
        yield from _subtree(child)
