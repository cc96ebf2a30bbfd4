"""How fast refinement is, how much memory it takes and what it finds: ours beside `datasets` and datatrove.

Reads   nothing: the raw text is made from a seed (raw_mix.py)
Writes  a table to stdout, with --json the numbers; its files (six times --mb) go into --folder and are removed

    .venv/bin/python tests/bench/bench_refine.py                        # all of them on 200 MB, half an hour
    .venv/bin/python tests/bench/bench_refine.py --mb 200 2000 --only program
    .venv/bin/python tests/bench/bench_refine.py --only signatures      # de-duplication of 3 million documents

| way | what it does |
|---|---|
| program | refine_00_plain_text with one worker, from the start of Python to train.jsonl |
| parts | ours: read, clean, filter, hash, write; the same work as the two below |
| datasets, batched | `load_dataset`, `map`, `filter`, `map`, `to_parquet` with the same functions, 1,000 rows each |
| datasets, by row | the same, a row at a time, as its documentation begins |
| datatrove | the same rules as steps of its own, its n-gram decontamination, its four steps of MinHash |
| datatrove's filters | its Gopher and C4 filters in place of our rules, no cleaning, its MinHash |
| signatures | pass 2 alone on --signatures documents, 5 % of them planted copies |

Every way is a process of its own with one worker. MB/s are raw UTF-8 megabytes by seconds of user and system time.
RSS is the most of any one process, RssAnon what of it no file backs. datatrove is optional; where it is not installed
the table says so. Its word tokenizer for Korean takes milliseconds a sentence; here it splits at spaces.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import raw_mix  # beside this file

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = REPOSITORY / "script" / "refine" / "refine_00_plain_text.py"
POLL = 0.02  # seconds between looks at a process's memory
TROVE = ("datatrove", "datatrove's filters")
BESIDE = {"parts": ("datasets, batched", "datasets, by row"), "program": TROVE}  # ours: what it is compared with
WAYS = ("program", "parts", *BESIDE["parts"], *TROVE, "signatures")


@dataclass
class Run:
    """One process: seconds by the clock and of the processor, most bytes of memory, and what it says of its work."""

    wall: float
    cpu: float
    rss: int
    anonymous: int
    found: dict[str, float] = field(default_factory=dict)


def measured(command: list[str], env: dict[str, str]) -> Run:
    """A whole process, from its start to its end, with its children."""
    with tempfile.TemporaryFile() as output:
        begun, anonymous = time.perf_counter(), 0
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        while True:
            anonymous = max(anonymous, _anonymous(process.pid))
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            time.sleep(POLL)
        wall = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace")
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}\n{text[-3000:]}")
    last = text.strip().rpartition("\n")[2]
    found = json.loads(last) if last.startswith("{") else {}
    return Run(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, anonymous, found)


def _anonymous(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def run(way: str, data: Path, out: Path, args: argparse.Namespace) -> Run:
    """One run of a way on the raw text below `data`, its files removed after it has been scored."""
    out.mkdir()
    env = os.environ | {
        "MEDGEMMA_KOREAN_ROOT": str(out),
        "HF_HOME": str(out / "home"),
        "HF_HUB_OFFLINE": "1",
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "ARROW_NUM_THREADS"), "1"),
    }
    if way == "program":
        # A folder of its own with the same files, for what the program writes beside them.
        (out / "data").mkdir()
        (out / "data" / "01_raw").symlink_to(data / "01_raw")
        command = [str(PROGRAM), "--data-dir", str(out / "data"), "--workers", "1"]
    else:
        command = [__file__, "--alone", way, "--folder", str(out), "--data", str(data)]
        command += ["--signatures", str(args.signatures)]
    os.sync()  # what was written before is no load of this run
    done = measured([sys.executable, *command], env)
    if way in ("program", *TROVE):
        folder = out / "data" / "02_refined" / "00_plain_text" if way == "program" else out / "kept"
        done.found = raw_mix.score(raw_mix.load(data), _texts(folder))
    shutil.rmtree(out)
    return done


def _texts(folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*.jsonl")):
        if file.name != "dropped.jsonl":
            with open(file, encoding="utf-8") as lines:
                yield from (json.loads(line)["text"] for line in lines)


def made(folder: Path, megabytes: float, seed: int) -> dict:
    truth = raw_mix.make(folder, megabytes, seed)
    return {"bytes": truth.bytes, "documents": truth.documents}


# ours, without exams and near duplicates -------------------------------------------------------------------


def parts(data: Path, out: Path) -> dict:
    """Read, clean, filter, hash and write, as `shards.refine_shard` does it."""
    import pyarrow
    import pyarrow.parquet

    from medgemma_korean.text.clean import clean_batch, rules_for
    from medgemma_korean.text.dedup import content_key
    from medgemma_korean.text.documents import read, tasks_of
    from medgemma_korean.text.filters import drop_reasons
    from medgemma_korean.text.shards import PARQUET

    schema, kept = pyarrow.schema([("text", pyarrow.large_string()), ("key", pyarrow.binary(16))]), 0
    for source in sorted((data / "01_raw" / "00_korean").iterdir()):
        with pyarrow.parquet.ParquetWriter(out / f"{source.name}.parquet", schema, **PARQUET) as writer:
            for task in tasks_of(source):
                for batch in read(task):
                    texts = clean_batch(batch.texts, rules_for(source.name))
                    texts = [text for text, why in zip(texts, drop_reasons(texts, "ko"), strict=True) if not why]
                    keys = [content_key(text) for text in texts]
                    writer.write_table(pyarrow.table([texts, keys], schema=schema))
                    kept += len(texts)
    return {"kept": kept}


# datasets ----------------------------------------------------------------------------------------------------


def with_datasets(data: Path, out: Path, batched: bool) -> dict:
    import datasets

    from medgemma_korean.text.clean import clean_batch, clean_text, rules_for
    from medgemma_korean.text.dedup import content_key
    from medgemma_korean.text.filters import drop_reason, drop_reasons

    datasets.disable_progress_bars()
    kept = 0
    for source in sorted((data / "01_raw" / "00_korean").iterdir()):
        rules = rules_for(source.name)
        rows = datasets.load_dataset("parquet", data_files=str(source / "*.parquet"), split="train")
        if batched:
            rows = rows.map(lambda r, rules=rules: {"text": clean_batch(r["text"], rules)}, batched=True)
            rows = rows.filter(lambda r: [not why for why in drop_reasons(r["text"], "ko")], batched=True)
            rows = rows.map(lambda r: {"key": [content_key(text) for text in r["text"]]}, batched=True)
        else:
            rows = rows.map(lambda r, rules=rules: {"text": clean_text(r["text"], rules)})
            rows = rows.filter(lambda r: not drop_reason(r["text"], "ko"))
            rows = rows.map(lambda r: {"key": content_key(r["text"])})
        rows.to_parquet(out / f"{source.name}.parquet")
        kept += len(rows)
    return {"kept": kept}


# datatrove ---------------------------------------------------------------------------------------------------


class AtSpaces:
    """A word tokenizer that costs nothing, in place of one that knows Korean."""

    word_tokenize = staticmethod(str.split)

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [found.span() for found in re.finditer(r"[^.?!]+[.?!]* *", text)]


def with_datatrove(data: Path, out: Path, own_filters: bool) -> dict:
    import datatrove.utils.word_tokenizers as word_tokenizers

    word_tokenizers.load_word_tokenizer = lambda language: AtSpaces()  # before other modules take it from there

    import datatrove.pipeline.decont.n_grams as decontamination
    import datatrove.pipeline.dedup.minhash as minhash
    import datatrove.pipeline.filters as filters
    import datatrove.utils.hashes.xxhash as trove_xxhash
    import xxhash
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.filters.base_filter import BaseFilter
    from datatrove.pipeline.formatters.base import BaseFormatter
    from datatrove.pipeline.readers import JsonlReader, ParquetReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    from medgemma_korean.text.clean import clean_text, rules_for
    from medgemma_korean.text.filters import drop_reason

    # Its default, which xxhash 4 broke: that takes bytes only. sha1, its other one, is slower.
    trove_xxhash.xxhash64 = lambda text: xxhash.xxh64_intdigest(text.encode())
    hashes = HashConfig(hash_fc="xxhash")

    class Clean(BaseFormatter):
        name = "our cleaner"

        def __init__(self, rules: str) -> None:
            super().__init__()
            self.rules = rules

        def format(self, text: str) -> str:
            return clean_text(text, self.rules)

    class Rules(BaseFilter):
        name = "our filters"

        def filter(self, document):  # noqa: ANN001, ANN202
            reason = drop_reason(document.text, "ko")
            return (False, reason) if reason else True

    def pipeline(number: int, *steps: object) -> None:
        LocalPipelineExecutor(list(steps), tasks=1, workers=1, logging_dir=str(out / "logs" / str(number))).run()

    exams = decontamination.NGramsDecontConfig(n_grams=12, find_query_ngrams=True, hash_config=hashes)
    _trove_index(data, out / "exams", decontamination, exams)
    for number, source in enumerate(sorted((data / "01_raw" / "00_korean").iterdir())):
        rules = (
            [filters.GopherRepetitionFilter(), filters.GopherQualityFilter(min_stop_words=0), filters.C4QualityFilter()]
            if own_filters
            else [Clean(rules_for(source.name)), Rules()]
        )
        pipeline(
            number,
            ParquetReader(str(source)),
            *rules,
            decontamination.NGramsDecontFilter(str(out / "exams"), exams),
            JsonlWriter(str(out / "filtered"), output_filename=f"{number}-${{rank}}.jsonl", compression=None),
        )
    config = minhash.MinhashConfig(hash_config=hashes)
    filtered, signed = JsonlReader(str(out / "filtered")), str(out / "signatures")
    pipeline(10, filtered, minhash.MinhashDedupSignature(signed, config))
    buckets = [minhash.MinhashDedupBuckets(signed, str(out / "buckets"), config=config)]
    logs = str(out / "logs" / "11")
    LocalPipelineExecutor(buckets, tasks=config.num_buckets, workers=1, logging_dir=logs).run()
    pipeline(12, minhash.MinhashDedupCluster(str(out / "buckets"), str(out / "removed"), config=config))
    kept = JsonlWriter(str(out / "kept"), compression=None)
    pipeline(13, filtered, minhash.MinhashDedupFilter(str(out / "removed")), kept)
    return {}


def _trove_index(data: Path, folder: Path, decontamination, config) -> None:  # noqa: ANN001
    """The index of the exam items; its own indexer reads them from lighteval only, so its arithmetic is called."""
    import numpy as np
    from datatrove.utils.hashing import create_hash_func

    # The class itself refuses to be made without lighteval.
    indexer = SimpleNamespace(config=config, tokenizer=AtSpaces(), hash_func=create_hash_func(config.hash_config))
    hashes_of = decontamination.NGramsDecontIndexer.compute_hashes
    found: set[int] = set()
    for split in ("dev", "test"):
        for line in (data / "01_raw" / "02_kor_med_test" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            found.update(hashes_of(indexer, " ".join(item[key] for key in "ABCDE"), item["question"]))
    folder.mkdir()
    np.array(sorted(found), dtype=config.hash_config.np_descr).tofile(folder / "exams.index.hashes")


# pass 2 ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signed:
    """A shard of which nothing but keys and signatures is there."""

    folder: Path
    number: int

    def array(self, suffix: str, mapped: bool = False):  # noqa: ANN201
        import numpy as np

        return np.load(self.folder / f"{self.number}.{suffix}", mmap_mode="r" if mapped else None)


def signatures(out: Path, number: int) -> dict:
    """De-duplicate signatures, of which 5 % are near copies (three slots in four the same) and 5 % exact ones."""
    import numpy as np

    from medgemma_korean.text import merge

    rng, size = np.random.default_rng(5), min(100_000, number // 2)
    copies = size // 20
    shards = [Signed(out, i) for i in range(number // size)]
    for shard in shards:
        signed = rng.integers(1 << 32, size=(size, 128), dtype=np.uint32)
        keys = rng.integers(1 << 63, size=(size, 3), dtype=np.uint64)
        if shard is shards[0]:
            first = signed[size // 2 :].copy(), keys[size // 2 :].copy()
        else:
            # Each copies others than the shards before it.
            chosen = (np.arange(copies) + shard.number * copies) % len(first[0])
            signed[:copies] = np.where(rng.random((copies, 128)) < 0.75, first[0][chosen], signed[:copies])
            keys[copies : 2 * copies] = first[1][chosen]
        np.save(out / f"{shard.number}.keys.npy", keys)
        np.save(out / f"{shard.number}.sig.npy", signed)
    del signed, keys, first
    before = time.process_time()
    decisions = merge.decide(shards, out / "all", limit=None, seed=1, share=0.001, most=2000)
    states = np.bincount(decisions.state, minlength=5)
    planted = copies * (len(shards) - 1)
    return {
        "seconds": time.process_time() - before,
        "documents": size * len(shards),
        "exact copies": int(states[merge.EXACT]) / planted,
        "near copies": int(states[merge.NEAR]) / planted,
    }


# the table ---------------------------------------------------------------------------------------------------


def lines(results: dict[str, dict[str, list[Run]]], truths: dict[str, dict]) -> Iterator[str]:
    """The table, one line a way and size."""
    heads = f"{'MB':>6} {'way':<20} {'MB/s per core':>22} {'ours by it':>10}"
    yield f"{heads} {'wall s':>7} {'RSS MB':>7} {'RssAnon':>8}  found"
    for size, ways in results.items():
        for way, runs in ways.items():
            ours = next((name for name, others in BESIDE.items() if way in others), None)
            ratio = f"{_cpu(runs) / _cpu(ways[ours]):.2f}" if ours in ways else ""
            if way == "signatures":
                shown, spread = "-", f"{statistics.median(run.found['seconds'] for run in runs):.0f} s of CPU"
            else:
                rates = sorted(truths[size]["bytes"] / 1e6 / run.cpu for run in runs)
                shown, spread = size, f"{statistics.median(rates):5.1f} ({rates[0]:.1f} to {rates[-1]:.1f})"
            memory = [max(run.rss for run in runs) / 1e6, max(run.anonymous for run in runs) / 1e6]
            wall = statistics.median(run.wall for run in runs)
            yield (
                f"{shown:>6} {way:<20} {spread:>22} {ratio:>10} {wall:7.1f} {memory[0]:7.0f} {memory[1]:8.0f}"
                f"  {_findings(runs[0].found)}"
            )


def _cpu(runs: list[Run]) -> float:
    return statistics.median(run.cpu for run in runs)


def _findings(found: dict[str, float]) -> str:
    shares = [
        f"{name} {found[name]:.1%}" for name in found if name not in ("lost", "plain", "seconds", "kept", "documents")
    ]
    lost = [f"lost {found['lost']:.0f} of {found['plain']:.0f} others"] if "lost" in found else []
    return ", ".join(shares + lost)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, nargs="+", default=[200], help="megabytes of raw text (default: 200)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way (default: 3)")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), help="these ways (default: all)")
    parser.add_argument("--signatures", type=int, default=3_000_000, metavar="N", help="documents of that way")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, after every run")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.alone:
        way = {
            "make": lambda: made(args.folder, args.mb[0], args.seed),
            "parts": lambda: parts(args.data, args.folder),
            "datasets, batched": lambda: with_datasets(args.data, args.folder, True),
            "datasets, by row": lambda: with_datasets(args.data, args.folder, False),
            "datatrove": lambda: with_datatrove(args.data, args.folder, False),
            "datatrove's filters": lambda: with_datatrove(args.data, args.folder, True),
            "signatures": lambda: signatures(args.folder, args.signatures),
        }[args.alone]
        print(json.dumps(way()))
        return 0
    ways = list(args.only)
    if not importlib.util.find_spec("datatrove") and set(ways) & set(TROVE):
        print("datatrove is not installed, so it is left out: .venv/bin/pip install -e '.[cluster]'")
        ways = [way for way in ways if way not in TROVE]
    results: dict[str, dict[str, list[Run]]] = {}
    truths: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        for megabytes in args.mb:
            size = f"{megabytes:g}"
            data = Path(scratch) / size
            # In a process of its own: what starts from a large one inherits its size in the books of the kernel.
            make = ["--alone", "make", "--folder", str(data), "--mb", size, "--seed", str(args.seed)]
            truths[size] = measured([sys.executable, __file__, *make], dict(os.environ)).found
            results[size] = {way: [] for way in ways}
        for turn in range(args.rounds):
            # In the opposite order every other round, so that what else the machine does meets all of them.
            for size in results:
                for way in ways if turn % 2 == 0 else ways[::-1]:
                    if way == "signatures" and (turn or size != f"{args.mb[0]:g}"):
                        continue
                    one = run(way, Path(scratch) / size, Path(scratch) / "out", args)
                    results[size][way].append(one)
                    print(f"round {turn + 1}: {size} MB, {way}: {one.cpu:.1f} s of CPU", file=sys.stderr, flush=True)
                    if args.json:
                        numbers = {s: {w: [asdict(r) for r in rs] for w, rs in of.items()} for s, of in results.items()}
                        args.json.write_text(json.dumps({"made": truths, "runs": numbers}, indent=1))
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    done = {size: {way: runs for way, runs in of.items() if runs} for size, of in results.items()}
    print("\n".join(lines(done, truths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
