"""Passes 2 and 3 of plain-text refinement: which documents of all shards are kept, and the files that hold them.

Documents are numbered in the order of the shards, cleanest source first: of equal or nearly equal documents the first
one stays. Every decision is made from content keys and signatures, so the texts are read once more only to be written.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from medgemma_korean import records
from medgemma_korean.text import dedup
from medgemma_korean.text.clean import normalise_block
from medgemma_korean.text.filters import MIN_CHARACTERS
from medgemma_korean.text.shards import Job, held_out_index

TRAIN, VALIDATION, EXACT, NEAR, NOT_SAMPLED, HELD_OUT, CONTAMINATED = range(7)
REASONS = {
    EXACT: "exact_duplicate",
    NEAR: "near_duplicate",
    NOT_SAMPLED: "not sampled",
    HELD_OUT: "in_validation",  # nothing is left of it without the lines that stand in held-out text
    CONTAMINATED: "contaminated",  # an exam item stands in it once such lines are gone from between its parts
}
# Lines of held-out text are taken out of training text: what a page quotes of another is no duplicate, and yet a model
# that has seen it scores too well. Shorter lines are headings and phrases of everyone.
HELD_OUT_LINE = 20


@dataclass
class Decisions:
    """state: uint8 [n], one of TRAIN to CONTAMINATED. first: int64 [n], the document that a duplicate repeats, or -1.

    starts: int64 [shards + 1], the number of each shard's first document. sizes: uint64 [n], UTF-8 bytes.
    exposed: the exam items of CONTAMINATED documents.
    """

    state: np.ndarray
    first: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    exposed: dict[int, list[str]] = field(default_factory=dict)

    def take_out(self, shard: int, emitted: Emitted) -> None:
        """Drop the documents of a shard that could not be written."""
        self.of_shard(shard)[emitted.emptied] = HELD_OUT
        self.of_shard(shard)[list(emitted.exposed)] = CONTAMINATED
        self.exposed.update({int(self.starts[shard]) + i: items for i, items in emitted.exposed.items()})

    def of_shard(self, shard: int) -> np.ndarray:
        return self.state[self.starts[shard] : self.starts[shard + 1]]

    def shard_of(self, document: int) -> tuple[int, int]:
        """(shard, position in it) of a document."""
        shard = int(np.searchsorted(self.starts, document, side="right")) - 1
        return shard, document - int(self.starts[shard])

    @property
    def clusters(self) -> Counter[int]:
        """How many groups of near duplicates there are of each size, the kept document counted."""
        near = self.first[self.state == NEAR]
        return Counter((np.unique(near, return_counts=True)[1] + 1).tolist())


def decide(
    jobs: Sequence[Job],
    scratch: Path,
    *,
    limit: int | None,
    seed: int,
    share: float,
    most: int,
    tick: Callable[[], None] = lambda: None,
) -> Decisions:
    """The state of every document of the shards.

    scratch: a file for the signatures of all documents that are no exact duplicates; it is mapped, not loaded.
    limit: at most so many documents are kept, drawn with `seed` from all in proportion. share: of the documents, by
    their own hash, for validation; at most `most` and, where two are kept, at least one. tick: called after each of
    the BANDS steps of the comparison.
    """
    keys = [job.array("keys.npy") for job in jobs]
    starts = np.cumsum([0, *map(len, keys)])
    keys = np.concatenate(keys) if keys else np.empty((0, 3), dtype=np.uint64)
    keys, sizes = keys[:, :2], keys[:, 2]
    state = np.full(len(keys), TRAIN, dtype=np.uint8)
    first = np.full(len(keys), -1, dtype=np.int64)

    # A stable sort: equal keys stay in the order of the documents.
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    fresh = np.ones(len(keys), dtype=bool)
    fresh[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    group = order[np.maximum.accumulate(np.where(fresh, np.arange(len(keys)), 0))] if len(keys) else order
    again = ~fresh
    state[order[again]] = EXACT
    first[order[again]] = group[again]
    del order, fresh, group, again

    left = np.flatnonzero(state != EXACT)
    duplicate_of = dedup.near_duplicate_of(_signatures(jobs, starts, state, scratch), tick)
    near = duplicate_of >= 0
    state[left[near]] = NEAR
    first[left[near]] = left[duplicate_of[near]]
    kept = left[~near]

    if limit is not None and limit < len(kept):
        chosen = np.zeros(len(kept), dtype=bool)
        chosen[random.Random(seed).sample(range(len(kept)), limit)] = True
        state[kept[~chosen]] = NOT_SAMPLED
        kept = kept[chosen]
    # A document's own hash decides, so that other documents change nothing.
    hashed = keys[kept, 0] / 2.0**64
    order = np.argsort(hashed, kind="stable")
    held = order[: min(max(np.count_nonzero(hashed < share), int(len(kept) > 1)), most)]
    state[kept[held]] = VALIDATION
    return Decisions(state, first, starts, sizes)


def _signatures(jobs: Sequence[Job], starts: np.ndarray, state: np.ndarray, scratch: Path) -> np.ndarray:
    """Signatures of the documents that are no exact duplicates, uint32 [n, 128], in a file that memory maps."""
    count = 0
    with open(scratch, "wb") as file:
        for i, job in enumerate(jobs):
            keep = state[starts[i] : starts[i + 1]] != EXACT
            signed = job.array("sig.npy", mapped=True)
            for low in range(0, len(signed), 1 << 16):
                rows = signed[low : low + (1 << 16)][keep[low : low + (1 << 16)]]
                file.write(np.ascontiguousarray(rows).data)  # `tofile` does not say why it fails
                count += len(rows)
    if not count:
        return np.empty((0, dedup.SLOTS), dtype=np.uint32)
    return np.memmap(scratch, dtype=np.uint32, mode="r", shape=(count, dedup.SLOTS))


def write_held_out_lines(jobs: Sequence[Job], decisions: Decisions, path: Path) -> None:
    """The distinct lines of all validation documents, of HELD_OUT_LINE characters or more, as a JSON list."""
    lines: set[str] = set()
    for shard, job in enumerate(jobs):
        positions = np.flatnonzero(decisions.of_shard(shard) == VALIDATION).tolist()
        if positions:
            texts = (text for _, text in texts_of(job, positions).values())
            lines.update(line for text in texts for line in text.split("\n") if len(line) >= HELD_OUT_LINE)
    records.write_json(path, sorted(lines))


@lru_cache(maxsize=1)
def _held_out_lines(path: Path) -> frozenset[str]:
    return frozenset(records.read_json(path))


@dataclass(frozen=True)
class Emission:
    """A shard to write: state of its documents, the file that takes the documents of a state, and held-out lines."""

    job: Job
    state: np.ndarray
    files: dict[int, Path]
    held_out_lines: Path


@dataclass
class Emitted:
    """What was written: exam items found in it, held-out lines taken out of the training text, how many bytes shorter
    that is for it; and the documents that were not, by position in the shard: those of which too little was left, and
    those in which what was left is an exam item."""

    left: list[str] = field(default_factory=list)
    lines: int = 0
    bytes: int = 0
    emptied: list[int] = field(default_factory=list)
    exposed: dict[int, list[str]] = field(default_factory=dict)


def emit(emission: Emission) -> Emitted:
    """Write a shard's documents as JSONL parts; run in a worker that `shards.prepare` prepared.

    The check that no held-out exam item is left is made on what is really written.
    """
    done, held_out = Emitted(), _held_out_lines(emission.held_out_lines)
    with contextlib.ExitStack() as stack:
        files = {state: stack.enter_context(open(path, "wb")) for state, path in emission.files.items()}
        for start, table in _tables(emission.job, ["text"]):
            texts = table.column("text").to_pylist()
            states = emission.state[start : start + len(texts)]
            for state, file in files.items():
                chosen = {}
                shorter: dict[int, int] = {}  # lines taken out
                for i in np.flatnonzero(states == state).tolist():
                    text = texts[i]
                    if state == TRAIN and not held_out.isdisjoint(lines := text.split("\n")):
                        shorter[i] = sum(line in held_out for line in lines)
                        text = normalise_block("\n".join(line for line in lines if line not in held_out))
                        if len(text) < MIN_CHARACTERS:
                            done.emptied.append(start + i)
                            continue
                    chosen[i] = text
                for i, items in zip(list(chosen), held_out_index().touched_by_each([*chosen.values()]), strict=True):
                    if items and i in shorter:
                        done.exposed[start + i] = items
                        del chosen[i], shorter[i]
                    else:
                        done.left += items
                done.lines += sum(shorter.values())
                done.bytes += sum(len(texts[i].encode()) - len(chosen[i].encode()) for i in shorter if i in chosen)
                rows = (records.dump({"text": text, "source": emission.job.task.source}) for text in chosen.values())
                file.write("".join(row + "\n" for row in rows).encode())
    return done


def texts_of(job: Job, positions: Sequence[int]) -> dict[int, tuple[int, str]]:
    """{position in the shard: (row in its file, text)} of some documents."""
    found = {}
    for start, table in _tables(job, ["row", "text"], positions):
        for position in positions:
            if start <= position < start + len(table):
                row = table.slice(position - start, 1).to_pylist()[0]
                found[position] = (row["row"], row["text"])
    return found


def _tables(job: Job, columns: list[str], positions: Sequence[int] | None = None) -> Iterator[tuple[int, Any]]:
    """(position of the first row, table) of the row groups of a shard, or only of those with some positions."""
    import pyarrow.parquet

    start, kept = 0, job.about()["kept"]
    with job.reading("parquet") as path, pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        # The pages have checksums, the index has none.
        rows = sum(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
        if file.schema_arrow.names != ["row", "text"] or rows != kept:
            raise ValueError("its index does not match")
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            if positions is None or any(start <= position < stop for position in positions):
                yield start, file.read_row_group(group, columns=columns)
            start = stop
