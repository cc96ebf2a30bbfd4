"""What ships with the project: enough of everything, in the raw formats, and nothing of it leaks into held-out text."""

import json
from collections import Counter

import numpy as np
import pytest

from medgemma_korean.paths import SAMPLE_DATA
from medgemma_korean.text.decontaminate import fold, grams

RAW = SAMPLE_DATA / "01_raw"
KOREAN = {"wikipedia-korean": {"id", "url", "title", "text"}, "namu_wiki": {"title", "text"}, "c4_korean": {"text"}}
EXAM = ["subject", "year", "period", "q_number", "question", "A", "B", "C", "D", "E", "answer", "cot"]


def rows(path):
    # Not splitlines(): the sample holds U+2028 and its like inside texts on purpose.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").strip("\n").split("\n")]


def test_korean_documents_over_three_sources():
    sources = {p.parent.name: rows(p) for p in RAW.glob("00_korean/*/train.jsonl")}
    assert set(sources) == set(KOREAN) and sum(map(len, sources.values())) >= 150
    for name, found in sources.items():
        assert len(found) >= 50, name
        for row in found:
            assert KOREAN[name] <= set(row) and all(isinstance(row[c], str) for c in KOREAN[name])


def test_english_documents():
    found = rows(RAW / "00_english_replay/train.jsonl")
    assert len(found) >= 60 and all(isinstance(r["text"], str) for r in found)


def test_dictionary_files():
    folder = RAW / "01_medical_dict"
    whole = {p.name: json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("*.json")}
    lines = {p.name: rows(p) for p in folder.glob("*.jsonl")}
    assert set(whole) | set(lines) == {
        "korean_medical_dict.jsonl", "korean_animal_medical_dict.jsonl", "bilingual_medical_dict.json",
        "bilingual_medical_dict_ko_en.json", "bilingual_medical_dict_categorized.json",
    }  # fmt: skip
    groups = whole["bilingual_medical_dict_categorized.json"]
    flat = [whole["bilingual_medical_dict.json"], whole["bilingual_medical_dict_ko_en.json"], *groups.values()]
    assert all(isinstance(k, str) and isinstance(v, str) for pairs in flat for k, v in pairs.items())
    assert all(set(r) == {"term", "definition"} for found in lines.values() for r in found)
    assert sum(map(len, flat)) + sum(map(len, lines.values())) >= 250
    assert any("\n 세부설명 : " in r["definition"] for r in lines["korean_medical_dict.jsonl"])


def test_exam_questions():
    splits = {name: rows(RAW / f"02_kor_med_test/{name}.jsonl") for name in ("train", "dev", "test")}
    assert {k: len(v) for k, v in splits.items()} == {"train": 100, "dev": 30, "test": 30}
    for name, found in splits.items():
        assert all(list(r) == EXAM for r in found)
        assert set(Counter(r["subject"] for r in found)) == {"doctor", "nurse", "pharm", "dentist"}
        assert min(Counter(r["subject"] for r in found).values()) >= len(found) // 4 - 1
        answers = Counter(r["answer"] for r in found)
        assert set(answers) == {1, 2, 3, 4, 5} and max(answers.values()) - min(answers.values()) <= 2, name
        for r in found:
            options = [r[x] for x in "ABCDE"]
            assert all(isinstance(o, str) and o.strip() for o in options) and len(set(options)) == 5
            assert all(isinstance(r[c], int) for c in ("year", "period", "q_number", "answer"))
        keys = Counter((r["subject"], r["year"], r["period"], r["q_number"]) for r in found)
        assert max(keys.values()) == 1, name


def test_worked_rationales_are_in_the_detailed_form_and_reach_their_answer():
    worked = [r for r in rows(RAW / "02_kor_med_test/train.jsonl") if r["cot"]]
    assert len(worked) >= 10 and len({r["answer"] for r in worked}) == 5
    assert len({r["subject"] for r in worked}) == 4
    for r in worked:
        lines = r["cot"].split("\n")
        assert [line[:3] for line in lines] == ["첫째:", "둘째:", "셋째:", "넷째:"]
        shares = [s.rsplit(" ", 1) for s in lines[3].removeprefix("넷째: ").split("%, ")]
        percents = {text[0]: int(share.rstrip("%")) for text, share in shares}
        assert list(percents) == list("ABCDE") and sum(percents.values()) == 100
        assert max(percents, key=percents.get) == "ABCDE"[r["answer"] - 1]
        assert all(len(text.split()) >= 4 for text, _ in shares)  # the letter and three words


def test_sentence_pairs():
    found = [r for p in RAW.glob("03_korean_english/*/*.jsonl") for r in rows(p)]
    assert len(found) >= 250 and all(set(r) == {"en", "ko"} for r in found)


def test_pretraining_text_is_text():
    for language, at_least in (("ko", 150), ("en", 150)):
        found = [r for p in (SAMPLE_DATA / "pretrain" / language).glob("*.jsonl") for r in rows(p)]
        assert len(found) >= at_least and all(set(r) == {"text"} and len(r["text"]) > 50 for r in found)


# leaks --------------------------------------------------------------------------------------------------


def texts(path):
    return [r["text"] for r in rows(path)]


def of_items(path):
    """An item as question alone and with its options."""
    return [t for r in rows(path) for t in (r["question"], " ".join([r["question"], *(r[x] for x in "ABCDE")]))]


@pytest.mark.parametrize("language, n", [("ko", 13), ("en", 40)])
def test_pretraining_text_shares_nothing_with_held_out_text(refined_root, language, n):
    refined = refined_root / "data/sample/02_refined"
    if language == "ko":
        held_out = texts(refined / "00_plain_text/validation.jsonl")
        for split in ("dev", "test"):
            held_out += of_items(refined / f"02_kor_med_test/{split}.jsonl")
        assert len(held_out) > 130
    else:
        held_out = texts(refined / "00_english_replay/validation.jsonl")
        assert len(held_out) >= 10
    known = np.unique(np.concatenate([grams(fold(text), n) for text in held_out]))
    assert len(known) > 5000
    found = []
    for file in sorted((SAMPLE_DATA / "pretrain" / language).glob("*.jsonl")):
        for number, text in enumerate(texts(file), 1):
            folded = fold(text)
            hits = np.flatnonzero(np.isin(grams(folded, n), known))
            if len(hits):
                found.append(f"{file.name}, line {number}: {folded[hits[0] : hits[-1] + n]}")
    assert not found, "\n".join(found)


def test_the_leak_check_can_find_something(refined_root):
    (text, *_) = texts(refined_root / "data/sample/02_refined/00_plain_text/validation.jsonl")
    shown = grams(fold("앞말 " + text[20:60].replace(" ", "  ") + " 뒷말"), 13)
    assert np.isin(shown, grams(fold(text), 13)).any()


def test_repository_text_names_no_person_or_number():
    import re

    for file in RAW.rglob("*.jsonl"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"hf_[A-Za-z0-9]{10,}|\b\d{6}-[1-4]\d{6}\b", text), file.name
