"""Clean, filter, de-duplicate and decontaminate plain text; split off the held-out validation part.

Reads   data/01_raw/00_korean/*/, data/01_raw/00_english_replay/ (the sample's where there is none),
        data/01_raw/02_kor_med_test/ (dev, test and fewshot items must not stand in training text)
Writes  data/02_refined/00_plain_text/{train,validation}.jsonl, ledger.json, dropped.jsonl (examples by reason),
        the same in data/02_refined/00_english_replay/

    python script/refine/refine_00_plain_text.py --model tiny
    python script/refine/refine_00_plain_text.py --model tiny --show advertisement     # what a rule dropped
    python script/refine/refine_00_plain_text.py --model medgemma-4b --executor slurm --partition cpu

Workers refine shards of the raw files, which are kept until all is done: a run that breaks off continues with the
shards that are left. The result is the same for any number of workers.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medgemma_korean import cli, mcq, records, workers
from medgemma_korean.cli import Every, PipelineError, log, size_text
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.stage import Input, Stage

FORMAT = 4
# Cleanest first: of two equal documents the one from the earlier source is kept.
PRIORITY = ("wikipedia_ko_2024", "wikipedia-korean", "namuwiki_extracted", "namu_wiki", "aihub", "c4_korean")
SMALL = 30e6  # bytes of raw text that one process refines before further ones have started
LANGUAGES = {"ko": "Korean", "en": "English replay"}


def sources_of(folder: Path) -> list[Path]:
    """The source folders in order of priority, then by name; the folder itself when it holds the files.

    A source may be a link to a folder on another disk. Raises PipelineError for a link to nothing, and for files
    beside folders: they would belong to no source.
    """
    from medgemma_korean.text.documents import kind_of

    if not folder.is_dir():
        raise PipelineError(f"{show(folder)}: a file where the folder of the sources is expected; move it away")
    shown = [p for p in folder.iterdir() if not p.name.startswith(".")]
    if gone := sorted(p for p in shown if not p.exists()):
        raise PipelineError(
            "\n".join(
                f"{show(p)}: a link to something that does not exist; remove it, or bring that back" for p in gone
            )
        )
    inside, files = [p for p in shown if p.is_dir()], sorted(p for p in shown if p.is_file() and kind_of(p))
    if not inside:
        return [folder]
    if files:
        raise PipelineError(f"{show(files[0])}: stands beside the folders of sources; move it into one of its own")
    return sorted(inside, key=lambda p: (PRIORITY.index(p.name) if p.name in PRIORITY else len(PRIORITY), p.name))


def exam_items(paths: RunPaths) -> Any:
    """The exam items to compare with. Raises PipelineError without any that are held out."""
    from medgemma_korean.text.clean import normalise_line
    from medgemma_korean.text.shards import Exams

    items: dict[str, list] = defaultdict(list)
    for file in records.row_files(paths.raw_mcq):
        train = file.stem == "train"
        for item in mcq.read_raw_items(file, normalise_line, [] if train else None):
            items["train" if train else "held out"].append({**item, "id": f"{file.stem}/{item['id']}"})
    if not items["held out"]:
        raise PipelineError(f"{show(paths.raw_mcq)}: no dev or test questions, so nothing can be decontaminated")
    return Exams(tuple(items["held out"]), tuple(items["train"]))


def jobs_of(paths: RunPaths, exams: Any) -> dict[str, list]:
    """The shards to make, by language, in the order that decides which duplicate stays.

    Raises PipelineError naming every file that cannot be read as far as its index tells.
    """
    from medgemma_korean.text.clean import rules_for
    from medgemma_korean.text.documents import tasks_of
    from medgemma_korean.text.shards import Job

    folder, digest = paths.refined / ".shards", exams.digest
    # Folders below the replay are the published layout of one source.
    places = {"ko": sources_of(paths.raw_korean), "en": [paths.raw_english]}
    if not paths.raw_english.is_relative_to(paths.raw):
        log.info("no 00_english_replay in %s; the sample's English text is replayed", show(paths.raw))
    jobs: dict[str, list] = {language: [] for language in places}
    problems = []
    for language, source in [(language, source) for language, sources in places.items() for source in sources]:
        try:
            tasks = tasks_of(source)
        except PipelineError as error:
            problems.append(str(error))
        else:
            jobs[language] += [Job(task, language, rules_for(source.name), digest, folder) for task in tasks]
    if problems:
        raise PipelineError("\n".join(problems))
    return jobs


def spread(args: argparse.Namespace, paths: RunPaths) -> bool:
    """Pass 1 by an executor of datatrove; False when the queue of a cluster does the rest too."""
    from medgemma_korean.text import cluster

    exams = exam_items(paths)
    again = [sys.executable, str(Path(__file__).resolve()), *cli.shared_argv(args), "--seed", str(args.seed)]
    again += ["--max-samples", str(args.max_samples)] if args.max_samples else []
    again += ["--keep-shards"] if args.keep_shards else []
    options = dict(option.partition("=")[::2] for option in args.sbatch)
    if args.executor == "slurm" and not args.partition:
        raise PipelineError("--executor slurm: name a partition with --partition (`sinfo` lists them)")
    return cluster.spread(
        args.executor,
        [job for of_language in jobs_of(paths, exams).values() for job in of_language],
        exams,
        paths.logs / f"datatrove_{paths.name}",
        workers=args.workers,
        slurm=cluster.Slurm(args.partition, args.time, options) if args.partition else None,
        again=again,
    )


class Meter:
    """How far the three passes are, which take these shares of the time (measured on 2 GB), for file and log."""

    SHARES = {"refined": 0.75, "compared": 0.05, "written": 0.20}

    def __init__(self, stage: Stage, total: int) -> None:
        self.stage, self.total, self.minute = stage, total, Every(60)
        self.done, self.begun = dict.fromkeys(self.SHARES, 0.0), dict.fromkeys(self.SHARES, (0.0, 0.0))

    def begin(self, step: str, there: float = 0) -> None:
        """A pass starts, or goes on; `there`: bytes of raw text whose results an earlier run left."""
        self.done[step] += there
        self.begun[step] = time.monotonic(), self.done[step]

    def add(self, step: str, size: float) -> None:
        """A pass is done with `size` more bytes of raw text."""
        self.done[step] += size
        begun, before = self.begun[step]
        rate = (self.done[step] - before) / max(time.monotonic() - begun, 1e-3)
        state = f"{size_text(self.done[step])} of {size_text(self.total)} {step}, {size_text(rate)}/s"
        whole = sum(share * self.done[name] for name, share in self.SHARES.items())
        self.stage.tick(int(whole), self.total, state)
        if self.minute():
            log.info("%s, %.0f min left", state, (self.total - self.done[step]) / rate / 60)


def make_shards(pool: workers.Workers, jobs: list, meter: Meter) -> None:
    """Pass 1: every shard that is not there yet."""
    from medgemma_korean.text import shards

    todo = [job for job in jobs if not job.done]
    if len(todo) < len(jobs):
        log.info("%s of %s shards are there already", f"{len(jobs) - len(todo):,}", f"{len(jobs):,}")
    meter.begin("refined", there=meter.total - sum(job.task.size for job in todo))
    for position, _ in pool.map(shards.work, todo):
        meter.add("refined", todo[position].task.size)


def write(pool: workers.Workers, jobs: list, decisions: Any, out: Path, meter: Meter) -> dict[str, int]:
    """Pass 3: the kept documents in the order of the shards; returns what was taken out of them.

    Documents of which nothing is left, or an exam item, are dropped in `decisions`. Raises AssertionError when an
    exam item is found in another one: pass 1 must have dropped it.
    """
    from medgemma_korean.text import merge

    names = {merge.TRAIN: "train.jsonl", merge.VALIDATION: "validation.jsonl"}
    parts, lines = out / ".parts", out / ".lines"
    parts.mkdir(parents=True)
    merge.write_held_out_lines(jobs, decisions, lines)
    emissions = [
        merge.Emission(
            job, decisions.of_shard(i), {state: parts / f"{i}.{name}" for state, name in names.items()}, lines
        )
        for i, job in enumerate(jobs)
    ]
    removed = {"lines": 0, "bytes": 0}
    ready: set[int] = set()
    files = {state: open(out / name, "wb") for state, name in names.items()}  # noqa: SIM115 - closed below
    following = 0
    meter.begin("written")
    try:
        for position, emitted in pool.map(merge.emit, emissions):
            if emitted.left:
                raise AssertionError(f"held-out items are left in the training text: {sorted(set(emitted.left))[:3]}")
            decisions.take_out(position, emitted)
            removed["lines"] += emitted.lines
            removed["bytes"] += emitted.bytes
            ready.add(position)
            meter.add("written", jobs[position].task.size)
            while following in ready:
                for state, part in emissions[following].files.items():
                    with open(part, "rb") as opened:
                        shutil.copyfileobj(opened, files[state], 1 << 22)
                    part.unlink()
                following += 1
    finally:
        for file in files.values():
            file.close()
    parts.rmdir()
    lines.unlink()
    return removed


def checked_ledger(jobs: list, decisions: Any, raw: Path, limit: int | None) -> dict:
    """The ledger of one language. Raises PipelineError, after printing it, when a split has no document."""
    from medgemma_korean.text import ledger

    book = ledger.build(jobs, decisions)
    for split, number in book["documents"].items():
        if not number:
            log.info("%s", ledger.table(book, LANGUAGES[book["language"]]))
            read = sum(of["read"]["documents"] for of in book["sources"].values())
            advice = f"choose more than --max-samples {limit}" if limit else "give it more text"
            raise PipelineError(
                f"{show(raw)}: no {split} document is left of {read:,}; see the counts above, and {advice}"
            )
    return book


def refine(
    pool: workers.Workers, jobs: list, raw: Path, out: Path, args: argparse.Namespace, profile: Any, meter: Meter
) -> dict:
    """Passes 2 and 3 of the text in `raw`; returns its ledger. Raises PipelineError when a split would be empty."""
    from medgemma_korean.text import ledger, merge
    from medgemma_korean.text.dedup import BANDS

    out.mkdir(parents=True)
    scratch, step = out / ".signatures", sum(job.task.size for job in jobs) / BANDS
    meter.begin("compared")
    limit = args.max_samples if jobs[0].language == "ko" else None
    decisions = merge.decide(
        jobs,
        scratch,
        limit=limit,
        seed=args.seed,
        share=profile.validation_share,
        most=profile.validation_documents,
        tick=lambda: meter.add("compared", step),
    )
    scratch.unlink()
    limit = limit if (decisions.state == merge.NOT_SAMPLED).any() else None  # to name it only where it is the cause
    checked_ledger(jobs, decisions, raw, limit)
    removed = write(pool, jobs, decisions, out, meter)
    book = checked_ledger(jobs, decisions, raw, limit) | {"validation_lines_removed": removed}
    log.info("%s", ledger.table(book, LANGUAGES[book["language"]]))
    records.write_json(out / ledger.LEDGER, book)
    records.write_jsonl(out / ledger.DROPPED, ledger.dropped(jobs, decisions))
    clusters = book["near_duplicate_clusters"]["number"]
    kept = book["documents"]
    log.info(
        "%s: %s train, %s; %s of near duplicates; %s of held-out text taken out of train",
        out.name,
        f"{kept['train']:,}",
        cli.count(kept["validation"], "validation document"),
        cli.count(clusters, "cluster"),
        cli.count(removed["lines"], "line"),
    )
    return book


def numbers(book: dict) -> dict:
    """What the stage record keeps of a ledger."""
    kept = {key: value for key, value in book.items() if key not in ("explained", "language")}
    return kept | {"contaminated_documents": len(book["contaminated_documents"])}


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """A full disk says nothing of where it is: name the folder."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or show(folder)
        raise


def tidy(folder: Path, kept: list) -> None:
    """Delete all but some shards: what earlier rules and files left, and what a kill left half written."""
    from medgemma_korean.text.shards import FILES

    if not kept:
        shutil.rmtree(folder)
        return
    names = {job.path(suffix).name for job in kept for suffix in FILES}
    for file in folder.iterdir():
        if file.is_file() and file.name not in names:
            file.unlink()


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--max-samples", type=cli.positive_int, metavar="N", help="keep at most N Korean documents")
    parser.add_argument("--seed", type=cli.seed, default=17, help="seed of that sample (default: 17)")
    parser.add_argument("--workers", type=cli.positive_int, metavar="N", help="processes (default: one a processor)")
    parser.add_argument(
        "--executor",
        choices=("local", "datatrove-local", "slurm", "ray"),
        default="local",
        help="what makes the shards (default: processes of this program); the others are datatrove's, an optional "
        "requirement; no real cluster has been tried yet",
    )
    parser.add_argument("--partition", metavar="NAME", help="of the Slurm cluster")
    parser.add_argument("--time", default="02:00:00", metavar="H:M:S", help="limit of a Slurm task (default: 02:00:00)")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION=VALUE", help="account=..., qos=...")
    parser.add_argument("--keep-shards", action="store_true", help="keep 02_refined/.shards for the next refinement")
    parser.add_argument("--show", metavar="REASON", help="print examples of what was dropped for a reason, and end")
    parser.add_argument("--number", type=cli.positive_int, default=10, metavar="N", help="how many (default: 10)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    profile, paths = cli.resolve(args)
    if args.show:
        from medgemma_korean.text import ledger

        if not (paths.plain_text / ledger.DROPPED).is_file():
            command = paths.command("refine/refine_00_plain_text")
            raise PipelineError(f"{show(paths.plain_text)}: nothing is refined here yet; run: {command}")
        print(ledger.examples([paths.plain_text, paths.english_replay], args.show, args.number))
        return 0
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
            "seed": args.seed if args.max_samples else None,  # else nothing is drawn
            "validation_share": profile.validation_share,
            "validation_documents": profile.validation_documents,
            "rules": _rule_versions(),
        },
        format=FORMAT,
        force=args.force,
    )
    rests = paths.refined / ".shards"
    if (code := stage.already_complete()) is not None:
        if rests.is_dir() and not args.keep_shards:  # a kill came behind the record
            with contextlib.suppress(PipelineError), stage.lock():
                tidy(rests, [])
        return code
    if args.executor != "local" and not spread(args, paths):
        return 0
    with writing_to(paths.refined), stage.work() as folder:
        from medgemma_korean.text import shards

        exams = exam_items(paths)
        jobs = jobs_of(paths, exams)
        every = [job for of_language in jobs.values() for job in of_language]
        small = sum(job.task.size for job in every) < SMALL
        number = 1 if small and not args.workers else min(args.workers or workers.available(), len(every))
        shards.remove_rests(rests)
        meter = Meter(stage, sum(job.task.size for job in every))
        with workers.Workers(number, shards.prepare, (exams,)) as pool:
            make_shards(pool, every, meter)
            korean, english = (
                refine(pool, jobs[language], raw, folder / output.name, args, profile, meter)
                for language, raw, output in (
                    ("ko", paths.raw_korean, paths.plain_text),
                    ("en", paths.raw_english, paths.english_replay),
                )
            )
        touched = len(korean["held_out_items_touched"])
        log.info("held-out exam items found in the raw text, their documents dropped: %d", touched)
        stage.complete(
            counts={
                "korean": numbers(korean),
                "english": numbers(english),
                "exam_items": {"held out": len(exams.held_out), "train": len(exams.train)},
            },
            metric=f"{korean['documents']['train']:,} Korean and {english['documents']['train']:,} English documents",
        )
        tidy(rests, every if args.keep_shards else [])
    return 0


def _rule_versions() -> dict[str, Any]:
    """The cleaning rules' version, the word lists and the thresholds: other rules are a reason to refine again."""
    from medgemma_korean.text import decontaminate, dedup, documents, filters, merge, shards
    from medgemma_korean.text.clean import CLEAN_VERSION

    words = Path(filters.__file__).with_name("filter_words.json")
    thresholds = {
        module.__name__.rpartition(".")[2]: {
            name: value
            for name, value in vars(module).items()
            if name.isupper() and name[0] != "_" and isinstance(value, (int, float))
        }
        for module in (filters, dedup, decontaminate)
    }
    cuts = {"longest": documents.MAX_CHARACTERS, "seam": shards.SEAM, "held_out_line": merge.HELD_OUT_LINE}
    return {"clean": CLEAN_VERSION, "words": records.sha256(words), "thresholds": thresholds, "cuts": cuts}


if __name__ == "__main__":
    sys.exit(cli.run(main))
