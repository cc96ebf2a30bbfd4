"""Read the raw documents of a source folder, of any size, as tasks that workers take independently.

    for task in tasks_of(folder):
        for batch in read(task):         # in any process
            ...                          # batch.texts; place(task, row) says where the document of a row stands

| file | its documents |
|---|---|
| `.parquet`, `.arrow` (stream or file; folders of `datasets.save_to_disk`) | the rows, their column `text` |
| `.jsonl`; `.json` when it is compressed, as C4 has it | one JSON object with a `text` a line |
| `.json` | one list of such objects |
| `.txt` | the text between two empty lines, as in CC-100 and the input of BERT |

`.jsonl`, `.json` and `.txt` may be compressed (`.gz`, `.bz2`, `.xz`, `.zst`). Which documents there are and in which
order depends neither on the size of the tasks nor on who reads them.

Memory is bounded by one batch and the unit of the format: a page of Parquet, a line. Speed on one core, in MB of text a
second with the strings made: Arrow 260 (its offsets and UTF-8 checked), Parquet 250, JSONL 250 (130 where Hangul is
escaped), text 155; zstd 210, gzip 120, xz 54, bz2 28. Refining does about 13. Arrow's own JSON reader is no faster.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import accumulate, pairwise
from math import ceil
from pathlib import Path
from typing import Any, BinaryIO

from medgemma_korean import cli, records
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import show

TEXT = "text"
# Longer documents are cut: no article comes near, and signing a document takes 50 bytes a character.
MAX_CHARACTERS = 1_000_000
# A longer line or entry of JSON is refused: memory goes up to nine times its bytes (ASCII with one emoji).
MAX_ENTRY = 64_000_000
CHUNK = 1 << 20
# A row group of Parquet cannot be entered in its middle: a part of it reads what stands before and throws it away, at
# 500 MB/s. Eight parts cost a tenth of the refining; pyarrow writes a million rows into a group unless told otherwise.
MAX_PARTS_OF_GROUP = 8
# A task of small files holds at most so many of them, and a batch counts a short text as this many characters.
MAX_FILES, LEAST_CHARACTERS = 10_000, 100
# A row names a part of its task and a position in it: part * SPAN + position.
SPAN = 1 << 44

FORMATS = ".parquet, .arrow, .jsonl, .json, .txt; .jsonl, .json and .txt also as .gz, .bz2, .xz and .zst"
# How many times its size a compressed file of Korean text holds, for progress only: measured 2.6 to 3.6.
EXPANSION = {".gz": 3, ".bz2": 4, ".xz": 4, ".zst": 3}
# Text that people put beside a corpus.
NOTES = ("readme", "license", "licence", "copying", "notice")
UTF8_MARK = b"\xef\xbb\xbf"
REPAIR = "correct it, or take that line out"
CUT_CHARACTER = "not UTF-8 (cut in the middle of a character); bring the file anew"


@dataclass(frozen=True)
class Part:
    """Consecutive documents of one file.

    file: below the task's folder, with "/". start, stop: rows of a table, bytes of lines and text; else 0 and the size.
    size: bytes of text, as far as the format tells without reading them (with the other columns of Parquet).
    """

    file: str
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Task:
    """What one worker reads at a time: a part of a large file, or several small files."""

    folder: Path
    parts: tuple[Part, ...]

    @property
    def source(self) -> str:
        return self.folder.name

    @property
    def files(self) -> list[Path]:
        return list(dict.fromkeys(self.folder / part.file for part in self.parts))

    @property
    def size(self) -> int:
        """Bytes of text, estimated: for progress and the time left."""
        return sum(part.size for part in self.parts)


@dataclass
class Batch:
    """Documents in order. rows: for `place`; the pieces of one cut document have one row.

    continued: how many texts go on with the document of the text before them, in this batch or the one before.
    nulls: how many rows had no text; they are in `texts` as "", so that a filter drops them and counts them.
    before, after: the pieces in the neighbouring batches that the first text goes on from, and the last one goes on
    with; None where a document begins or ends.
    """

    texts: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    continued: int = 0
    nulls: int = 0
    before: str | None = None
    after: str | None = None


# Files and tasks ----------------------------------------------------------------------------------------


def kind_of(file: Path) -> str | None:
    """How the documents of a file are read: "parquet", "arrow", "lines", "list" or "text"; None for other files."""
    name = file.name.lower()
    bare = name.removesuffix(_compression(file))
    if any(fnmatch(name, pattern) for pattern in records.NOT_ROWS):
        return None
    if bare.endswith(".jsonl") or (bare != name and bare.endswith(".json")):
        return "lines"
    if bare.endswith(".txt"):
        return None if bare.startswith(NOTES) else "text"
    return {".json": "list", ".arrow": "arrow", ".parquet": "parquet"}.get(Path(name).suffix)


def _compression(file: Path) -> str:
    suffix = file.suffix.lower()
    return suffix if suffix in EXPANSION else ""


def files_of(folder: Path) -> list[Path]:
    """The files of a folder and its sub-folders that hold documents, sorted; hidden ones are left out.

    Raises PipelineError for a folder that cannot be read, a link to a folder or to nothing, and a shard that
    `save_to_disk` wrote and is not there.
    """
    files, problems = _inventory(folder)
    _raise(problems)
    return files


def _inventory(folder: Path) -> tuple[list[Path], list[str]]:
    files, problems = [], []

    def unreadable(error: OSError) -> None:
        problems.append(f"{show(Path(error.filename))}: cannot be read ({error.strerror})")

    for here, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked = [Path(here, name) for name in folders if Path(here, name).is_symlink()]
        problems += [f"{show(link)}: a link to a folder, which is not followed; link its files" for link in linked]
        shown = [Path(here, name) for name in names if not name.startswith(".")]
        try:
            saved = _saved_shards(Path(here, "state.json")) if "state.json" in names else None
        except PipelineError as error:
            problems.append(str(error))
            saved = None
        if saved is not None:
            gone = sorted(saved - set(names))
            problems += [f"{show(Path(here, name))}: missing, and state.json beside it names it" for name in gone]
            shown = [file for file in shown if kind_of(file) != "arrow" or file.name in saved]
        for file in filter(kind_of, shown):
            if file.exists():
                files.append(file)
            else:
                problems.append(f"{show(file)}: a link to a file that does not exist")
    return sorted(files, key=lambda file: file.relative_to(folder).parts), sorted(problems)


def _saved_shards(state: Path) -> set[str] | None:
    """The shards that a state.json of `save_to_disk` names; None for another file of this name."""
    about = records.read_json(state)
    shards = about.get("_data_files") if isinstance(about, dict) else None
    if not isinstance(shards, list):
        return None
    names = [shard.get("filename") if isinstance(shard, dict) else None for shard in shards]
    if not all(isinstance(name, str) for name in names):
        raise PipelineError(
            f'{show(state)}: "_data_files" names no files, as those of save_to_disk do; mend or delete it'
        )
    return set(names)


def tasks_of(folder: Path, task_bytes: int = 96_000_000) -> list[Task]:
    """The documents of a folder as tasks of about `task_bytes` bytes of text, in order.

    What cannot be split is one task: a compressed file, a list. Raises PipelineError naming every file that is
    empty, damaged as far as its index tells, or without a column of text; and when there is no file.
    """
    files, problems = _inventory(folder)
    if not files and not problems:
        raise PipelineError(f"{show(folder)}: no text files ({FORMATS})")
    parts: list[Part] = []
    for file in files:
        try:
            name = file.relative_to(folder).as_posix()
            parts += [Part(name, *span) for span in _spans(file, task_bytes)]
        except PipelineError as error:
            problems.append(str(error))
    _raise(problems)
    return [Task(folder, tuple(group)) for group in _grouped(parts, task_bytes)]


def _raise(problems: list[str]) -> None:
    if problems:
        more = [f"and {cli.count(len(problems) - 20, 'more file')}"] if len(problems) > 20 else []
        raise PipelineError("\n".join(problems[:20] + more))


def _grouped(parts: Iterable[Part], task_bytes: int) -> Iterator[list[Part]]:
    group: list[Part] = []
    size = 0
    for part in parts:
        if group and (size + part.size > task_bytes or len(group) == MAX_FILES):
            yield group
            group, size = [], 0
        group.append(part)
        size += part.size
    if group:
        yield group


def _spans(file: Path, task_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, bytes of text) of the parts of a file. Raises PipelineError for a file that cannot be read."""
    with _readable(file):
        size = file.stat().st_size
        if not size:
            raise PipelineError(f"{show(file)}: an empty file (0 bytes); bring it anew, or remove it")
        kind = kind_of(file)
        if kind in ("parquet", "arrow"):
            chunks = _parquet_sizes(file) if kind == "parquet" else list(_arrow_sizes(file))
            if not any(rows for rows, _ in chunks):
                raise PipelineError(f"{show(file)}: no rows")
            most = MAX_PARTS_OF_GROUP if kind == "parquet" else task_bytes
            yield from _row_spans(chunks, task_bytes, most)
        elif kind == "list" or _compression(file):
            yield 0, size, size * EXPANSION.get(_compression(file), 1)
        else:
            edges = [0, *_edges(file, size, ceil(size / task_bytes), kind == "text"), size]
            yield from ((start, stop, stop - start) for start, stop in pairwise(edges))


def _row_spans(chunks: Iterable[tuple[int, int]], task_bytes: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Rows of chunks, given as (rows, bytes): small chunks together, a large one in up to `most` equal parts."""
    start = row = size = 0
    for rows, weight in chunks:
        if row > start and size + weight > task_bytes:
            yield start, row, size
            start, size = row, 0
        pieces = min(ceil(weight / task_bytes), most, rows)
        if pieces > 1:
            edges = [row + rows * i // pieces for i in range(pieces + 1)]
            yield from ((low, high, weight // pieces) for low, high in pairwise(edges))
            start, size = row + rows, 0
        else:
            size += weight
        row += rows
    if row > start:
        yield start, row, size


def _edges(file: Path, size: int, count: int, text: bool) -> Iterator[int]:
    """Where to cut a file into `count` parts: at the first line, or document of text, behind each equal share."""
    with open(file, "rb", CHUNK) as stream:
        edge = 0
        for i in range(1, count):
            share = size * i // count
            if share <= edge:
                continue
            stream.seek(share - 1)
            _skip_line(stream)
            while text and not _skip_line(stream):
                pass
            edge = stream.tell()
            if edge >= size:
                return
            yield edge


def _skip_line(stream: BinaryIO) -> bool:
    """Go behind the next line end; True when only spaces stand before it, or at the end of the file."""
    line = stream.readline(CHUNK)
    empty = not line.strip() and _whole(line)
    while not _whole(line):
        line = stream.readline(CHUNK)
    return empty


def _whole(line: bytes) -> bool:
    """Whether what `readline(CHUNK)` gave is a line up to its end, or up to the end of the file."""
    return line.endswith(b"\n") or len(line) < CHUNK


# Reading ------------------------------------------------------------------------------------------------


def read(task: Task, batch_characters: int = 4_000_000) -> Iterator[Batch]:
    """The documents of a task in batches of at most `batch_characters` (more only for one text that has more).

    A document of more than MAX_CHARACTERS becomes several texts; joined they are the document.
    Raises PipelineError naming the file and the row or line of what cannot be read.
    """
    batch, room = Batch(), batch_characters
    for index, part in enumerate(task.parts):
        last = -1
        for position, text in _documents(task.folder / part.file, part.start, part.stop):
            for piece in _pieces(text or ""):
                cost = max(len(piece), LEAST_CHARACTERS)
                if cost > room and batch.texts:
                    before = batch.texts[-1] if position == last else None
                    batch.after = None if before is None else piece
                    yield batch
                    batch, room = Batch(before=before), batch_characters
                room -= cost
                batch.texts.append(piece)
                batch.rows.append(index * SPAN + position)
                batch.continued += position == last
                last = position
            batch.nulls += text is None
        if last < 0 and part.start == 0:
            _check_not_blank(task.folder / part.file, part)
    if batch.texts:
        yield batch


def _check_not_blank(file: Path, part: Part) -> None:
    if kind_of(file) in ("lines", "list", "text") and part.stop == file.stat().st_size:
        raise PipelineError(f"{show(file)}: no documents; bring it anew, or remove it")


def check(folder: Path) -> int:
    """Read the first document of every file of a folder; returns the number of files.

    Raises PipelineError naming every file that cannot be read.
    """
    problems, firsts = [], [p for task in tasks_of(folder) for p in task.parts if p.start == 0]
    for part in firsts:
        try:
            if next(_documents(folder / part.file, 0, part.stop), None) is None:
                _check_not_blank(folder / part.file, part)
        except PipelineError as error:
            problems.append(str(error))
    _raise(problems)
    return len(firsts)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > MAX_CHARACTERS:
        stop = _cut(text, start)
        yield text[start:stop]
        start = stop
    yield text[start:] if start else text


def _cut(text: str, start: int) -> int:
    """Behind the last paragraph, else line, else word that ends in the second half of what is allowed."""
    half, stop = start + MAX_CHARACTERS // 2, start + MAX_CHARACTERS
    for mark in ("\n\n", "\n", " "):
        if (found := text.rfind(mark, half, stop)) >= 0:
            return found + len(mark)
    return stop


def _documents(file: Path, start: int, stop: int) -> Iterator[tuple[int, str | None]]:
    """(position, text) of documents; a text may come in pieces of one position."""
    reader = {"parquet": _parquet, "arrow": _arrow, "lines": _json_lines, "list": _json_list, "text": _text}
    with _readable(file):
        yield from reader[kind_of(file) or ""](file, start, stop)


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turns what the operating system refuses into a message."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise PipelineError(f"{show(file)}: cannot be read ({reason})") from None


# Parquet and Arrow --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_parquet(file: Path) -> Iterator[tuple[Any, list[tuple[int, int]]]]:
    """A Parquet file and the (rows, bytes) of its row groups. Raises PipelineError for a damaged footer."""
    import pyarrow.parquet

    with _intact(file, "Parquet"):
        # Without pre_buffer=False a whole column chunk is read at once: 2 GB where the file is one row group.
        table = pyarrow.parquet.ParquetFile(file, buffer_size=CHUNK, pre_buffer=False, page_checksum_verification=True)
        _check_schema(file, table.schema_arrow)
        # Bytes of all columns: asking a damaged footer for those of one aborts the process (pyarrow 26).
        found = map(table.metadata.row_group, range(table.metadata.num_row_groups))
        groups = [(group.num_rows, group.total_byte_size) for group in found]
        if any(rows < 0 or size < 0 for rows, size in groups):
            raise pyarrow.ArrowInvalid("negative sizes")
    with table:
        yield table, groups


def _parquet_sizes(file: Path) -> list[tuple[int, int]]:
    with _open_parquet(file) as (_, groups):
        return groups


def _parquet(file: Path, start: int, stop: int) -> Iterator[tuple[int, str | None]]:
    with _open_parquet(file) as (table, groups):
        ends = list(accumulate(rows for rows, _ in groups))
        wanted = [i for i, (rows, _) in enumerate(groups) if ends[i] > start and ends[i] - rows < stop]
        size = max(sum(groups[i][1] for i in wanted) // max(1, sum(groups[i][0] for i in wanted)), 1)
        batches = table.iter_batches(
            batch_size=min(256, max(1, CHUNK // size)),  # rows: they are in memory twice
            row_groups=wanted,
            columns=[TEXT],
            use_threads=False,  # a worker has one core
        )
        first = ends[wanted[0]] - groups[wanted[0]][0] if wanted else 0
        yield from _rows(file, "Parquet", batches, first, start, stop)


def _arrow(file: Path, start: int, stop: int) -> Iterator[tuple[int, str | None]]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as mapped:
        yield from _rows(file, "Arrow", _arrow_batches(file, mapped), 0, start, stop)


def _arrow_sizes(file: Path) -> Iterator[tuple[int, int]]:
    """(rows, bytes of text) of the record batches; of these only the headers are read."""
    import pyarrow

    with pyarrow.memory_map(str(file)) as mapped:
        for _, batch in _guarded(file, "Arrow", _arrow_batches(file, mapped), 0):
            yield batch.num_rows, batch.column(TEXT).nbytes


def _arrow_batches(file: Path, mapped: Any) -> Iterator[Any]:
    """The record batches of a stream (which is what `datasets` writes) or of a file. Raises Arrow's own errors."""
    import pyarrow

    if mapped.read(6) == b"ARROW1":
        reader = pyarrow.ipc.open_file(mapped)
        batches = map(reader.get_batch, range(reader.num_record_batches))
        whole = True
    else:
        # A stream that is cut between two batches reads like a whole one, but for this mark.
        mapped.seek(max(0, mapped.size() - 8))
        whole = mapped.read(8) == b"\xff\xff\xff\xff\0\0\0\0"
        mapped.seek(0)
        batches = reader = pyarrow.ipc.open_stream(mapped)
    _check_schema(file, reader.schema)
    for batch in batches:
        batch.column(TEXT).validate()  # a damaged length crashes what does not look at the size of its buffers
        yield batch
    if not whole:
        raise pyarrow.ArrowInvalid("the end mark is missing")


def _check_schema(file: Path, schema: Any) -> None:
    if TEXT not in schema.names:
        raise PipelineError(f"{show(file)}: {_no_text(schema.names)}; rename the column")
    if (number := schema.names.count(TEXT)) > 1:
        raise PipelineError(f'{show(file)}: {number} columns are called "{TEXT}"; rename all but one')
    type = schema.field(TEXT).type
    if not _is_string(type):
        raise PipelineError(f'{show(file)}: the column "{TEXT}" holds {type}, not strings')


def _is_string(type: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(type):
        type = type.value_type
    return types.is_string(type) or types.is_large_string(type) or types.is_string_view(type)


def _guarded(file: Path, what: str, batches: Iterable[Any], row: int) -> Iterator[tuple[int, Any]]:
    """(first row, batch), with Arrow's errors as messages."""
    iterator = iter(batches)
    while True:
        with _intact(file, what, row):
            batch = next(iterator, None)
        if batch is None:
            return
        yield row, batch
        row += batch.num_rows


@contextlib.contextmanager
def _intact(file: Path, what: str, row: int | None = None) -> Iterator[None]:
    """Turns Arrow's errors into a message; a damaged name is a UnicodeDecodeError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # not Arrow's own
            raise
        where = "" if row is None else f", from row {row + 1:,} on"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PipelineError(f"{show(file)}{where}: damaged or cut {what} file ({reason}); bring it anew") from None


def _rows(
    file: Path, what: str, batches: Iterable[Any], first: int, start: int, stop: int
) -> Iterator[tuple[int, str | None]]:
    """(row, text) of the rows from `start` to `stop` of batches that begin at row `first`."""
    end = first
    for row, batch in _guarded(file, what, batches, first):
        end = row + batch.num_rows
        low = max(start, row)
        if low < end:
            yield from _strings(file, what, low, batch.column(TEXT).slice(low - row, stop - low))
        if end >= stop:
            return
    if end < stop:
        raise PipelineError(f"{show(file)}: {end:,} rows where {stop:,} were listed; it has changed or is damaged")


def _strings(file: Path, what: str, row: int, column: Any) -> Iterator[tuple[int, str | None]]:
    import pyarrow

    with _intact(file, what, row):
        if what == "Arrow":  # where a damaged offset could point anywhere; the reader of Parquet makes its own
            _validate(column)
        if not pyarrow.types.is_string(column.type):
            column = column.cast(pyarrow.large_string(), safe=False)
    for low, high in _slices(column):
        try:
            texts = column[low:high].to_pylist()
        except UnicodeDecodeError:
            texts = [_string(file, row + i, column[i]) for i in range(low, high)]
        yield from enumerate(texts, row + low)


def _validate(column: Any) -> None:
    import pyarrow

    try:
        column.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        if "UTF8" not in str(error):  # of which the row is found when its string is made
            raise


def _string(file: Path, row: int, scalar: Any) -> str | None:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise PipelineError(f"{show(file)}, row {row + 1:,}: {_not_utf8(error)}") from None


def _slices(column: Any) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about 4 MB each: a batch of Arrow may hold gigabytes, mapped from the disk."""
    if column.nbytes <= 4 * CHUNK:
        yield 0, len(column)
        return
    import numpy as np
    import pyarrow.compute

    sizes = pyarrow.compute.binary_length(column).fill_null(0).to_numpy()
    slices = np.cumsum(sizes, dtype=np.int64) // (4 * CHUNK)
    edges = [0, *(np.flatnonzero(np.diff(slices)) + 1).tolist(), len(column)]
    yield from pairwise(edges)


# Lines of JSON, lists and text --------------------------------------------------------------------------


def _lines(file: Path, start: int, stop: int, limit: int) -> Iterator[tuple[int, bytes]]:
    """(number within the part, line) with a long line in pieces of `limit` bytes; the file's mark is left out."""
    compressed = _compression(file)
    number, byte = 0, start
    try:
        with _open(file) as stream:
            if start:
                stream.seek(start)
            while compressed or byte < stop:
                line = stream.readline(limit)
                if not line:
                    break
                yield number, line.removeprefix(UTF8_MARK) if byte == 0 else line
                byte += len(line)
                number += line.endswith(b"\n")
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _wrong(file, 0, number, f"damaged or cut {compressed[1:]} file ({error}); bring it anew") from None
    if not compressed and byte < stop:
        raise PipelineError(f"{show(file)}: {byte:,} bytes where {stop:,} were listed; it has changed")


def _open(file: Path) -> BinaryIO:
    compression = _compression(file)
    if not compression:
        return open(file, "rb", CHUNK)
    if compression == ".zst":
        import pyarrow

        unpacked: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd")
    else:
        unpacked = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[compression](file)
    return io.BufferedReader(unpacked, CHUNK)


def _json_lines(file: Path, start: int, stop: int) -> Iterator[tuple[int, str | None]]:
    for number, line in _lines(file, start, stop, MAX_ENTRY):
        try:
            if len(line) == MAX_ENTRY and not line.endswith(b"\n"):
                raise ValueError(f"longer than {cli.size_text(MAX_ENTRY)}; this is no JSONL file")
            if not line.isspace() and line:
                yield number, _text_of(records.parse_row(line))
        except UnicodeDecodeError as error:
            raise _wrong(file, start, number, _not_utf8(error)) from None
        except ValueError as error:
            raise _wrong(file, start, number, f"{error}; {REPAIR}") from None


def _text_of(row: dict[str, Any]) -> str | None:
    """The text of a row; None where it is null. Raises ValueError for a row without, or with something else."""
    if TEXT not in row:
        raise ValueError(_no_text(list(row)))
    text = row[TEXT]
    if text is not None and not isinstance(text, str):
        raise ValueError(f'"{TEXT}" is {_JSON_NAMES[type(text)]}, not a string')
    return text


_JSON_NAMES = {int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}


def _no_text(names: list[str]) -> str:
    found = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f'no "{TEXT}" column; found {found or "nothing"}'


def _not_utf8(error: UnicodeDecodeError) -> str:
    """The reason, with a hint where the bytes read as another encoding that Korean text comes in."""
    from medgemma_korean.dictionary_files import is_everyday_syllable

    data = bytes(error.object)
    hint = "; convert it to UTF-8"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        hint = "; it is UTF-16: convert it with iconv -f utf-16 -t utf-8"
    elif error.reason == "unexpected end of data":
        return CUT_CHARACTER
    else:
        # From the first byte that is no UTF-8; the last character may be cut.
        sample = data[error.start : error.start + 2000].decode("cp949", "replace")[:-1]
        hangul = [c for c in sample if "가" <= c <= "힣"]
        # UTF-8 read as CP949 gives syllables that no word has.
        if hangul and "\ufffd" not in sample and sum(map(is_everyday_syllable, hangul)) >= 0.95 * len(hangul):
            hint = "; it reads as CP949 (EUC-KR): convert it with iconv -f cp949 -t utf-8"
    return f"not UTF-8 (byte {error.start + 1}){hint}"


def _text(file: Path, start: int, stop: int) -> Iterator[tuple[int, str]]:
    """Documents of text, in pieces of at most MAX_CHARACTERS while the file is read."""
    held: list[str] = []
    length = first = 0
    rest, within = b"", False  # bytes of a cut character; whether the last line goes on
    for number, line in _lines(file, start, stop, CHUNK):
        if not within and not line.strip() and _whole(line):
            if held:
                yield from _last_piece(first, held)
                held, length = [], 0
            continue
        if not held:
            first = number
        within = not line.endswith(b"\n")
        try:
            text, used = codecs.utf_8_decode(rest + line, "strict", not within)
        except UnicodeDecodeError as error:
            raise _wrong(file, start, number, _not_utf8(error)) from None
        rest = (rest + line)[used:] if within else b""
        held.append(text)
        length += len(text)
        if length > MAX_CHARACTERS:
            *pieces, last = _pieces("".join(held))
            yield from ((first, piece) for piece in pieces)
            held, length = [last], len(last)
    if rest:
        raise _wrong(file, start, number, CUT_CHARACTER)
    if held:
        yield from _last_piece(first, held)


def _last_piece(first: int, held: list[str]) -> Iterator[tuple[int, str]]:
    text = "".join(held).rstrip("\r\n")
    if text:
        yield first, text


class _Window:
    """A UTF-8 file of which only what is being parsed is in memory."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.file, self.stream = file, stream
        self.text, self.at, self.lines, self.ended = "", 0, 0, False
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def more(self) -> None:
        # Twice as much each time, so that parsing a long entry again and again stays linear.
        data = self.stream.read(max(CHUNK, len(self.text) - self.at))
        self.lines += self.text.count("\n", 0, self.at)
        self.text, self.at, self.ended = self.text[self.at :], 0, not data
        try:
            self.text += self.decoder.decode(data, self.ended)
        except UnicodeDecodeError as error:
            line = self.lines + self.text.count("\n") + bytes(error.object).count(b"\n", 0, error.start)
            raise PipelineError(f"{show(self.file)}, line {line + 1:,}: {_not_utf8(error)}") from None

    def mark(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self.at = _SPACES.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def entry(self) -> Any:
        while True:
            try:
                value, self.at = _DECODER.raw_decode(self.text, self.at)
                return value
            except json.JSONDecodeError as error:
                if self.ended or len(self.text) - self.at > MAX_ENTRY:
                    raise self.wrong(f"{records.json_reason(error)}; {REPAIR}", error.pos) from None
                self.more()
            except (ValueError, RecursionError) as error:
                raise self.wrong(f"{records.json_reason(error)}; {REPAIR}", self.at) from None

    def wrong(self, reason: str, at: int | None = None) -> PipelineError:
        line = self.lines + self.text.count("\n", 0, self.at if at is None else at)
        return PipelineError(f"{show(self.file)}, line {line + 1:,}: {reason}")


_SPACES = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def _json_list(file: Path, start: int, stop: int) -> Iterator[tuple[int, str | None]]:
    """A list, entry by entry: the whole of a large one would take eight times its size in memory."""
    with open(file, "rb") as stream:
        window, row = _Window(file, stream), 0
        if window.mark() != "[":
            raise window.wrong(
                "expected a JSON list of objects; call it .jsonl if each line is an object, "
                'and see MANUAL_DATA.md, "AI Hub", for other layouts'
            )
        window.at += 1
        if window.mark() == "]":
            return
        while True:
            if window.mark() != "{":
                raise window.wrong(f"row {row + 1:,}: expected a JSON object")
            try:
                yield row, _text_of(window.entry())
            except ValueError as error:
                raise PipelineError(f"{show(file)}, row {row + 1:,}: {error}") from None
            row += 1
            mark = window.mark()
            window.at += 1
            if mark == "]":
                break
            if mark != ",":
                raise window.wrong("not valid JSON (expected a comma or the end of the list)")
        if window.mark():
            raise window.wrong("something follows the end of the list")


# Places -------------------------------------------------------------------------------------------------


def place(task: Task, row: int) -> str:
    """Where the document of a row stands: "namu_wiki/a.parquet, row 12,345", "c4_korean/b.jsonl, line 77".

    Rows and lines count from 1 in the whole file. The first place that is asked of a task counts the lines before it.
    """
    index, position = divmod(row, SPAN)
    part = task.parts[index]
    return f"{task.source}/{part.file}, {_where(task.folder / part.file, part.start, position)}"


def _wrong(file: Path, start: int, position: int, reason: str) -> PipelineError:
    return PipelineError(f"{show(file)}, {_where(file, start, position)}: {reason}")


def _where(file: Path, start: int, position: int) -> str:
    if kind_of(file) in ("lines", "text"):
        return f"line {_lines_before(file, start) + position + 1:,}"
    return f"row {position + 1:,}"


_counted: dict[tuple[Path, int, int], dict[int, int]] = {}


def _lines_before(file: Path, start: int) -> int:
    """How many lines end before byte `start`, counted on from the nearest byte that is known."""
    if not start:
        return 0
    stat = file.stat()
    known = _counted.setdefault((file, stat.st_size, stat.st_mtime_ns), {0: 0})
    byte = max(b for b in known if b <= start)
    lines = known[byte]
    with open(file, "rb") as stream:
        stream.seek(byte)
        while byte < start and (data := stream.read(min(4 * CHUNK, start - byte))):
            lines += data.count(b"\n")
            byte += len(data)
    known[start] = lines
    return lines
