"""Rows in and out: every damaged input names its file and line, and no writer leaves half a file."""

import errno
import gzip
import json
import os

import pytest

from medgemma_korean import records
from medgemma_korean.cli import PipelineError


def rows(path):
    return list(records.read_rows(path))


def write(path, data: bytes):
    path.write_bytes(data)
    return path


GOOD = b'{"a": 1}\n'


def test_jsonl_with_mark_blank_lines_and_no_last_newline(tmp_path):
    file = write(tmp_path / "x.jsonl", b'\xef\xbb\xbf{"a": "\xea\xb0\x84"}\n\n  \r\n{"a": 2}\r\n{"a": 3}')
    assert rows(file) == [{"a": "간"}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize(
    "data, said",
    [
        (GOOD + b'{"a": \n' + GOOD, ["line 2", "not valid JSON"]),
        (GOOD * 2 + b'{"a": "\xff"}\n', ["line 3", "not UTF-8"]),
        (GOOD + '{"a": "간"}\n'.encode("cp949"), ["line 2", "not UTF-8"]),
        (GOOD + b"\n[1, 2]\n", ["line 3", "list"]),
        (b'"text"\n', ["line 1", "str"]),
        (b"[" * 100_000 + b"\n", ["line 1", "nested too deeply"]),
        (b'{"a": ' + b"1" * 5000 + b"}\n", ["line 1", "too long a number"]),
    ],
)
def test_a_bad_line_names_file_and_line(tmp_path, data, said):
    file = write(tmp_path / "bad.jsonl", data)
    with pytest.raises(PipelineError) as error:
        rows(file)
    for part in (str(file), *said):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_before_the_bad_line_are_streamed(tmp_path):
    reader = records.read_jsonl(write(tmp_path / "x.jsonl", GOOD + b"{"))
    assert next(reader) == {"a": 1}
    with pytest.raises(PipelineError, match="line 2"):
        next(reader)


def test_a_row_that_lacks_text_is_named(tmp_path):
    lines = b'{"text": "a", "n": 1}\n\n{"n": "2", "text": ""}\n{"n": 3, "text": null}\n'
    reader = records.read_jsonl(write(tmp_path / "x.jsonl", lines), needs=("text",))
    assert [next(reader), next(reader)] == [{"text": "a", "n": 1}, {"n": "2", "text": ""}]
    with pytest.raises(PipelineError, match=r"x.jsonl, line 4: no text under text; the row has n, text$"):
        next(reader)
    with pytest.raises(PipelineError, match=r"x.jsonl, line 1: no text under n, term; the row has text, n$"):
        next(records.read_jsonl(tmp_path / "x.jsonl", needs=("text", "n", "term")))
    with pytest.raises(PipelineError, match="line 1: no text under text; the row has no keys"):
        next(records.read_jsonl(write(tmp_path / "y.jsonl", b"{}"), needs=("text",)))


def test_a_list_names_its_row(tmp_path):
    file = write(tmp_path / "x.json", b'[{"term": "a", "definition": "b"}, {"term": "c"}]')
    assert records.read_list(file, needs=("term",)) == records.read_json(file)
    with pytest.raises(PipelineError, match=r"x.json, row 2: no text under definition; the row has term$"):
        records.read_list(file, needs=("term", "definition"))
    for data in (b'{"term": "a"}', b'["a"]'):
        with pytest.raises(PipelineError, match="expected a JSON list of objects"):
            records.read_list(write(file, data))


@pytest.mark.parametrize("name", ["x.jsonl.gz", "c4-ko.tfrecord-00000-of-01024.json.gz"])
def test_gzip_rows(tmp_path, name):
    """C4 ships JSON lines under .json.gz."""
    file = write(tmp_path / name, gzip.compress(GOOD * 3))
    assert rows(file) == [{"a": 1}] * 3
    assert records.row_files(tmp_path) == [file]


def test_cut_damaged_and_false_gzip(tmp_path):
    whole = gzip.compress(b"".join(b'{"a": "%d"}\n' % (i * 7919) for i in range(5000)))
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 40] = b"\xff" * 40
    for name, data in (("cut", whole[: len(whole) // 2]), ("damaged", bytes(damaged)), ("plain", GOOD)):
        file = write(tmp_path / f"{name}.jsonl.gz", data)
        with pytest.raises(PipelineError) as error:
            rows(file)
        assert str(file) in str(error.value)


def test_parquet_whole_cut_and_false(tmp_path):
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["가", "나"], "n": [1, 2]}), file)
    assert rows(file) == [{"text": "가", "n": 1}, {"text": "나", "n": 2}]
    assert list(records.read_parquet(file, ["text", "absent"])) == [{"text": "가"}, {"text": "나"}]
    for name, data in (("cut", file.read_bytes()[:-20]), ("text", b"no parquet"), ("empty", b"")):
        bad = write(tmp_path / f"{name}.parquet", data)
        with pytest.raises(PipelineError, match="damaged Parquet") as error:
            rows(bad)
        assert str(bad) in str(error.value)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"], ids=["depth", "digits"])
def test_json_beyond_the_limits_of_python_is_named(tmp_path, content):
    file = write(tmp_path / "x.json", content)
    with pytest.raises(
        PipelineError, match=rf"{file}: not valid JSON \(nested too deeply or too long a number\); bring"
    ):
        records.read_json(file)
    assert records.read_sealed(file, ["a"]) is None


def test_json_lists_and_their_errors(tmp_path):
    assert rows(write(tmp_path / "x.json", b'\xef\xbb\xbf[{"a": 1}]')) == [{"a": 1}]
    for data, said in ((b'{"a": 1}', "list of objects"), (b"[1]", "list of objects"), (b'[\n{"a": 1},\n]', "line 3")):
        with pytest.raises(PipelineError, match=said):
            rows(write(tmp_path / "y.json", data))
    with pytest.raises(PipelineError, match="not UTF-8"):
        records.read_json(write(tmp_path / "z.json", '{"간": 1}'.encode("utf-16")))
    with pytest.raises(PipelineError, match="no such file"):
        records.read_json(tmp_path / "absent.json")
    with pytest.raises(PipelineError, match=r"cannot read.*\.parquet"):
        rows(write(tmp_path / "x.csv", b"a,b"))


def test_row_files_are_sorted_and_hidden_ones_left_out(tmp_path):
    for name in ("b/2.jsonl", "a/1.parquet", ".hidden/3.jsonl", "a/.part.jsonl", "a/README.md", "10.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert [str(p.relative_to(tmp_path)) for p in records.row_files(tmp_path)] == [
        "10.json", "a/1.parquet", "b/2.jsonl",
    ]  # fmt: skip
    assert records.row_files(tmp_path / "10.json") == [tmp_path / "10.json"]


def test_writers_are_atomic(tmp_path):
    file = tmp_path / "new" / "x.jsonl"
    records.write_jsonl(file, [{"a": "간"}])
    before = file.read_bytes()
    assert before == '{"a": "간"}\n'.encode()

    def failing():
        yield {"a": 1}
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        records.write_jsonl(file, failing())
    with pytest.raises(ValueError):
        records.write_json(file, {"a": float("nan")})
    with pytest.raises(TypeError):
        records.write_json(file, {"a": {1, 2}})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_write_counts_and_reads_back(tmp_path):
    given = [{"text": "줄\n바꿈\u2028", "n": i} for i in range(5)]
    assert records.write_jsonl(tmp_path / "x.jsonl", given) == 5
    assert rows(tmp_path / "x.jsonl") == given
    records.write_json(tmp_path / "x.json", given)
    assert records.read_json(tmp_path / "x.json") == json.loads((tmp_path / "x.json").read_text()) == given


def test_move_aside_numbers(tmp_path):
    path = tmp_path / "final"
    assert records.move_aside(path) is None
    names = []
    for i in range(3):
        path.mkdir()
        (path / "n").write_text(str(i))
        names.append(records.move_aside(path))
    assert [n.name for n in names] == ["final.previous", "final.previous.2", "final.previous.3"]
    assert [(n / "n").read_text() for n in names] == ["0", "1", "2"] and not path.exists()


def test_digests(tmp_path):
    assert records.digest_of({"a": 1, "b": [2]}) == records.digest_of({"b": [2], "a": 1})
    assert records.digest_of({"a": 1}) != records.digest_of({"a": 2})
    assert records.read_back({"a": (1, 2)}) == {"a": [1, 2]}
    file = write(tmp_path / "x", b"abc")
    assert records.sha256(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_linked_folder_is_followed_once(tmp_path):
    (tmp_path / "disk/deep").mkdir(parents=True)
    (tmp_path / "disk/1.jsonl").write_text("")
    (tmp_path / "disk/deep/2.jsonl").write_text("")
    (tmp_path / "disk/deep/again").symlink_to(tmp_path / "disk")
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a").symlink_to(tmp_path / "disk")
    (tmp_path / "here/.hidden").symlink_to(tmp_path / "disk")
    (tmp_path / "here/gone").symlink_to(tmp_path / "nowhere")
    found = [tmp_path / "here/a/1.jsonl", tmp_path / "here/a/deep/2.jsonl"]
    assert records.row_files(tmp_path / "here") == records.files_below(tmp_path / "here") == found


def test_parts_of_living_writers_are_spared(tmp_path):
    for name, living in ((os.getpid(), True), (99999999, False), ("0123456789abcdef", True)):
        assert records.may_be_written(tmp_path / f".x.json.{name}.part") == living
    for name in (os.getpid(), 99999999):
        (tmp_path / f".x.json.{name}.part").write_text("x")
    records.write_json(tmp_path / "x.json", 1)
    assert [p.name for p in tmp_path.glob(".*")] == []  # one is what it wrote itself


@pytest.mark.parametrize("below", ["", "a/b"])
def test_what_stands_in_the_way_of_a_folder_is_named(tmp_path, below):
    records.make_folder(tmp_path / "new" / below)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, what in (("file", "a file"), ("link", "a link to a folder that does not exist")):
        with pytest.raises(PipelineError, match=f"/{name}: {what} where a folder is needed; move it away"):
            records.make_folder(tmp_path / name / below)


def test_a_sealed_object_is_read_as_it_was_written_or_not_at_all(tmp_path):
    file = tmp_path / "x.json"
    assert records.read_sealed(file, ["rows"]) is None
    records.write_sealed(file, {"rows": 3, "of": ("a", "b")})
    assert records.read_sealed(file, ["rows"]) == {"rows": 3, "of": ["a", "b"]}
    assert records.read_sealed(file, ["columns"]) is None
    written = file.read_text()
    for damaged in (written.replace("3", "2"), written[:-5], written.replace("rows", "rovs"), "[]", ""):
        file.write_text(damaged)
        assert records.read_sealed(file, ["rows"]) is None
    file.write_text('{"rows": 3}')  # of an earlier version
    assert records.read_sealed(file, ["rows"]) == {"rows": 3}


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[1]", "found list; do this"), ("3", "found int; do this"), ('{"a": 1}', "lacks b, c; do this")],
)
def test_a_file_of_another_shape_is_refused_with_what_to_do(tmp_path, text, reason):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(PipelineError) as error:
        records.read_object(file, "a", "b", "c", repair="do this")
    assert str(error.value).startswith(f"{file}: ") and str(error.value).endswith(reason)
    file.write_text('{"a": 1, "b": 2, "c": 3}')
    assert records.read_object(file, "a", "c")["b"] == 2


def test_a_full_disk_is_told_with_the_file(tmp_path):
    with pytest.raises(OSError) as error, records.atomic_open(tmp_path / "x"):
        raise OSError(28, "No space left on device")
    assert error.value.filename == str(tmp_path / "x") and not list(tmp_path.iterdir())


def test_settling_reaches_every_file_and_folder_and_no_link(tmp_path, synced):
    for name in ("out/final/a.bin", "out/b.bin", "out/.hidden/c", "elsewhere/d", "e"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "out/empty").mkdir()
    (tmp_path / "out/link.bin").symlink_to(tmp_path / "e")
    (tmp_path / "out/linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "out/fifo")  # whoever opens it waits
    (tmp_path / "whole").symlink_to(tmp_path / "elsewhere")
    records.settle(tmp_path / "out", tmp_path / "whole")
    whole = ["out/final/a.bin", "out/final", "out/b.bin", "out/.hidden/c", "out/.hidden", "out/empty", "out", "."]
    assert sorted(synced) == sorted(whole)
    assert all(synced.index(path) < synced.index(os.path.dirname(path) or ".") for path in whole[:-1])
    synced.clear()
    records.settle(tmp_path / "e")
    assert synced == ["e", "."]
    with pytest.raises(FileNotFoundError):
        records.settle(tmp_path / "gone" / "x")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EROFS, errno.EIO, errno.ENOSPC])
def test_a_disk_that_cannot_settle_is_no_error_and_one_that_fails_is(tmp_path, monkeypatch, code):
    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    (tmp_path / "x").write_text("x")
    if code not in (errno.EIO, errno.ENOSPC):
        return records.settle(tmp_path)
    with pytest.raises(OSError, match=f"{os.strerror(code)}: '{tmp_path}/x'"):
        records.settle(tmp_path)
