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
from medgemma_korean.text.filters import DROP_REASONS
from medgemma_korean.text.merge import (
    CONTAMINATED,
    EXACT,
    HELD_OUT,
    NEAR,
    REASONS,
    TRAIN,
    VALIDATION,
    Decisions,
    texts_of,
)
from medgemma_korean.text.shards import EXCERPT, SAMPLES, Job

LEDGER, DROPPED = "ledger.json", "dropped.jsonl"
PAIRS = 100  # examples of exact and of near duplicates, each with the document that was kept

EXPLAINED = {
    "read": "documents of the source, with their raw bytes; a document of over a million characters counts as pieces",
    "further_pieces": "pieces of such documents after the first",
    "cleaned_away": "bytes of mark-up, addresses, numbers of persons, spaces and invisible characters",
    "kept": "documents in train.jsonl and validation.jsonl, with their clean bytes",
    "dropped": "documents dropped, each for the first reason that applies, with their clean bytes",
    "contaminated_documents": "documents that hold an exam item of dev, test or fewshot, and which",
    "held_out_items_touched": "those items",
    "train_items_touched": "training items of the exam that stand in the text: counted, not dropped",
    "near_duplicate_clusters": "groups of nearly equal documents, of which the first was kept; by_size counts it too",
    "validation_lines_removed": "lines of validation.jsonl taken out of train.jsonl, which is so many bytes shorter",
}


def reasons_of(language: str) -> list[str]:
    """Every reason for which a document of a language may be dropped, in the order of the checks."""
    return list(dict.fromkeys([*DROP_REASONS[language], "contaminated", *REASONS.values()]))


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
    exposed = _texts(jobs, decisions, set(decisions.exposed))
    for number, items in sorted(decisions.exposed.items()):
        source, where, _ = exposed[number]
        contaminated.append({"source": source, "where": where, "items": items})
    sources = {}
    for source, of in documents.items():
        dropped = {r: _pair(of, sizes[source], r) for r in reasons_of(jobs[0].language)}
        kept, read = (_pair(of, sizes[source], kind) for kind in ("kept", "read"))
        clean = kept["bytes"] + sum(pair["bytes"] for pair in dropped.values())
        sources[source] = {
            "read": read,
            "further_pieces": of["further_pieces"],
            "cleaned_away": read["bytes"] - clean,
            "kept": kept,
            "dropped": dropped,
        }
    clusters = decisions.clusters
    return {
        "explained": EXPLAINED,
        "language": jobs[0].language,
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
    """Documents and megabytes in and out by source, how many documents were dropped for which reason, and which checks
    dropped none."""
    sources = ledger["sources"]
    every = reasons_of(ledger["language"])
    reasons = [r for r in every if any(of["dropped"][r]["documents"] for of in sources.values())]
    rows = []
    for name, of in sources.items():
        totals = [f"{of[kind]['documents']:,}" for kind in ("read", "kept")]
        sizes = [of["read"]["bytes"], of["cleaned_away"], of["kept"]["bytes"]]
        counts = [f"{of['dropped'][reason]['documents']:,}" for reason in reasons]
        rows.append([name, *totals, *map(cli.size_text, sizes), *counts])
    head = [f"{title}: documents", "read", "kept", "read size", "cleaned away", "kept size", *reasons]
    none = ", ".join(reason for reason in every if reason not in reasons)
    return cli.table(rows, head) + f"\ndropped for none of: {none}"


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
    for state in (EXACT, NEAR, HELD_OUT, CONTAMINATED):
        numbers = np.flatnonzero(decisions.state == state)
        # Spread over all documents, not the first of them.
        chosen = numbers[np.linspace(0, len(numbers) - 1, min(PAIRS, len(numbers))).astype(int)].tolist()
        texts = _texts(jobs, decisions, {*chosen, *(int(decisions.first[n]) for n in chosen)} - {-1})
        for number in chosen:
            source, where, text = texts[number]
            row = {"reason": REASONS[state], "source": source, "where": where, "text": text[:EXCERPT]}
            if state == CONTAMINATED:
                row["where"] = f"{where}: {', '.join(decisions.exposed[number])}"
            if state in (EXACT, NEAR):
                _, kept, kept_text = texts[int(decisions.first[number])]
                row |= {"kept": kept, "kept_text": kept_text[:EXCERPT]}
            yield row


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
    """Examples of a reason as text to read. Raises PipelineError for a reason that there is none of."""
    rows = [row for f in folders if (f / DROPPED).is_file() for row in records.read_jsonl(f / DROPPED)]
    if odd := [row for row in rows if not {"reason", "where", "text"} <= row.keys()]:
        raise cli.PipelineError(
            f"{DROPPED}: a row without reason, where or text, found {', '.join(odd[0]) or 'nothing'}"
        )
    reasons = Counter(row["reason"] for row in rows)
    known = list(dict.fromkeys(r for language in DROP_REASONS for r in reasons_of(language)))
    if reason not in known:
        raise cli.PipelineError(f"--show {reason}: no such reason; there are {', '.join(known)}")
    if reason not in reasons:
        return f"no examples of {reason}; there are some of {', '.join(r for r in known if r in reasons) or 'none'}"
    blocks = []
    for row in [r for r in rows if r["reason"] == reason][:number]:
        blocks.append(f"[{row['where']}]\n{row['text']}")
        if "kept" in row:
            blocks[-1] += f"\n  the kept one: [{row['kept']}]\n{row['kept_text']}"
    return ("\n" + "-" * 100 + "\n").join(blocks)
