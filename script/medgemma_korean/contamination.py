"""Which exam items stand in the text that a run trains on, source by source, and how a model does without them.

One definition for all of them (`text.decontaminate`). Refining drops documents that hold a dev, test or fewshot item;
this looks at what is left, at every source that training reads, so that a score can be split into clean and touched
items instead of being trusted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgemma_korean import cli, mcq, prompts, records
from medgemma_korean.cli import log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.stage import vouch, vouched
from medgemma_korean.statistics import wilson

PARTS = ("checked", "sources", "touched")  # of a ledger, what scores and report keep
_BATCH = 2000  # rows searched at once


@dataclass(frozen=True)
class TrainingSource:
    """A file that training reads, and the text of each of its rows."""

    name: str
    file: Path
    texts: Callable[[Path], Iterator[str]]


def sources_of(paths: RunPaths, built: bool) -> list[TrainingSource]:
    """The training sources of a run that are there. built: the raw model is made here, from `pretrain`."""
    found = [
        TrainingSource("plain text", paths.plain_text / "train.jsonl", _plain),
        TrainingSource("English replay", paths.english_replay / "train.jsonl", _plain),
        TrainingSource("dictionary", paths.dictionary, _entries),
        TrainingSource("symbols", paths.characters, _entries),
        TrainingSource("en to ko", paths.pairs / "en_to_ko.jsonl", _pairs),
        TrainingSource("ko to en", paths.pairs / "ko_to_en.jsonl", _pairs),
        TrainingSource("exam questions", paths.mcq / "train.jsonl", _questions),
        TrainingSource("exam rationales", paths.mcq / "train_with_reasoning.jsonl", _questions),
    ]
    if built:
        files = sorted(paths.pretrain.glob("*/*.jsonl"))
        found += [TrainingSource(f"pre-training {file.parent.name}/{file.stem}", file, _plain) for file in files]
    return [source for source in found if source.file.is_file()]


def _plain(file: Path) -> Iterator[str]:
    return (row["text"] for row in records.read_jsonl(file, needs=("text",)))


def _entries(file: Path) -> Iterator[str]:
    return (f"{row['term']}\n{row['definition']}" for row in records.read_list(file, needs=("term", "definition")))


def _pairs(file: Path) -> Iterator[str]:
    return (f"{row['source']}\n{row['target']}" for row in records.read_jsonl(file, needs=("source", "target")))


def _questions(file: Path) -> Iterator[str]:
    for item in records.read_jsonl(file, needs=mcq.ITEM_KEYS):
        yield f"{item['question']}\n{prompts.options(item)}\n{item.get('reasoning', '')}"


def ledger(paths: RunPaths, split: str, items: Sequence[Mapping[str, Any]], built: bool) -> dict[str, Any]:
    """The items of a whole split that a source touches: {"checked", "sources": {name: {"rows", "touched"}}, "touched"}.

    The search is kept in the report folder and done again only when a source or the split has changed.
    """
    found = sources_of(paths, built)
    now = {
        "items": records.digest_of([[item["id"], item["question"], prompts.options(item)] for item in items]),
        "files": {show(s.file): _as_it_is(s.file) for s in found},
    }
    kept = paths.report / "validation" / f"contamination-{split}.json"
    if vouched(kept) and (known := records.read_object(kept)).get("of") == now:
        return known
    begun = time.monotonic()
    log.info("looking for the %s questions in %s of training text", split, cli.count(len(found), "file"))
    result = {"of": now, "split": split, "checked": len(items), "sources": _search(found, items)}
    result["touched"] = sorted({i for source in result["sources"].values() for i in source["touched"]})
    records.write_json(kept, result)
    vouch("contamination", [kept], time.monotonic() - begun)
    return result


def _as_it_is(file: Path) -> dict[str, int]:
    stat = file.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _search(found: Sequence[TrainingSource], items: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    from medgemma_korean.text.decontaminate import ExamIndex

    index = ExamIndex(items)
    result = {}
    for source in found:
        rows, touched = 0, set()
        for batch in _batches(source.texts(source.file)):
            rows += len(batch)
            touched.update(i for ids in index.touched_by_each(batch) for i in ids)
        if source.texts is _questions:  # equal question and options, in whatever order they are printed
            same = (index.same_item(item) for item in records.read_jsonl(source.file))
            touched.update(i for i in same if i is not None)
        result[source.name] = {"rows": rows, "touched": sorted(touched)}
    return result


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def accuracies(predictions: Sequence[Mapping[str, Any]], touched: Iterable[str]) -> dict[str, Any]:
    """{"clean": {"n", "correct", "accuracy", "lower", "upper"} or None where there is no such item, "touched": ...}"""
    known, result = set(touched), {}
    for name, inside in (("clean", False), ("touched", True)):
        rows = [row for row in predictions if (row["id"] in known) == inside]
        right = sum(row["predicted"] == row["gold"] for row in rows)
        result[name] = None
        if rows:
            lower, upper = wilson(right, len(rows))
            result[name] = {"n": len(rows), "correct": right, "accuracy": right / len(rows)}
            result[name] |= {"lower": lower, "upper": upper}
    return result
