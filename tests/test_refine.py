"""The refine programs on the sample and on real text: what is kept, what is dropped and why; same bytes twice."""

import json
import re
import time
from collections import Counter
from pathlib import Path

import pytest

from medgemma_korean.cli import PipelineError
from medgemma_korean.stage import files_under
from medgemma_korean.text import dedup
from medgemma_korean.text.decontaminate import fold

REAL = Path(__file__).resolve().parents[1].parent / "shared" / "real_data" / "01_raw"
OUTPUTS = {
    "00_plain_text/train.jsonl", "00_plain_text/validation.jsonl",
    "00_english_replay/train.jsonl", "00_english_replay/validation.jsonl",
    "00_plain_text/ledger.json", "00_plain_text/dropped.jsonl",
    "00_english_replay/ledger.json", "00_english_replay/dropped.jsonl",
    "01_medical_dict.json", "01_english_korean/en_to_ko.jsonl", "01_english_korean/ko_to_en.jsonl",
    "02_kor_med_test/train.jsonl", "02_kor_med_test/dev.jsonl", "02_kor_med_test/test.jsonl",
    "02_kor_med_test/train_with_reasoning.jsonl", "02_char_dict.json",
}  # fmt: skip


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write(path, found):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in found), encoding="utf-8")


def outputs(refined):
    return {str(f.relative_to(refined)): f.read_bytes() for f in files_under(refined)}


def record(refined, program):
    return json.loads((refined / ".stages" / f"{program}.json").read_text())


def documents_of(language):
    """{source: {"read", "kept", reason: documents}} of the counts of one language."""
    return {
        name: {kind: of[kind]["documents"] for kind in ("read", "kept")}
        | {reason: count["documents"] for reason, count in of["dropped"].items() if count["documents"]}
        for name, of in language["sources"].items()
    }


def raw_of(root):
    return root / "data/sample/01_raw"


def refined_of(root):
    return root / "data/sample/02_refined"


@pytest.fixture(scope="module")
def refined(refined_root):
    return refined_of(refined_root)


@pytest.fixture(scope="module")
def korean(refined):
    return rows(refined / "00_plain_text/train.jsonl") + rows(refined / "00_plain_text/validation.jsonl")


# the sample, whole --------------------------------------------------------------------------------------


def test_everything_is_made_and_nothing_is_left_over(refined):
    assert set(outputs(refined)) == OUTPUTS
    assert not list(refined.rglob("*.partial")) and not list(refined.rglob("*.part"))


def test_plain_text_counts_by_reason(refined):
    counts = record(refined, "refine_00_plain_text")["counts"]
    reasons = {**documents_of(counts["korean"]), **documents_of(counts["english"])}
    assert reasons == {
        "wikipedia-korean": {
            "read": 52, "kept": 45, "too_short": 3, "korean_ratio": 1, "exact_duplicate": 2, "near_duplicate": 1,
        },
        "namu_wiki": {
            "read": 64, "kept": 53, "too_short": 3, "korean_ratio": 1, "exact_duplicate": 2, "near_duplicate": 2,
            "redirect": 2, "adult": 1,
        },
        "c4_korean": {
            "read": 66, "kept": 50, "too_short": 2, "korean_ratio": 2, "exact_duplicate": 2, "near_duplicate": 2,
            "adult": 2, "advertisement": 5, "boilerplate": 1,
        },
        "00_english_replay": {
            "read": 76, "kept": 70, "too_short": 2, "english_ratio": 1, "exact_duplicate": 2, "near_duplicate": 1,
        },
    }  # fmt: skip
    for found in reasons.values():
        assert found["read"] == sum(v for k, v in found.items() if k != "read")
    assert counts["korean"]["documents"] == {"train": 115, "validation": 33}
    assert counts["english"]["documents"] == {"train": 58, "validation": 12}
    assert counts["exam_items"] == {"held out": 60, "train": 100}
    assert counts["korean"]["held_out_items_touched"] == counts["english"]["held_out_items_touched"] == []


def test_planted_noise_is_gone(korean):
    text = "\n".join(r["text"] for r in korean)
    for noise in (
        "조건만남",
        "출장안마",
        "성인용품",
        "당일 대출",
        "구매 문의",
        "#redirect",
        "Ambulatory care",
        "이용약관",
    ):
        assert noise not in text
    for mark in ("[[", "]]", "{{", "}}", "'''", "||", "[*", "[include", "[목차]", "<ref", "{|", "http", "~~싫어도~~"):
        assert mark not in text, mark
    assert not re.search("[\u200b-\u200f\u2028\u2029\ufeff\x00-\x08]", text)
    assert not re.search(r"[\w.+-]+@[\w-]+\.\w+|01\d-\d{3,4}-\d{4}|\d{6}-[1-4]\d{6}", text)


def test_planted_good_text_is_kept_and_cleaned(korean):
    starts = {
        "wikipedia-korean": ["동의보감은 허준이 중심이 되어 엮고 1613년 내의원에서 간행한 스물다섯 권짜리 의서이다."],
        "namu_wiki": [
            "아세트아미노펜\n다른 이름 파라세타몰\n쓰임 해열, 진통\n하루 한도(성인) 4,000 mg\n\n어떤 약인가\n",
            "뼈의 통장\n뼈는 죽은 기둥이 아니다. 파골세포가 낡은 곳을 파내면 조골세포가 새로 메우는 공사를",
            "잇몸병의 두 단계\n잇몸만 붓고 피가 나면 치은염, 치아를 붙드는 뼈와 인대까지 허물어지면 치주염이다.",
            "유방촬영술(乳房撮影術, mammography)은 낮은 에너지의 엑스선으로",
        ],
        "c4_korean": [
            "[안내] 5월부터 토요일 진료가 달라집니다\n\n늘 저희",
            "청소년과 청년을 위한 성병 예방 상담실을",
            "샤워할 때 5분만 내 몸에 써 보세요. 유방 자가검진은",
            "오줌발이 예전 같지 않다고",
        ],
    }
    for source, expected in starts.items():
        found = [r["text"] for r in korean if r["source"] == source]
        for start in expected:
            assert sum(text.startswith(start) for text in found) == 1, start
    text = "\n".join(r["text"] for r in korean)
    for medical in ("'성인병'이라는", "방사선 노출", "성매개감염병", "성기 부위", "성교통"):
        assert medical in text, medical


def test_no_text_stands_twice(korean, refined):
    english = rows(refined / "00_english_replay/train.jsonl") + rows(refined / "00_english_replay/validation.jsonl")
    for found in (korean, english):
        texts = [r["text"] for r in found]
        assert len({dedup.content_key(t) for t in texts}) == len(texts)
        assert max(dedup.near_duplicate_of(dedup.signatures(texts))) == -1


def test_no_exam_question_stands_in_the_text(korean, refined):
    text = fold("\n".join(r["text"] for r in korean))
    for split in ("dev", "test"):
        for item in rows(refined / f"02_kor_med_test/{split}.jsonl"):
            question = fold(item["question"])
            assert question[: len(question) // 2] not in text and question[len(question) // 2 :] not in text


def test_dictionary(refined):
    assert record(refined, "refine_01_medical_dict")["counts"] == {
        "read": 260, "dropped: empty definition": 1, "dropped: definition equals term": 1, "dropped: same sense": 41,
        "kept terms": 201, "kept senses": 217,
    }  # fmt: skip
    found = {r["term"]: r for r in json.loads((refined / "01_medical_dict.json").read_text(encoding="utf-8"))}
    assert len(found) == 201 and "도뇨" not in found and "림프종" not in found
    expected = {
        "간": "Liver - 오른쪽 윗배에 자리한 가장 큰 샘 기관으로, 담즙을 만들고 알부민과 응고인자를 합성하며 "
        "약물을 대사한다.",
        "현기증": "Dizziness or vertigo",
        "흉관 삽입": "Chest tube insertion",
        "탈장/헤르니아": "Hernia",
        "호흡곤란": "1. Dyspnea 2. Shortness of breath",
        "광견병": "Rabies - 감염 동물에게 물려 옮는 치명적인 인수공통감염병. 개는 해마다 예방접종을 하고, "
        "물린 사람은 즉시 상처를 씻는다.",
    }
    assert {t: found[t]["definition"] for t in expected} == expected
    for term in (
        "조/치조/폐포",
        "판/판막/밸브",
        "치근단농양/근단농양",
        "(골)수강",
        "각(脚)",
        "돈<돼지>열병",
        "사정(射精)",
        "사정(査定)",
    ):
        assert term in found
    assert found["쿠싱증후군"]["category"] == ["human", "veterinary"] and found["쿠싱증후군"]["senses"] == 2


def test_pairs(refined):
    assert record(refined, "refine_01_english_korean")["counts"] == {
        "read": 265, "kept": 244, "untranslated_copy": 3, "empty_side": 2, "not_korean": 3, "not_english": 3,
        "too_short": 3, "length_ratio": 3, "exact_duplicate": 4,
    }  # fmt: skip
    there, back = (rows(refined / f"01_english_korean/{d}.jsonl") for d in ("en_to_ko", "ko_to_en"))
    assert len(there) == len(back) == 244
    assert [(r["source"], r["target"]) for r in there] == [(r["target"], r["source"]) for r in back]
    assert {(r["direction"], r["origin"]) for r in there + back} == {
        ("en_to_ko", "sample_ko_en"), ("ko_to_en", "sample_ko_en"),
    }  # fmt: skip
    pairs = {r["source"]: r["target"] for r in there}
    assert pairs["Please sign the consent form before surgery."] == "수술 전에 동의서에 서명해 주세요."
    assert pairs["The lights on the stairs are broken."] == "계단 전등이 고장 났어요."
    for gone in ("Please wait outside.", "No.", "Good morning.", "Acetaminophen 500 mg tablet"):
        assert gone not in pairs
    assert sum(r["source"] == "Do not crush or chew this capsule." for r in there) == 1


def test_exam_questions(refined, refined_root):
    counts = record(refined, "refine_02_kor_med_test")["counts"]
    assert counts["train"] == {"read": 100, "kept": 96, "stands in dev or test": 2, "exact_duplicate": 2}
    assert (counts["dev"], counts["test"], counts["rationales"], counts["symbols"]) == (30, 30, 12, 31)
    raw = {
        split: [
            "-".join(str(r[c]) for c in ("subject", "year", "period", "q_number"))
            for r in rows(raw_of(refined_root) / f"02_kor_med_test/{split}.jsonl")
        ]
        for split in ("train", "dev", "test")
    }
    kept = {split: [r["id"] for r in rows(refined / f"02_kor_med_test/{split}.jsonl")] for split in raw}
    assert kept["dev"] == raw["dev"] and kept["test"] == raw["test"]
    planted = {"doctor-2020-3-71", "nurse-2020-2-68", "pharm-2018-3-89", "dentist-2019-2-83"}
    assert kept["train"] == [i for i in raw["train"] if i not in planted]


def test_answers_follow_the_raw_numbers(refined, refined_root):
    for split in ("train", "dev", "test"):
        raw = {
            f"{r['subject']}-{r['year']}-{r['period']}-{r['q_number']}": r
            for r in rows(raw_of(refined_root) / f"02_kor_med_test/{split}.jsonl")
        }
        for item in rows(refined / f"02_kor_med_test/{split}.jsonl"):
            given = raw[item["id"]]
            assert item["answer"] == "ABCDE"[given["answer"] - 1] and item["exam"] == given["subject"]
            assert [fold(item[x]) for x in "ABCDE"] == [fold(given[x]) for x in "ABCDE"]  # in the given order
            assert ("reasoning" in item) == bool(given["cot"])


def test_rationales_and_symbols(refined):
    reasoned = rows(refined / "02_kor_med_test/train_with_reasoning.jsonl")
    train = rows(refined / "02_kor_med_test/train.jsonl")
    assert reasoned == [r for r in train if r.get("reasoning")] and len(reasoned) == 12
    assert all(r["reasoning"].count("\n") == 3 for r in reasoned)
    symbols = json.loads((refined / "02_char_dict.json").read_text(encoding="utf-8"))
    by_term = {s["term"]: s for s in symbols}
    assert by_term["↑"]["definition"] == "increased, elevated, or upward trend"
    assert [s["count"] for s in symbols] == sorted((s["count"] for s in symbols), reverse=True)
    assert {"↓", "≥", "℃", "Ⅱ", "μ"} <= set(by_term)


# same bytes, and again ----------------------------------------------------------------------------------


def test_another_root_gets_the_same_bytes_and_again_is_complete(refined, root, run_program):
    assert run_program("refine_all").code == 0
    assert outputs(refined_of(root)) == outputs(refined)
    fingerprints = [
        {f.name: json.loads(f.read_text())["fingerprint"] for f in (r / ".stages").glob("*.json")}
        for r in (refined, refined_of(root))
    ]
    assert fingerprints[0] == fingerprints[1] and len(fingerprints[0]) == 4
    before = {f: f.stat().st_mtime_ns for f in files_under(refined_of(root))}
    again = run_program("refine_all")
    assert again.code == 0 and again.text.count("already complete") == 4
    assert {f: f.stat().st_mtime_ns for f in files_under(refined_of(root))} == before


def test_a_wrong_order_of_files_changes_nothing(root, refined, load_program):
    """The order in which a folder lists its files is not part of the input."""
    source = raw_of(root) / "00_korean/c4_korean"
    whole = rows(source / "train.jsonl")
    (source / "train.jsonl").unlink()
    write(source / "b.jsonl", whole[40:])
    write(source / "a.jsonl", whole[:40])
    assert load_program("refine_00_plain_text").main([]) == 0
    expected = {k: v for k, v in outputs(refined).items() if k.startswith("00_")}
    found = outputs(refined_of(root))
    # Only the places of dropped documents have other names.
    places = re.compile(rb"c4_korean/\w+\.jsonl, line \d+")
    changed = [k for k in expected if found[k] != expected[k]]
    assert set(found) == set(expected) and changed == ["00_plain_text/dropped.jsonl"]
    assert places.sub(b"", found[changed[0]]) == places.sub(b"", expected[changed[0]])


def test_max_samples_is_seeded_and_over_all_sources(root, load_program, korean):
    program, drawn = load_program("refine_00_plain_text"), []
    for seed in (17, 18):
        assert program.main(["--max-samples", "60", "--seed", str(seed), "--force"]) == 0
        folder = refined_of(root) / "00_plain_text"
        drawn.append(rows(folder / "train.jsonl") + rows(folder / "validation.jsonl"))
        counts = documents_of(record(refined_of(root), "refine_00_plain_text")["counts"]["korean"])
        assert sum(c["not sampled"] for c in counts.values()) == 148 - 60
        by_source = Counter(r["source"] for r in drawn[-1])
        for source, whole in Counter(r["source"] for r in korean).items():
            assert abs(by_source[source] - 60 * whole / 148) <= 8, (source, by_source)
    assert len(drawn[0]) == len(drawn[1]) == 60
    first, second = ({r["text"] for r in d} for d in drawn)
    assert first != second and first != {r["text"] for r in korean[:60]} and first <= {r["text"] for r in korean}
    assert len(rows(refined_of(root) / "00_english_replay/train.jsonl")) == 58  # the replay is not sampled
    assert program.main(["--max-samples", "60", "--force"]) == 0
    folder = refined_of(root) / "00_plain_text"
    assert rows(folder / "train.jsonl") + rows(folder / "validation.jsonl") == drawn[0]


def test_a_sampling_that_differs_needs_force(root, run_program):
    assert run_program("refine_01_english_korean").code == 0
    (raw_of(root) / "03_korean_english/more").mkdir()
    write(raw_of(root) / "03_korean_english/more/a.jsonl", [{"en": "The wound is clean.", "ko": "상처가 깨끗합니다."}])
    outcome = run_program("refine_01_english_korean")
    assert outcome.code == 2 and "input changed: sentence pairs" in outcome.text and "--force" in outcome.text
    assert "Traceback" not in outcome.text
    assert run_program("refine_01_english_korean", "--force").code == 0
    assert len(rows(refined_of(root) / "01_english_korean/en_to_ko.jsonl")) == 245


# planted cases ------------------------------------------------------------------------------------------


def test_a_document_with_an_exam_item_is_dropped(root, load_program):
    item = rows(raw_of(root) / "02_kor_med_test/dev.jsonl")[3]
    printed = item["question"] + "\n" + "\n".join(f"{i}) {item[x]}" for i, x in enumerate("ABCDE", 1))
    file = raw_of(root) / "00_korean/c4_korean/train.jsonl"
    filler = "오늘 스터디에서 푼 문제를 옮겨 적는다. 해설은 나중에 붙이겠다. " * 3
    train_item = rows(raw_of(root) / "02_kor_med_test/train.jsonl")[0]["question"]
    write(file, [*rows(file), {"text": f"{filler}\n\n{printed}"}, {"text": f"{filler} 둘째 날 기록.\n\n{train_item}"}])
    english = raw_of(root) / "00_english_replay/train.jsonl"
    prose = "The study group met again on a rainy evening and copied one question from the book into the notes. " * 3
    write(english, [*rows(english), {"text": prose + item["question"]}])
    assert load_program("refine_00_plain_text").main([]) == 0
    counts = record(refined_of(root), "refine_00_plain_text")["counts"]
    key = "-".join(str(item[c]) for c in ("subject", "year", "period", "q_number"))
    assert counts["korean"]["held_out_items_touched"] == [f"dev/{key}"]
    assert (
        documents_of(counts["korean"])["c4_korean"]["contaminated"] == counts["korean"]["contaminated_documents"] == 1
    )
    assert counts["english"]["held_out_items_touched"] == [f"dev/{key}"]
    assert counts["korean"]["train_items_touched"] == 1  # counted, and kept
    text = (refined_of(root) / "00_plain_text/train.jsonl").read_text() + (
        refined_of(root) / "00_plain_text/validation.jsonl"
    ).read_text()
    assert "둘째 날 기록" in text and "해설은 나중에 붙이겠다. \\n\\n" + item["question"][:10] not in text


def test_equal_options_leave_a_train_item_out_and_a_dev_item_in(root, load_program):
    for split in ("train", "dev"):
        file = raw_of(root) / f"02_kor_med_test/{split}.jsonl"
        found = rows(file)
        found[1]["B"] = found[1]["A"]
        write(file, found)
    assert load_program("refine_02_kor_med_test").main([]) == 0
    counts = record(refined_of(root), "refine_02_kor_med_test")["counts"]
    assert counts["train"]["unusable"] == 1 and counts["train"]["read"] == 100 and counts["train"]["kept"] == 95
    dev = rows(refined_of(root) / "02_kor_med_test/dev.jsonl")
    assert len(dev) == 30 and dev[1]["A"] == dev[1]["B"]


def test_a_leak_in_another_order_is_found(root, load_program):
    held_out = rows(raw_of(root) / "02_kor_med_test/test.jsonl")[0]
    file = raw_of(root) / "02_kor_med_test/train.jsonl"
    turned = {
        **held_out,
        "year": 2001,
        "q_number": 999,
        **dict(zip("ABCDE", [held_out[x] for x in "BCDEA"], strict=True)),
    }
    turned["question"] = held_out["question"].replace(" ", "  ")
    turned["answer"] = (held_out["answer"] - 2) % 5 + 1
    write(file, [*rows(file), turned])
    assert load_program("refine_02_kor_med_test").main([]) == 0
    assert record(refined_of(root), "refine_02_kor_med_test")["counts"]["train"]["stands in dev or test"] == 3


@pytest.mark.parametrize("change", ["answer", "key", "option"])
def test_a_damaged_dev_row_stops(root, load_program, change):
    file = raw_of(root) / "02_kor_med_test/dev.jsonl"
    found = rows(file)
    if change == "answer":
        found[4]["answer"] = 6
    elif change == "key":
        found[4] |= {k: found[3][k] for k in ("subject", "year", "period", "q_number")}
    else:
        found[4]["C"] = " "
    write(file, found)
    with pytest.raises(PipelineError) as error:
        load_program("refine_02_kor_med_test").main([])
    assert "dev.jsonl" in str(error.value) and ("twice" if change == "key" else "row 5") in str(error.value)
    assert not (refined_of(root) / "02_kor_med_test").exists()


def test_lone_surrogates_and_controls_do_not_break_the_writer(root, load_program):
    file = raw_of(root) / "03_korean_english/sample_ko_en/train.jsonl"
    with open(file, "a", encoding="utf-8") as out:
        out.write('{"en": "A broken \\ud83d emoji.", "ko": "깨진 \\udca9 그림\\u0000 글자."}\n')
    assert load_program("refine_01_english_korean").main([]) == 0
    (row,) = [
        r
        for r in rows(refined_of(root) / "01_english_korean/en_to_ko.jsonl")
        if "broken" in r["source"] and "emoji" in r["source"]
    ]
    assert row["source"] == "A broken emoji." and row["target"] == "깨진 그림 글자."


# damaged and empty input --------------------------------------------------------------------------------

RAW_FILES = {
    "00_korean/wikipedia-korean/train.jsonl": "refine_00_plain_text",
    "00_korean/namu_wiki/train.jsonl": "refine_00_plain_text",
    "00_korean/c4_korean/train.jsonl": "refine_00_plain_text",
    "00_english_replay/train.jsonl": "refine_00_plain_text",
    "01_medical_dict/korean_medical_dict.jsonl": "refine_01_medical_dict",
    "01_medical_dict/korean_animal_medical_dict.jsonl": "refine_01_medical_dict",
    "01_medical_dict/bilingual_medical_dict.json": "refine_01_medical_dict",
    "01_medical_dict/bilingual_medical_dict_ko_en.json": "refine_01_medical_dict",
    "01_medical_dict/bilingual_medical_dict_categorized.json": "refine_01_medical_dict",
    "02_kor_med_test/train.jsonl": "refine_02_kor_med_test",
    "02_kor_med_test/dev.jsonl": "refine_02_kor_med_test",
    "02_kor_med_test/test.jsonl": "refine_02_kor_med_test",
    "03_korean_english/sample_ko_en/train.jsonl": "refine_01_english_korean",
}


def test_every_raw_file_is_covered(root):
    assert {str(f.relative_to(raw_of(root))) for f in files_under(raw_of(root))} == set(RAW_FILES)


@pytest.mark.parametrize("name", RAW_FILES)
def test_a_malformed_line_names_file_and_line_and_writes_nothing(root, load_program, name):
    file = raw_of(root) / name
    lines = file.read_bytes().split(b"\n")
    lines[6] = b'{"text": "cut'
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(PipelineError) as error:
        load_program(RAW_FILES[name]).main([])
    assert error.value.exit_code == 2
    assert name in str(error.value) and re.search(r"line [78]\b", str(error.value))
    assert not refined_of(root).exists() or files_under(refined_of(root)) == []
    assert not list(refined_of(root).glob(".stages/*.json"))


def test_a_malformed_line_as_a_user_sees_it(root, run_program):
    file = raw_of(root) / "03_korean_english/sample_ko_en/train.jsonl"
    file.write_bytes(file.read_bytes() + b"{\n")
    outcome = run_program("refine_01_english_korean")
    (line,) = outcome.text.strip().splitlines()
    assert outcome.code == 2
    assert re.fullmatch(r"error: .*03_korean_english/sample_ko_en/train\.jsonl, line 266: not valid JSON .*", line)


@pytest.mark.parametrize(
    "program, name, row",
    [
        ("refine_00_plain_text", "00_english_replay/train.jsonl", {"text": "too short"}),
        ("refine_01_english_korean", "03_korean_english/sample_ko_en/train.jsonl", {"en": "same", "ko": "same"}),
        ("refine_02_kor_med_test", "02_kor_med_test/train.jsonl", None),
        ("refine_02_kor_med_test", "02_kor_med_test/dev.jsonl", None),
    ],
)
def test_no_usable_row_is_an_error(root, run_program, program, name, row):
    write(raw_of(root) / name, [row] * 3 if row else [])
    outcome = run_program(program)
    assert outcome.code == 2 and "error: " in outcome.text and "Traceback" not in outcome.text
    assert Path(name).parts[0] in outcome.text.split("error: ")[1]
    assert not (refined_of(root) / ".stages" / f"{program}.json").exists()


def test_no_usable_korean_document_and_no_usable_entry(root, load_program):
    for source in ("wikipedia-korean", "namu_wiki", "c4_korean"):
        write(raw_of(root) / f"00_korean/{source}/train.jsonl", [{"text": "짧다"}])
    with pytest.raises(PipelineError, match="no train document is left of 3"):
        load_program("refine_00_plain_text").main([])
    folder = raw_of(root) / "01_medical_dict"
    for file in folder.iterdir():
        file.write_text('{"term": "x", "definition": ""}' if file.suffix == ".jsonl" else "{}")
    with pytest.raises(PipelineError, match="no usable entry .read 2, "):
        load_program("refine_01_medical_dict").main([])


def test_a_missing_column_and_missing_files(root, load_program):
    file = raw_of(root) / "00_korean/namu_wiki/train.jsonl"
    write(file, [{"title": "x", "body": "y"}])
    with pytest.raises(PipelineError, match=r'namu_wiki/train\.jsonl, line 1: no "text" column; found title, body'):
        load_program("refine_00_plain_text").main([])
    for name in ("bilingual_medical_dict.json", "korean_medical_dict.jsonl"):
        (raw_of(root) / "01_medical_dict" / name).unlink()
    with pytest.raises(PipelineError) as error:
        load_program("refine_01_medical_dict").main([])
    for part in ("bilingual_medical_dict.json", "korean_medical_dict.jsonl", "MANUAL_DATA.md"):
        assert part in str(error.value)


def test_missing_raw_data_names_the_download(root, load_program):
    (raw_of(root) / "02_kor_med_test").rename(root / "aside")
    for program in ("refine_00_plain_text", "refine_02_kor_med_test"):
        with pytest.raises(PipelineError, match="run: python script/download/download_02_kor_med_test.py --model tiny"):
            load_program(program).main(["--model", "tiny"])


# skipping -----------------------------------------------------------------------------------------------


def test_without_stage_01(root, run_program):
    outcome = run_program("refine_all", "--skip-01")
    assert outcome.code == 0
    assert set(outputs(refined_of(root))) == {o for o in OUTPUTS if not o.startswith("01_")}
    symbols = json.loads((refined_of(root) / "02_char_dict.json").read_text(encoding="utf-8"))
    assert symbols  # those of the questions
    made = record(refined_of(root), "refine_02_kor_med_test")
    assert made["identity"]["inputs"]["dictionary"] is None


def test_without_veterinary(root, run_program):
    """refine_all hands its options on, and so does not find another setting than the program alone."""
    assert run_program("refine_01_medical_dict", "--no-veterinary").code == 0
    done = run_program("refine_all")
    assert (done.code, "settings.veterinary: False -> True" in done.text) == (2, True), done.text[-500:]
    done = run_program("refine_all", "--no-veterinary", "--workers", "2")
    assert (done.code, "refine_01_medical_dict: already complete" in done.text) == (0, True), done.text[-500:]
    assert record(refined_of(root), "refine_01_medical_dict")["counts"]["dropped: veterinary"] == 30
    found = json.loads((refined_of(root) / "01_medical_dict.json").read_text(encoding="utf-8"))
    assert {c for r in found for c in r["category"]} == {"human"}


# real text ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    if not REAL.is_dir():
        pytest.skip("the real data are not here")
    import os
    import shutil
    import subprocess
    import sys

    root = tmp_path_factory.mktemp("real")
    shutil.copytree(REAL, root / "hospital/01_raw", copy_function=shutil.copyfile)
    for folder in [root / "hospital/01_raw", *(root / "hospital/01_raw").rglob("*/")]:
        folder.chmod(0o755)
    program = Path(__file__).resolve().parents[1] / "script/refine/refine_all.py"
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(program), "--data-dir", "hospital"],
        env={**os.environ, "MEDGEMMA_KOREAN_ROOT": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return root, time.monotonic() - started


def test_real_text_is_refined_in_time_and_mostly_kept(real):
    root, seconds = real
    assert seconds < 60
    refined = root / "hospital/02_refined"
    assert (root / "logs/pipeline_tiny-hospital.log").is_file()
    counts = record(refined, "refine_00_plain_text")["counts"]["korean"]
    korean = documents_of(counts)
    assert korean["wikipedia-korean"]["read"] == korean["wikipedia-korean"]["kept"] == 140
    assert (korean["namu_wiki"]["read"], korean["namu_wiki"]["kept"], korean["namu_wiki"]["redirect"]) == (15, 14, 1)
    web = korean["c4_korean"]
    assert web["read"] == 2201 and web["kept"] >= 2100 and web.get("adult", 0) == 0
    for of in counts["sources"].values():
        assert of["kept"]["bytes"] >= 0.5 * of["read"]["bytes"]
    pairs = record(refined, "refine_01_english_korean")["counts"]
    assert pairs["read"] == 3523 and pairs["kept"] >= 3390 and 60 <= pairs["too_short"] <= 80
    terms = record(refined, "refine_01_medical_dict")["counts"]
    assert terms["read"] == 1655 and terms["kept senses"] >= terms["kept terms"] >= 1250
    assert terms["kept senses"] + sum(v for k, v in terms.items() if k.startswith("dropped")) == 1655
    exam = record(refined, "refine_02_kor_med_test")["counts"]
    assert exam["train"]["read"] == 1391 and exam["train"]["kept"] >= 1380
    assert (exam["dev"], exam["test"]) == (200, 813)


def test_real_text_holds_no_exam_question_and_no_markup(real):
    root, _ = real
    refined = root / "hospital/02_refined"
    found = rows(refined / "00_plain_text/train.jsonl")
    text = fold("\n".join(r["text"] for r in found))
    questions = [i["question"] for s in ("dev", "test") for i in rows(refined / f"02_kor_med_test/{s}.jsonl")]
    assert not [q for q in questions if len(fold(q)) >= 13 and fold(q) in text]
    train = {fold(i["question"]) for i in rows(refined / "02_kor_med_test/train.jsonl")}
    same = [q for q in questions if fold(q) in train and len(fold(q)) > 40]
    assert not same
    namu = "\n".join(r["text"] for r in found if r["source"] == "namu_wiki")
    for mark in ("[[", "]]", "{{{", "}}}", "||", "'''", "[include(", "[* "):
        assert namu.count(mark) == 0, mark
