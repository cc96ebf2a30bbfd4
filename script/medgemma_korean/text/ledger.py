"""What refinement did to every document, by source and by reason, for people to judge the rules by.

ledger = build(jobs, decisions)        # a JSON value
print(table(ledger, "Korean"))
examples(folder, "adult", 5)           # what `refine_00_plain_text --show adult` prints
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medgemma_korean import cli, records
from medgemma_korean.text.documents import place
from medgemma_korean.text.merge import EXACT, NEAR, REASONS, TRAIN, VALIDATION, Decisions, texts_of
from medgemma_korean.text.shards import EXCERPT, SAMPLES, Job

LEDGER, DROPPED = "ledger.json", "dropped.jsonl"
PAIRS = 100  # examples of exact and of near duplicates, each with the document that was kept


def build(jobs: Sequence[Job], decisions: Decisions) -> dict[str, Any]:
    """The ledger of one language: read, kept and dropped in documents and bytes, clusters, contaminated documents.

    Of every source, the documents read are those kept and those dropped. A document that is too long to be refined at
    once counts as its pieces; "further_pieces" are those after the first. Bytes read are raw, the others clean.
    """
    documents: dict[str, Counter[str]] = defaultdict(Counter)
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    contaminated, train_items = [], set()
    for i, job in enumerate(jobs):
        made, source = job.about(), job.task.source
        documents[source].update(made["documents"])
        sizes[source].update(made["bytes"])
        contaminated += made["contaminated"]
        train_items.update(made["train_items"])
        state = decisions.of_shard(i)
        of_shard = decisions.sizes[decisions.starts[i] : decisions.starts[i + 1]]
        for value, reason in ({TRAIN: "kept", VALIDATION: "kept"} | REASONS).items():
            chosen = state == value
            documents[source][reason] += int(np.count_nonzero(chosen))
            sizes[source][reason] += int(of_shard[chosen].sum())
    sources = {}
    for source in documents:
        reasons = sorted(documents[source].keys() - {"read", "kept", "passed", "further_pieces"})
        sources[source] = {kind: _pair(documents[source], sizes[source], kind) for kind in ("read", "kept")}
        sources[source]["further_pieces"] = documents[source]["further_pieces"]
        sources[source]["dropped"] = {
            r: _pair(documents[source], sizes[source], r) for r in reasons if documents[source][r]
        }
    clusters = decisions.clusters
    return {
        "sources": sources,
        "near_duplicate_clusters": {
            "number": clusters.total(),
            "by_size": {str(k): v for k, v in sorted(clusters.items())},
        },
        "contaminated_documents": contaminated,
        "held_out_items_touched": sorted({item for row in contaminated for item in row["items"]}),
        "train_items_touched": len(train_items),
        "documents": {
            "train": int(np.count_nonzero(decisions.state == TRAIN)),
            "validation": int(np.count_nonzero(decisions.state == VALIDATION)),
        },
    }


def _pair(documents: Counter[str], sizes: Counter[str], reason: str) -> dict[str, int]:
    return {"documents": documents[reason], "bytes": sizes[reason]}


def table(ledger: dict[str, Any], title: str) -> str:
    """Documents and megabytes in and out by source, and what was dropped for which reason."""
    sources = ledger["sources"]
    reasons = sorted({reason for of in sources.values() for reason in of["dropped"]})
    rows = []
    for name, of in sources.items():
        counts = [f"{of['dropped'][r]['documents']:,}" if r in of["dropped"] else "" for r in reasons]
        totals = [f"{of[kind]['documents']:,}" for kind in ("read", "kept")]
        rows.append([name, *totals, *(cli.size_text(of[kind]["bytes"]) for kind in ("read", "kept")), *counts])
    return cli.table(rows, [title, "read", "kept", "read size", "kept size", *reasons])


def dropped(jobs: Sequence[Job], decisions: Decisions) -> Iterator[dict[str, str]]:
    """Examples of what was dropped, the same ones whatever the order of the work: by reason, then by hash."""
    samples: dict[str, list[tuple[str, str, str, str]]] = defaultdict(list)
    for job in jobs:
        for reason, kept in job.about()["samples"].items():
            rows = [(key, job.task.source, where, text) for key, where, text in kept]
            samples[reason] = heapq.nsmallest(SAMPLES, samples[reason] + rows)
    for reason, rows in sorted(samples.items()):
        for _, source, where, text in rows:
            yield {"reason": reason, "source": source, "where": where, "text": text}
    for state in (EXACT, NEAR):
        numbers = np.flatnonzero(decisions.state == state)
        # Spread over all documents, not the first of them.
        chosen = numbers[np.linspace(0, len(numbers) - 1, min(PAIRS, len(numbers))).astype(int)].tolist()
        texts = _texts(jobs, decisions, {*chosen, *(int(decisions.first[n]) for n in chosen)})
        for number in chosen:
            source, where, text = texts[number]
            kept = texts[int(decisions.first[number])]
            yield {
                "reason": REASONS[state],
                "source": source,
                "where": where,
                "text": text[:EXCERPT],
                "kept": kept[1],
                "kept_text": kept[2][:EXCERPT],
            }


def _texts(jobs: Sequence[Job], decisions: Decisions, numbers: set[int]) -> dict[int, tuple[str, str, str]]:
    """{number: (source, place, text)}"""
    by_shard: dict[int, dict[int, int]] = defaultdict(dict)
    for number in numbers:
        shard, position = decisions.shard_of(number)
        by_shard[shard][position] = number
    found = {}
    for shard, positions in by_shard.items():
        task = jobs[shard].task
        for position, (row, text) in texts_of(jobs[shard], list(positions)).items():
            found[positions[position]] = (task.source, place(task, row), text)
    return found


def examples(folders: Sequence[Path], reason: str, number: int) -> str:
    """Examples of a reason as text to read. Raises PipelineError for a reason that nothing was dropped for."""
    rows = [row for f in folders if (f / DROPPED).is_file() for row in records.read_jsonl(f / DROPPED)]
    reasons = Counter(row["reason"] for row in rows)
    if reason not in reasons:
        known = f"some of {', '.join(sorted(reasons))}" if reasons else "none of any reason"
        raise cli.PipelineError(f"--show {reason}: no examples; there are {known}")
    blocks = []
    for row in [r for r in rows if r["reason"] == reason][:number]:
        blocks.append(f"[{row['where']}]\n{row['text']}")
        if "kept" in row:
            blocks[-1] += f"\n  the kept one: [{row['kept']}]\n{row['kept_text']}"
    return ("\n" + "-" * 100 + "\n").join(blocks)
