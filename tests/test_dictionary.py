"""Dictionary terms, senses and symbols: noisy headwords cleaned, nothing lost, every sense kept in order."""

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from medgemma_korean import dictionary, records
from medgemma_korean.dictionary import Entry, clean_definition, clean_term, count_symbols, merge, reversible

NOISY = Path(__file__).resolve().parents[1].parent / "shared" / "real_data" / "noisy_dictionary_terms.txt"


def entry(term, definition, source="korean_medical_dict", category="human"):
    return Entry(term, definition, source, category, "x")


# terms --------------------------------------------------------------------------------------------------

CLEANED = [
    ("1. 조 치조 2. 폐포", "조/치조/폐포", ""),
    ("1. 첨단농양-기관의 첨단에 위치한 농양. 2. 근첨농양", "첨단농양/근첨농양", "기관의 첨단에 위치한 농양."),
    # Hanja of the compatibility block become the ordinary ones.
    ("근위축성 측삭경화증(筋萎縮性 側\uf96a硬化症)", "근위축성 측삭경화증(筋萎縮性 側索硬化症)", ""),
    ("누골(\uf94e骨)", "누골(漏骨)", ""),
    ("인(\uf9ee)", "인(燐)", ""),
    ("(골)수강", "(골)수강", ""),
    ("(Lactic dehydrogenase LDH)", "(Lactic dehydrogenase LDH)", ""),
    ("13삼염색체성증후군", "13삼염색체성증후군", ""),
    ("7일열렙토스피라", "7일열렙토스피라", ""),
    ("간 스캔", "간 스캔", ""),
    ("간경변[증]", "간경변[증]", ""),
    ("각(脚) 경(莖) 병(柄)", "각(脚) 경(莖) 병(柄)", ""),
    ("감염성계<닭>기관지염", "감염성계<닭>기관지염", ""),
    ("[원근]조절반사.원근순응반사", "[원근]조절반사.원근순응반사", ""),
    ("C.G.S단위", "C.G.S단위", ""),
    ("P.P.D피부검사", "P.P.D피부검사", ""),
    ("경피적 경혈관 관상동맥확장술=PTCA", "경피적 경혈관 관상동맥확장술=PTCA", ""),
    ("소〔적혈〕구성빈혈", "소〔적혈〕구성빈혈", ""),
    ("신체의 일부분에 한정된 마취.", "신체의 일부분에 한정된 마취.", ""),
    ("펜사이클리딘 피.씨.피.", "펜사이클리딘 피.씨.피.", ""),
    ("H-Y항원", "H-Y항원", ""),
    ("Is유전자[군]", "Is유전자[군]", ""),
    ("거대방광-거대요관증후군", "거대방광-거대요관증후군", ""),
    ("인두(두)(pharynx). 구협(fauces)", "인두(두)(pharynx). 구협(fauces)", ""),
    ("간", "간", ""),
]
MORE = [
    ("  간경변  ", "간경변", ""),
    ("흉관  삽입", "흉관 삽입", ""),
    ("계단\u200b전등", "계단전등", ""),
    (unicodedata.normalize("NFD", "간염"), "간염", ""),
    ("1. 판 판막 2. 밸브", "판/판막/밸브", ""),
    ("1. 판 2. 판", "판", ""),
    ("1. 흉터 반흔 2. 흔적", "흉터/반흔/흔적", ""),
    ("1.5 테슬라 자기공명영상", "1.5 테슬라 자기공명영상", ""),
    ("2. 폐포", "2. 폐포", ""),
    ("제Ⅱ형 당뇨병", "제Ⅱ형 당뇨병", ""),
    ("β-차단제", "β-차단제", ""),
    ("1. α1-항트립신 결핍증 2. 폐기종", "α1-항트립신/결핍증/폐기종", ""),
    (
        "1. 누공-두 장기 또는 장기와 피부 사이에 비정상으로 뚫린 길. 2. 샛길",
        "누공/샛길",
        "두 장기 또는 장기와 피부 사이에 비정상으로 뚫린 길.",
    ),
    ("", "", ""),
]


@pytest.mark.parametrize("raw, term, gloss", CLEANED + MORE)
def test_terms(raw, term, gloss):
    assert clean_term(raw) == (term, gloss)


def test_noisy_terms_lose_nothing():
    if not NOISY.is_file():
        pytest.skip("the noisy term list is not here")
    lines = NOISY.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 6072 and {raw for raw, _, _ in CLEANED} <= set(lines)
    for line in lines:
        term, gloss = clean_term(line)
        plain = unicodedata.normalize("NFC", line)
        if re.match(r"1\. ", plain):
            plain = re.sub(r"(^|\s)\d\.\s", " ", plain)
        letters = Counter(c for c in plain if c.isalnum())
        assert term and Counter(c for c in term + gloss if c.isalnum()) == letters, line
    merged, counts = merge(entry(line, "A definition") for line in lines)
    assert {m.term for m in merged} == {clean_term(line)[0] for line in lines}
    assert not [reason for reason in counts if reason.startswith("dropped") and reason != "dropped: same sense"]


# definitions and senses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw, cleaned",
    [
        ("Medullary Cavity\n 세부설명 : 긴뼈  가운데의 빈 곳.", "Medullary Cavity - 긴뼈 가운데의 빈 곳."),
        ("Medullary Cavity\n세부설명: 긴뼈", "Medullary Cavity - 긴뼈"),
        ("\n 세부설명 : 긴뼈", "긴뼈"),
        ("Edema\n 세부설명 : ", "Edema"),
        ("Edema", "Edema"),
        ("한 줄\n두 줄", "한 줄 두 줄"),
        ("골밀도 T값이 ≤ -2.5", "골밀도 T값이 ≤ -2.5"),
        ("  ", ""),
    ],
)
def test_definitions(raw, cleaned):
    assert clean_definition(raw) == cleaned


def test_every_sense_in_order_of_source():
    rows, counts = merge(
        [
            entry("경련", "근육이 오그라드는 현상."),
            entry("간", "Liver"),
            entry("경련", "Convulsion\n 세부설명 : 뇌의 방전."),
            entry("경련", "Spasm", "bilingual_ko_en"),
            entry("경련", "spasm", "bilingual_en_ko"),
            entry("경련", "Convulsion", "bilingual_en_ko"),
            entry("경련", "Colic", "korean_animal_medical_dict", "veterinary"),
        ]
    )
    assert [r.term for r in rows] == ["경련", "간"]
    assert rows[0].row() == {
        "term": "경련",
        "definition": "1. 근육이 오그라드는 현상. 2. Convulsion - 뇌의 방전. 3. Spasm 4. Colic",
        "senses": 4,
        "source": ["korean_medical_dict", "bilingual_ko_en", "bilingual_en_ko", "korean_animal_medical_dict"],
        "category": ["human", "veterinary"],
    }
    assert rows[1].row()["definition"] == "Liver" and rows[1].row()["senses"] == 1
    assert counts == {"read": 7, "dropped: same sense": 2, "kept terms": 2, "kept senses": 5}


def test_a_bare_equivalent_and_its_detail_are_one_sense_in_either_order():
    for definitions in (
        ["Rabies", "Rabies\n 세부설명 : 물려 옮는 병."],
        ["Rabies\n 세부설명 : 물려 옮는 병.", "rabies"],
    ):
        rows, counts = merge(entry("광견병", d) for d in definitions)
        assert rows[0].senses == ["Rabies - 물려 옮는 병."] and counts["dropped: same sense"] == 1


def test_a_gloss_goes_to_the_definition():
    rows, _ = merge([entry("1. 첨단농양-기관의 첨단에 위치한 농양. 2. 근첨농양", "Apical Abscess")])
    assert rows[0].row()["term"] == "첨단농양/근첨농양"
    assert rows[0].row()["definition"] == "Apical Abscess - 기관의 첨단에 위치한 농양."


def test_drops_are_counted_and_short_headwords_kept():
    rows, counts = merge(
        [entry("", "x"), entry("도뇨", ""), entry("림프종", "림프종"), entry("간", "肝"), entry("위", "W")]
    )
    assert [r.term for r in rows] == ["간", "위"]
    assert counts == {
        "read": 5, "dropped: empty term": 1, "dropped: empty definition": 1, "dropped: definition equals term": 1,
        "kept terms": 2, "kept senses": 2,
    }  # fmt: skip


def test_without_veterinary():
    rows, counts = merge([entry("간", "Liver"), entry("구제역", "FMD", category="veterinary")], veterinary=False)
    assert [r.term for r in rows] == ["간"] and counts["dropped: veterinary"] == 1


def test_reversible_names_exactly_one_term():
    rows = [
        {"term": "간", "definition": "Liver", "senses": 1},
        {"term": "콩팥", "definition": "Kidney", "senses": 1},
        {"term": "신장", "definition": "Kidney", "senses": 1},
        {"term": "경련", "definition": "1. Spasm 2. Convulsion", "senses": 2},
        {"term": "폐", "definition": "Lung"},
    ]
    assert [r["term"] for r in reversible(rows)] == ["간", "폐"]


# symbols ------------------------------------------------------------------------------------------------


def test_symbols_are_counted_with_their_meaning():
    rows, unknown = count_symbols(["TSH ↓, T4 ↑, 젖산 ↑", "38℃ ≥ 37℃ ↑", "☃ ☃ ⇑ 가나다 abc 123 , . ( )"])
    assert [(r["term"], r["count"]) for r in rows] == [("↑", 3), ("℃", 2), ("↓", 1), ("≥", 1)]
    assert rows[0]["definition"] == "increased, elevated, or upward trend"
    assert unknown == {"☃": 2, "⇑": 1}  # reported, not dropped


def test_the_symbol_table_is_whole():
    table = json.loads(dictionary.SYMBOLS.read_text(encoding="utf-8"))
    assert all(set(row) >= {"term", "definition"} and len(row["definition"]) >= 4 for row in table)
    terms = [row["term"] for row in table]
    assert len(terms) == len(set(terms)) >= 27 and all(len(t) == 1 for t in terms)
    assert records.read_json(dictionary.SYMBOLS) == table
