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
    "decomposed syllables": sized("\u1112\u1161\u11ab \u1112\u1161 "),
    "zero-width characters": sized("환\u200b자\u200d는\ufeff "),
    "letters that fold into eighteen": sized("\ufdfa\u3307 "),
    "beyond the first plane": sized("😀𠀀\U0010ffff 환자 "),
    "e-mail addresses": sized("a.", 250_000) + "@" + sized("a@b.", 250_000),
    "addresses": sized("http://www.(http://"),
    "numbers": sized("010-1234-02-800101-1"),
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


def test_many_shards_do_not_hold_many_files(jobs, tmp_path) -> None:
    import os

    before = len(os.listdir("/proc/self/fd"))
    decided = decide(jobs * 30, tmp_path)
    assert len(os.listdir("/proc/self/fd")) - before < 10
    assert (decided.state == merge.EXACT).sum() == 30 * 150 - 148
