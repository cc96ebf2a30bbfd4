"""Clean, filter, de-duplicate and decontaminate plain text; split off the held-out validation part.

Reads   data/01_raw/00_korean/*/, data/01_raw/00_english_replay/ (the sample's where there is none),
        data/01_raw/02_kor_med_test/ (dev, test and fewshot items must not stand in training text)
Writes  data/02_refined/00_plain_text/{train,validation}.jsonl,
        data/02_refined/00_english_replay/{train,validation}.jsonl

    python script/refine/refine_00_plain_text.py --model tiny
"""

from __future__ import annotations

import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from medgemma_korean import cli, mcq, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.profiles import ModelProfile
from medgemma_korean.stage import Input, Stage

FORMAT = 1
BATCH = 500  # documents cleaned together; bounds memory, not the result
# Cleanest first: of two equal documents the one from the earlier source is kept.
PRIORITY = ("wikipedia_ko_2024", "wikipedia-korean", "namuwiki_extracted", "namu_wiki", "aihub", "c4_korean")


def sources_of(folder: Path) -> list[Path]:
    """The source folders in order of priority, then by name; the folder itself when it holds the files."""
    inside = [p for p in folder.iterdir() if p.is_dir() and records.row_files(p)]
    if not inside:
        return [folder]
    return sorted(inside, key=lambda p: (PRIORITY.index(p.name) if p.name in PRIORITY else len(PRIORITY), p.name))


def exam_indexes(paths: RunPaths) -> tuple[Any, Any, dict[str, int]]:
    """Indexes of the held-out items and of the train items, and how many of each there are."""
    from medgemma_korean.text.clean import normalise_line
    from medgemma_korean.text.decontaminate import ExamIndex

    items: dict[str, list] = defaultdict(list)
    for file in records.row_files(paths.raw_mcq):
        train = file.stem == "train"
        for item in mcq.read_raw_items(file, normalise_line, [] if train else None):
            items["train" if train else "held out"].append({**item, "id": f"{file.stem}/{item['id']}"})
    if not items["held out"]:
        raise PipelineError(f"{show(paths.raw_mcq)}: no dev or test questions, so nothing can be decontaminated")
    return ExamIndex(items["held out"]), ExamIndex(items["train"]), {k: len(v) for k, v in items.items()}


def read_texts(source: Path) -> Iterator[str]:
    """The raw texts of a source. Raises PipelineError for a row without text."""
    for file in records.row_files(source):
        for number, row in enumerate(records.read_rows(file), 1):
            if not isinstance(row.get("text"), str):
                raise PipelineError(f'{show(file)}, row {number}: no "text" column; found {", ".join(row)}')
            yield row["text"]


def in_batches(values: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(values, BATCH)):
        yield batch


class Refiner:
    """Documents of one language through all filters, with the counts by source and reason."""

    def __init__(self, language: str, held_out: Any, train_items: Any) -> None:
        self.language, self.held_out, self.train_items = language, held_out, train_items
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.touched_items: set[str] = set()
        self.touched_train_items: set[str] = set()
        self.seen: set[bytes] = set()
        self.texts: list[str] = []
        self.origin: list[str] = []

    def read(self, source: Path, tick) -> None:
        """Clean and filter one source; what is left goes to `self.texts`."""
        from medgemma_korean.text import clean, dedup, filters

        rules, counts = clean.rules_for(source.name), self.counts[source.name]
        for batch in in_batches(read_texts(source)):
            counts["read"] += len(batch)
            counts["characters read"] += sum(map(len, batch))
            passed = []
            for text in clean.clean_batch(batch, rules):
                if reason := filters.drop_reason(text, self.language):
                    counts[reason] += 1
                else:
                    passed.append(text)
            touched = self.held_out.touched_by_each(passed)
            for items in self.train_items.touched_by_each(passed):
                self.touched_train_items.update(items)
            for text, items in zip(passed, touched, strict=True):
                key = dedup.content_key(text)
                if items:
                    counts["contaminated"] += 1
                    self.touched_items.update(items)
                elif key in self.seen:
                    counts["exact_duplicate"] += 1
                else:
                    self.seen.add(key)
                    self.texts.append(text)
                    self.origin.append(source.name)
            tick(counts["read"])

    def drop_near_duplicates(self) -> None:
        """Of a group of near duplicates the first one stays."""
        from medgemma_korean.text import dedup

        kept_texts, kept_origin = [], []
        duplicates = dedup.near_duplicate_of(dedup.signatures(self.texts))
        for text, origin, first in zip(self.texts, self.origin, duplicates, strict=True):
            if first >= 0:
                self.counts[origin]["near_duplicate"] += 1
            else:
                kept_texts.append(text)
                kept_origin.append(origin)
                self.counts[origin]["kept"] += 1
                self.counts[origin]["characters kept"] += len(text)
        self.texts, self.origin = kept_texts, kept_origin

    def sample(self, limit: int | None, seed: int) -> None:
        """At most `limit` documents, drawn with a seed over all sources in proportion: never the first ones."""
        if limit is None or limit >= len(self.texts):
            return
        chosen = sorted(random.Random(seed).sample(range(len(self.texts)), limit))
        for origin in self.origin:
            self.counts[origin]["not sampled"] += 1
        for i in chosen:
            self.counts[self.origin[i]]["not sampled"] -= 1
        self.texts, self.origin = [self.texts[i] for i in chosen], [self.origin[i] for i in chosen]

    def split(self, share: float, most: int) -> tuple[list[dict], list[dict]]:
        """(train, validation) rows. A document's own hash decides, so that other documents change nothing."""
        from medgemma_korean.text.dedup import content_key

        def hashed(text: str) -> float:
            return int.from_bytes(content_key(text)[:8], "big") / 2**64

        held = {text for text in self.texts if hashed(text) < share}
        if len(held) > most:
            held = set(sorted(held, key=hashed)[:most])
        rows = [{"text": text, "source": origin} for text, origin in zip(self.texts, self.origin, strict=True)]
        return [row for row in rows if row["text"] not in held], [row for row in rows if row["text"] in held]


def report(refiner: Refiner, language: str) -> None:
    """The kept and dropped counts by reason, as a table."""
    reasons = sorted(
        {r for c in refiner.counts.values() for r in c} - {"read", "kept"} - {"characters read", "characters kept"}
    )
    header = [language, "read", "kept", *reasons, "characters kept"]
    rows = [
        [name, counts["read"], counts["kept"], *[counts[r] or "" for r in reasons], f"{counts['characters kept']:,}"]
        for name, counts in refiner.counts.items()
    ]
    log.info("%s", cli.table(rows, header))


def refine(folder: Path, out: Path, language: str, indexes: tuple, args, profile: ModelProfile, stage: Stage) -> dict:
    """One language end to end; writes train and validation. Raises PipelineError when either would be empty."""
    held_out, train_items, _ = indexes
    refiner = Refiner(language, held_out, train_items)
    # Folders below the replay are the published layout of one source.
    sources = sources_of(folder) if language == "ko" else [folder]
    for i, source in enumerate(sources):
        done = 10 * i
        refiner.read(source, lambda n, done=done: stage.tick(done, 10 * len(sources), f"{n:,} documents"))
    refiner.drop_near_duplicates()
    report(refiner, {"ko": "Korean", "en": "English replay"}[language])
    refiner.sample(args.max_samples if language == "ko" else None, args.seed)
    train, validation = refiner.split(profile.validation_share, profile.validation_documents)
    for name, rows in (("train", train), ("validation", validation)):
        if not rows:
            raise PipelineError(
                f"{show(folder)}: no {name} document is left of {sum(c['read'] for c in refiner.counts.values())}; "
                "see the counts above, and give it more text"
            )
        records.write_jsonl(out / f"{name}.jsonl", rows)
    left = {i for items in held_out.touched_by_each([r["text"] for r in train]) for i in items}
    assert not left, f"held-out items are left in the training text: {sorted(left)[:3]}"
    log.info("%s: %d train, %d validation documents", out.name, len(train), len(validation))
    return {
        "train": len(train),
        "validation": len(validation),
        "by_source": {name: dict(counts) for name, counts in refiner.counts.items()},
        "held_out_items_touched": sorted(refiner.touched_items),
        "train_items_touched": len(refiner.touched_train_items),
    }


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("--max-samples", type=cli.positive_int, metavar="N", help="keep at most N Korean documents")
    parser.add_argument("--seed", type=int, default=17, help="seed of that sample (default: 17)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    profile, paths = cli.resolve(args)
    cli.start_logging(paths, "refine_00_plain_text")
    download = paths.command("download/download_00_plain_text")
    stage = Stage(
        "refine_00_plain_text",
        paths,
        outputs=[paths.plain_text, paths.english_replay],
        inputs=[
            Input("Korean text", paths.raw_korean, repair=download),
            Input("English replay", paths.raw_english, repair=download),
            Input("exam questions", paths.raw_mcq, repair=paths.command("download/download_02_kor_med_test")),
        ],
        settings={
            "max_samples": args.max_samples,
            "seed": args.seed,
            "validation_share": profile.validation_share,
            "validation_documents": profile.validation_documents,
            "rules": _rule_versions(),
        },
        format=FORMAT,
        force=args.force,
    )
    if (code := stage.already_complete()) is not None:
        return code
    with stage.work() as folder:
        indexes = exam_indexes(paths)
        korean = refine(paths.raw_korean, folder / paths.plain_text.name, "ko", indexes, args, profile, stage)
        english = refine(paths.raw_english, folder / paths.english_replay.name, "en", indexes, args, profile, stage)
        touched = len(korean["held_out_items_touched"])
        log.info("held-out exam items found in the raw text, their documents dropped: %d", touched)
        stage.complete(
            counts={"korean": korean, "english": english, "exam_items": indexes[2]},
            metric=f"{korean['train']:,} Korean and {english['train']:,} English documents",
        )
    return 0


def _rule_versions() -> dict[str, Any]:
    """Versions of the cleaning rules and word lists: new rules are a reason to refine again."""
    from medgemma_korean.text.clean import CLEAN_VERSION

    words = records.read_json(Path(records.__file__).parent / "text" / "filter_words.json")
    return {"clean": CLEAN_VERSION, "words": words["version"]}


if __name__ == "__main__":
    sys.exit(cli.run(main))
