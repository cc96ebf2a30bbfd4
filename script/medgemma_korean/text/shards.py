"""Pass 1 of plain-text refinement: one pure function from a task to a shard, safe to run anywhere, any number of times.

A shard is four files under a name that holds the digest of all it depends on (input, rules, word lists, code, library
versions, exam questions): a worker that finds them has nothing to do.

    <name>.parquet       the texts that passed the filters, with their rows
    <name>.keys.npy      uint64 [n, 3], their content keys (xxh3-128, two halves) and sizes in UTF-8 bytes
    <name>.sig.npy       uint32 [n, 128], their MinHash signatures
    <name>.json          counts, contaminated documents, samples of what was dropped, and checksums; written last
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import platform
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from medgemma_korean import records
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import show
from medgemma_korean.text.documents import Batch, Task, place, read

FORMAT = 2
FILES = ("parquet", "keys.npy", "sig.npy", "json")  # of a shard, in the order in which they are written
PART = ".part"  # ends the name of a file that is being written
SAMPLES = 200  # dropped documents a reason that a shard keeps for a person to judge the rule by
EXCERPT = 400  # characters of each
# What decides the content of a shard besides its input.
CODE = (
    "shards.py",
    "documents.py",
    "clean.py",
    "namumark.py",
    "filters.py",
    "filter_words.json",
    "dedup.py",
    "decontaminate.py",
    "points.py",
)
LIBRARIES = ("numpy", "xxhash", "rensa")  # signatures of two rensa versions are not comparable


@cache
def rules_digest() -> str:
    """sha256 over the rules, word lists and code that refine a document, and the libraries that hash it."""
    here = Path(__file__).parent
    code = {name: records.sha256(here / name) for name in CODE}
    return records.digest_of({"format": FORMAT, "code": code, "versions": {n: metadata.version(n) for n in LIBRARIES}})


@dataclass(frozen=True)
class Exams:
    """The exam items that documents are compared with: held-out ones drop a document, train items are counted."""

    held_out: tuple[dict[str, Any], ...]
    train: tuple[dict[str, Any], ...]

    @property
    def digest(self) -> str:
        return records.digest_of([list(self.held_out), list(self.train)])


@dataclass(frozen=True)
class Job:
    """A task with what it is refined by. language: "ko" or "en"; rules: of text/clean; exams: digest of the items."""

    task: Task
    language: str
    rules: str
    exams: str
    folder: Path  # where shards lie

    @cached_property
    def name(self) -> str:
        """Language, source, and the digest of all that the shard depends on."""
        parts = [[p.file, p.start, p.stop, records.sha256_once(self.task.folder / p.file)] for p in self.task.parts]
        digest = records.digest_of([self.task.source, parts, self.language, self.rules, self.exams, rules_digest()])
        # A file name has at most 255 bytes, and a folder of AI Hub may have a long one.
        return f"{self.language}.{self.task.source[:30]}.{digest[:24]}"

    def path(self, suffix: str) -> Path:
        return self.folder / f"{self.name}.{suffix}"

    @property
    def done(self) -> bool:
        """Whether all files are there: deleting shards may have been interrupted too."""
        return all(self.path(suffix).is_file() for suffix in reversed(FILES))

    @contextlib.contextmanager
    def reading(self, suffix: str) -> Iterator[Path]:
        """The path of a file to read; what is wrong with it becomes a message."""
        import pyarrow

        path = self.path(suffix)
        try:
            yield path
        except (pyarrow.ArrowException, OSError, EOFError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PipelineError(
                f"{show(path)}: a damaged shard ({reason}); delete this file and run the same command again"
            ) from None

    def about(self) -> dict[str, Any]:
        """The record of the shard."""
        with self.reading("json") as path:
            about = json.loads(path.read_text(encoding="utf-8"))
            if about.pop("digest", None) != records.digest_of(about):
                raise ValueError("its checksum does not match")
            return about

    def array(self, suffix: str, mapped: bool = False) -> Any:
        """An array of the shard. A mapped one holds a file handle."""
        import numpy as np
        import xxhash

        checksum = self.about()["checksums"][suffix]
        with self.reading(suffix) as path:
            array = np.load(path, mmap_mode="r" if mapped else None)
            if xxhash.xxh3_64_hexdigest(array) != checksum:
                raise ValueError("its checksum does not match")
            return array


@dataclass
class Tally:
    """What happened to the documents of a shard, in documents and bytes by reason."""

    documents: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[tuple[str, str, str]]] = field(default_factory=lambda: defaultdict(list))
    contaminated: list[dict[str, Any]] = field(default_factory=list)
    train_items: set[str] = field(default_factory=set)

    def add(self, reason: str, text: str, size: int) -> None:
        self.documents[reason] += 1
        self.bytes[reason] += size

    def sample(self, reason: str, text: str, where: str) -> None:
        """Keep the SAMPLES texts of smallest hash: a sample that no order of reading changes."""
        from medgemma_korean.text.dedup import content_key

        kept = self.samples[reason]
        kept.append((content_key(text).hex(), where, text[:EXCERPT]))
        if len(kept) >= 2 * SAMPLES:
            self.samples[reason] = heapq.nsmallest(SAMPLES, kept)

    def as_json(self) -> dict[str, Any]:
        return {
            "documents": dict(sorted(self.documents.items())),
            "bytes": dict(sorted(self.bytes.items())),
            "samples": {reason: heapq.nsmallest(SAMPLES, kept) for reason, kept in sorted(self.samples.items())},
            "contaminated": self.contaminated,
            "train_items": sorted(self.train_items),
        }


def refine_shard(job: Job, held_out: Any, train_items: Any) -> Path:
    """Read, clean, filter, compare with the exams, hash and sign the documents of one task; returns the record's path.

    held_out, train_items: ExamIndex of the items that drop a document and of those that are only counted. Nothing is
    done where the shard is there. Raises PipelineError naming file and row for what cannot be read.
    """
    if job.done:
        return job.path("json")
    import numpy as np
    import pyarrow
    import pyarrow.parquet

    job.folder.mkdir(parents=True, exist_ok=True)
    schema = pyarrow.schema([("row", pyarrow.int64()), ("text", pyarrow.large_string())])
    tally, keys, signed = Tally(), [], []
    options = {"compression": "zstd", "compression_level": 1, "write_page_checksum": True}
    with (
        _published(job.path("parquet")) as part,
        pyarrow.parquet.ParquetWriter(part, schema, **options) as writer,
    ):
        for batch in read(job.task):
            rows, texts, sizes = _refine_batch(job, batch, held_out, train_items, tally)
            if not texts:
                continue
            batch_keys, batch_signatures = _hashes(texts, sizes)
            keys.append(batch_keys)
            signed.append(batch_signatures)
            writer.write_table(pyarrow.table([rows, texts], schema=schema))
    checksums = {
        "keys.npy": _save(job.path("keys.npy"), keys, np.empty((0, 3), dtype=np.uint64)),
        "sig.npy": _save(job.path("sig.npy"), signed, np.empty((0, 128), dtype=np.uint32)),
    }
    about = {"source": job.task.source, "language": job.language, "kept": sum(map(len, keys)), "checksums": checksums}
    about = records.read_back(about | tally.as_json())
    records.write_json(job.path("json"), about | {"digest": records.digest_of(about)})
    return job.path("json")


@contextlib.contextmanager
def _published(path: Path) -> Iterator[Path]:
    """A file to write, which appears under its name, on the disk, when the block ends without an error."""
    part = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}{PART}")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def remove_rests(folder: Path) -> None:
    """Delete what killed workers of this machine left half written."""
    for rest in folder.glob(f".*.{platform.node()}.*{PART}"):
        rest.unlink()


def _save(path: Path, arrays: Sequence[Any], empty: Any) -> str:
    """Write rows of several arrays as one `.npy` file, without a copy of them all; returns the rows' xxh3-64."""
    import numpy as np
    import xxhash

    checksum, count = xxhash.xxh3_64(), sum(map(len, arrays))
    about = {"descr": np.lib.format.dtype_to_descr(empty.dtype), "fortran_order": False}
    with _published(path) as part, open(part, "wb") as file:
        np.lib.format.write_array_header_1_0(file, about | {"shape": (count, empty.shape[1])})
        for array in arrays:
            rows = np.ascontiguousarray(array, dtype=empty.dtype)
            file.write(rows.data)
            checksum.update(rows)
    return checksum.hexdigest()


def _hashes(texts: list[str], sizes: list[int]) -> tuple[Any, Any]:
    """Content keys (big-endian halves of the digest) with sizes, uint64 [n, 3], and signatures, uint32 [n, 128]."""
    import numpy as np

    from medgemma_korean.text.dedup import content_key, signatures

    halves = np.frombuffer(b"".join(map(content_key, texts)), dtype=">u8").astype(np.uint64).reshape(-1, 2)
    return np.column_stack([halves, np.array(sizes, dtype=np.uint64)]), signatures(texts)


def _refine_batch(
    job: Job, batch: Batch, held_out: Any, train_items: Any, tally: Tally
) -> tuple[list[int], list[str], list[int]]:
    """The rows, texts and sizes of what is left of a batch, everything else counted with one reason."""
    import pyarrow.compute

    from medgemma_korean.text.clean import clean_batch
    from medgemma_korean.text.decontaminate import touched_by_all
    from medgemma_korean.text.filters import drop_reasons

    tally.documents["read"] += len(batch.texts)
    tally.documents["further_pieces"] += batch.continued
    tally.bytes["read"] += sum(map(_size, batch.texts))
    rows, texts, sizes = [], [], []
    cleaned = clean_batch(batch.texts, job.rules)
    # Arrow leaves the UTF-8 form in each string, so that hashing and writing it need not encode again.
    lengths = pyarrow.compute.binary_length(pyarrow.array(cleaned, pyarrow.large_string())).to_pylist()
    reasons = drop_reasons(cleaned, job.language)
    for row, text, size, reason in zip(batch.rows, cleaned, lengths, reasons, strict=True):
        if reason:
            tally.add(reason, text, size)
            tally.sample(reason, text, place(job.task, row))
        else:
            rows.append(row)
            texts.append(text)
            sizes.append(size)
    held, train = touched_by_all((held_out, train_items), texts)
    for items in train:
        tally.train_items.update(items)
    left = []
    for i, items in enumerate(held):
        if items:
            where = place(job.task, rows[i])
            tally.add("contaminated", texts[i], sizes[i])
            tally.sample("contaminated", texts[i], f"{where}: {', '.join(items)}")
            tally.contaminated.append({"source": job.task.source, "where": where, "items": items})
        else:
            left.append(i)
    tally.documents["passed"] += len(left)
    tally.bytes["passed"] += sum(sizes[i] for i in left)
    return [rows[i] for i in left], [texts[i] for i in left], [sizes[i] for i in left]


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


# in a worker --------------------------------------------------------------------------------------------

_indexes: list[Any] = []


def prepare(exams: Exams) -> None:
    """Build this process's exam indexes, which `work` and `held_out_index` use."""
    from medgemma_korean.text.decontaminate import ExamIndex

    _indexes[:] = [ExamIndex(exams.held_out), ExamIndex(exams.train)]


def work(job: Job) -> Path:
    """`refine_shard` with the indexes that `prepare` built."""
    return refine_shard(job, *_indexes)


def held_out_index() -> Any:
    return _indexes[0]
