"""Raw documents: every format, every way of splitting it, every damage by file and line, and bounded memory."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medgemma_korean.cli import PipelineError
from medgemma_korean.text import documents
from medgemma_korean.text.documents import check, files_of, kind_of, place, read, tasks_of

TEXTS = [
    "당뇨병은 혈당이 높은 병이다.\n진단 기준은 126 mg/dL 이상이다.",
    "줄 안의 \u2028 구분 문자와 \x85 다음 줄 문자, 그리고 탭\t도 줄을 나누지 않는다.",
    "이모지 😀와 한자 疾病, e\u0301",
    "가" * 300,
    "끝",
]


def jsonl(texts, **more) -> bytes:
    return "".join(
        json.dumps({"id": i, "text": t, **more}, ensure_ascii=False) + "\n" for i, t in enumerate(texts)
    ).encode()


def plain(texts) -> bytes:
    return "\n\n".join(texts).encode() + b"\n"


def parquet(file: Path, texts, type=pa.string(), **options) -> None:  # noqa: B008
    table = pa.table({"title": ["x"] * len(texts), "text": pa.array(texts).cast(type)})
    pq.write_table(table, file, **options)


def arrow(file: Path, texts, batch: int = 2, writer=pa.ipc.new_stream, type=pa.string()) -> None:  # noqa: B008
    table = pa.table({"text": pa.array(texts, pa.string()).cast(type)})
    with pa.OSFile(str(file), "wb") as sink, writer(sink, table.schema) as out:
        out.write_table(table, max_chunksize=batch)


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}
WRITERS = {
    "a.parquet": lambda f: parquet(f, TEXTS),
    "groups.parquet": lambda f: parquet(f, TEXTS, row_group_size=2),
    "large.parquet": lambda f: parquet(f, TEXTS, pa.large_string()),
    "category.parquet": lambda f: parquet(f, TEXTS, pa.dictionary(pa.int32(), pa.string())),
    "stream.arrow": lambda f: arrow(f, TEXTS),
    "file.arrow": lambda f: arrow(f, TEXTS, writer=pa.ipc.new_file),
    "large.arrow": lambda f: arrow(f, TEXTS, type=pa.large_string()),
    "category.arrow": lambda f: arrow(f, TEXTS, type=pa.dictionary(pa.int32(), pa.string())),
    "list.json": lambda f: f.write_text(json.dumps([{"text": t} for t in TEXTS], indent=1), encoding="utf-8"),
    "MARK.JSONL": lambda f: f.write_bytes(b"\xef\xbb\xbf" + jsonl(TEXTS).replace(b"\n", b"\r\n")[:-2]),
    "escaped.jsonl": lambda f: f.write_text("".join(json.dumps({"text": t}) + "\n\n" for t in TEXTS)),
    "mark.txt": lambda f: f.write_bytes(b"\xef\xbb\xbf\n \t\n" + plain(TEXTS) + b"\n\n  "),
    **{f"a.jsonl{s}": lambda f, c=c: f.write_bytes(c(jsonl(TEXTS))) for s, c in COMPRESS.items()},
    **{f"c4.json{s}": lambda f, c=c: f.write_bytes(c(jsonl(TEXTS, url="x"))) for s, c in COMPRESS.items() if s},
    **{f"a.txt{s}": lambda f, c=c: f.write_bytes(c(plain(TEXTS))) for s, c in COMPRESS.items()},
}


def everything(folder: Path, task_bytes: int = 96_000_000, **options) -> list[tuple[str, str]]:
    """(place, text) of all documents."""
    return [
        (place(task, row), text)
        for task in tasks_of(folder, task_bytes)
        for batch in read(task, **options)
        for row, text in zip(batch.rows, batch.texts, strict=True)
    ]


def texts_of(folder: Path, task_bytes: int = 96_000_000, **options) -> list[str]:
    return [text for _, text in everything(folder, task_bytes, **options)]


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "namu_wiki"
    folder.mkdir()
    return folder


# formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(source, name):
    WRITERS[name](source / name)
    assert texts_of(source) == TEXTS
    assert check(source) == 1


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "list.json", "a.jsonl.gz", "a.jsonl", "a.txt"])
def test_places_count_from_one_in_the_whole_file(source, name):
    (source / "sub").mkdir()
    WRITERS[name](source / "sub" / name)
    places = [where for where, _ in everything(source, 100)]
    if name == "a.txt":
        assert places == [f"namu_wiki/sub/{name}, line {n}" for n in (1, 4, 6, 8, 10)]
    else:
        word = "line" if "jsonl" in name else "row"
        assert places == [f"namu_wiki/sub/{name}, {word} {n}" for n in range(1, 6)]


def test_lone_surrogates_reach_the_cleaner(source):
    (source / "a.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    (source / "b.json").write_text('[{"text": "\\udfff"}]')
    assert texts_of(source) == ["a\ud800b 😀", "\udfff"]


def test_members_and_frames_that_stand_one_after_the_other(source):
    for suffix, compress in COMPRESS.items():
        (source / f"a{suffix[1:]}.jsonl{suffix}").write_bytes(compress(jsonl(TEXTS[:2])) + compress(jsonl(TEXTS[2:])))
    assert texts_of(source) == TEXTS * 5


def test_a_null_is_an_empty_text_and_counted(source):
    parquet(source / "a.parquet", ["가", None, "", "나"])
    arrow(source / "b.arrow", [None, "다"])
    (source / "c.jsonl").write_text('{"text": null}\n{"text": "라"}\n')
    (source / "d.json").write_text('[{"text": null}]')
    (task,) = tasks_of(source)
    (batch,) = read(task)
    assert batch.texts == ["가", "", "", "나", "", "다", "", "라", ""] and batch.nulls == 4
    batches = list(read(task, batch_characters=1))
    assert [(b.texts, b.nulls) for b in batches[:3]] == [(["가"], 0), ([""], 1), ([""], 0)] and len(batches) == 9


def test_text_is_cut_at_empty_lines_only(source):
    (source / "a.txt").write_bytes(" 첫 줄\r\n둘째 줄 \r\n\r\n\r\n \t \n다음\n\n\n".encode())
    assert everything(source) == [
        ("namu_wiki/a.txt, line 1", " 첫 줄\r\n둘째 줄 "),
        ("namu_wiki/a.txt, line 6", "다음"),
    ]


# files --------------------------------------------------------------------------------------------------


def test_hidden_and_other_files_are_left_out_and_order_is_by_path(source):
    for name in ("b/2.jsonl", "b/10.jsonl", "a/z.jsonl", "B.jsonl", "a.b/x.jsonl"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(jsonl([name]))
    for name in (
        ".c/1.jsonl",
        "a/.part.jsonl",
        "README.txt",
        "LICENSE.txt",
        "x.csv",
        "x.zip",
        "a/dataset_infos.json",
        "SUMS",
    ):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("no document")
    assert texts_of(source) == ["B.jsonl", "a/z.jsonl", "a.b/x.jsonl", "b/10.jsonl", "b/2.jsonl"]
    assert check(source) == 5 and len(files_of(source)) == 5


@pytest.mark.parametrize(
    "name, kind",
    [("x.json", "list"), ("x.json.gz", "lines"), ("x.jsonl.zst", "lines"), ("x.TXT", "text"), ("x.parquet.gz", None),
     ("state.json", None), ("x.gz", None), ("parquet", None), ("license_list.txt.gz", None)],
)  # fmt: skip
def test_kinds(name, kind):
    assert kind_of(Path(name)) == kind


def test_folders_saved_by_datasets(source, tmp_path):
    import datasets

    datasets.disable_progress_bars()
    train = datasets.Dataset.from_dict({"text": TEXTS, "n": [1, 2, 3, 4, 5]})
    train.save_to_disk(source / "alone", num_shards=2)
    both = datasets.DatasetDict({"train": train.select([4, 1]), "test": train.select([0])})
    both.save_to_disk(source / "both")
    assert texts_of(source) == [*TEXTS, TEXTS[0], TEXTS[4], TEXTS[1]]
    assert len(tasks_of(source, 60)) > 4 and texts_of(source, 60) == texts_of(source)
    # A map leaves its result beside the shards.
    datasets.load_from_disk(source / "alone").map(lambda row: {"text": row["text"] * 2})
    assert list((source / "alone").glob("cache-*.arrow"))
    assert len(texts_of(source)) == 8
    (source / "alone" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(PipelineError, match=r"alone/data-00001-of-00002\.arrow: missing, and state\.json .* names it"):
        tasks_of(source)


def test_the_cache_of_the_hub_library(source, tmp_path):
    import datasets

    datasets.disable_progress_bars()
    (tmp_path / "in.jsonl").write_bytes(jsonl(TEXTS))
    datasets.load_dataset("json", data_files=str(tmp_path / "in.jsonl"), cache_dir=str(source))
    assert [f.suffix for f in files_of(source)] == [".arrow"]
    assert texts_of(source) == TEXTS


# tasks --------------------------------------------------------------------------------------------------


def awkward(rng: random.Random) -> list[str]:
    return ["가 나\u2028다 " * rng.randint(0, 12) + str(i) for i in range(60)]


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_lines_and_text_are_the_same_for_every_size_of_task(source, monkeypatch, ending, chunk):
    """Also where lines are longer than what is read at a time."""
    monkeypatch.setattr(documents, "CHUNK", chunk)
    rng = random.Random(3)
    texts = awkward(rng)
    lines = [line + rng.choice([b"", b"", b"\n", b"  \n\n"]) for line in jsonl(texts).splitlines(keepends=True)]
    (source / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"".join(lines).replace(b"\n", ending))
    for text in texts:
        blank = rng.choice(["\n\n", "\n  \n", "\n\n\n", "\n \n\n", "\n\n\n\n"])
        with open(source / "b.txt", "ab") as out:
            out.write((text.replace(" ", "\n", 2) + blank).encode().replace(b"\n", ending))
    whole = everything(source)
    assert [text for _, text in whole] == texts + [t.replace(" ", ending.decode(), 2) for t in texts]
    for size in (1, 2, 3, 5, 8, 64, 100, 333, 1000, 4000, 10_000, 10**9):
        tasks = tasks_of(source, size)
        assert everything(source, size) == whole, size
        if size >= 333:
            assert all(task.size < 2 * size + 1000 for task in tasks)
    assert len(tasks_of(source, 1)) > 100


@pytest.mark.parametrize("name", ["a.parquet", "groups.parquet", "stream.arrow", "file.arrow", "one.arrow"])
def test_tables_are_the_same_for_every_size_of_task(source, name):
    texts = [*awkward(random.Random(4)), "", "", None, ""]
    if name.endswith(".arrow"):
        writer = pa.ipc.new_file if name == "file.arrow" else pa.ipc.new_stream
        arrow(source / name, texts, 1000 if name == "one.arrow" else 7, writer)
    else:
        parquet(source / name, texts, row_group_size=5 if name == "groups.parquet" else 1000)
    whole = everything(source)
    assert [text or None for _, text in whole] == [text or None for text in texts]
    counts = set()
    for size in (1, 10, 100, 500, 1000, 3000, 10**9):
        assert everything(source, size) == whole, size
        counts.add(len(tasks_of(source, size)))
    # One row group is read from its start by each of its parts, so there are few.
    assert max(counts) == documents.MAX_PARTS_OF_GROUP if name == "a.parquet" else len(counts) > 3


def test_a_large_row_group_behind_small_empty_ones(source):
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(source / "a.parquet", schema) as writer:
        for texts in ([""], [], ["가" * 200 + str(i) for i in range(50)], [], [""]):
            writer.write_table(pa.table({"text": texts}, schema=schema))
    whole = everything(source)
    assert len(whole) == 52
    assert all(everything(source, size) == whole for size in (1, 50, 500, 5000))


def test_small_files_share_a_task_and_large_ones_have_several(source, monkeypatch):
    for i in range(20):
        (source / f"{i:02}.txt").write_text(f"문서 {i:02}\n" * 10)
    (source / "large.txt").write_text("큰 문서\n\n" * 1000)
    size = (source / "00.txt").stat().st_size
    tasks = tasks_of(source, 5 * size)
    assert [len(task.files) for task in tasks[:3]] == [5, 5, 5]
    assert sum(task.size for task in tasks) == sum(f.stat().st_size for f in files_of(source))
    assert all(task.source == "namu_wiki" for task in tasks) and max(task.size for task in tasks) <= 5 * size + 20
    assert len(everything(source, 5 * size)) == 1020
    monkeypatch.setattr(documents, "MAX_FILES", 3)
    assert {len(task.parts) for task in tasks_of(source)} == {3}


def test_tasks_go_to_other_processes_in_any_order(source):
    for name in ("a.jsonl", "groups.parquet", "stream.arrow", "a.txt", "a.txt.gz"):
        WRITERS[name](source / name)
    tasks = tasks_of(source, 150)
    assert tasks == tasks_of(source, 150) and len({pickle.dumps(task) for task in tasks}) == len(tasks) > 8
    order = list(range(len(tasks)))
    random.Random(1).shuffle(order)
    copies = pickle.loads(pickle.dumps(tasks))
    read_there = {i: [batch.texts for batch in read(copies[i])] for i in order}
    assert [text for i in range(len(tasks)) for batch in read_there[i] for text in batch] == TEXTS * 5


# batches and pieces -------------------------------------------------------------------------------------


def test_batches_are_bounded_by_characters_and_by_many_empty_texts(source):
    rng = random.Random(6)
    texts = ["가" * rng.choice([0, 1, 500, 900]) for _ in range(400)]
    parquet(source / "a.parquet", texts)
    (task,) = tasks_of(source)
    batches = list(read(task, batch_characters=2000))
    assert [text for batch in batches for text in batch.texts] == texts
    assert all(sum(map(len, b.texts)) <= 2000 and len(b.texts) <= 20 and b.texts for b in batches)
    assert [row for batch in batches for row in batch.rows] == list(range(400))
    assert len(list(read(task))) == 1


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.parquet", "a.arrow", "a.json"])
@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_long_documents_are_cut_and_nothing_is_lost(source, monkeypatch, name, chunk):
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 100)
    monkeypatch.setattr(documents, "CHUNK", chunk)
    rng = random.Random(8)
    texts = [
        "가" * 350,
        "짧다",
        "".join(rng.choice(["가", "나다", " ", " ", "\n"]) for _ in range(2000)).strip() + "끝",
        "마지막 " * 60 + "끝",
    ]
    texts = ["\n".join(filter(str.strip, t.split("\n"))) for t in texts]
    file = source / name
    if kind_of(file) == "text":
        file.write_bytes(COMPRESS[file.suffix if file.suffix == ".gz" else ""](plain(texts)))
    elif name == "a.json":
        file.write_text(json.dumps([{"text": t} for t in texts]))
    elif name == "a.jsonl":
        file.write_bytes(jsonl(texts))
    else:
        (parquet if name == "a.parquet" else arrow)(file, texts)
    (task,) = tasks_of(source)
    for characters in (4_000_000, 100):
        joined: dict[int, str] = {}
        batches = list(read(task, characters))
        for batch in batches:
            for row, piece in zip(batch.rows, batch.texts, strict=True):
                assert 0 < len(piece) <= 100
                joined[row] = joined.get(row, "") + piece
        assert list(joined.values()) == texts
        pieces = sum(len(batch.texts) for batch in batches)
        assert pieces > 20 and sum(batch.continued for batch in batches) == pieces - len(texts)


def test_where_a_document_is_cut(monkeypatch):
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 20)
    paragraph = "가" * 12 + "\n\n" + "나 \n다" + "라" * 20
    assert list(documents._pieces(paragraph)) == ["가" * 12 + "\n\n", "나 \n다" + "라" * 16, "라" * 4]
    assert list(documents._pieces("가" * 11 + "\n나 다" + "라" * 9)) == ["가" * 11 + "\n", "나 다" + "라" * 9]
    assert list(documents._pieces("가" * 11 + " 나" + "라" * 9)) == ["가" * 11 + " ", "나" + "라" * 9]
    assert list(documents._pieces("\n\n" + "가" * 30)) == ["\n\n" + "가" * 18, "가" * 12]  # no tiny pieces
    assert list(documents._pieces("가" * 20)) == ["가" * 20] and list(documents._pieces("")) == [""]


MEASURE = """
import sys
from pathlib import Path
import numpy, pyarrow, pyarrow.compute, pyarrow.parquet
from medgemma_korean.text.documents import read, tasks_of

def megabytes(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) // 1024

before = megabytes("VmRSS")
characters = sum(len(text) for task in tasks_of(Path(sys.argv[1])) for batch in read(task) for text in batch.texts)
print(characters, megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux")
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.parquet"])
def test_one_line_of_50_megabytes(source, name):
    text = "가나다라마바사 아" * 2_100_000  # 52 MB
    if name == "a.jsonl":
        (source / name).write_text('{"text": "' + text + '"}\n', encoding="utf-8")
    elif name == "a.json":
        (source / name).write_text('[{"text": "' + text + '"}]', encoding="utf-8")
    elif name == "a.txt":
        (source / name).write_text(text, encoding="utf-8")
    else:
        parquet(source / name, [text], use_dictionary=False)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(source)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    characters, megabytes = map(int, done.stdout.split())
    assert characters == len(text) and megabytes < 400


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux")
def test_one_row_group_is_streamed(source):
    """120 MB of text in one row group: what is read at a time is a page, not the group."""
    rng = random.Random(0)
    words = ["".join(rng.choices("가나다라마바사아자차카타파하", k=3)) for _ in range(5000)]
    texts = [" ".join(rng.choices(words, k=300)) for _ in range(2000)] * 20
    parquet(source / "a.parquet", texts, use_dictionary=False, compression="none")
    assert (source / "a.parquet").stat().st_size > 100_000_000
    done = subprocess.run([sys.executable, "-c", MEASURE, str(source)], capture_output=True, text=True, timeout=60)
    characters, megabytes = map(int, done.stdout.split())
    assert characters == sum(map(len, texts)) and megabytes < 90


# errors -------------------------------------------------------------------------------------------------


def refused(folder: Path, *said: str, task_bytes: int = 96_000_000) -> str:
    with pytest.raises(PipelineError) as error:
        texts_of(folder, task_bytes)
    for part in said:
        assert part in str(error.value), str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name, data, said",
    [
        ("a.jsonl", jsonl(["가"]) + b'{"title": 1, "body": 2}\n', ', line 2: no "text" column; found title, body'),
        ("a.jsonl", jsonl(["가"]) + b"{}\n", 'line 2: no "text" column; found nothing'),
        ("a.jsonl", b"\n\n" + jsonl([["가"]]), 'line 3: "text" is a list, not a string'),
        ("a.jsonl", jsonl([1]), 'line 1: "text" is a number, not a string'),
        ("a.jsonl", jsonl(["가"]) + b'["text"]\n', "line 2: expected a JSON object, found list"),
        ("a.jsonl", jsonl(["가", "나"])[:-3], "line 2: not valid JSON (Unterminated string"),
        ("a.jsonl", jsonl(["가", "나"])[:-4], "line 2: not UTF-8 (cut in the middle of a character)"),
        ("a.jsonl", jsonl(["가"]) + b"[" * 100_000, "line 2: not valid JSON (nested too deeply"),
        ("a.jsonl", jsonl(["a"]) + b'{"text": "\xff"}\n', "line 2: not UTF-8 (byte 11)"),
        ("a.jsonl", jsonl(["a"]) + b'{"text": "\xed\xa0\x80"}\n', "line 2: not UTF-8"),
        (
            "a.jsonl",
            jsonl(["당뇨병은 혈당이 높은 병이다"]).decode().encode("cp949"),
            "line 1: not UTF-8 (byte 20); it reads as CP949 (EUC-KR): convert it with iconv -f cp949 -t utf-8",
        ),
        ("a.txt", "당뇨병\n혈당".encode() + b"\n\n" + "혈압".encode("cp949"), "line 4: not UTF-8 (byte 1); it reads"),
        ("a.txt", "당뇨병".encode("utf-16"), "line 1: not UTF-8 (byte 1); it is UTF-16: convert it"),
        ("a.txt", "가\n나".encode()[:-1], "line 2: not UTF-8 (cut in the middle of a character)"),
        ("a.txt", b" \n\n\n", "no documents"),
        ("a.jsonl", b"\xef\xbb\xbf\n\n", "no documents"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "no documents"),
        ("a.json", b" [ ] ", "no documents"),
        ("a.json", b'{"data": []}', 'expected a JSON list of objects; call it .jsonl if each line is an object'),
        ("a.json", b'[{"text": "a"},\n{"text": 3}]', 'row 2: "text" is a number, not a string'),
        ("a.json", b'[{"text": "a"},\n{"body": 3}]', 'row 2: no "text" column; found body'),
        ("a.json", b'[{"text": "a"},\n 3]', "line 2: row 2: expected a JSON object"),
        ("a.json", b'[{"text": "a"},]', "line 1: row 2: expected a JSON object"),
        ("a.json", b'[{"text": "a"}\n\n{"text": "b"}]', "line 3: not valid JSON (expected a comma or the end"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"', "line 2: not valid JSON (Expecting ',' delimiter)"),
        ("a.json", b'[{"text": "a"}] {}', "line 1: something follows the end of the list"),
        ("a.json", b'[{"text": "a"},\n\n{"text": "\xff"}]', "line 3: not UTF-8"),
        ("a.json", b'[{"text": ' + b"[" * 200_000, "line 1: not valid JSON (nested too deeply"),
        ("a.jsonl", b"", "an empty file (0 bytes)"),
        ("a.parquet", b"", "an empty file (0 bytes)"),
        ("a.parquet", b"no parquet file at all", "damaged or cut Parquet file"),
        ("a.arrow", b"no arrow stream at all", "damaged or cut Arrow file"),
        ("a.jsonl.gz", jsonl(["가"]), "damaged or cut gz file"),
        ("a.jsonl.bz2", jsonl(["가"]), "damaged or cut bz2 file"),
        ("a.jsonl.xz", jsonl(["가"]), "damaged or cut xz file"),
        ("a.jsonl.zst", jsonl(["가"]), "damaged or cut zst file"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(source, name, data, said):
    (source / "0.jsonl").write_bytes(jsonl(["앞의 문서"]))
    (source / name).write_bytes(data)
    message = refused(source, f"namu_wiki/{name}", said)
    assert "\n" not in message and len(message) < 300 + len(str(source))


def test_a_line_is_named_in_a_task_that_begins_in_the_middle(source):
    lines = jsonl([f"문서 {i}" for i in range(500)]).splitlines(keepends=True)
    lines[450] = b'{"text": 3}\n'
    (source / "a.jsonl").write_bytes(b"".join(lines))
    refused(source, "a.jsonl, line 451:", task_bytes=1000)
    (source / "a.jsonl").unlink()
    text = plain(["문서\n둘째 줄"] * 500)
    (source / "a.txt").write_bytes(text[:-30] + b"\xff" + text[-30:])
    refused(source, f"a.txt, line {text[:-30].count(10) + 1:,}: not UTF-8", task_bytes=1000)


@pytest.mark.parametrize("suffix", [s for s in COMPRESS if s])
def test_cut_and_damaged_compression(source, suffix):
    rng = random.Random(2)
    whole = COMPRESS[suffix](jsonl(["".join(rng.choices("가나다라마바사", k=200)) for _ in range(1000)]))
    file = source / f"a.jsonl{suffix}"
    file.write_bytes(whole[: len(whole) // 2])
    refused(source, f"a.jsonl{suffix}", f"damaged or cut {suffix[1:]} file")
    file.write_bytes(whole[:-3])
    refused(source, f"a.jsonl{suffix}", f"damaged or cut {suffix[1:]} file")
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 40] = b"\xff" * 40
    file.write_bytes(bytes(damaged))
    # A frame of zstd without a checksum may decode, to something that is no JSON.
    refused(source, f"a.jsonl{suffix}, line ")


def test_damaged_parquet(source):
    rng = random.Random(2)
    file = source / "a.parquet"
    parquet(file, ["".join(rng.choices("가나다라마바사", k=200)) for _ in range(3000)], use_dictionary=False)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(source, "a.parquet: damaged or cut Parquet file")
    file.write_bytes(whole[: len(whole) // 2] + b"\xff" * 1000 + whole[len(whole) // 2 + 1000 :])
    assert tasks_of(source)  # the index is whole
    message = refused(source, "a.parquet, from row ", "damaged or cut Parquet file")
    assert int(message.split("from row ")[1].split(" on:")[0].replace(",", "")) <= 3000
    parquet(file, ["가"] * 3000, write_page_checksum=True, compression="none", use_dictionary=False)
    whole = file.read_bytes()
    middle = len(whole) * 2 // 3
    file.write_bytes(whole[:middle] + bytes(reversed(whole[middle : middle + 7])) + whole[middle + 7 :])
    refused(source, "a.parquet", "damaged or cut Parquet file", "CRC")


def test_damaged_arrow(source):
    file = source / "a.arrow"
    for writer in (pa.ipc.new_stream, pa.ipc.new_file):
        arrow(file, [f"문서 {i} " * 20 for i in range(100)], 10, writer)
        whole = file.read_bytes()
        for data in (whole[: len(whole) // 2], whole[:-8], whole[:-9], whole[:100]):
            file.write_bytes(data)
            refused(source, "a.arrow", "damaged or cut Arrow file")
    # Offsets that point out of the text.
    arrow(file, ["가나다"] * 4, 4)
    whole = file.read_bytes()
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 9, 18, 27, 36))
    assert whole.count(offsets) == 1
    file.write_bytes(whole.replace(offsets, offsets[:8] + b"\xff\xff\xff\x7f" + offsets[12:]))
    refused(source, "a.arrow", "damaged or cut Arrow file")


@pytest.mark.parametrize("write", [parquet, arrow], ids=["parquet", "arrow"])
def test_tables_of_bytes_that_are_no_utf8(source, write):
    file = source / ("a.parquet" if write is parquet else "a.arrow")
    write(file, ["가나다 0123456789", "라마바"])
    file.write_bytes(file.read_bytes().replace("라마바".encode(), "당뇨병과혈".encode("cp949")[:9]))
    refused(source, f"{file.name}, row 2: not UTF-8 (byte 1)")


def test_tables_without_text(source):
    columns = {
        "a": pa.table({"title": ["x"], "body": ["y"]}),
        "b": pa.table({"text": [1]}),
        "c": pa.table({"text": pa.nulls(3)}),
        "d": pa.table({"text": [b"x"]}),
        "e": pa.table({"text": [["x"]]}),
        "f": pa.table({"text": pa.array([], pa.string())}),
        "g": pa.table({f"c{i}": [1] for i in range(50)}),
    }
    for name, table in columns.items():
        pq.write_table(table, source / f"{name}.parquet")
        with pa.OSFile(str(source / f"{name}.arrow"), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
    # All of them at once, before anything is read.
    with pytest.raises(PipelineError) as error:
        tasks_of(source)
    lines = str(error.value).splitlines()
    assert len(lines) == 14
    for name, said in {
        "a": 'no "text" column; found title, body',
        "b": 'the column "text" holds int64, not strings',
        "c": "holds null, not strings",
        "d": "holds binary, not strings",
        "e": "holds list<",
        "f": "no rows",
        "g": "c11, ...",
    }.items():
        for suffix in ("arrow", "parquet"):
            (line,) = (line for line in lines if f"namu_wiki/{name}.{suffix}: " in line)
            assert said in line
    with pytest.raises(PipelineError, match="a.arrow(.|\n)*g.parquet"):
        check(source)


def test_no_files_broken_links_and_what_the_system_refuses(source, monkeypatch):
    with pytest.raises(PipelineError, match=r"namu_wiki: no text files \(\.parquet, \.arrow"):
        tasks_of(source)
    (source / "a.parquet").symlink_to(source / "absent")
    refused(source, "a.parquet: a link to a file that does not exist")
    (source / "a.parquet").unlink()
    (source / "linked").symlink_to(source.parent)
    refused(source, "linked: a link to a folder, which is not followed")
    (source / "linked").unlink()
    with pytest.raises(PipelineError, match="absent: cannot be read"):
        tasks_of(source / "absent")
    (source / "b.jsonl").write_bytes(jsonl(TEXTS))
    (task,) = tasks_of(source)

    def denied(file, *_):
        raise PermissionError(13, "Permission denied", str(file))

    with monkeypatch.context() as patch:
        patch.setattr(documents, "open", denied, raising=False)
        refused(source, "b.jsonl: cannot be read (Permission denied)")
    os.truncate(source / "b.jsonl", 19)
    with pytest.raises(PipelineError, match="b.jsonl, line 1: not valid JSON"):
        list(read(task))
    (source / "b.jsonl").write_bytes(jsonl(TEXTS[:1]))
    with pytest.raises(PipelineError, match=r"b\.jsonl: [\d,]+ bytes where [\d,]+ were listed; it has changed"):
        list(read(task))
    (source / "b.jsonl").unlink()
    with pytest.raises(PipelineError, match=r"b\.jsonl: cannot be read \(No such file"):
        list(read(task))


def test_a_table_that_became_shorter(source):
    for write, name in ((parquet, "a.parquet"), (arrow, "a.arrow")):
        write(source / name, TEXTS)
        (task,) = tasks_of(source)
        write(source / name, TEXTS[:2])
        with pytest.raises(PipelineError, match=rf"{name}: 2 rows where 5 were listed; it has changed or is damaged"):
            list(read(task))
        (source / name).unlink()


def test_a_line_without_end_is_refused(source, monkeypatch):
    monkeypatch.setattr(documents, "MAX_ENTRY", 1000)
    monkeypatch.setattr(documents, "CHUNK", 100)
    (source / "a.jsonl").write_bytes(jsonl(["가", "나" * 400]))
    refused(source, "a.jsonl, line 2: longer than 1.0 kB; this is no JSONL file")
    shutil.rmtree(source)
    source.mkdir()
    (source / "a.json").write_text('[{"text": "가"}, {"text": "' + "나" * 5000 + '"}]', encoding="utf-8")
    refused(source, "a.json, line 1: not valid JSON (Unterminated string")


def test_check_names_every_file(source):
    (source / "a.jsonl").write_bytes(jsonl(TEXTS))
    for name in ("b.jsonl", "c.json", "d.txt.gz"):
        (source / name).write_text("[no")
    with pytest.raises(PipelineError) as error:
        check(source)
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and [Path(line.split(":")[0].split(",")[0]).name for line in lines] == [
        "b.jsonl",
        "c.json",
        "d.txt.gz",
    ]


def test_many_damaged_files_are_a_short_message(source):
    for i in range(50):
        (source / f"{i:02}.parquet").write_bytes(b"")
    with pytest.raises(PipelineError) as error:
        tasks_of(source)
    assert str(error.value).splitlines()[-1] == "and 30 more files" and len(str(error.value).splitlines()) == 21


def test_two_columns_of_one_name(source):
    for file, write in (("a.parquet", pq.write_table), ("a.arrow", None)):
        table = pa.Table.from_arrays([pa.array(["가"]), pa.array(["나"])], names=["text", "text"])
        if write:
            write(table, source / file)
        else:
            with pa.ipc.new_stream(source / file, table.schema) as out:
                out.write_table(table)
        refused(source, f'{file}: 2 columns are called "text"; rename all but one')
        (source / file).unlink()


@pytest.mark.parametrize("shards", [[{"x": 1}], ["a.arrow"], [{"filename": 3}]])
def test_a_state_that_names_no_files(source, shards):
    (source / "state.json").write_text(json.dumps({"_data_files": shards}))
    (source / "a.jsonl").write_bytes(jsonl(["가"]))
    refused(source, 'state.json: "_data_files" names no files, as those of save_to_disk do; mend or delete it')


def test_a_batch_knows_the_pieces_around_it(source, monkeypatch):
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 200)
    texts = ["가" * 100, "나" * 950, "다" * 100, "라" * 150]
    (source / "a.jsonl").write_bytes(jsonl(texts))
    (task,) = tasks_of(source)
    batches = list(read(task, 400))
    assert [batch.rows for batch in batches] == [[0, 1], [1, 1], [1, 1], [2, 3]]
    assert (batches[0].before, batches[0].after) == (None, batches[1].texts[0])
    assert (batches[1].before, batches[1].after) == (batches[0].texts[1], batches[2].texts[0])
    assert (batches[2].before, batches[2].after) == (batches[1].texts[1], None)
    assert (batches[3].before, batches[3].after) == (None, None)
