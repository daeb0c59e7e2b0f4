"""What attention over a pack consists of: kernel calls, planned from the pack's segments and cut over a ring of ranks.

A pack is a forest: every segment sees its ancestors and, causally, itself. That is one causal call per segment (the
leaves of one parent together) and one unmasked call of all rows below a segment on that segment's keys, where a last
row of it that is alone joins, since it sees the same keys. Results of a row from several calls are merged by their
log-sum-exp. The video prefix of G rollouts costs one pass instead of G.

Cut over a ring of r ranks, each rank takes its share of every segment's rows against the keys of the whole pack:
segments that others see, and long leaves, in 2r zigzag chunks (chunk j and chunk 2r-1-j: every rank has the same
number of key/query pairs); leaves of at most a quarter of what is above them side by side, since nearly all their work
is on the ancestors' keys: at worst, a rank of four has an eighth more than the mean.

A plan may also be of some rows alone (plan_rows): those whose result is read, where the others are keys and no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby

from megalong.parallel.split import shard_range
from megalong.records import Segment

Range = tuple[int, int]
"""[first, last) rows."""


@dataclass(frozen=True, slots=True)
class Call:
    """Rows `queries[i]` against keys `keys[i]` for every i. Causal calls are square: as many keys as queries."""

    queries: tuple[Range, ...]  # of this rank's rows
    keys: tuple[Range, ...]  # of the pack's rows
    shared: bool = False  # the keys of a segment, all of them, for the rows below it


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The calls of one rank of a ring."""

    num_keys: int  # rows of the pack
    rows: tuple[Range, ...]  # pack rows of this rank, ascending; local rows are these one after another
    causal: tuple[Call, ...]  # no row twice
    unmasked: tuple[Call, ...]  # one range each; every local row is in some call

    @property
    def num_rows(self) -> int:
        return sum(last - first for first, last in self.rows)


@dataclass(slots=True)
class _Node:
    start: int
    stop: int
    depth: int  # rows of its ancestors
    children: list[_Node] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Behind the last descendant's rows."""
        return self.children[-1].end if self.children else self.stop


def encode_segments(segments: Sequence[Segment]) -> list[int]:
    """[start, length, parent] of each, flat; plan_calls takes it as a tuple."""
    return [number for segment in segments for number in (segment.start, segment.length, segment.parent)]


@lru_cache(maxsize=256)
def plan_calls(encoded: tuple[int, ...], *, ring_rank: int, ring_size: int) -> AttentionPlan:
    """The plan of one rank. encoded: encode_segments.

    Raises ValueError for segments that are no forest in row order.
    """
    roots = _forest(encoded)
    return _plan(roots, _pieces(roots, ring_rank, ring_size))


@lru_cache(maxsize=256)
def plan_rows(encoded: tuple[int, ...], rows: tuple[Range, ...]) -> AttentionPlan:
    """The plan of these rows alone, against the keys of the whole pack.

    encoded: encode_segments. rows: ascending pack rows without overlap, whichever; local rows are these one after
    another. Raises ValueError for segments that are no forest in row order.
    """
    roots = _forest(encoded)
    return _plan(roots, _pieces_of(roots, rows))


def _plan(roots: list[_Node], unordered: Iterator[_Piece]) -> AttentionPlan:
    """Calls for the rows of the pieces."""
    pieces = sorted(unordered, key=lambda piece: piece[1])
    offset_of: dict[Range, int] = {}
    local = 0
    for _, first, last in pieces:
        offset_of[first, last] = local
        local += last - first

    def here(first: int, last: int) -> Range:
        """The local rows of pack rows [first, last)."""
        inside = [piece[1:] for piece in pieces if first <= piece[1] and piece[2] <= last]
        return (offset_of[inside[0]], offset_of[inside[-1]] + inside[-1][1] - inside[-1][0]) if inside else (0, 0)

    causal, unmasked = [], []
    masked = [piece for piece in pieces if not _sees_all(*piece)]
    # Leaf pieces of one parent stand side by side: one padded batch.
    for _, run in groupby(masked, key=lambda piece: ("leaves", id(piece[0].parent)) if piece[0].leaf else piece[1]):
        ranges = tuple(piece[1:] for piece in run)
        causal.append(Call(tuple(here(*r) for r in ranges), ranges))
    for spot, first, last in masked:
        if first > spot.node.start:
            unmasked.append(Call((here(first, last),), ((spot.node.start, first),)))
    for node in _walk(roots):
        # From the last row on: a piece that starts there is one that sees all.
        below = here(node.stop - 1, node.end) if node.children else (0, 0)
        if below[1] > below[0]:
            unmasked.append(Call((below,), ((node.start, node.stop),), shared=True))
    num_keys = roots[-1].end
    return AttentionPlan(num_keys, tuple(piece[1:] for piece in pieces), tuple(causal), tuple(unmasked))


@dataclass(frozen=True, slots=True)
class _Spot:
    """Where a piece belongs."""

    node: _Node
    parent: _Node | None

    @property
    def leaf(self) -> bool:
        return self.parent is not None and not self.node.children


def _forest(encoded: tuple[int, ...]) -> list[_Node]:
    """Roots of the forest; a segment whose only child follows it is one with that child (a plain causal sequence)."""
    nodes: list[_Node] = []
    roots: list[_Node] = []
    at = 0
    open_nodes: list[int] = []  # the last segment and its ancestors
    for index in range(0, len(encoded), 3):
        start, length, parent = encoded[index : index + 3]
        while open_nodes and open_nodes[-1] != parent:
            open_nodes.pop()
        if start != at or length < 1 or (parent >= 0 and not open_nodes):
            raise ValueError(
                f"segment {index // 3} (start {start}, length {length}, parent {parent}): expected start {at}, at "
                "least one row, and a parent that is the last segment or an ancestor of it"
            )
        above = nodes[parent] if parent >= 0 else None
        node = _Node(start, start + length, depth=above.depth + above.stop - above.start if above else 0)
        (above.children if above else roots).append(node)
        nodes.append(node)
        open_nodes.append(len(nodes) - 1)
        at = node.stop
    if not roots:
        raise ValueError("a pack needs at least one segment")
    for node in _walk(roots):
        while len(node.children) == 1:
            node.stop, node.children = node.children[0].stop, node.children[0].children
    return roots


def _walk(nodes: Sequence[_Node]) -> Iterator[_Node]:
    for node in nodes:
        yield node
        yield from _walk(node.children)


_Piece = tuple[_Spot, int, int]
"""Where, and [first, last) pack rows of that node."""


def _sees_all(spot: _Spot, first: int, last: int) -> bool:
    """A single row, the last of a node that others see: its keys are theirs, so it needs no mask."""
    return last - first == 1 and last == spot.node.stop and bool(spot.node.children)


def _pieces_of(nodes: list[_Node], rows: tuple[Range, ...], parent: _Node | None = None) -> Iterator[_Piece]:
    """The rows, cut where one node ends and the next begins."""
    for node in nodes:
        for first, last in rows:
            low, high = max(first, node.start), min(last, node.stop)
            if low < high:
                yield _Spot(node, parent), low, high
        yield from _pieces_of(node.children, rows, node)


def _pieces(roots: list[_Node], rank: int, size: int) -> Iterator[_Piece]:
    """This rank's of a ring."""

    def share(nodes: list[_Node], parent: _Node | None) -> Iterator[_Piece]:
        for node in nodes:
            if not _is_short_leaf(node):
                yield from ((_Spot(node, parent), *piece) for piece in _zigzag(node, rank, size))
            yield from share(node.children, node)
        short = [node for node in nodes if _is_short_leaf(node)]
        first, last = shard_range(sum(node.stop - node.start for node in short), rank, size)
        for node in short:
            length = node.stop - node.start
            low, high = max(first, 0), min(last, length)
            if low < high:
                yield _Spot(node, parent), node.start + low, node.start + high
            first, last = first - length, last - length

    yield from share(roots, None)


def _is_short_leaf(node: _Node) -> bool:
    """Whose work is to at least eight ninths on the keys above it."""
    return not node.children and 4 * (node.stop - node.start) <= node.depth


def _zigzag(node: _Node, rank: int, size: int) -> list[Range]:
    length = node.stop - node.start
    early, late = (shard_range(length, chunk, 2 * size) for chunk in (rank, 2 * size - 1 - rank))
    ranges = [(early[0], late[1])] if early[1] == late[0] else [early, late]
    return [(node.start + first, node.start + last) for first, last in ranges if first < last]
