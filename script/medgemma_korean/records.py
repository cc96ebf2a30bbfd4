"""Reading and writing rows: JSONL, JSON, Parquet and Arrow, streamed, with the file and line in every error.

Writers are atomic: a file is written beside its place, flushed to disk and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import gzip
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from medgemma_korean.cli import PipelineError

# Files of these names hold one JSON object a line (C4 calls them .json.gz).
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz")
SEAL = "seal"  # the key under which an object keeps the hash of its content
ROW_SUFFIXES = (*LINE_SUFFIXES, ".json", ".parquet", ".arrow")
NAME_BYTES = 200  # of a file name from data: disks take 255, and parts and previous results have longer names
# What `datasets` writes beside its rows: save_to_disk, the hub's tools, and caches of a map or filter.
NOT_ROWS = ("state.json", "dataset_info.json", "dataset_dict.json", "dataset_infos.json", "cache-*.arrow")


def read_jsonl(path: Path, needs: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file (`.gz` too, UTF-8, byte-order mark tolerated), blank lines skipped.

    Raises PipelineError with file and line for bytes that are not UTF-8, a line that is not JSON, a row that is not
    an object, or one without text under a key of `needs`.
    """
    if not path.is_file():
        raise PipelineError(f"{path}: no such file")
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                row = _parse_line(line, path, number)
                _require(row, needs, f"{path}, line {number}")
                yield row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise PipelineError(f"{path}, line {number + 1}: damaged or cut gzip file ({error}); bring it anew") from None


def _parse_line(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        return parse_row(line)
    except UnicodeDecodeError as error:
        raise PipelineError(f"{path}, line {number}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except ValueError as error:
        raise PipelineError(f"{path}, line {number}: {error}; correct that line") from None


def _require(row: dict[str, Any], needs: Sequence[str], where: str) -> None:
    if missing := [key for key in needs if not isinstance(row.get(key), str)]:
        raise PipelineError(f"{where}: no text under {', '.join(missing)}; the row has {', '.join(row) or 'no keys'}")


def parse_row(line: bytes) -> dict[str, Any]:
    """One line as a JSON object. Raises UnicodeDecodeError, or ValueError whose message is the reason."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(json_reason(error)) from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
    return row


def json_reason(error: Exception) -> str:
    """What the JSON parser found wrong; a plain ValueError is a number of thousands of digits."""
    reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply or too long a number"
    return f"not valid JSON ({reason})"


def read_json(path: Path) -> Any:
    """A whole JSON file. Raises PipelineError with file and line."""
    if not path.is_file():
        raise PipelineError(f"{path}: no such file")
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise PipelineError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise PipelineError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); bring it anew") from None
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{path}: {json_reason(error)}; bring it anew") from None


def read_object(path: Path, *needs: str, repair: str = "bring it anew") -> dict[str, Any]:
    """A JSON file that holds an object with these keys. Raises PipelineError, with what to do, for another one."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise PipelineError(f"{path}: expected a JSON object, found {type(value).__name__}; {repair}")
    if lacks := [key for key in needs if key not in value]:
        raise PipelineError(f"{path}: lacks {', '.join(lacks)}; {repair}")
    return value


def read_list(path: Path, needs: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of a JSON file that holds a list of objects.

    Raises PipelineError for another file, and with its number for a row without text under a key of `needs`.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or any(not isinstance(row, dict) for row in rows):
        raise PipelineError(f"{path}: expected a JSON list of objects; bring another file")
    for number, row in enumerate(rows, 1):
        _require(row, needs, f"{path}, row {number}")
    return rows


def read_parquet(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, one batch of 1,000 in memory at a time. Raises PipelineError when it is damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        wanted = [c for c in columns if c in file.schema_arrow.names] if columns else None
        for batch in file.iter_batches(batch_size=1000, columns=wanted):
            yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, pyarrow.ArrowException, OSError) as error:
        raise PipelineError(f"{path}: damaged Parquet file ({str(error).splitlines()[0]}); bring it anew") from None


def read_arrow(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of an Arrow file, as a stream (what `datasets` writes) or as a file. Raises PipelineError when damaged."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":
                file = pyarrow.ipc.open_file(source)
                batches: Iterable[Any] = (file.get_batch(i) for i in range(file.num_record_batches))
            else:
                source.seek(max(source.size() - 8, 0))
                if source.read() != b"\xff\xff\xff\xff\0\0\0\0":  # a cut stream may read as a shorter one
                    raise ValueError("its end is missing")
                source.seek(0)
                batches = pyarrow.ipc.open_stream(source)
            for batch in batches:
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise PipelineError(f"{path}: damaged Arrow file ({str(error).splitlines()[0]}); bring it anew") from None


def parquet_rows(path: Path) -> int:
    """How many rows a Parquet file holds, from its footer. Raises PipelineError when it is damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path).num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise PipelineError(f"{path}: damaged Parquet file ({str(error).splitlines()[0]}); bring it anew") from None


def files_below(folder: Path) -> list[Path]:
    """The files of a folder and its sub-folders, sorted, hidden ones left out.

    A link to a folder is followed where it stands in `folder` itself: a source may lie on another disk.
    """
    links = [p for p in folder.glob("*") if p.is_symlink() and p.is_dir()]
    found = (p for start in (folder, *links) for p in start.rglob("*") if p.is_file())
    shown = {p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)}
    return sorted(shown)  # of a set: Python 3.13 may follow the links by itself


def row_files(folder: Path) -> list[Path]:
    """The row files of a folder and its sub-folders, sorted, hidden ones left out; the file itself for a file."""
    if folder.is_file():
        return [folder]
    found = (p for p in files_below(folder) if p.name.endswith(ROW_SUFFIXES))
    return [p for p in found if not any(p.match(name) for name in NOT_ROWS)]


def readable_name(path: Path) -> str:
    """A path whose name is not UTF-8, as Windows machines of Korea leave them in an archive, in letters to print."""
    try:
        return os.fsencode(path).decode("cp949")
    except UnicodeDecodeError:
        return os.fsencode(path).decode("utf-8", "backslashreplace")


def make_folder(path: Path) -> None:
    """Make a folder and those above it. Raises PipelineError where a file, or a link to nothing, stands in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        way = next(p for p in (*reversed(path.parents), path) if not p.is_dir())
        what = "a link to a folder that does not exist" if way.is_symlink() else "a file"
        raise PipelineError(f"{way}: {what} where a folder is needed; move it away") from None


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of one file by its suffix; a `.json` file must hold a list of objects."""
    if path.name.endswith(LINE_SUFFIXES):
        yield from read_jsonl(path)
    elif path.suffix == ".parquet":
        yield from read_parquet(path)
    elif path.suffix == ".arrow":
        yield from read_arrow(path)
    elif path.suffix == ".json":
        yield from read_list(path)
    else:
        raise PipelineError(f"{path}: cannot read this kind of file; known are {', '.join(ROW_SUFFIXES)}")


@contextlib.contextmanager
def atomic_open(path: Path) -> Iterator[IO[str]]:
    """Open `path` for writing UTF-8 text; it appears under its name only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sweep(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk says nothing of where it is
        raise
    finally:
        part.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove what processes left that were killed while they wrote `path`; one that is alive may be writing now."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if not may_be_written(part):
            part.unlink(missing_ok=True)


def may_be_written(part: Path) -> bool:
    """False where the process of this machine that `<name>.<pid>.part` names is gone."""
    pid = part.name.split(".")[-2]
    if not pid.isdigit() or len(pid) > 8:  # a part of the transfer has a hash there
        return True
    with contextlib.suppress(PermissionError):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return False
    return True


def dump(value: Any) -> str:
    """One line of JSON, readable Hangul, no NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows, one a line; returns how many."""
    number = 0
    with atomic_open(path) as file:
        for row in rows:
            file.write(dump(row) + "\n")
            number += 1
    return number


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, indented by one space."""
    with atomic_open(path) as file:
        json.dump(value, file, ensure_ascii=False, allow_nan=False, indent=1)
        file.write("\n")


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object with the hash of its content, for `read_sealed`."""
    write_json(path, sealed(value))


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The object with a hash of its content under `seal`, in place of one that it has."""
    bare = read_back({k: v for k, v in value.items() if k != SEAL})
    return {**bare, SEAL: digest_of(bare)}


def seal_holds(value: dict[str, Any]) -> bool:
    """False where the object is not what was sealed. One without a seal, of an earlier version, is taken as it is."""
    return SEAL not in value or value[SEAL] == digest_of({k: v for k, v in value.items() if k != SEAL})


def read_sealed(path: Path, needs: Sequence[str]) -> dict[str, Any] | None:
    """The object that was written there, without its seal; None where there is none, or a bit of it is another."""
    if not path.is_file():
        return None
    try:
        value = read_json(path)
    except PipelineError:
        return None
    if not isinstance(value, dict) or not set(needs) <= value.keys() or not seal_holds(value):
        return None
    value.pop(SEAL, None)
    return value


def write_text(path: Path, text: str) -> None:
    with atomic_open(path) as file:
        file.write(text)


def write_bytes(path: Path, content: bytes) -> None:
    with atomic_open(path) as file:
        file.buffer.write(content)


# A filesystem that cannot be asked, or that nothing waits for.
NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS)


def settle(*paths: Path) -> None:
    """Put files, and folders with all that is in them, on the disk, with the names that they have in their folders.

    What vouches for them is written after this: a record must not outlive a power cut that its weights do not. Links
    are left alone. Raises OSError where the disk is full or fails.
    """
    for path in (path for path in paths if not path.is_symlink()):
        if path.is_dir():
            for here, _, names in os.walk(path, topdown=False, onerror=_raise):
                for file in (Path(here, name) for name in names):
                    if file.is_file() and not file.is_symlink():
                        _fsync(file)
                _fsync(Path(here))
        else:
            _fsync(path)
        _fsync(path.parent)


def _raise(error: OSError) -> None:
    raise error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            error.filename = error.filename or str(path)
            raise
    finally:
        os.close(descriptor)


def share(path: Path) -> None:
    """Give a file, or all files of a folder, the mode that the user's umask asks for: some libraries write 0600."""
    wanted = 0o666 & ~_umask()
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file() and not file.is_symlink() and file.stat().st_mode & wanted != wanted:
            with contextlib.suppress(PermissionError):  # another user's, linked here
                file.chmod(stat.S_IMODE(file.stat().st_mode) | wanted)


def _umask() -> int:
    # Asking by os.umask() would set it, for all threads, for a moment.
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    current = os.umask(0o077)
    os.umask(current)
    return current


def require_inside(name: str, what: str) -> str:
    """A relative path that comes from data, as it is. Raises PipelineError for one that leaves the folder it is put in,
    or that no disk takes."""
    parts = name.split("/")
    if not name or name.startswith("/") or "\\" in name or "\0" in name or {"", ".", ".."} & set(parts):
        raise PipelineError(f"{what}: {name[:200]!r} is no name of a file below its folder; nothing of it is used")
    if any(len(part.encode("utf-8", "surrogateescape")) > NAME_BYTES for part in parts):
        raise PipelineError(f"{what}: {name[:60]!r}… is too long a file name; nothing of it is used")
    return name


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: IO[bytes]) -> str:  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


_known: dict[tuple[int, int, int, int], str] = {}


def _identity(path: Path) -> tuple[int, int, int, int]:
    now = path.stat()
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns  # survives a rename


def sha256_once(path: Path) -> str:
    """`sha256`, read only once in a process while size and time stay the same: raw data may be 50 GB."""
    key = _identity(path)
    if key not in _known:
        _known[key] = sha256(path)
    return _known[key]


def remember_sha256(path: Path, digest: str) -> None:
    """Tell `sha256_once` what was hashed while it was written."""
    _known[_identity(path)] = digest


def digest_of(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def move_aside(path: Path) -> Path | None:
    """Rename an existing result to `<name>.previous` (`.previous.2`, ... where that is taken); None if absent."""
    if not path.exists():
        return None
    target, number = path.with_name(path.name + ".previous"), 2
    while target.exists():
        target, number = path.with_name(f"{path.name}.previous.{number}"), number + 1
    path.rename(target)
    return target


def read_back(value: Any) -> Any:
    """The value as JSON would return it (tuples become lists), so that stored and fresh settings compare equal."""
    return json.loads(json.dumps(value, ensure_ascii=False))
