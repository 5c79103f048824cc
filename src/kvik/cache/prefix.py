"""Finding what is already known: blocks of full pages under chained keys.

    key(block i) = SHA-256( key(block i-1), its tokens )          key(root) = SHA-256( weights, spec, centres, salt )

Every part is tagged and length-prefixed, so that no two different lists of parts give the same bytes. A hit also
compares the tokens themselves.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvik.cache.arena import Pages
from kvik.cache.spec import Group, Spec
from kvik.ops.reads import Kept

MOST_LOOKED_AT = 64  # blocks that begin with one token and stand on one parent


def digest(**parts: bytes) -> bytes:
    """SHA-256 over tagged, length-prefixed parts."""
    sha = hashlib.sha256()
    for tag, part in parts.items():
        sha.update(f"{tag}:{len(part)}:".encode())
        sha.update(part)
    return sha.digest()


def root_key(weights: str, spec: Spec, salt: str, centres: str = "") -> bytes:
    """The parent of every first block. No block under another root can be found.

    Args:
        weights: names the weights, as they are held.
        spec: names what is stored, and its layout.
        salt: tenant, adapter content, encoder input: whatever else the rows depend on or must not be shared across.
        centres: names what was subtracted from keys; "" = nothing was.
    """
    return digest(
        kvik=b"block-2", weights=weights.encode(), spec=spec.fingerprint.encode(), salt=salt.encode(),
        centres=centres.encode(),
    )  # fmt: skip


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of the block that holds `tokens` after `parent`."""
    return digest(parent=parent, tokens=array("q", tokens).tobytes())


def page_keys(root: bytes, tokens: Sequence[int], page_size: int) -> list[bytes]:
    """The keys of a text's full pages."""
    key, found = root, []
    for start in range(0, len(tokens) - page_size + 1, page_size):
        key = block_key(key, tokens[start : start + page_size])
        found.append(key)
    return found


def _shared(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many first tokens are the same."""
    pairs = zip(ours, theirs, strict=False)
    return next((at for at, (mine, other) in enumerate(pairs) if mine != other), min(len(ours), len(theirs)))


def source_key(root: bytes, source: bytes) -> bytes:
    """The key of a source's rows, and the parent of all blocks of texts that read it."""
    return digest(root=root, source=source)


@dataclass
class Block:
    """What can be found under a key: one run of N tokens, or all rows of a source.

    Attributes:
        key, parent: its own, and that of what it stands on.
        start: position of its first token.
        tokens: of the run; none of a source.
        pages: for each group, one a lane, or of a source lane by lane all; None where it has none, or they had left.
        rows: of a source.
        owner: on whose account its pages are; see `cache/owners.py`.
        children: blocks that stand on it; below 0 once one leaves that came before it.
    """

    key: bytes
    parent: bytes
    start: int
    tokens: tuple[int, ...]
    pages: list[Pages | None]
    rows: int = 0
    owner: str = ""
    children: int = 0

    def kept(self, index: int, group: Group) -> Kept:
        """A source's rows in one group, as rows that every query sees."""
        pages, size = self.pages[index], group.page_size
        assert pages is not None and self.rows > 0, "a source has rows in every group that keeps some"
        mine = pages.reshape(len(group.lanes), -1).astype(np.int32)
        at = np.arange(mine.shape[1] * size, dtype=np.int32)
        positions = np.broadcast_to(np.where(at < self.rows, at, -1), (len(mine), len(at)))
        return Kept(mine, np.full(len(mine), self.rows, np.int32), np.ascontiguousarray(positions, np.int32))

    def rows_in(self, pages: Pages, page_size: int) -> NDArray[np.int64]:
        """How many rows each of a group's pages holds."""
        if not self.rows:
            return np.full(len(pages), page_size)
        columns = -(-self.rows // page_size)
        return np.tile(np.minimum(self.rows - np.arange(columns) * page_size, page_size), len(pages) // columns)


class PrefixIndex:
    """Blocks by key, and each owner's, least recently used first. Whoever adds or removes one holds or releases its
    pages."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._blocks: dict[bytes, Block] = {}
        self._order: dict[str, OrderedDict[bytes, Block]] = {}  # by owner, the least recently used first
        self._after: dict[tuple[bytes, int], dict[bytes, None]] = {}  # parent, first token -> keys, the oldest first

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Block]:
        """All blocks."""
        return iter(list(self._blocks.values()))

    def of(self, owner: str) -> Iterable[Block]:
        """An owner's blocks, the least recently used first; good until one is added, removed, touched or given."""
        return self._order.get(owner, {}).values()

    def get(self, key: bytes) -> Block | None:
        """The block under a key."""
        return self._blocks.get(key)

    def find(self, root: bytes, tokens: Sequence[int]) -> list[Block]:
        """The longest chain that gives every group all rows that its mask can see from the chain's end."""
        size, chain, key = self.spec.page_size, [], root
        for start in range(0, len(tokens) - size + 1, size):
            run = tuple(tokens[start : start + size])
            key = block_key(key, run)
            block = self._blocks.get(key)
            if block is None or block.tokens != run:
                break
            chain.append(block)
        while chain and not self._complete(chain):
            chain.pop()
        self.touch([block.key for block in chain])
        return chain

    def find_part(self, root: bytes, chain: list[Block], tokens: Sequence[int]) -> tuple[Block, int] | None:
        """A block that begins as the tokens behind a chain do, and how many of its first tokens they share. Its page
        can be copied so far.

        Args:
            tokens: all of the text.
        """
        rest = tokens[len(chain) * self.spec.page_size :]
        if not rest:
            return None
        parent = chain[-1].key if chain else root
        near = list(self._after.get((parent, rest[0]), ()))[-MOST_LOOKED_AT:]
        best = max(((_shared(self._blocks[key].tokens, rest), key) for key in near), default=(0, b""))
        if not best[0]:
            return None
        block = self._blocks[best[1]]
        if not self._complete([*chain, block], len(chain) * self.spec.page_size + best[0]):
            return None
        self.touch([block.key])
        return block, best[0]

    def _complete(self, chain: list[Block], length: int | None = None) -> bool:
        size = self.spec.page_size
        length = len(chain) * size if length is None else length
        return all(
            chain[page].pages[index] is not None
            for index, group in enumerate(self.spec.groups)
            if not group.source
            for page in group.retention.live_pages(length, size)
        )

    def add(self, block: Block) -> None:
        """Takes a block in; the caller has retained its pages."""
        self._blocks[block.key] = block
        self._order.setdefault(block.owner, OrderedDict())[block.key] = block
        if block.tokens:
            self._after.setdefault((block.parent, block.tokens[0]), {})[block.key] = None
        if block.parent in self._blocks:
            self._blocks[block.parent].children += 1

    def remove(self, block: Block) -> None:
        """Forgets a block; the caller releases its pages."""
        del self._blocks[block.key]
        self._leave(block)
        if block.tokens:
            near = self._after[block.parent, block.tokens[0]]
            del near[block.key]
            if not near:
                del self._after[block.parent, block.tokens[0]]
        if block.parent in self._blocks:
            self._blocks[block.parent].children -= 1

    def touch(self, keys: Sequence[bytes]) -> None:
        """Marks a chain as used just now, its end first, so that ends leave before what they stand on."""
        for key in reversed(keys):
            block = self._blocks.get(key)
            if block is not None:
                self._order[block.owner].move_to_end(key)

    def give(self, block: Block, owner: str) -> None:
        """Makes a block another owner's, used just now."""
        self._leave(block)
        block.owner = owner
        self._order.setdefault(owner, OrderedDict())[block.key] = block

    def _leave(self, block: Block) -> None:
        mine = self._order[block.owner]
        del mine[block.key]
        if not mine:
            del self._order[block.owner]
