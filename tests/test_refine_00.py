"""Plain text through the shipped program: planted copies and exam questions, the ledger, order, samples, damage."""

from __future__ import annotations

import gzip
import json
import platform
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from itertools import chain, cycle
from pathlib import Path

import pytest
from korean_corpus import (
    REAL,
    SAMPLE,
    as_namuwiki,
    begin,
    book_of,
    document,
    dropped_of,
    edited,
    kept_texts,
    make_root,
    outputs,
    raw_of,
    record_of,
    refined_of,
    rows,
    run,
    shards_of,
    write,
)

from medgemma_korean.cli import PipelineError
from medgemma_korean.text import decontaminate, dedup, filters, ledger, shards
from medgemma_korean.text.dedup import BANDS

WIKI, NAMU, WEB = "wikipedia-korean", "namu_wiki", "c4_korean"


# planted copies and exam questions ----------------------------------------------------------------------


def as_printed(item: dict, style: str) -> str:
    """An exam item as people copy it."""
    question, options = item["question"], [item[x] for x in "ABCDE" if item.get(x)]
    marks = {"numbers": "12345", "circles": "①②③④⑤", "letters": "ABCDE"}.get(style, "     ")
    whole = question + "".join(f"\n{mark}) {text}" for mark, text in zip(marks, options, strict=False))
    if style == "no spaces":
        return re.sub(r"\s+", "", question + "".join(options))
    if style == "wide":
        return re.sub(r" ", "  \n ", question + " / ".join(options))
    if style == "punctuation":
        other = str.maketrans({".": " · ", ",": "、", "?": "？!", "(": "〔", ")": "〕", "-": "–"})
        return (question + " | ".join(options)).translate(other)
    return whole


STYLES = ("numbers", "circles", "letters", "no spaces", "wide", "punctuation")


class Planted:
    """A project root with planted documents, refined; every document begins with a name of its own."""

    def __init__(self, root: Path, exam: Path) -> None:
        self.rng = rng = random.Random(20)
        self.originals = {s: [f"{s}{i:05d} {document(rng)}" for i in range(700)] for s in ("위키", "나무", "웹")}
        wiki, namu, web = self.originals.values()
        self.exact = {NAMU: [as_namuwiki(t) for t in wiki[:100]], WEB: [*wiki[100:250], *namu[:100]]}
        # The same to a reader: other spaces, invisible characters, a link.
        self.exact[WEB] += [t.replace(" ", " \u200b ", 7) + "\n\n\nhttps://example.org/a" for t in namu[100:150]]
        self.near = [edited(rng, text, 0.05) for text in [*wiki[250:450], *namu[200:400]]]
        self.items = {
            f"{split}/" + "-".join(str(item[c]) for c in ("subject", "year", "period", "q_number")): item
            for split in ("dev", "test", "fewshot")
            if (exam / f"{split}.jsonl").is_file()
            for item in rows(exam / f"{split}.jsonl")
        }
        self.leaks = {s: [] for s in (WIKI, NAMU, WEB)}  # (item, document)
        for number, (key, source) in enumerate(zip(self.items, cycle(self.leaks))):
            style = STYLES[number % len(STYLES)]
            around = [document(rng, length=(30, 60)) for _ in range(2)]
            self.leaks[source].append((key, f"\n{as_printed(self.items[key], style)}\n".join(around)))
        leaked = {source: [text for _, text in found] for source, found in self.leaks.items()}
        korean = {
            f"{WIKI}/a.parquet": wiki + leaked[WIKI],
            f"{NAMU}/a.jsonl": list(map(as_namuwiki, namu)) + self.exact[NAMU] + leaked[NAMU],
            f"{WEB}/a.jsonl.gz": web + self.exact[WEB] + self.near + leaked[WEB],
        }
        self.root = make_root(root, korean, exam)
        code, self.printed = run(self.root, "--workers", 2)
        assert code == 0, self.printed
        self.book, self.kept = book_of(root), kept_texts(root)


@pytest.fixture(scope="module", params=["sample", "real"])
def planted(request, tmp_path_factory) -> Planted:
    root, exam = tmp_path_factory.mktemp("planted"), SAMPLE / "02_kor_med_test"
    if request.param == "real":
        exam = REAL / "02_kor_med_test"
        if not exam.is_dir():
            pytest.skip("the real data are not here")
        return Planted(root, exam)
    # Five train items as the few-shot examples of this test.
    shutil.copytree(exam, root / "exam")
    train = rows(exam / "train.jsonl")
    for name, found in (("fewshot", train[40:45]), ("train", train[:40] + train[45:])):
        (root / f"exam/{name}.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in found))
    return Planted(root, root / "exam")


def test_planted_copies_are_found(planted):
    found = {source: Counter(dropped_of(planted.book, source)) for source in (WIKI, NAMU, WEB)}
    assert {source: count["exact_duplicate"] for source, count in found.items()} == {WIKI: 0, NAMU: 100, WEB: 300}
    near = found[WEB]["near_duplicate"]
    assert near >= 0.95 * len(planted.near)
    assert found[WIKI]["near_duplicate"] == found[NAMU]["near_duplicate"] == 0
    clusters = planted.book["near_duplicate_clusters"]
    assert clusters["number"] == near and clusters["by_size"] == {"2": near}


def test_nothing_unplanted_is_lost(planted):
    names = {text.split()[0] for texts in planted.originals.values() for text in texts}
    kept = Counter(text.split()[0] for text in planted.kept)
    assert names <= kept.keys()
    # Besides them, only the edited copies that were not recognised are left.
    assert len(planted.kept) - len(names) == len(planted.near) - dropped_of(planted.book, WEB)["near_duplicate"]


def test_planted_exam_questions_are_all_found(planted):
    book = planted.book
    for source, leaks in planted.leaks.items():
        assert dropped_of(book, source)["contaminated"] == len(leaks)
    assert book["held_out_items_touched"] == sorted(planted.items)
    assert (
        f"held-out exam items found in the raw text, their documents dropped: {len(planted.items)}" in planted.printed
    )
    by_place = {row["where"]: row for row in book["contaminated_documents"]}
    assert len(by_place) == len(planted.items)
    words = {f"{WIKI}/a.parquet, row": 700, f"{NAMU}/a.jsonl, line": 800, f"{WEB}/a.jsonl.gz, line": 1400}
    for source, (word, before) in zip(planted.leaks, words.items(), strict=True):
        for number, (item, _) in enumerate(planted.leaks[source], before + 1):
            row = by_place[f"{word} {number:,}"]
            assert row["source"] == source and item in row["items"]


# the ledger ---------------------------------------------------------------------------------------------


def assert_sums(book: dict) -> None:
    """Every document that was read is either kept or dropped for one reason."""
    kept = 0
    for source, found in book["sources"].items():
        counts = [found["kept"], *found["dropped"].values()]
        assert found["read"]["documents"] == sum(count["documents"] for count in counts), source
        assert list(found["dropped"]) == ledger.reasons_of(book["language"])
        assert sum(count["bytes"] for count in counts) <= found["read"]["bytes"], source
        kept += found["kept"]["documents"]
    assert kept == sum(book["documents"].values())


def test_the_ledger_adds_up(planted):
    for folder in ("00_plain_text", "00_english_replay"):
        book = book_of(planted.root, folder)
        assert_sums(book)
        texts = kept_texts(planted.root, folder)
        assert len(texts) == sum(book["documents"].values())
        size = sum(found["kept"]["bytes"] for found in book["sources"].values())
        assert size - book["validation_lines_removed"]["bytes"] == sum(len(text.encode()) for text in texts)
        assert set(book["explained"]) <= set(book) | set(next(iter(book["sources"].values())))
    reads = {source: found["read"]["documents"] for source, found in planted.book["sources"].items()}
    number = {source: len(leaks) for source, leaks in planted.leaks.items()}
    assert reads == {WIKI: 700 + number[WIKI], NAMU: 800 + number[NAMU], WEB: 1400 + number[WEB]}
    table = planted.printed.split("Korean: documents", 1)[1].split("\n\n")[0]
    for source, found in planted.book["sources"].items():
        (line,) = re.findall(rf"^{source} .*", table, re.MULTILINE)
        assert line.split()[1:3] == [f"{found[kind]['documents']:,}" for kind in ("read", "kept")]


def test_the_ledger_of_the_sample_adds_up(refined_root):
    for folder in ("00_plain_text", "00_english_replay"):
        assert_sums(book_of(refined_root, folder))


def test_pieces_of_long_documents_and_nulls_are_counted(tmp_path):
    rng = random.Random(3)
    long = " ".join(document(rng, length=(2000, 2001)) for _ in range(330))
    assert 2_100_000 < len(long) < 2_900_000
    texts = [None, "짧다", long, *(document(rng) for _ in range(40))]
    root = make_root(tmp_path, {f"{WEB}/a.jsonl": texts})
    code, printed = run(root)
    assert code == 0, printed
    found = book_of(root)["sources"][WEB]
    assert found["further_pieces"] == 2 and found["read"]["documents"] == 43 + 2 and found["kept"]["documents"] == 43
    assert dropped_of(book_of(root), WEB) == {"too_short": 2}
    assert_sums(book_of(root))
    # Nothing of it is lost but the spaces at which it was cut.
    kept = sum(len(re.sub(r"\s", "", text)) for text in kept_texts(root) if len(text) > 50_000)
    assert kept == len(re.sub(r"\s", "", long))


# sources ------------------------------------------------------------------------------------------------


def kept_by_source(root: Path) -> dict[str, list[tuple[str, str]]]:
    """{source: (split, first word) of what was kept}"""
    found: dict[str, list[tuple[str, str]]] = {}
    for split in ("train", "validation"):
        for row in rows(refined_of(root) / f"00_plain_text/{split}.jsonl"):
            found.setdefault(row["source"], []).append((split, row["text"].split()[0]))
    return {source: sorted(names) for source, names in found.items()}


def test_the_first_source_keeps_a_duplicate_and_another_source_changes_nothing_else(
    tmp_path, load_program, monkeypatch
):
    rng = random.Random(4)
    texts = {s: [f"{s}{i} {document(rng)}" for i in range(60)] for s in ("web", "hub", "own", "wiki", "namu")}
    shared = f"shared {document(rng)}"
    korean = {
        f"{WEB}/a.jsonl": [*texts["web"], shared, texts["own"][3]],
        "aihub/books.jsonl": [*texts["hub"], shared, edited(rng, texts["hub"][0], 0.03)],
        "my own text/a.txt": [re.sub("\n\n", "\n", text) for text in texts["own"]] + [shared],
    }
    more = {f"{WIKI}/a.json": [*texts["wiki"], texts["hub"][5], shared], f"{NAMU}/saved": texts["namu"]}
    program = load_program("refine_00_plain_text")
    kept = {}
    for name, files in (("few", korean), ("all", korean | more)):
        monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(tmp_path / name))
        assert program.main(["--data-dir", str(make_root(tmp_path / name, files) / "data/sample")]) == 0
        kept[name] = kept_by_source(tmp_path / name)
        assert_sums(book_of(tmp_path / name))
    few, every = kept["few"], kept["all"]
    # AI Hub comes before the web, and the web before folders that the program does not know.
    assert [s for s, names in few.items() if "shared" in dict((n, 1) for _, n in names)] == ["aihub"]
    assert {s: len(names) for s, names in few.items()} == {WEB: 60 + 1, "aihub": 61, "my own text": 59}
    assert [s for s, names in every.items() if "shared" in [n for _, n in names]] == [WIKI]
    assert {s: len(names) for s, names in every.items()} == {
        WIKI: 62, NAMU: 60, WEB: 61, "aihub": 59, "my own text": 59,
    }  # fmt: skip
    # What they share with a new, cleaner source goes there; everything else is as it was, its split too.
    assert every[WEB] == few[WEB] and every["my own text"] == few["my own text"]
    gone = {"shared", texts["hub"][5].split()[0]}
    assert every["aihub"] == [(split, name) for split, name in few["aihub"] if name not in gone]
    # Written in the order of the sources.
    order = [row["source"] for row in rows(refined_of(tmp_path / "all") / "00_plain_text/train.jsonl")]
    assert list(dict.fromkeys(order)) == [WIKI, NAMU, "aihub", WEB, "my own text"]


def test_every_format_and_every_folder(tmp_path):
    rng = random.Random(5)
    names = ("a.jsonl", "b.jsonl.gz", "c.txt", "d.json", "e.parquet", "sub/f.jsonl", "saved")
    texts = {name: [f"{name}{i} {document(rng)}" for i in range(30)] for name in names}
    root = make_root(tmp_path, {f"{WEB}/{name}": found for name, found in texts.items()})
    code, printed = run(root, "--workers", 2)
    assert code == 0, printed
    kept = Counter(re.match(r"\D+", text.split()[0])[0] for text in kept_texts(root))
    assert kept == dict.fromkeys(names, 30)
    # The files of one corpus may lie in 00_korean itself.
    shutil.move(raw_of(root) / f"00_korean/{WEB}/c.txt", raw_of(root) / "00_korean/c.txt")
    code, printed = run(root, "--force")
    assert code == 2 and printed.count("error:") == 1
    assert "00_korean/c.txt: stands beside the folders of sources; move it into one of its own" in printed
    shutil.rmtree(raw_of(root) / f"00_korean/{WEB}")
    code, printed = run(root, "--force")
    assert code == 0, printed
    assert list(book_of(root)["sources"]) == ["00_korean"] and len(kept_texts(root)) == 30


def test_without_english_the_sample_is_replayed_and_that_is_said(tmp_path):
    rng = random.Random(6)
    root = make_root(tmp_path, {f"{WEB}/a.jsonl": [document(rng) for _ in range(60)]})
    shutil.rmtree(raw_of(root) / "00_english_replay")
    code, printed = run(root)
    assert code == 0, printed
    assert "no 00_english_replay in data/sample/01_raw; the sample's English text is replayed" in printed
    assert len(kept_texts(root, "00_english_replay")) == 70


def test_a_source_may_be_a_link_and_a_link_to_nothing_is_refused(tmp_path, load_program, monkeypatch):
    monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(tmp_path))
    rng = random.Random(16)
    texts = [document(rng) for _ in range(60)]
    root = make_root(tmp_path, {f"{WEB}/a.jsonl": texts[:30]})
    file = write(tmp_path / "disk" / "books" / "a.jsonl", texts[30:])
    (raw_of(root) / "00_korean/books").symlink_to(file.parent)
    program = load_program("refine_00_plain_text")
    assert program.main([]) == 0 and program.main([]) == 0
    assert len(kept_texts(root)) == 60 and list(book_of(root)["sources"]) == [WEB, "books"]
    write(file, texts[30:50])
    with pytest.raises(PipelineError, match="input changed: Korean text"):
        program.main([])
    (raw_of(root) / "00_korean/gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(PipelineError, match="00_korean/gone: a link to something that does not exist"):
        program.main(["--force"])


def test_a_file_in_the_place_of_the_sources_is_named(tmp_path, load_program):
    root = make_root(tmp_path, {})
    (raw_of(root) / "00_korean").write_text("x")
    with pytest.raises(PipelineError, match="00_korean: a file where the folder of the sources is expected"):
        load_program("refine_00_plain_text").main([])


# samples and the split ----------------------------------------------------------------------------------


def test_a_sample_is_seeded_and_in_proportion_and_the_split_is_by_content(tmp_path, load_program, monkeypatch):
    rng = random.Random(7)
    sizes = {f"{WIKI}/a.jsonl": 300, f"{NAMU}/a.jsonl": 600, f"{WEB}/a.jsonl": 900}
    texts = {file: [document(rng, length=(40, 60)) for _ in range(number)] for file, number in sizes.items()}
    root = make_root(tmp_path, texts)
    program, drawn = load_program("refine_00_plain_text"), []

    def refine(*args: object) -> list[str]:
        assert program.main(["--keep-shards", "--force", *map(str, args)]) == 0
        assert_sums(book_of(root))
        return kept_texts(root)

    whole = refine()
    held = {row["text"] for row in rows(refined_of(root) / "00_plain_text/validation.jsonl")}
    assert len(whole) == 1800 and 0 < len(held) < 600
    for seed in (1, 2, 3):
        kept = refine("--max-samples", 600, "--seed", seed)
        drawn.append(kept)
        assert len(kept) == 600 and set(kept) < set(whole)
        book = book_of(root)
        assert sum(dropped_of(book, source)["not sampled"] for source in (WIKI, NAMU, WEB)) == 1200
        shares = [book["sources"][source]["kept"]["documents"] / 600 for source in (WIKI, NAMU, WEB)]
        # Standard deviation of each is below 0.02.
        assert shares == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=0.07)
        # What is held out of the whole is never trained on in a sample of it.
        assert not held & {row["text"] for row in rows(refined_of(root) / "00_plain_text/train.jsonl")}
    assert len({frozenset(kept) for kept in drawn}) == 3
    assert refine("--max-samples", 600, "--seed", 2) == drawn[1]
    # Not the first ones of a source, nor the last.
    chosen = [i for i, text in enumerate(texts[f"{WEB}/a.jsonl"]) if text in set(drawn[0])]
    assert min(chosen) < 100 and max(chosen) > 800


def test_a_small_sample_has_a_validation_document_or_says_why_not(small_root, load_program):
    program = load_program("refine_00_plain_text")
    for number in (2, 3, 5):
        assert program.main(["--force", "--max-samples", str(number)]) == 0
        assert sum(book_of(small_root)["documents"].values()) == number == len(kept_texts(small_root))
        assert book_of(small_root)["documents"]["validation"] >= 1
    with pytest.raises(PipelineError, match="no validation document is left .* choose more than --max-samples 1"):
        program.main(["--force", "--max-samples", "1"])


def test_a_seed_that_draws_nothing_changes_nothing(small_root, load_program):
    program = load_program("refine_00_plain_text")
    assert program.main([]) == 0 and program.main(["--seed", "18"]) == 0
    assert program.main(["--force", "--max-samples", "40"]) == 0
    with pytest.raises(PipelineError, match="settings.seed: 17 -> 18"):
        program.main(["--max-samples", "40", "--seed", "18"])


@pytest.mark.parametrize("module, name", [(filters, "MIN_CHARACTERS"), (dedup, "BANDS"), (decontaminate, "MIN_SHARE")])
def test_another_threshold_is_a_reason_to_refine_again(small_root, load_program, monkeypatch, module, name):
    program = load_program("refine_00_plain_text")
    assert program.main([]) == 0
    monkeypatch.setattr(module, name, getattr(module, name) + 1)
    with pytest.raises(PipelineError, match=rf"settings\.rules\.thresholds\.\w+\.{name}: "):
        program.main([])


def test_another_word_is_a_reason_to_refine_again(small_root, load_program, monkeypatch, tmp_path):
    program = load_program("refine_00_plain_text")
    words = Path(filters.__file__).with_name("filter_words.json")
    monkeypatch.setattr(filters, "__file__", str(tmp_path / "filters.py"))
    shutil.copyfile(words, tmp_path / words.name)
    assert program.main([]) == 0 and program.main([]) == 0
    lists = json.loads(words.read_text(encoding="utf-8"))
    lists["adult"].append("환자")
    (tmp_path / words.name).write_text(json.dumps(lists), encoding="utf-8")
    with pytest.raises(PipelineError, match=r"settings\.rules\.words: "):
        program.main([])


def test_lines_of_held_out_text_are_taken_out_of_training_text(tmp_path, load_program, monkeypatch):
    """A page that quotes a validation document loses the quotation; one that is little else is dropped."""
    rng = random.Random(11)

    def lines(number: int) -> list[str]:
        return [" ".join(document(rng, length=(16, 20)).split()) for _ in range(number)]

    texts = ["\n".join(lines(9)) for _ in range(40)]
    root = make_root(tmp_path, {f"{WEB}/a.jsonl": texts})
    program = load_program("refine_00_plain_text")
    assert program.main([]) == 0
    validation = [row["text"] for row in rows(refined_of(root) / "00_plain_text/validation.jsonl")]
    assert book_of(root)["validation_lines_removed"] == {"lines": 0, "bytes": 0}
    quoted, other = validation[0].split("\n"), validation[1].split("\n")
    own = [lines(6) for _ in range(12)]
    quoting = ["\n".join([*own[i][:3], *quoted[:3], *own[i][3:]]) for i in range(12)]
    nothing_else = ["\n".join(["짧은 말.", *pair]) for pair in zip(other[3:], quoted[3:], strict=True)]
    write(raw_of(root) / f"00_korean/{WEB}/b.jsonl", quoting + nothing_else)
    assert program.main(["--force"]) == 0
    train = [row["text"] for row in rows(refined_of(root) / "00_plain_text/train.jsonl")]
    held_out = [row["text"] for row in rows(refined_of(root) / "00_plain_text/validation.jsonl")]
    book = book_of(root)
    assert_sums(book)
    assert set(validation) < set(held_out)
    held_lines = {line for text in held_out for line in text.split("\n")}
    assert not held_lines & {line for text in train for line in text.split("\n")}
    # By its own hash a document is held out itself; the others are in train without what they quote.
    shortened = {"\n".join(mine) for mine, text in zip(own, quoting, strict=True) if text not in held_out}
    assert len(shortened) > 5 and shortened <= set(train)
    emptied = [text for text in nothing_else if text not in held_out]
    assert len(emptied) > 2 and dropped_of(book, WEB) == {"in_validation": len(emptied)}
    assert book["validation_lines_removed"]["lines"] == 3 * len(shortened) + 2 * len(emptied)
    assert book["validation_lines_removed"]["bytes"] == len(shortened) * sum(len(q.encode()) + 1 for q in quoted[:3])
    shown = [row for row in rows(refined_of(root) / "00_plain_text/dropped.jsonl") if row["reason"] == "in_validation"]
    assert sorted(row["text"] for row in shown) == sorted(text[:400] for text in emptied)


# what a person looks at ---------------------------------------------------------------------------------


def test_show_before_refining_is_one_message(root, load_program, monkeypatch):
    with pytest.raises(PipelineError) as error:
        load_program("refine_00_plain_text").main(["--show", "adult"])
    command = "python script/refine/refine_00_plain_text.py --model tiny"
    assert str(error.value) == f"data/sample/02_refined/00_plain_text: nothing is refined here yet; run: {command}"
    assert not refined_of(root).exists()


def test_damaged_examples_are_named(refined_root, tmp_path):
    (tmp_path / "dropped.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(PipelineError, match="dropped.jsonl: a row without reason, where or text, found x"):
        ledger.examples([tmp_path], "adult", 1)


@pytest.fixture
def show(load_program, monkeypatch, capsys):
    def show(root: Path, reason: str, *args: object) -> str:
        monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(root))
        assert load_program("refine_00_plain_text").main(["--show", reason, *map(str, args)]) == 0
        return capsys.readouterr().out

    return show


def test_show_prints_examples_of_every_reason(refined_root, show):
    reasons = set()
    for folder in ("00_plain_text", "00_english_replay"):
        for source, found in book_of(refined_root, folder)["sources"].items():
            for reason, count in found["dropped"].items():
                if not count["documents"]:
                    continue
                reasons.add(reason)
                number = len(re.findall(rf"^\[{source}/train\.jsonl, line \d+\]$", show(refined_root, reason), re.M))
                assert number == count["documents"], (source, reason)
    assert reasons == {
        "redirect", "too_short", "korean_ratio", "english_ratio", "adult", "advertisement", "boilerplate",
        "exact_duplicate", "near_duplicate",
    }  # fmt: skip
    assert "\n#redirect " in show(refined_root, "redirect") and "당일 대출" in show(refined_root, "advertisement")


def test_show_prints_a_near_duplicate_beside_the_kept_text(refined_root, show):
    shown = show(refined_root, "near_duplicate", "--number", 1)
    place = r"\[wikipedia-korean/train\.jsonl, line \d+\]"
    parts = re.fullmatch(rf"{place}\n(.+)\n  the kept one: {place}\n(.+)\n", shown, re.DOTALL)
    dropped, kept = parts[1].split(), parts[2].split()
    assert 0.6 < len(set(dropped) & set(kept)) / len(set(dropped)) < 1
    assert any(" ".join(kept[:20]) in " ".join(text.split()) for text in kept_texts(refined_root))
    assert not any(" ".join(dropped) in " ".join(text.split()) for text in kept_texts(refined_root))


def test_show_prints_contaminated_documents_and_knows_no_other_reason(planted, show):
    shown = show(planted.root, "contaminated", "--number", 3)
    assert (
        shown.count("\n" + "-" * 100 + "\n") == 2
        and len(re.findall(r"^\[.+, (?:row|line) [\d,]+: (?:dev|test|fewshot)/.+\]$", shown, re.M)) == 3
    )
    assert show(planted.root, "adult").startswith("no examples of adult; there are some of too_short, ")
    with pytest.raises(PipelineError, match="^--show wrong: no such reason; there are redirect, too_short, "):
        show(planted.root, "wrong")


# the check at the end -----------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["ko", "en"])
def test_an_exam_item_that_slips_through_is_found_before_anything_is_published(
    root, load_program, monkeypatch, language
):
    item = rows(raw_of(root) / "02_kor_med_test/test.jsonl")[4]
    file = raw_of(root) / {"ko": f"00_korean/{WEB}", "en": "00_english_replay"}[language] / "train.jsonl"
    rng = random.Random(8)
    around = document(rng, language, (60, 61))
    write(file, [row["text"] for row in rows(file)] + [f"{around}\n{as_printed(item, 'numbers')}\n{around}"])
    seen = decontaminate.touched_by_all

    def blind(indexes, texts):
        """The first look, at two indexes, finds nothing; the last, at one, is as it is."""
        return seen(indexes, texts) if len(indexes) == 1 else [[[] for _ in texts] for _ in indexes]

    monkeypatch.setattr(decontaminate, "touched_by_all", blind)
    program = load_program("refine_00_plain_text")
    with pytest.raises(AssertionError, match=r"held-out items are left in the training text: \['test/"):
        program.main([])
    assert outputs(root) == {} and not (refined_of(root) / ".stages/refine_00_plain_text.json").exists()
    monkeypatch.setattr(decontaminate, "touched_by_all", seen)
    for shard in (refined_of(root) / ".shards").iterdir():
        shard.unlink()  # they were made without it
    assert program.main([]) == 0
    counts = record_of(root)["counts"]
    assert counts[{"ko": "korean", "en": "english"}[language]]["contaminated_documents"] == 1


# shards -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_root(tmp_path, monkeypatch) -> Path:
    """Three sources of 40 documents each."""
    monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(tmp_path))
    rng = random.Random(9)
    files = (f"{WIKI}/a.parquet", f"{NAMU}/a.jsonl", f"{WEB}/a.jsonl.gz")
    return make_root(tmp_path, {file: [document(rng) for _ in range(40)] for file in files})


def test_shards_are_used_again_until_what_they_depend_on_changes(small_root, load_program, monkeypatch, capsys):
    program = load_program("refine_00_plain_text")

    def refine(*args: str) -> tuple[str, dict[str, int]]:
        capsys.readouterr()
        assert program.main(["--force", *args]) == 0
        return capsys.readouterr().out, shards_of(small_root)

    _, kept = refine("--keep-shards")
    assert len(kept) == 4 and {name.rsplit(".", 1)[0] for name in kept} == {
        f"ko.{WIKI}", f"ko.{NAMU}", f"ko.{WEB}", "en.00_english_replay",
    }  # fmt: skip
    # Another sample of the same documents.
    printed, found = refine("--keep-shards", "--max-samples", "50")
    assert found == kept and "4 of 4 shards are there already" in printed

    # One file lost of one shard, and another source: these two are made.
    next((refined_of(small_root) / ".shards").glob(f"ko.{NAMU}.*.sig.npy")).unlink()
    (refined_of(small_root) / ".shards/.ko.x.parquet.host.1.part").write_text("a kill left this")
    rng = random.Random(10)
    write(raw_of(small_root) / "00_korean/aihub/a.txt", [document(rng) for _ in range(3)])
    printed, found = refine("--keep-shards")
    assert "3 of 5 shards are there already" in printed
    new = {name for name, made in found.items() if kept.get(name) != made}
    assert {name.split(".")[1] for name in new} == {NAMU, "aihub"} and kept.keys() < found.keys()
    assert not list((refined_of(small_root) / ".shards").glob(".*"))

    # One raw file changed: its shard alone, and the one of before is deleted at the end.
    file = raw_of(small_root) / f"00_korean/{NAMU}/a.jsonl"
    write(file, [row["text"] for row in rows(file)][1:])
    kept = found
    printed, found = refine("--keep-shards")
    assert "4 of 5 shards are there already" in printed and len(found) == 5
    assert {name.split(".")[1] for name in found.keys() ^ kept.keys()} == {NAMU}

    # A new exam item concerns every document, and so do new rules.
    exam = raw_of(small_root) / "02_kor_med_test/dev.jsonl"
    exam.write_text(
        exam.read_text() + json.dumps(rows(exam)[0] | {"q_number": 901, "question": "새로 낸 문제는 무엇인가?"}) + "\n"
    )
    kept = found
    printed, found = refine("--keep-shards")
    assert "already" not in printed and not found.keys() & kept.keys() and len(found) == 5
    monkeypatch.setattr(shards, "rules_digest", lambda: "other rules")
    kept = found
    printed, found = refine("--keep-shards", "--max-samples", "9999", "--seed", "5")
    assert "already" not in printed and not found.keys() & kept.keys()

    # Without --keep-shards they are used, and then deleted.
    printed, found = refine("--max-samples", "9999", "--seed", "6")
    assert "5 of 5 shards are there already" in printed and found == {}
    assert not (refined_of(small_root) / ".shards").exists()


def test_shards_that_a_kill_left_behind_the_record_are_deleted(small_root, load_program, monkeypatch):
    program = load_program("refine_00_plain_text")
    with monkeypatch.context() as patch:
        patch.setattr(program, "tidy", lambda *_: None)
        assert program.main([]) == 0
    assert len(shards_of(small_root)) == 4
    assert program.main(["--keep-shards"]) == 0 and len(shards_of(small_root)) == 4
    assert program.main([]) == 0 and not (refined_of(small_root) / ".shards").exists()


def test_two_at_once(small_root):
    """One is at work, the other one says so; the first is not disturbed."""
    rng = random.Random(17)
    write(raw_of(small_root) / f"00_korean/{WEB}/b.jsonl", [document(rng, length=(300, 400)) for _ in range(2000)])
    first = begin(small_root, "--workers", 1)
    work = refined_of(small_root) / ".stages/refine_00_plain_text.partial"
    while not work.exists():
        assert first.poll() is None
        time.sleep(0.01)
    code, printed = run(small_root)
    assert code == 2 and re.fullmatch(
        rf"error: .*refine_00_plain_text\.lock: another process is at work on .* \(pid {first.pid}\); wait .*\n",
        printed,
    ), printed
    printed, _ = first.communicate(timeout=120)
    assert first.returncode == 0, printed
    made = outputs(small_root)
    shutil.rmtree(refined_of(small_root))
    assert run(small_root)[0] == 0 and outputs(small_root) == made


@pytest.mark.parametrize("when", ["before it is refined", "when all are refined"])
def test_a_raw_file_that_changes_meanwhile_is_refused(small_root, load_program, monkeypatch, when):
    program = load_program("refine_00_plain_text")
    file = raw_of(small_root) / f"00_korean/{NAMU}/a.jsonl"
    whole, made = file.read_bytes(), program.make_shards

    def changing(*args):
        if when == "when all are refined":
            made(*args)
        file.write_bytes(whole.replace("다".encode(), "라".encode()))
        if when == "before it is refined":
            made(*args)

    monkeypatch.setattr(program, "make_shards", changing)
    with pytest.raises(PipelineError, match="Korean text: .* has changed\nwhile refine_00_plain_text was at work"):
        program.main(["--keep-shards"])
    assert outputs(small_root) == {}
    # Back again, the shards of the other content are not used.
    file.write_bytes(whole)
    monkeypatch.setattr(program, "make_shards", made)
    assert program.main([]) == 0
    kept = outputs(small_root)
    shutil.rmtree(refined_of(small_root))
    assert program.main([]) == 0 and outputs(small_root) == kept


def test_progress_is_said_in_megabytes_with_the_time_left(small_root, load_program, monkeypatch, capsys):
    program = load_program("refine_00_plain_text")
    monkeypatch.setattr(program, "Every", lambda seconds: lambda: True)
    name = "한국어 의학 도서 말뭉치 " * 6  # 144 bytes
    rng = random.Random(14)
    write(raw_of(small_root) / "00_korean" / name.strip() / "a.jsonl", [document(rng) for _ in range(40)])
    assert program.main([]) == 0
    state = r"[\d.]+ [kM]?B of [\d.]+ [kM]B (\w+), [\d.]+ [kM]?B/s"
    lines = re.findall(rf"^{state}, (\d+) min left$", capsys.readouterr().out, re.MULTILINE)
    steps = [["refined"] * 5, ["compared"] * BANDS, ["written"] * 4, ["compared"] * BANDS, ["written"]]
    assert lines == [(step, "0") for step in chain(*steps)]
    progress = (small_root / "logs/progress_tiny.txt").read_text(encoding="utf-8")
    assert "refine" in progress and len(kept_texts(small_root)) == 160


def test_what_a_shard_depends_on_is_complete(monkeypatch):
    """Every module and word list that pass 1 imports is part of the digest."""
    folder = Path(shards.__file__).parent
    imported, ahead = set(), ["shards.py"]
    while ahead:
        name = ahead.pop()
        if name in imported or not (folder / name).is_file():
            continue
        imported.add(name)
        ahead += [
            f"{found}.py" for found in re.findall(r"medgemma_korean\.text\.(\w+) import", (folder / name).read_text())
        ]
        ahead += [
            f"{found}.py" for found in re.findall(r"medgemma_korean\.text import (\w+)", (folder / name).read_text())
        ]
    assert imported | {"filter_words.json"} == set(shards.CODE)
    assert {file.name for file in folder.glob("*.json")} == {"filter_words.json"}


# damage -------------------------------------------------------------------------------------------------


def cut(file: Path, share: float = 0.6) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    at = int(len(data) * 0.45)
    data[at : at + 64] = bytes(byte ^ 0xFF for byte in data[at : at + 64])
    file.write_bytes(data)


def wrong_column(file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"title": ["가"], "body": ["나"]}), file)


def line_without_text(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").split("\n")
    lines[24] = '{"content": "글"}'
    file.write_text("\n".join(lines), encoding="utf-8")


def cp949(file: Path) -> None:
    file.write_bytes(file.read_bytes().decode().replace("\u2028", "").encode("cp949", "ignore"))


# file, what happens to it, what is said of it, whether that takes reading it
DAMAGE = {
    "parquet cut": ("a.parquet", cut, r": damaged or cut Parquet file \(.+\); bring it anew", False),
    "parquet with other bytes": ("a.parquet", flip, r", from row [\d,]+ on: damaged or cut .+; bring.*", True),
    "gzip cut": ("a.jsonl.gz", cut, r", line \d+: damaged or cut gz file \(.+\); bring it anew", True),
    "gzip with other bytes": ("a.txt.gz", flip, r", line \d+: (?:damaged or cut gz file|not UTF-8) ?\(.+\).*", True),
    "another column": ("a.parquet", wrong_column, r': no "text" column; found title, body; rename .*', False),
    "a line without text": ("a.jsonl", line_without_text, r', line 25: no "text" column; found content; .*', True),
    "an empty file": ("a.jsonl", lambda file: cut(file, 0), r": an empty file \(0 bytes\); bring .*", False),
    "an empty compressed file": ("a.jsonl.gz", lambda file: write(file, []), r": no documents; bring .*", True),
    "another encoding": ("a.txt", cp949, r", line 1: not UTF-8 \(byte 1\); it reads as CP949 .*iconv.*", True),
    "a list cut": ("a.json", cut, r", line 1: (?:not valid JSON|not UTF-8) \(.+\); .+", True),
}  # fmt: skip


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """damaged(kind) -> (root, file, what is to be said): a whole source, and behind it one with a damaged file."""
    monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(tmp_path))

    def make(kind: str):
        name, change, said, read = DAMAGE[kind]
        rng = random.Random(11)
        korean = {f"{WIKI}/a.jsonl": [document(rng) for _ in range(50)]}
        make_root(tmp_path, korean)
        texts = [document(rng) for _ in range(400)]
        file = raw_of(tmp_path) / f"00_korean/{WEB}" / name
        if name == "a.txt.gz":
            write(file.with_suffix(""), texts)
            file.write_bytes(gzip.compress(file.with_suffix("").read_bytes()))
            file.with_suffix("").unlink()
        else:
            write(file, texts)
        whole = file.read_bytes()
        change(file)
        return tmp_path, file, whole, rf"data/sample/01_raw/00_korean/{WEB}/{re.escape(name)}{said}", read

    return make


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_with_its_place_and_nothing_is_published(damaged, load_program, kind):
    root, file, whole, said, read = damaged(kind)
    rest = refined_of(root) / f".shards/.ko.x.parquet.{platform.node()}.99999999.part"
    rest.parent.mkdir(parents=True)
    rest.write_text("a worker was killed")
    program = load_program("refine_00_plain_text")
    with pytest.raises(PipelineError) as error:
        program.main([])
    assert re.fullmatch(said, str(error.value)), str(error.value)
    assert outputs(root) == {} and not (refined_of(root) / ".stages/refine_00_plain_text.json").exists()
    # The shard of the source before it is kept, and used when the file is mended.
    assert [name.split(".")[1] for name in shards_of(root)] == ([WIKI] if read else [])
    assert not list((refined_of(root) / ".shards").glob(".*")) if read else True
    file.write_bytes(whole)
    made = shards_of(root)
    assert program.main(["--keep-shards"]) == 0
    assert {name: shards_of(root)[name] for name in made} == made
    assert len(kept_texts(root)) == 450


@pytest.mark.parametrize("kind", ["parquet with other bytes", "a line without text", "another encoding"])
def test_damage_that_a_worker_process_finds(damaged, kind):
    root, _, _, said, _ = damaged(kind)
    code, printed = run(root, "--workers", 2)
    assert code == 2 and re.fullmatch(f"error: {said}\n", printed), printed
    assert outputs(root) == {}


def test_every_damaged_file_of_every_source_is_named_at_once(tmp_path):
    rng = random.Random(12)
    files = [f"{WIKI}/a.parquet", f"{NAMU}/b.jsonl", f"{WEB}/c.parquet", f"{WEB}/d.parquet"]
    root = make_root(tmp_path, {file: [document(rng) for _ in range(40)] for file in files})
    for file in files[1:]:
        cut(raw_of(root) / "00_korean" / file, 0 if file.endswith("jsonl") else 0.5)
    cut(raw_of(root) / "00_english_replay/train.jsonl", 0)
    code, printed = run(root)
    assert code == 2 and printed.startswith("error: ") and len(printed.strip().split("\n")) == 4
    for name in (f"{NAMU}/b.jsonl", f"{WEB}/c.parquet", f"{WEB}/d.parquet", "00_english_replay/train.jsonl"):
        assert name in printed


@pytest.mark.parametrize(
    "suffix, change",
    [(suffix, change) for suffix in ("parquet", "keys.npy", "sig.npy", "json") for change in (cut, flip)],
)
def test_a_damaged_shard_is_named_and_made_again(small_root, load_program, suffix, change):
    program = load_program("refine_00_plain_text")
    assert program.main(["--keep-shards"]) == 0
    before = outputs(small_root)
    (shard,) = (refined_of(small_root) / ".shards").glob(f"ko.{WEB}.*.{suffix}")
    change(shard)
    with pytest.raises(PipelineError) as error:
        program.main(["--force", "--max-samples", "9999"])
    advice = "it was deleted, run the same command again"
    place = re.escape(f"data/sample/02_refined/.shards/{shard.name}")
    assert re.fullmatch(rf"{place}: a damaged shard \(.+\); {advice}", str(error.value)), str(error.value)
    assert outputs(small_root) == before and not shard.exists()
    assert program.main(["--force", "--max-samples", "9999"]) == 0
    assert {name: digest for name, digest in outputs(small_root).items() if ".previous" not in name} == before


# a full disk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, full, workers", [("2m", "pass 1", 2), ("13m", "pass 3", 1)])
def test_a_full_disk_is_one_message_and_loses_nothing(tmp_path, size, full, workers):
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system of its own")
    rng = random.Random(13)
    texts = [[document(rng, length=(300, 400)) for _ in range(700)] for _ in range(3)]
    root = make_root(tmp_path, {f"{name}/a.jsonl": found for name, found in zip((WIKI, NAMU, WEB), texts, strict=True)})
    refined_of(root).mkdir()
    # What a mount holds is seen by those inside only: a list of the files is part of what is printed.
    script = (
        f'mount -t tmpfs -o size={size} none {refined_of(root)} && {{ "$@"; echo exit $?; '
        f"cd {refined_of(root)} && find . -type f | sort; cd {root}; mount -o remount,size=200m {refined_of(root)}; "
        f'"$@"; echo exit $?; cd {refined_of(root)} && sha256sum 00_*/*; }}'
    )
    code, printed = run(root, "--workers", workers, within=["unshare", "-rm", "sh", "-c", script, "sh"])
    assert code == 0 and "Traceback" not in printed, printed
    first, listed, again = re.match(
        r"(.*)exit 2\n(.*?)(?=\d of 4 shards|Korean )(.*exit 0.*)", printed, re.DOTALL
    ).groups()
    errors = [line for line in first.split("\n") if line.startswith("error: ")]
    assert errors == ["error: no space left on the disk of data/sample/02_refined; free some and run again"], first
    # Nothing half-published; the finished shards stay and are used.
    files = listed.strip().split("\n")
    assert not [file for file in files if not file.startswith(("./.shards/", "./.stages/refine_00_plain_text.partial"))]
    made = [file for file in files if file.startswith("./.shards/") and file.endswith(".json")]
    assert (f"{len(made)} of 4 shards are there already" in again) == bool(made)
    assert len(made) == 4 if full == "pass 3" else len(made) < 4
    # The same as where there was space.
    shutil.rmtree(refined_of(root))
    assert run(root)[0] == 0
    digests = {name: digest for name, digest in outputs(root).items()}
    assert {line.split()[1]: line.split()[0] for line in again.split("exit 0\n")[1].strip().split("\n")} == digests
