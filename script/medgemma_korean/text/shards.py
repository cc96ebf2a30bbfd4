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
import io
import json
import os
import platform
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from medgemma_korean import records
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import show
from medgemma_korean.text.documents import Batch, Task, place, read

FORMAT = 3
FILES = ("parquet", "keys.npy", "sig.npy", "json")  # of a shard, in the order in which they are written
ARRAYS = {"keys.npy": ("uint64", 3), "sig.npy": ("uint32", 128)}  # what is in their rows
PART = ".part"  # ends the name of a file that is being written
SAMPLES = 200  # dropped documents a reason that a shard keeps for a person to judge the rule by
EXCERPT = 400  # characters of each
# Where a long document was cut, so much of either side is compared with the exams together: longer than any item.
SEAM = 4_000
# Texts are all different, so that a dictionary of them only costs time.
PARQUET = {
    "compression": "zstd",
    "compression_level": 1,
    "write_page_checksum": True,
    "use_dictionary": False,
    "write_statistics": False,
}
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


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


@dataclass(frozen=True)
class Job:
    """A task with what it is refined by. language: "ko" or "en"; rules: of text/clean; exams: digest of the items."""

    task: Task
    language: str
    rules: str
    exams: str
    folder: Path  # where shards lie

    @cached_property
    def stamps(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Size, time and inode of the files, as they were when `name` hashed them; a worker's copy keeps them."""
        return tuple(map(_stamp, self.task.files))

    def check_unchanged(self) -> None:
        """Raises PipelineError for a file that is not the one that was hashed."""
        for file, stamp in zip(self.task.files, self.stamps, strict=True):
            if stamp != _stamp(file):
                raise PipelineError(f"{show(file)}: changed while it was read; run the same command again")

    @cached_property
    def name(self) -> str:
        """Language, source, and the digest of all that the shard depends on."""
        assert self.stamps  # before the hashing, so that no change is missed
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
        """The path of a file to read; one that is damaged is deleted, to be made again, and becomes a message."""
        import pyarrow

        path = self.path(suffix)
        try:
            yield path
        except (pyarrow.ArrowException, OSError, EOFError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise PipelineError(
                f"{show(path)}: a damaged shard ({reason}); it was deleted, run the same command again"
            ) from None

    def about(self) -> dict[str, Any]:
        """The record of the shard."""
        with self.reading("json") as path:
            about = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(about, dict) or about.pop("digest", None) != records.digest_of(about):
                raise ValueError("its checksum does not match")
            return about

    def array(self, suffix: str, mapped: bool = False) -> Any:
        """An array of the shard. A mapped one holds a file handle."""
        import numpy as np
        import xxhash

        about = self.about()
        checksum, shape = about["checksums"][suffix], (about["kept"], ARRAYS[suffix][1])
        header, dtype = _header(suffix, about["kept"]), np.dtype(ARRAYS[suffix][0])
        with self.reading(suffix) as path:
            # Compared, not parsed: NumPy evaluates a header as Python, and a damaged one fails in as many ways.
            with open(path, "rb") as file:
                if file.read(len(header)) != header:
                    raise ValueError("its header does not match")
            if path.stat().st_size != len(header) + shape[0] * shape[1] * dtype.itemsize:
                raise ValueError("its size does not match")
            array = np.memmap(path, dtype, "r", len(header), shape)
            if not mapped:
                array = np.array(array)
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
    import pyarrow
    import pyarrow.parquet

    records.make_folder(job.folder)
    schema = pyarrow.schema([("row", pyarrow.int64()), ("text", pyarrow.large_string())])
    tally, keys, signed = Tally(), [], []
    with (
        _published(job.path("parquet")) as part,
        pyarrow.parquet.ParquetWriter(part, schema, **PARQUET) as writer,
    ):
        for batch in read(job.task):
            rows, texts, sizes = _refine_batch(job, batch, held_out, train_items, tally)
            if not texts:
                continue
            batch_keys, batch_signatures = _hashes(texts, sizes)
            keys.append(batch_keys)
            signed.append(batch_signatures)
            writer.write_table(pyarrow.table([rows, texts], schema=schema))
        job.check_unchanged()
    checksums = {
        "keys.npy": _save(job.path("keys.npy"), keys, "keys.npy"),
        "sig.npy": _save(job.path("sig.npy"), signed, "sig.npy"),
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
    """Delete what killed workers of this machine left half written; those of another run may be at work."""
    for rest in folder.glob(f".*.{platform.node()}.*{PART}"):
        if not records.may_be_written(rest):
            rest.unlink(missing_ok=True)


def _header(suffix: str, count: int) -> bytes:
    """The header of an array of so many rows."""
    import numpy as np

    name, columns = ARRAYS[suffix]
    about = {"descr": np.lib.format.dtype_to_descr(np.dtype(name)), "fortran_order": False, "shape": (count, columns)}
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, about)
    return header.getvalue()


def _save(path: Path, arrays: Sequence[Any], suffix: str) -> str:
    """Write rows of several arrays as one `.npy` file, without a copy of them all; returns the rows' xxh3-64."""
    import numpy as np
    import xxhash

    checksum = xxhash.xxh3_64()
    with _published(path) as part, open(part, "wb") as file:
        file.write(_header(suffix, sum(map(len, arrays))))
        for array in arrays:
            rows = np.ascontiguousarray(array, dtype=ARRAYS[suffix][0])
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
    rows, texts, sizes, positions = [], [], [], []
    cleaned = clean_batch(batch.texts, job.rules)
    # Arrow leaves the UTF-8 form in each string, so that hashing and writing it need not encode again.
    lengths = pyarrow.compute.binary_length(pyarrow.array(cleaned, pyarrow.large_string())).to_pylist()
    reasons = drop_reasons(cleaned, job.language)
    for position, (row, text, size, reason) in enumerate(zip(batch.rows, cleaned, lengths, reasons, strict=True)):
        if reason:
            tally.add(reason, text, size)
            tally.sample(reason, text, place(job.task, row))
        else:
            rows.append(row)
            texts.append(text)
            sizes.append(size)
            positions.append(position)
    held, train = touched_by_all((held_out, train_items), texts)
    cut = _touched_at_cuts(job, batch, cleaned, (held_out, train_items))
    for items in (*train, *(train for _, train in cut.values())):
        tally.train_items.update(items)
    for found, position in zip(held, positions, strict=True):
        found += [item for item in cut.get(position, ((), ()))[0] if item not in found]
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


def _touched_at_cuts(
    job: Job, batch: Batch, cleaned: Sequence[str], indexes: Sequence[Any]
) -> dict[int, tuple[list[str], list[str]]]:
    """{position in the batch: (held-out items, train items)} of items that no piece of a cut document holds by itself.

    Both pieces hold a part of the item, so both are named.
    """
    from medgemma_korean.text.clean import clean_batch
    from medgemma_korean.text.decontaminate import touched_by_all

    if not batch.continued and batch.after is None:
        return {}
    around = [text is not None for text in (batch.before, batch.after)]
    outer = iter(clean_batch([text for text in (batch.before, batch.after) if text is not None], job.rules))
    pieces = [next(outer) if around[0] else "", *cleaned, next(outer) if around[1] else ""]
    rows = [batch.rows[0] if around[0] else -1, *batch.rows, batch.rows[-1] if around[1] else -1]
    seams = [i for i, (row, following) in enumerate(pairwise(rows)) if row == following]
    sides = [text for i in seams for text in (pieces[i][-SEAM:], pieces[i + 1][:SEAM])]
    both = [left + right for left, right in zip(sides[::2], sides[1::2], strict=True)]
    found: dict[int, tuple[list[str], list[str]]] = {}
    for kind, of_index in enumerate(touched_by_all(indexes, [*both, *sides])):
        for number, i in enumerate(seams):
            alone = {item for items in of_index[len(seams) + 2 * number :][:2] for item in items}
            for position in (i - 1, i):  # `pieces` has one more in front
                of_piece = found.setdefault(position, ([], []))[kind]
                of_piece += [item for item in of_index[number] if item not in alone and item not in of_piece]
    return found


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
