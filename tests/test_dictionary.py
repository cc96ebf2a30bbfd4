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

# Real lines: (raw, term), and the gloss where the line has one.
CLEANED = [
    # numbering, and the explanation of one of the senses
    ("1. 조 치조 2. 폐포", "조/치조/폐포"),
    ("1. 첨단농양-기관의 첨단에 위치한 농양. 2. 근첨농양", "첨단농양/근첨농양", "기관의 첨단에 위치한 농양."),
    # synonyms joined by = or by a full stop, which abbreviations have too
    ("노르아드레날린=노르에피네프린", "노르아드레날린/노르에피네프린"),
    ("노보카인=프로카인(Procaine)", "노보카인/프로카인(Procaine)"),
    ("이첨판=승모판(Mitral Valve)", "이첨판/승모판(Mitral Valve)"),
    ("경피적 경혈관 관상동맥확장술=PTCA", "경피적 경혈관 관상동맥확장술/PTCA"),
    ("피.씨.피=Pencyclidine", "피.씨.피/Pencyclidine"),
    ("다형핵백혈구 다형핵구(=PMN)", "다형핵백혈구 다형핵구(=PMN)"),
    ("축동의(miosis=축동)", "축동의(miosis=축동)"),
    ("팔꿈치머리. 주두", "팔꿈치머리/주두"),
    ("폐성심. 폐심장", "폐성심/폐심장"),
    ("[원근]조절반사.원근순응반사", "[원근]조절반사/원근순응반사"),
    ("인두(두)(pharynx). 구협(fauces)", "인두(두)(pharynx)/구협(fauces)"),
    ("신체의 일부분에 한정된 마취.", "신체의 일부분에 한정된 마취"),
    ("펜사이클리딘 피.씨.피.", "펜사이클리딘 피.씨.피."),
    ("C.G.S단위", "C.G.S단위"),
    ("P.P.D피부검사", "P.P.D피부검사"),
    ("미국약전단위 U.S.P.단위", "미국약전단위 U.S.P.단위"),
    # Hanja of the compatibility block become the ordinary ones
    ("근위축성 측삭경화증(筋萎縮性 側\uf96a硬化症)", "근위축성 측삭경화증(筋萎縮性 側索硬化症)"),
    ("누골(\uf94e骨)", "누골(漏骨)"),
    ("인(\uf9ee)", "인(燐)"),
    # brackets of one shape
    ("소〔적혈〕구성빈혈", "소[적혈]구성빈혈"),
    ("(Lactic dehydrogenase LDH)", "Lactic dehydrogenase LDH"),
    # and what must stay as it is
    ("(골)수강", "(골)수강"),
    ("(약의)경구복용", "(약의)경구복용"),
    ("(심장의)세동 섬유성연축", "(심장의)세동 섬유성연축"),
    ("황반(망막에 존재)", "황반(망막에 존재)"),
    ("대이증(大耳症)", "대이증(大耳症)"),
    ("간경변[증]", "간경변[증]"),
    ("각(脚) 경(莖) 병(柄)", "각(脚) 경(莖) 병(柄)"),
    ("감염성계<닭>기관지염", "감염성계<닭>기관지염"),
    ("13삼염색체성증후군", "13삼염색체성증후군"),
    ("7일열렙토스피라", "7일열렙토스피라"),
    ("활로 4징", "활로 4징"),
    ("텍크니슘 99mm", "텍크니슘 99mm"),
    ("간 스캔", "간 스캔"),
    ("H-Y항원", "H-Y항원"),
    ("거대방광-거대요관증후군", "거대방광-거대요관증후군"),
    ("인슐린-의존성당뇨병", "인슐린-의존성당뇨병"),
    ("비-A형 비-B형간염", "비-A형 비-B형간염"),
    ("인자Ⅸ복합체", "인자Ⅸ복합체"),
    ("간", "간"),
]
MORE = [
    ("  간경변  ", "간경변"),
    ("흉관  삽입", "흉관 삽입"),
    ("계단\u200b전등", "계단전등"),
    (unicodedata.normalize("NFD", "간염"), "간염"),
    ("1. 판 판막 2. 밸브", "판/판막/밸브"),
    ("1. 판 2. 판", "판"),
    ("1. 흉터 반흔 2. 흔적", "흉터/반흔/흔적"),
    ("1) 조 치조 2) 폐포", "조/치조/폐포"),
    ("①조 치조 ②폐포", "조/치조/폐포"),
    ("1. 인자 12. 2. 혈장", "인자/12./혈장"),  # 12 does not follow 1
    ("1.5 테슬라 자기공명영상", "1.5 테슬라 자기공명영상"),
    ("2. 폐포", "2. 폐포"),
    ("제Ⅱ형 당뇨병", "제Ⅱ형 당뇨병"),
    ("β-차단제", "β-차단제"),
    ("p=0.05", "p=0.05"),
    ("T/NK-세포 림프종", "T/NK-세포 림프종"),
    ("양구()", "양구"),  # an export lost the Hanja,
    ("열결(缺)", "열결"),  # some of them
    ("족임읍(足泣)", "족임읍"),
    ("외노궁=열결(缺)", "외노궁/열결"),
    ("열결（\uf99c缺）", "열결(列缺)"),
    ("각(脚) 경(莖大)", "각(脚) 경(莖大)"),  # of several words the number says nothing
    ("（골）수강＝골강", "(골)수강/골강"),
    ("1. α1-항트립신 결핍증 2. 폐기종", "α1-항트립신/결핍증/폐기종"),
    (
        "1. 누공-두 장기 또는 장기와 피부 사이에 비정상으로 뚫린 길. 2. 샛길",
        "누공/샛길",
        "두 장기 또는 장기와 피부 사이에 비정상으로 뚫린 길.",
    ),
    ("()", ""),
    ("", ""),
]


@pytest.mark.parametrize("raw, term, gloss", [(*row, "")[:3] for row in CLEANED + MORE])
def test_terms(raw, term, gloss):
    assert clean_term(raw)[:2] == (term, gloss)


@pytest.mark.parametrize(
    "raw, aliases",
    [
        ("1. 조 치조 2. 폐포", ["조", "치조", "폐포"]),
        ("노보카인=프로카인(Procaine)", ["노보카인", "프로카인(Procaine)", "프로카인"]),
        ("간경변[증]", ["간경변", "간경변증"]),
        ("[뇌척]수막염", ["수막염", "뇌척수막염"]),
        ("다발[성]경화[증]", ["다발경화", "다발성경화증"]),
        ("망상성[형][정신]분열병", ["망상성분열병"]),
        ("돈<돼지>콜레라", ["돈콜레라", "돼지콜레라"]),
        ("잠재성<특발성>패혈증", ["잠재성패혈증", "특발성패혈증"]),
        ("전염성돈<돼지>뇌척수염", ["전염성돈뇌척수염"]),  # what it replaces cannot be told
        ("(골)수강", ["수강", "골수강"]),
        ("무통(증)", ["무통", "무통증"]),
        ("(약의)경구복용", ["경구복용"]),
        ("악어눈물(거짓눈물)증후군", ["악어눈물증후군"]),
        ("모세(혈)관", ["모세관"]),
        ("각(脚)", ["각"]),
        ("근위축성 측삭경화증(筋萎縮性 側索硬化症)", ["근위축성 측삭경화증"]),
        ("황달(jaundice)", ["황달"]),
        ("폐포자충증(J17.3*)", []),
        ("열결(缺)", []),
        ("기생(증) 기생생활", []),  # two words; the bracket belongs to the first
        ("감염 전염 오염[발효]", []),
        ("간 스캔", []),
        ("T/NK-세포 림프종", []),
    ],
)
def test_plain_spellings_are_aliases(raw, aliases):
    assert list(clean_term(raw).aliases) == aliases


@pytest.mark.parametrize(
    "raw, term, code",
    [
        ("결핵성 수막염(G01*)", "결핵성 수막염", "G01*"),
        ("결핵성 수막염（G01†）", "결핵성 수막염", "G01†"),
        ("알츠하이머병에서의 치매(G30.-+)", "알츠하이머병에서의 치매", "G30.-+"),
        ("뇌혈관질환에서의 뇌혈관 증후군 (I60-I67+)", "뇌혈관질환에서의 뇌혈관 증후군", "I60-I67+"),
        ("남성생식기관의 결핵(N51.-*)", "남성생식기관의 결핵", "N51.-*"),
        ("포이츠-제거스증후군(Q85.8)", "포이츠-제거스증후군", "Q85.8"),
        ("비타민(B12)", "비타민(B12)", ""),
        ("등뼈(T12)", "등뼈(T12)", ""),
        ("백회(GV20)", "백회(GV20)", ""),
        ("(G01*)", "G01*", ""),
    ],
)
def test_a_code_of_the_kcd_is_no_part_of_a_term(raw, term, code):
    found = clean_term(raw)
    assert (found.term, found.code) == (term, code)


@pytest.mark.parametrize("raw", ["열결(缺)", "족임읍（足泣）", "머리()", "머리( )", "()"])
def test_hanja_that_an_export_lost_are_recognised(raw):
    assert dictionary.lost_hanja(raw)


@pytest.mark.parametrize(
    "raw", ["각(脚)", "인(\uf9ee)", "열결(列缺)", "무통(증)", "간", "각(脚) 경(莖) 병(柄)", "황달(jaundice)"]
)
def test_whole_hanja_are_not_taken_for_lost(raw):
    assert not dictionary.lost_hanja(raw)


def test_noisy_terms_lose_nothing():
    if not NOISY.is_file():
        pytest.skip("the noisy term list is not here")
    lines = NOISY.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 6072 and len(CLEANED) >= 40 and {row[0] for row in CLEANED} <= set(lines)
    for line in lines:
        term, gloss, aliases, _ = clean_term(line)
        plain = unicodedata.normalize("NFC", line)
        if re.match(r"1\. ", plain):
            plain = re.sub(r"(^|\s)\d\.\s", " ", plain)
        letters = Counter(c for c in plain if c.isalnum())
        assert term and Counter(c for c in term + gloss if c.isalnum()) == letters, line
        assert all(Counter(c for c in alias if c.isalnum()) <= letters for alias in aliases), line
        assert not re.search(r"[=〔〕]|^\d\. |[가-힣]{2}\.", re.sub(r"\(.*?\)", "", term)), line
    # Cleaning the lines once more changes nothing.
    for line in lines:
        assert clean_term(clean_term(line).term).term == clean_term(line).term, line
    merged, counts = merge(entry(line, "A definition") for line in lines)
    assert {s for m in merged for s in (m.term, *m.aliases)} >= {clean_term(line).term for line in lines}
    assert len(merged) == len({clean_term(line).term.replace(" ", "").casefold() for line in lines})
    assert not [line for line in lines if dictionary.lost_hanja(line)]
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
        ("-2.5 이하", "-2.5 이하"),
        ("  ", ""),
    ],
)
def test_definitions(raw, cleaned):
    assert clean_definition(raw) == cleaned


@pytest.mark.parametrize(
    "raw, code, cleaned",
    [
        ("Tuberculous meningitis(G01*)", "G01*", "Tuberculous meningitis - 한국표준질병사인분류 G01*"),
        ("Tuberculous meningitis", "G01*", "Tuberculous meningitis - 한국표준질병사인분류 G01*"),
        ("Tuberculous meningitis(G01*)", "", "Tuberculous meningitis - 한국표준질병사인분류 G01*"),
        (
            "Dementia in Alzheimer's disease (G30.-+)\n 세부설명 : 한국표준질병사인분류 F00",
            "G30.-+",
            "Dementia in Alzheimer's disease - 한국표준질병사인분류 F00, G30.-+",
        ),
        ("Chorea(G10+)\n세부설명 : 춤.", "G11*", "Chorea - 춤. - 한국표준질병사인분류 G10+, G11*"),
        ("\n세부설명 : 뇌막의 결핵.", "G01*", "뇌막의 결핵. - 한국표준질병사인분류 G01*"),
        ("Cyanocobalamin (B12)", "", "Cyanocobalamin (B12)"),
        ("", "G01*", ""),
    ],
)
def test_a_code_of_the_kcd_is_a_detail_of_the_definition(raw, code, cleaned):
    assert clean_definition(raw, code) == cleaned


def test_spellings_with_other_spaces_or_capitals_are_one_term():
    rows, counts = merge(
        [
            entry("좁쌀 결핵", "Miliary tuberculosis\n 세부설명 : 한국표준질병사인분류 A19"),
            entry("결핵성 수막염(G01*)", "Tuberculous meningitis(G01*)", "bilingual_en_ko"),
            entry("좁쌀결핵", "Miliary tuberculosis", "bilingual_ko_en"),
            entry("좁쌀결핵", "온몸에 퍼진 결핵.", "korean_animal_medical_dict", "veterinary"),
            entry("LE 세포", "LE cell"),
            entry("le세포[증]", "Another term"),
            entry("le세포", "Lupus cell"),
        ]
    )
    assert [r.row() for r in rows[:2]] == [
        {
            "term": "좁쌀 결핵",
            "definition": "1. Miliary tuberculosis - 한국표준질병사인분류 A19 2. 온몸에 퍼진 결핵.",
            "senses": 2,
            "source": ["korean_medical_dict", "bilingual_ko_en", "korean_animal_medical_dict"],
            "category": ["human", "veterinary"],
            "aliases": ["좁쌀결핵"],
        },
        {
            "term": "결핵성 수막염",
            "definition": "Tuberculous meningitis - 한국표준질병사인분류 G01*",
            "senses": 1,
            "source": ["bilingual_en_ko"],
            "category": ["human"],
        },
    ]
    assert [(r.term, r.senses(), r.aliases) for r in rows[2:]] == [
        ("LE 세포", ["LE cell", "Lupus cell"], ["le세포"]),
        ("le세포[증]", ["Another term"], ["le세포", "le세포증"]),
    ]
    assert counts == {"read": 7, "dropped: same sense": 1, "kept terms": 4, "kept senses": 6}


def test_a_list_of_steps_is_one_sense():
    """As under the headings of instructions that lost their Hanja; elsewhere the numbers are those of senses."""
    steps = "1. 갈비뼈를 찾는다.\n2. 세어 내려간다.\n3. 표시한다."
    rows, counts = merge([entry("갈비（）", steps), entry("금연침()", "금연침: 인후"), entry("마비", steps)])
    assert [r.row()["senses"] for r in rows] == [1, 1, 3]
    assert rows[0].row()["definition"] == "(1) 갈비뼈를 찾는다. (2) 세어 내려간다. (3) 표시한다."
    assert rows[2].row()["definition"] == "1. 갈비뼈를 찾는다. 2. 세어 내려간다. 3. 표시한다."
    assert counts == {"read": 3, "kept terms": 3, "kept senses": 5, "numbered senses beside the first": 2}
    (row,), _ = merge([entry("양구()", "1. Cramp 2. Spasm")])  # on one line
    assert row.senses() == ["Cramp", "Spasm"]
    (row,), counts = merge([entry("갈비()", steps), entry("갈비", "Rib")])
    assert row.row()["definition"] == "1. (1) 갈비뼈를 찾는다. (2) 세어 내려간다. (3) 표시한다. 2. Rib"
    assert row.row()["senses"] == 2 == counts["kept senses"]


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


def test_a_numbered_definition_is_as_many_senses():
    """So that joined senses are numbered once, and a sense that another source repeats is not told twice."""
    (row,), counts = merge(
        [entry("경련", "1. Convulsion 2. Spasm"), entry("경련", "spasm", "bilingual_ko_en"), entry("경련", "Cramp")]
    )
    assert row.row()["definition"] == "1. Convulsion 2. Spasm 3. Cramp" and row.row()["senses"] == 3
    assert counts == {
        "read": 3, "dropped: same sense": 1, "kept terms": 1, "kept senses": 3, "numbered senses beside the first": 1,
    }  # fmt: skip
    (row,), _ = merge([entry("경련", "1. Convulsion 2. Spasm")])
    assert row.row()["definition"] == "1. Convulsion 2. Spasm" and row.row()["senses"] == 2
    assert reversible([row.row()]) == []


def test_korean_and_english_definitions_are_both_kept():
    (row,), _ = merge(
        [
            entry("간경변[증]", "간이 굳는 병."),
            entry("간경변〔증〕", "Liver cirrhosis", "bilingual_en_ko"),
            entry("간경변[증] ", "肝硬變", "bilingual_ko_en"),
        ]
    )
    assert row.row() == {
        "term": "간경변[증]",
        "definition": "1. 간이 굳는 병. 2. Liver cirrhosis 3. 肝硬變",
        "senses": 3,
        "source": ["korean_medical_dict", "bilingual_en_ko", "bilingual_ko_en"],
        "category": ["human"],
        "aliases": ["간경변", "간경변증"],
    }


def test_a_bare_equivalent_and_its_detail_are_one_sense_in_either_order():
    for definitions in (
        ["Rabies", "Rabies\n 세부설명 : 물려 옮는 병."],
        ["Rabies\n 세부설명 : 물려 옮는 병.", "rabies"],
    ):
        rows, counts = merge(entry("광견병", d) for d in definitions)
        assert rows[0].senses() == ["Rabies - 물려 옮는 병."] and counts["dropped: same sense"] == 1


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
    rows, unknown = count_symbols(
        ["TSH ↓, T4 ↑, 젖산 ↑", "38℃ ≥ 37℃ ↑ ５０％", "☃ ☃ ⇝ ⅷ ϟ 가나다 abc 123 , . ( ) é 漢 「」"]
    )
    assert [(r["term"], r["count"]) for r in rows] == [("↑", 3), ("℃", 2), ("ⅷ", 1), ("↓", 1), ("≥", 1), ("％", 1)]
    assert rows[0]["definition"] == "increased, elevated, or upward trend"
    assert rows[-1]["definition"] == "percent; parts per hundred"  # the wide form means the same
    assert unknown == {"☃": 2, "⇝": 1, "ϟ": 1}  # reported, not dropped


@pytest.mark.parametrize("character", "+^％↑⇝Ⅱⅳ①½²₂αΩµ℃㎎‰†·※ℓªⁿ₩*/")
def test_what_is_a_symbol(character):
    assert dictionary.is_symbol(character)


@pytest.mark.parametrize("character", "aZ7간ㄱ漢éあ .,:;!?'\"-_()[]{}<“”‘’「」、。".replace("<", ""))
def test_what_is_no_symbol(character):
    assert not dictionary.is_symbol(character)


def test_the_symbol_table_is_whole():
    table = json.loads(dictionary.SYMBOLS.read_text(encoding="utf-8"))
    assert all(set(row) == {"term", "definition"} and len(row["definition"]) >= 4 for row in table)
    terms = [row["term"] for row in table]
    assert len(terms) == len(set(terms)) >= 300 and all(len(t) == 1 for t in terms)
    assert all(unicodedata.normalize("NFC", t) == t for t in terms)  # as the normalised texts have them
    assert records.read_json(dictionary.SYMBOLS) == table


def test_symbols_of_korean_exams_are_explained():
    meanings = {row["term"]: row["definition"] for row in records.read_json(dictionary.SYMBOLS)}
    expected = {
        "↑": "increased", "↓": "decreased", "→": "leads to", "≥": "at least", "≤": "at most", "≒": "approximately",
        "±": "borderline", "+": "dagger", "/": "divided by", "*": "HLA", "○": "hidden",
        "−": "negative", "^": "power", "～": "range", "×": "times", "℃": "Celsius",
        "㎎": "milligram", "㎖": "milliliter", "㎗": "deciliter", "ℓ": "liter", "㎜": "millimeter", "㎣": "cubic",
        "㎡": "body surface", "μ": "micro", "α": "17α", "β": "interferon", "γ": "gamma", "δ": "WPW", "ε": "ε4",
        "κ": "kappa", "λ": "interferon lambda", "Δ": "change", "Ⅰ": "lead I", "Ⅱ": "angiotensin II",
        "Ⅲ": "oculomotor", "Ⅵ": "abducens", "Ⅶ": "facial", "Ⅷ": "coagulation factor VIII",
        "Ⅸ": "coagulation factor IX", "Ⅹ": "vagus", "①": "circled one", "㉠": "giyeok", "♂": "male", "♀": "female",
        "†": "deceased", "※": "note", "■": "affected male", "□": "unaffected male", "●": "affected female",
        "#": "tooth", "㏉": "absorbed", "㏜": "equivalent", "℞": "prescription", "³": "cubed", "⁺": "positive charge",
    }  # fmt: skip
    assert {term: meanings[term] for term in expected if expected[term] not in meanings[term]} == {}
