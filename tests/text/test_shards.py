"""Shards: pure and complete; hostile documents end quickly; what is decided about documents of many shards."""

from __future__ import annotations

import json
import pickle
import random
import time
from pathlib import Path

import numpy as np
import pytest

from medgemma_korean.cli import PipelineError
from medgemma_korean.text import dedup, documents, ledger, merge, shards
from medgemma_korean.text.decontaminate import ExamIndex
from medgemma_korean.text.shards import Exams, Job, refine_shard

PROSE = "환자는 사흘 전부터 두통과 발열로 내원하였고, 진찰에서 목이 뻣뻣하였다. "
QUESTION = "다음 가운데 급성 심근경색 환자에게 가장 먼저 시행하여야 하는 검사로 옳은 것은 무엇인가?"
ITEM = {"id": "dev/1", "question": QUESTION, "A": "심전도", "B": "심장초음파", "C": "관상동맥조영술"}


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "c4_korean"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def indexes() -> tuple[ExamIndex, ExamIndex]:
    return ExamIndex([ITEM]), ExamIndex([])


def job_of(source: Path, rules: str = "web", number: int = 0, task_bytes: int = 96_000_000) -> Job:
    task = documents.tasks_of(source, task_bytes)[number]
    return Job(task, "ko", rules, "exams", source.parent / ".shards")


def write(file: Path, texts: list[str | None]) -> Path:
    # Escaped: so lone surrogates reach the cleaner, as they do from real files.
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def texts_of(job: Job) -> list[str]:
    count = len(job.array("keys.npy"))
    return [text for _, (_, text) in sorted(merge.texts_of(job, range(count)).items())]


# hostile documents --------------------------------------------------------------------------------------


def sized(unit: str, size: int = 500_000) -> str:
    """About so many bytes of a unit."""
    return unit * (size // len(unit.encode("utf-8", "surrogatepass")))


HOSTILE = {
    "unclosed tags": sized("<b <span style="),
    "unclosed comments": sized("<!-- 주석 "),
    "unclosed references": sized("<ref>각주 "),
    "unclosed scripts": sized("<script>가 <style>나 "),
    "a hundred thousand brackets": "[" * 100_000 + PROSE * 20,
    "a hundred thousand links": "[[" * 100_000 + PROSE * 20,
    "a hundred thousand open groups": "{{{" * 100_000 + PROSE * 20,
    "nested a hundred thousand deep": "{{" * 100_000 + PROSE * 20 + "}}" * 100_000,
    "one run of braces": "{" * 300_000 + PROSE * 20 + "}" * 300_000,
    "crossing": "{{[[" * 100_000 + PROSE * 20 + "}}]]" * 100_000,
    "nested colours": sized("{{{#red ", 250_000) + PROSE * 20 + sized("}}}", 125_000),
    "links in links": sized("[[가|", 250_000) + sized("]]", 125_000),
    "brackets": sized("[a]"),
    "empty brackets": sized("[]"),
    "footnotes": sized("[* 각주 [b] "),
    "cells": sized("||<-2><:>"),
    "tables": sized("\n{|\n|-\n"),
    "headings of spaces": sized("= " + " " * 200),
    "struck and underlined": sized("--a ~~b __c ''d "),
    "lists in quotations": sized(" * > * "),
    "lone surrogates": sized(PROSE + "\ud800\udfff"),
    "NUL and control characters": sized("가\x00\x07나\x1b"),
    "right-to-left marks": sized("\u202e환자\u200f는 \u2067두통\u2069 "),
    "private-use characters": sized("\ue000환자\uf8ff는 \U000f0000"),
    "combining marks": "가" * 50 + sized("\u0301\u0323"),
    "combining marks above the first plane": "가나다 " * 50 + "\U0001e8d0\U0001d165" * 60_000,
    "combining marks of two kinds": sized("\u0301\uff9e"),
    "tags, selectors and fillers": sized("환\U000e0100자\u034f는 \U000e0041\u1160 "),
    "decomposed syllables": sized("\u1112\u1161\u11ab \u1112\u1161 "),
    "zero-width characters": sized("환\u200b자\u200d는\ufeff "),
    "letters that fold into eighteen": sized("\ufdfa\u3307 "),
    "one letter that folds into eighteen": sized("\ufdfa "),
    "beyond the first plane": sized("😀𠀀\U0010ffff 환자 "),
    "e-mail addresses": sized("a.", 250_000) + "@" + sized("a@b.", 250_000),
    "addresses": sized("http://www.(http://"),
    "numbers": sized("010-1234-02-800101-1"),
    "lists of numbers": sized("02-345-6789/"),
    "full-width numbers": sized("０１０－"),
    "entities": sized("&amp;amp;lt;&#x26;"),
    "blank lines": sized(" \n \u2028 \n"),
    "one character": sized("가"),
    "one exam question again and again": sized(QUESTION),
    "advertisements": sized("상담 문의 당일 대출 구매 문의 무료 상담 조건만남 "),
    "one line again and again": sized("같은 줄이 되풀이된다\n"),
}
SECONDS_PER_MEGABYTE = 0.2
# Only runaway is to fail here, and not a busy machine; what was measured is in the log of the work.
MARGIN = 5


@pytest.mark.parametrize("rules", ["namumark", "wikitext", "web"])
def test_hostile_documents_end_quickly(source, indexes, rules) -> None:
    assert len(HOSTILE) >= 25
    slow = {}
    for name, text in HOSTILE.items():
        write(source / "a.jsonl", [text])
        job, begun = job_of(source, rules), time.process_time()
        refine_shard(job, *indexes)
        seconds, size = time.process_time() - begun, max(0.2, len(text.encode("utf-8", "surrogatepass")) / 1e6)
        if seconds > MARGIN * SECONDS_PER_MEGABYTE * size:
            slow[name] = round(seconds / size, 2)
        about = job.about()
        documents_read = about["documents"]["read"]
        dropped = {"passed", "read", "further_pieces"}
        assert documents_read == sum(n for kind, n in about["documents"].items() if kind not in dropped) + len(
            texts_of(job)
        ), name
        # What is left can be written, and folds like any text.
        for kept in texts_of(job):
            kept.encode()
    assert slow == {}


@pytest.mark.slow
def test_doubling_a_hostile_document_doubles_the_time(source, indexes) -> None:
    quadratic = {}
    for name, text in HOSTILE.items():
        times = []
        for part in (text[: len(text) // 2], text):
            write(source / "a.jsonl", [part])
            jobs = [job_of(source, rules) for rules in ("namumark", "wikitext")]
            begun = time.process_time()
            for job in jobs:
                refine_shard(job, *indexes)
            times.append(time.process_time() - begun)
        if times[1] > 0.5 and times[1] > 3.5 * times[0]:
            quadratic[name] = times
    assert quadratic == {}


@pytest.mark.slow
def test_a_line_of_fifty_megabytes(source, indexes) -> None:
    rng = random.Random(1)
    words = [chr(0xAC00 + rng.randrange(11172)) + chr(0xAC00 + rng.randrange(11172)) for _ in range(3000)]
    text = " ".join(rng.choices(words, k=50_000_000 // 7))
    (source / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    size = (source / "a.jsonl").stat().st_size / 1e6
    assert size > 49
    job, begun = job_of(source), time.process_time()
    refine_shard(job, *indexes)
    seconds = time.process_time() - begun
    print(f"{seconds / size:.3f} s per MB")
    assert seconds < MARGIN * SECONDS_PER_MEGABYTE * size
    pieces = texts_of(job)
    assert len(pieces) > 15 and sum(len(piece.split()) for piece in pieces) == 50_000_000 // 7
    assert job.about()["documents"]["further_pieces"] == len(pieces) - 1


# shards -------------------------------------------------------------------------------------------------


def test_a_shard_is_the_same_wherever_and_however_often_it_is_made(source, indexes) -> None:
    write(source / "a.jsonl", [f"{i} {PROSE * 3}{i * 7919}" for i in range(300)] + [QUESTION + PROSE * 2, "짧다", None])
    job = job_of(source)
    refine_shard(job, *indexes)
    made = {file.name: file.read_bytes() for file in job.folder.iterdir()}
    times = {file: file.stat().st_mtime_ns for file in job.folder.iterdir()}
    assert set(made) == {f"{job.name}.{suffix}" for suffix in shards.FILES} and job.done
    refine_shard(job, *indexes)
    assert {file: file.stat().st_mtime_ns for file in job.folder.iterdir()} == times
    for lost in shards.FILES:
        job.path(lost).unlink()
        assert not job.done
        refine_shard(pickle.loads(pickle.dumps(job)), *indexes)
        assert {file.name: file.read_bytes() for file in job.folder.iterdir()} == made
    about = job.about()
    assert about["documents"] == {"read": 303, "passed": 300, "contaminated": 1, "too_short": 2, "further_pieces": 0}
    assert about["contaminated"] == [
        {"source": "c4_korean", "where": "c4_korean/a.jsonl, line 301", "items": ["dev/1"]}
    ]
    keys, signed = job.array("keys.npy"), job.array("sig.npy")
    assert keys.shape == (300, 3) and keys.dtype == np.uint64 and signed.shape == (300, 128)
    texts = texts_of(job)
    assert keys[7, :2].astype(">u8").tobytes() == dedup.content_key(texts[7]) and keys[7, 2] == len(texts[7].encode())
    assert np.array_equal(signed, dedup.signatures(texts))


def test_nothing_left_is_a_shard_too(source, indexes) -> None:
    write(source / "a.jsonl", ["짧다", None])
    job = job_of(source)
    refine_shard(job, *indexes)
    assert job.array("keys.npy").shape == (0, 3) and job.array("sig.npy", mapped=True).shape == (0, 128)
    decided = merge.decide([job], source.parent / "signatures", limit=None, seed=1, share=0.5, most=10)
    assert len(decided.state) == 0 and ledger.build([job], decided)["documents"] == {"train": 0, "validation": 0}


def test_a_name_says_all_that_a_shard_depends_on(source, tmp_path, monkeypatch) -> None:
    write(source / "a.jsonl", [PROSE * 5, PROSE * 6])
    first = job_of(source)
    names = {first.name}

    def other(job: Job) -> None:
        assert job.name not in names
        names.add(job.name)

    assert first.name.startswith("ko.c4_korean.") and job_of(source).name == first.name
    other(Job(first.task, "en", first.rules, first.exams, first.folder))
    other(Job(first.task, "ko", "wikitext", first.exams, first.folder))
    other(Job(first.task, "ko", first.rules, "other exams", first.folder))
    other(job_of(source, number=0, task_bytes=20))
    monkeypatch.setattr(shards, "rules_digest", lambda: "x")
    other(job_of(source))
    monkeypatch.undo()
    write(source / "a.jsonl", [PROSE * 5, PROSE * 7])
    other(job_of(source))
    # A copy elsewhere is the same; so is a worker's, which hashes nothing again.
    moved = tmp_path / "there" / "c4_korean"
    moved.parent.mkdir()
    source.rename(moved)
    again = pickle.loads(pickle.dumps(first))
    assert again.name == first.name


def test_exam_items_have_an_order_and_a_side() -> None:
    one, two = {**ITEM, "id": "1"}, {**ITEM, "id": "2"}
    digests = [Exams((one, two), ()), Exams((two, one), ()), Exams((one,), (two,)), Exams((), (one, two))]
    assert len({exams.digest for exams in digests}) == 4


def test_the_samples_do_not_depend_on_the_order_of_reading(monkeypatch) -> None:
    monkeypatch.setattr(shards, "SAMPLES", 20)
    texts, drawn = [f"글 {i}" for i in range(500)], []
    for seed in range(3):
        random.Random(seed).shuffle(texts)
        tally = shards.Tally()
        for text in texts:
            tally.sample("too_short", text, f"place of {text}")
            assert len(tally.samples["too_short"]) < 40
        drawn.append(tally.as_json()["samples"]["too_short"])
    assert drawn[0] == drawn[1] == drawn[2] and len(drawn[0]) == 20
    assert [row[1] for row in drawn[0]] == [f"place of {row[2]}" for row in drawn[0]]


def test_an_error_leaves_no_rest(source, indexes) -> None:
    write(source / "a.jsonl", [PROSE * 5] * 3)
    with open(source / "a.jsonl", "ab") as file:
        file.write(b'{"text": "\xff"}\n')
    job = job_of(source)
    with pytest.raises(PipelineError, match="a.jsonl, line 4: not UTF-8"):
        refine_shard(job, *indexes)
    assert list(job.folder.iterdir()) == []


@pytest.mark.parametrize("batch", [1, 1300, 4_000_000])
def test_an_exam_item_at_a_cut_is_found(source, indexes, monkeypatch, batch) -> None:
    """Half of it stands in either piece; a piece that holds it alone takes no other one along."""
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 1000)
    monkeypatch.setattr(shards, "read", lambda task: documents.read(task, batch))
    before, behind = QUESTION[: len(QUESTION) // 2], QUESTION[len(QUESTION) // 2 :]
    rng = random.Random(3)

    def words(length: int) -> str:
        made = "".join("".join(chr(0xAC00 + 7 * rng.randrange(1500)) for _ in range(3)) + " " for _ in range(length))
        return made[:length]

    # No space in the first thousand characters, so that it is cut behind them.
    half = before.replace(" ", "")
    head = words(1000 - len(half)).replace(" ", "가") + half
    cut = head + behind + words(1500)
    alone = words(400) + QUESTION + words(2000)
    write(source / "a.jsonl", [words(900), cut, words(500), alone, words(2500)])
    job = job_of(source)
    refine_shard(job, *indexes)
    about = job.about()
    pieces = [list(documents._pieces(text)) for text in (cut, alone)]
    assert pieces[0][0] == head and pieces[0][1].startswith(behind)
    found = [row["where"] for row in about["contaminated"]]
    assert found == ["c4_korean/a.jsonl, line 2"] * 2 + ["c4_korean/a.jsonl, line 4"]
    assert all(row["items"] == ["dev/1"] for row in about["contaminated"])
    passed = 1 + (len(pieces[0]) - 2) + 1 + (len(pieces[1]) - 1) + 3
    assert about["documents"] == {
        "read": passed + 3, "passed": passed, "contaminated": 3, "further_pieces": about["documents"]["further_pieces"],
    }  # fmt: skip
    # The last piece is too short to stay, and the item is in the one before it all the same.
    write(source / "a.jsonl", [head + behind])
    job = job_of(source)
    refine_shard(job, *indexes)
    assert (job.about()["documents"]["contaminated"], job.about()["documents"]["too_short"]) == (1, 1)
    # Train items are counted there, too.
    write(source / "a.jsonl", [cut])
    refine_shard(job_of(source), *indexes[::-1])
    assert job_of(source).about()["train_items"] == ["dev/1"] and not job_of(source).about()["contaminated"]


@pytest.mark.parametrize("change", ["same size", "longer", "touched", "gone"])
def test_a_file_that_changes_while_it_is_read_makes_no_shard(source, indexes, monkeypatch, change) -> None:
    import os

    file = write(source / "a.jsonl", [f"{PROSE * 3}{i}" for i in range(9)])
    job = job_of(source)
    assert job.name
    job = pickle.loads(pickle.dumps(job))  # a worker has what the program hashed
    whole = file.read_bytes()
    if change == "gone":  # behind its reading; before, the reader says so
        real = documents.read
        monkeypatch.setattr(shards, "read", lambda task: [*real(task), file.unlink()][:-1])
    elif change == "touched":
        os.utime(file, ns=(1, 1))
    else:
        file.write_bytes(file.read_bytes().replace(b"3", b"4") + (b'{"text": "a"}\n' if change == "longer" else b""))
        os.utime(file, ns=(1, 1))
    with pytest.raises(PipelineError, match=r"a\.jsonl: changed while it was read; run the same command again"):
        refine_shard(job, *indexes)
    assert list(job.folder.iterdir()) == []
    monkeypatch.undo()
    file.write_bytes(whole)
    refine_shard(job_of(source), *indexes)
    assert job_of(source).done


@pytest.mark.parametrize("suffix", ["keys.npy", "sig.npy"])
def test_every_flipped_bit_of_a_header_is_a_damaged_shard(source, indexes, suffix) -> None:
    write(source / "a.jsonl", [f"{PROSE * 3}{i}" for i in range(9)])
    job = job_of(source)
    refine_shard(job, *indexes)
    whole = job.path(suffix).read_bytes()
    for position in range(128):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            job.path(suffix).write_bytes(damaged)
            with pytest.raises(PipelineError, match=r"a damaged shard \(its header does not match\)"):
                job.array(suffix)
    job.path(suffix).write_bytes(whole + b"x")
    with pytest.raises(PipelineError, match=r"a damaged shard \(its size does not match\)"):
        job.array(suffix, mapped=True)
    job.path(suffix).write_bytes(whole)
    assert np.array_equal(job.array(suffix), np.load(job.path(suffix)))
    job.path("json").write_text("[]")
    with pytest.raises(PipelineError, match="a damaged shard"):
        job.array(suffix)


def test_rests_of_living_workers_stay(tmp_path) -> None:
    import os
    import platform

    rests = [tmp_path / f".ko.x.parquet.{platform.node()}.{pid}.part" for pid in (os.getpid(), 99999999)]
    for rest in [*rests, tmp_path / ".ko.x.parquet.otherhost.99999999.part"]:
        rest.write_text("x")
    shards.remove_rests(tmp_path)
    assert [rest.exists() for rest in rests] == [True, False] and len(list(tmp_path.glob(".*"))) == 2


def test_a_file_in_the_place_of_the_shards_is_named(source, indexes) -> None:
    write(source / "a.jsonl", [PROSE * 3])
    (source.parent / ".shards").write_text("")
    with pytest.raises(PipelineError, match=r"/\.shards: a file where a folder is needed"):
        refine_shard(job_of(source), *indexes)


# decisions ----------------------------------------------------------------------------------------------


@pytest.fixture
def jobs(tmp_path, indexes) -> list[Job]:
    """Three sources with documents of their own, and copies: exact ones in b and c, near ones in c."""
    rng = random.Random(2)

    def text() -> str:
        return " ".join("".join(chr(0xAC00 + 7 * rng.randrange(1500)) for _ in range(3)) for _ in range(80))

    own = {name: [text() for _ in range(50)] for name in "abc"}
    own["b"][10] = own["a"][3]
    own["c"][20] = own["a"][3]
    own["c"][21] = own["a"][4][:-9] + "다른 말로 끝"
    own["c"][22] = own["c"][21][:-6] + "또 다르게"
    found = []
    for name, texts in own.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name / "x.jsonl", texts)
        found.append(job_of(tmp_path / name))
        refine_shard(found[-1], *indexes)
    return found


def decide(jobs: list[Job], tmp_path: Path, **options) -> merge.Decisions:
    return merge.decide(jobs, tmp_path / "sig", **{"limit": None, "seed": 1, "share": 0.2, "most": 100} | options)


def test_the_first_of_equal_documents_stays(jobs, tmp_path) -> None:
    decided = decide(jobs, tmp_path)
    assert decided.starts.tolist() == [0, 50, 100, 150]
    exact, near = (np.flatnonzero(decided.state == state).tolist() for state in (merge.EXACT, merge.NEAR))
    assert exact == [60, 120] and decided.first[exact].tolist() == [3, 3]
    assert near == [121, 122] and decided.first[near].tolist() == [4, 4]
    assert decided.clusters == {3: 1} and decided.shard_of(121) == (2, 21) and decided.shard_of(50) == (1, 0)
    # In another order of the sources another one stays.
    turned = decide(jobs[::-1], tmp_path)
    assert np.flatnonzero(turned.state == merge.EXACT).tolist() == [60, 103]
    assert turned.first[[60, 103]].tolist() == [20, 20]
    alone = decide(jobs[:1], tmp_path)
    assert not (alone.state >= merge.EXACT).any() and np.array_equal(alone.state, decided.state[:50])


def test_the_split_is_a_document_s_own(jobs, tmp_path) -> None:
    whole = decide(jobs, tmp_path)
    held = np.flatnonzero(whole.state == merge.VALIDATION)
    assert 15 < len(held) < 50
    # The most that is held out are those of smallest hash; a larger share holds these and more.
    few = decide(jobs, tmp_path, most=5)
    assert set(np.flatnonzero(few.state == merge.VALIDATION)) < set(held) and (few.state == merge.VALIDATION).sum() == 5
    more = decide(jobs, tmp_path, share=0.5)
    assert set(held) < set(np.flatnonzero(more.state == merge.VALIDATION))
    sampled = decide(jobs, tmp_path, limit=60)
    kept = np.flatnonzero(sampled.state < merge.EXACT)
    assert len(kept) == 60 and set(np.flatnonzero(sampled.state == merge.VALIDATION)) == set(held) & set(kept)
    assert (decide(jobs, tmp_path, limit=60).state == sampled.state).all()
    assert not (decide(jobs, tmp_path, limit=60, seed=2).state == sampled.state).all()
    assert (decide(jobs, tmp_path, limit=1000).state == whole.state).all()


def test_what_is_written_is_what_was_decided(jobs, tmp_path, monkeypatch) -> None:
    decided, held_out = decide(jobs, tmp_path), tmp_path / "lines"
    shards.prepare(Exams((ITEM,), ()))
    merge.write_held_out_lines(jobs, decided, held_out)
    for number, job in enumerate(jobs):
        files = {merge.TRAIN: tmp_path / "train", merge.VALIDATION: tmp_path / "validation"}
        emitted = merge.emit(merge.Emission(job, decided.of_shard(number), files, held_out))
        assert emitted == merge.Emitted()
        texts = texts_of(job)
        for state, file in files.items():
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            chosen = np.flatnonzero(decided.of_shard(number) == state)
            assert lines == [{"text": texts[i], "source": job.task.source} for i in chosen]
    # The last look is at what is written.
    text = texts_of(jobs[0])[0]
    shards.prepare(Exams(({"id": "test/9", "question": text},), ()))
    files = {decided.state[0]: tmp_path / "again"}
    assert merge.emit(merge.Emission(jobs[0], decided.of_shard(0), files, held_out)).left == ["test/9"]


def test_one_document_is_held_out_where_two_are_kept(jobs, tmp_path) -> None:
    for limit, held_out in ((1, 0), (2, 1), (3, 1)):
        decided = decide(jobs, tmp_path, share=1e-9, limit=limit)
        held = np.flatnonzero(decided.state == merge.VALIDATION)
        assert (len(held), (decided.state == merge.TRAIN).sum()) == (held_out, limit - held_out)
        if held_out:
            keys = np.concatenate([job.array("keys.npy") for job in jobs])[:, 0]
            assert keys[held[0]] == keys[decided.state <= merge.VALIDATION].min()


def test_a_full_disk_says_so(jobs, tmp_path, monkeypatch) -> None:
    with pytest.raises(OSError) as error:
        merge._signatures(jobs, np.array([0, 50, 100, 150]), np.zeros(150, dtype=np.uint8), Path("/dev/full"))
    assert error.value.errno == 28


def test_an_exam_item_that_removed_lines_had_divided_is_no_training_text(source, tmp_path, indexes) -> None:
    rng = random.Random(6)

    def words(number: int) -> str:
        return " ".join("".join(chr(0xAC00 + 7 * rng.randrange(1500)) for _ in range(3)) for _ in range(number))

    line = words(9)
    folded = QUESTION.replace(" ", "")
    divided = f"\n{line}\n".join(folded[i : i + 10] for i in range(0, len(folded), 10))
    texts = [f"{words(40)}\n{line}\n{words(9)}", f"{words(40)}\n{divided}\n{words(40)}", words(60)]
    texts.append(f"{words(40)}\n{line}\n{words(40)}")
    write(source / "a.jsonl", texts)
    job = job_of(source)
    refine_shard(job, *indexes)
    assert job.about()["documents"]["passed"] == 4
    decided = decide([job], tmp_path)
    decided.state[:] = [merge.VALIDATION, merge.TRAIN, merge.TRAIN, merge.TRAIN]
    shards.prepare(Exams((ITEM,), ()))
    merge.write_held_out_lines([job], decided, tmp_path / "lines")
    files = {merge.TRAIN: tmp_path / "train", merge.VALIDATION: tmp_path / "validation"}
    emitted = merge.emit(merge.Emission(job, decided.of_shard(0), files, tmp_path / "lines"))
    shorter = len(line.encode()) + 1
    assert emitted == merge.Emitted(lines=1, bytes=shorter, exposed={1: ["dev/1"]})
    written = [json.loads(row)["text"] for row in (tmp_path / "train").read_text(encoding="utf-8").splitlines()]
    assert written == [texts[2], texts[3].replace(line + "\n", "")]
    decided.take_out(0, emitted)
    book = ledger.build([job], decided)
    found = book["sources"]["c4_korean"]
    assert found["dropped"]["contaminated"] == {"documents": 1, "bytes": len(texts[1].encode())}
    assert found["read"]["documents"] == found["kept"]["documents"] + 1 and book["documents"]["train"] == 2
    assert book["contaminated_documents"] == [
        {"source": "c4_korean", "where": "c4_korean/a.jsonl, line 2", "items": ["dev/1"]}
    ]
    assert book["held_out_items_touched"] == ["dev/1"]
    assert list(found["dropped"]).count("contaminated") == 1
    (row,) = ledger.dropped([job], decided)
    assert row["reason"] == "contaminated" and row["where"] == "c4_korean/a.jsonl, line 2: dev/1"


def test_many_shards_do_not_hold_many_files(jobs, tmp_path) -> None:
    import os

    before = len(os.listdir("/proc/self/fd"))
    decided = decide(jobs * 30, tmp_path)
    assert len(os.listdir("/proc/self/fd")) - before < 10
    assert (decided.state == merge.EXACT).sum() == 30 * 150 - 148
