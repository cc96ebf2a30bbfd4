"""The refine programs of stages 01 and 02: each rule with a planted case, exactly what is kept, each drop by reason."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from medgemma_korean import mcq, prompts, rationales, records
from medgemma_korean.cli import PipelineError
from medgemma_korean.text.clean import normalise_line

REAL = Path(__file__).resolve().parents[1].parent / "shared" / "real_data" / "01_raw"


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in found), encoding="utf-8")


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


@pytest.fixture
def data(tmp_path):
    """An empty data folder that is not the sample: for --data-dir."""
    folder = tmp_path / "hospital"
    (folder / "01_raw").mkdir(parents=True)
    return folder


@pytest.fixture
def refine(load_program, data, capsys):
    """refine("01_medical_dict", ...) -> (the stage record, what was printed)"""

    def refine(name, *options):
        capsys.readouterr()
        assert load_program(f"refine_{name}").main(["--data-dir", str(data), *options]) == 0
        record = json.loads((data / f"02_refined/.stages/refine_{name}.json").read_text(encoding="utf-8"))
        return record, capsys.readouterr().out

    return refine


# the dictionary -----------------------------------------------------------------------------------------


def plant_dictionary(data, terms=()):
    folder = data / "01_raw/01_medical_dict"
    write(
        folder / "korean_medical_dict.jsonl",
        [
            {"term": "1. 조 치조 2. 폐포", "definition": "Alveolus\n 세부설명 : 허파꽈리."},
            {"term": "간경변[증]", "definition": "간이 굳는 병."},
            {"term": "경련", "definition": "1. Convulsion 2. Spasm"},
            {"term": "노보카인=프로카인", "definition": "Procaine"},
            {"term": "도뇨", "definition": ""},
            {"term": "()", "definition": "이름을 잃은 혈자리"},
            {"term": "림프종", "definition": "림프종"},
            *({"term": f"시험용어{n:04}", "definition": f"Term {n}"} for n in terms),
        ],
    )
    write_json(folder / "bilingual_medical_dict_ko_en.json", {"간경변〔증〕": "Liver cirrhosis", "경련": "Cramp"})
    write_json(folder / "bilingual_medical_dict.json", {"Spasm": "경련", "Alveolus": "1. 조 치조 2. 폐포"})
    write_json(folder / "bilingual_medical_dict_categorized.json", {"K": {"Cirrhosis of liver": "간경변[증]"}, "L": {}})
    write(
        folder / "korean_animal_medical_dict.jsonl",
        [{"term": "구제역", "definition": "FMD"}, {"term": "경련", "definition": "Colic"}],
    )


HUMAN = [
    {
        "term": "조/치조/폐포", "definition": "Alveolus - 허파꽈리.", "senses": 1,
        "source": ["korean_medical_dict", "bilingual_en_ko"], "category": ["human"],
        "aliases": ["조", "치조", "폐포"],
    },
    {
        "term": "간경변[증]", "senses": 3, "definition": "1. 간이 굳는 병. 2. Liver cirrhosis 3. Cirrhosis of liver",
        "source": ["korean_medical_dict", "bilingual_ko_en", "bilingual_categorized"], "category": ["human"],
        "aliases": ["간경변", "간경변증"],
    },
    {
        "term": "경련", "definition": "1. Convulsion 2. Spasm 3. Cramp", "senses": 3,
        "source": ["korean_medical_dict", "bilingual_ko_en", "bilingual_en_ko"], "category": ["human"],
    },
    {
        "term": "노보카인/프로카인", "definition": "Procaine", "senses": 1, "source": ["korean_medical_dict"],
        "category": ["human"], "aliases": ["노보카인", "프로카인"],
    },
]  # fmt: skip


def test_five_sources_are_merged_in_order(data, refine):
    plant_dictionary(data)
    record, printed = refine("01_medical_dict")
    found = json.loads((data / "02_refined/01_medical_dict.json").read_text(encoding="utf-8"))
    cramp = {
        "definition": "1. Convulsion 2. Spasm 3. Cramp 4. Colic", "senses": 4,
        "source": [*HUMAN[2]["source"], "korean_animal_medical_dict"], "category": ["human", "veterinary"],
    }  # fmt: skip
    foot = {
        "term": "구제역", "definition": "FMD", "senses": 1, "source": ["korean_animal_medical_dict"],
        "category": ["veterinary"],
    }  # fmt: skip
    assert found == [HUMAN[0], HUMAN[1], HUMAN[2] | cramp, HUMAN[3], foot]
    counts = {
        "read": 14, "dropped: empty definition": 1, "dropped: empty term": 1, "dropped: definition equals term": 1,
        "dropped: same sense": 2, "kept terms": 5, "kept senses": 10, "numbered senses beside the first": 1,
    }  # fmt: skip
    assert record["counts"] == counts
    assert counts["kept senses"] == sum(row["senses"] for row in found)
    dropped = sum(n for k, n in counts.items() if k.startswith("dropped"))
    assert counts["read"] + counts["numbered senses beside the first"] == counts["kept senses"] + dropped
    for reason, number in counts.items():
        assert any(line.split() == [*reason.split(), str(number)] for line in printed.splitlines()), reason


def test_without_the_veterinary_entries(data, refine):
    plant_dictionary(data)
    record, _ = refine("01_medical_dict", "--no-veterinary")
    assert json.loads((data / "02_refined/01_medical_dict.json").read_text(encoding="utf-8")) == HUMAN
    assert record["counts"]["dropped: veterinary"] == 2 and record["warnings"] == []


def test_few_terms_are_a_warning_that_stays_in_the_record(data, refine):
    plant_dictionary(data)
    record, printed = refine("01_medical_dict")
    (warning,) = record["warnings"]
    assert warning in printed and "the dictionary has 5 terms" in warning and "4,000" in warning
    plant_dictionary(data, terms=range(3995))
    record, printed = refine("01_medical_dict", "--force")
    assert record["counts"]["kept terms"] == 4000 and record["warnings"] == [] and "whole files" not in printed


def test_the_sample_may_be_small(root, load_program):
    assert load_program("refine_01_medical_dict").main([]) == 0
    record = root / "data/sample/02_refined/.stages/refine_01_medical_dict.json"
    assert json.loads(record.read_text(encoding="utf-8"))["warnings"] == []


# sentence pairs -----------------------------------------------------------------------------------------

LONG_EN = "The patient was admitted with fever, cough, and shortness of breath that began three days ago. " * 2
DROPPED_PAIRS = [
    ("", "열이 나요.", "empty_side"),
    ("I have a fever.", " \u200b ", "empty_side"),
    ("That hearing is set for today.", "TOEIC 독해", "page_furniture"),
    ("What's in it for you?", "일어사전", "page_furniture"),
    ("The Jets became the first team to beat the Titans.", "영한사전 약어표 / 한영사전 약어표", "page_furniture"),
    ("##http://x.com/1", "BAGHDAD ##http://x.com/1", "page_furniture"),
    ("Seoul expressed disappointment.", "한국 정부, 실망 표명2006.01 원문 & 독해설명 인쇄", "page_furniture"),
    ("the storm linked to at least 4 deaths.", "link to 관련되다, 연관되다", "glossary"),
    ("Big time blood money at the weekend box office:", "big time 일류의, 크게 흥행한", "glossary"),
    ("It does encompass all of them.", "encompass …을 포함하다", "glossary"),
    ("I have a fever.", "I have a fever.", "untranslated_copy"),
    ("I have a fever.", "i have a FEVER. 저는 열이 나요.", "untranslated_copy"),  # the source stands inside
    ("열이 나요. 많이 나요.", "열이 나요. 많이 나요. ", "untranslated_copy"),
    ("I have a fever.", "J'ai de la fièvre.", "not_korean"),
    ("I have a fever.", "熱があります。", "not_korean"),
    ("I have a fever.", "fever headache cough nausea 발열", "not_korean"),
    ("저는 열이 나요.", "열이 납니다.", "not_english"),
    ("38.5 / 39.0", "열이 납니다.", "not_english"),
    ("Привет, как дела, мой дорогой друг x", "안녕 내 소중한 친구야 잘 지내", "not_english"),
    ("今日は天気がとても良いですね A", "오늘은 날씨가 정말 좋네요", "not_english"),
    ("The weather is really nice today.", "今日は天気がとても良いですね 가", "not_korean"),
    ("The weather is nice today.", "ㅋㅋㅋㅋㅋㅋㅋㅋㅋㅋㅋㅋ 가", "not_korean"),
    ("???????? a ????????", "열이 나고 기침합니다.", "not_english"),
    ("12345 67890 x", "12345 67890 가나다", "not_english"),
    ("Je suis allé au marché hier soir avec ma mère.", "나는 어제 저녁 어머니와 시장에 갔다.", "not_english"),
    ("Le patient a de la fièvre et il tousse.", "환자는 열이 나고 기침한다.", "not_english"),
    ("Ich habe gestern keinen Kaffee getrunken", "나는 어제 커피를 마시지 않았다", "not_english"),
    ("¿Dónde está el hospital?", "병원이 어디 있어요?", "not_english"),
    ("Help me!", "도와줘!", "too_short"),
    ("Ouch", "아이고 아파라.", "too_short"),
    ("a" * 501, "가" * 300, "too_long"),
    ("Fever rises quickly. " * 20, "열이 빨리 오른다. " * 60, "too_long"),
    ("I have a fever today.", "저는 오늘 열이 나고 기침도 하며 목이 아파 밤새 잠을 이루지 못했습니다.", "length_ratio"),
    ("Do you have any pain when you walk?", "아픕니까?", "length_ratio"),
    (LONG_EN, "환자는 열이 있었다.", "length_ratio"),
    ("Take one tablet of this medicine after each meal.", "식후에 한 알씩 드세요. " * 5, "length_ratio"),
]  # fmt: skip
KEPT_PAIRS = [
    ("I won!", "내가 이겼어!"),  # 1.17
    ("You're miserable, aren't you?", "비참하지?"),  # 0.17
    ("Nobody lied.", "아무도 거짓말을 하지 않았어."),  # 1.33
    ("It hurts", "아프네요."),
    ("Tom began to sing “Happy Birthday.”", "Tom이 “Happy Birthday” 노래를 부르기 시작했다."),
    (
        "The bacteria have sickened 1,200 people, according to the Centers for Disease Control and Prevention.",
        "질병관리본부(The US Centers for Disease Control and Prevention, CDC)는 감염자가 1200명이라고 밝혔다.",
    ),
    ("The mRNA vaccine is given twice.", "mRNA 백신은 두 번 맞는다."),
    ("Wash your hands &amp; dry them &#8212; every time.", "손을 씻고 말리세요 &#8212; 매번."),
    ("I scored 900 on the TOEIC reading test.", "나는 TOEIC 독해 시험에서 900점을 받았다."),
    ("Is this your English-Korean dictionary?", "이것은 당신의 영한사전입니까?"),
    ("Allergy to aspirin, bronchial asthma", "aspirin 알레르기, 기관지 천식"),
    ("mRNA and DNA and inactivated vaccines", "mRNA 백신, DNA 백신, 불활화 백신"),
    ("Patient on long-term warfarin", "warfarin 장기 복용 중인 환자"),
    ("Hypoglycemia after taking metformin", "metformin 복용 후 저혈당"),
    ("Hypotension and rash after penicillin", "penicillin 투여 후 발진, 저혈압"),
    ("Blood pressure 120/80", "혈압 120/80"),
    ("Multiple café au lait spots", "다발성 밀크커피색 반점"),
    ("Gilles de la Tourette syndrome in a child", "소아의 투렛 증후군"),
    ("Ménière disease and Sjögren syndrome", "메니에르병과 쇼그렌 증후군"),
    ("Acute myocardial infarction, hypertension", "급성 심근경색, 고혈압"),
    ("Feel free to ask me.", "편하게 물어보세요."),
    ("Feel free to ask me.", "무엇이든 물어보세요."),  # several translations
]


def plant_pairs(data, folder="tatoeba", keys=("en", "ko")):
    pairs = [{keys[0]: en, keys[1]: ko} for en, ko, *_ in [*DROPPED_PAIRS, *KEPT_PAIRS]]
    twice = {keys[0]: " I  won!", keys[1]: "내가 이겼어!\n"}
    write(data / f"01_raw/03_korean_english/{folder}/train.jsonl", [*pairs, twice])


@pytest.mark.parametrize("keys", [("en", "ko"), ("english", "non_english"), ("english", "korean")])
def test_pairs_by_reason(data, refine, keys):
    plant_pairs(data, keys=keys)
    record, printed = refine("01_english_korean")
    reasons = Counter(reason for *_, reason in DROPPED_PAIRS)
    total = len(DROPPED_PAIRS) + len(KEPT_PAIRS) + 1
    assert record["counts"] == {"read": total, "kept": len(KEPT_PAIRS), "exact_duplicate": 1, **reasons}
    for reason, number in reasons.items():
        assert f"{reason} {number}".split() in [line.split()[:2] for line in printed.splitlines()]
    found = rows(data / "02_refined/01_english_korean/en_to_ko.jsonl")
    expected = [(en.replace("&amp;", "&").replace("&#8212;", "—"), ko.replace("&#8212;", "—")) for en, ko in KEPT_PAIRS]
    assert [(r["source"], r["target"]) for r in found] == expected
    back = rows(data / "02_refined/01_english_korean/ko_to_en.jsonl")
    assert [(r["target"], r["source"]) for r in back] == expected
    assert {(r["direction"], r["origin"]) for r in found + back} == {("en_to_ko", "tatoeba"), ("ko_to_en", "tatoeba")}


@pytest.mark.parametrize("en, ko, reason", DROPPED_PAIRS)
def test_each_pair_has_one_reason(load_program, en, ko, reason):
    program = load_program("refine_01_english_korean")
    en = program.clean(en)
    assert program.drop_reason(en, program.clean_korean(ko, en)) == reason


@pytest.mark.parametrize(
    "en, ko, cleaned",
    [
        ("4 killed as SUV collides with car.", "승용차 충돌로 4명 사망 2008.10", "승용차 충돌로 4명 사망"),
        ("Published in October 2008", "발행일 2008.10", "발행일 2008.10"),
        ("Version 3.10 is out.", "버전 3.10", "버전 3.10"),
        ("It was a long negotiation.", "긴 협상이었다. negotiation 협상", "긴 협상이었다."),
        ("It is not yet known", "알려지지 않았다. encompass …을 포함하다", "알려지지 않았다."),
        ("They began.", "그들은 시작했다. launch 〔기업·계획 따위〕에 착수하다", "그들은 시작했다."),
        ("It had no concurrence.", "동의가 없었다. 협력, 동의, 동시 발생", "동의가 없었다."),
        (
            "He had chest pain. On aspirin.",
            "그는 가슴이 아팠다. aspirin 복용 중",
            "그는 가슴이 아팠다. aspirin 복용 중",
        ),
        ("He came. Late, alone.", "그가 왔다. 늦게, 혼자", "그가 왔다. 늦게, 혼자"),
        ("The symptoms are: headache, fever", "증상은 다음과 같다. 두통, 발열", "증상은 다음과 같다. 두통, 발열"),
        (
            "The symptoms are as follows. Headache, fever.",
            "증상은 다음과 같다. 두통, 발열",
            "증상은 다음과 같다. 두통, 발열",
        ),
        (
            "The deal failed, he said.",
            "협상이 결렬됐다고 그가 말했다. 협력, 동의, 동시 발생",
            "협상이 결렬됐다고 그가 말했다.",
        ),
        ("I have a fever.", "열이 난다. 많이 난다.", "열이 난다. 많이 난다."),
    ],
)
def test_what_a_news_page_puts_behind_a_sentence_goes(load_program, en, ko, cleaned):
    assert load_program("refine_01_english_korean").clean_korean(ko, en) == cleaned


def test_the_bounds_of_length_are_met_exactly(load_program):
    reason = load_program("refine_01_english_korean").drop_reason
    for length, least, most in ((20, 3, 30), (39, 6, 58), (40, 8, 40), (100, 20, 100)):
        en = "a" * length
        least = max(least, 5)
        assert reason(en, "가" * least) is None and reason(en, "가" * most) is None
        assert reason(en, "가" * (most + 1)) == "length_ratio"
        assert reason(en, "가" * (least - 1)) in ("length_ratio", "too_short")
    assert reason("a" * 500, "가" * 500) is None and reason("a" * 501, "가" * 500) == "too_long"
    assert reason("a" * 8, "가" * 4) == "too_short" and reason("a" * 8, "가" * 5) is None


def test_pairs_in_the_folders_of_datasets(data, refine):
    """save_to_disk of a set and of a set of splits, and the layout of a hub repository."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    folder = data / "01_raw/03_korean_english"
    pairs = [{"en": f"Case number {n} is stable.", "ko": f"{n}번 환자는 안정적입니다."} for n in range(40)]
    datasets.Dataset.from_list(pairs[:10]).save_to_disk(folder / "one")
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(pairs[10:20]))
    splits.save_to_disk(folder / "splits", num_shards={"train": 2})
    table = pyarrow.Table.from_pylist([{"english": p["en"], "non_english": p["ko"]} for p in pairs[20:30]])
    (folder / "hub/en-ko").mkdir(parents=True)
    pyarrow.parquet.write_table(table, folder / "hub/en-ko/train-00000-of-00001.parquet")
    write(folder / "loose.jsonl", pairs[30:])
    record, _ = refine("01_english_korean")
    assert record["counts"] == {"read": 40, "kept": 40}
    found = rows(data / "02_refined/01_english_korean/en_to_ko.jsonl")
    assert {r["source"] for r in found} == {p["en"] for p in pairs}
    assert Counter(r["origin"] for r in found) == {"one": 10, "splits": 10, "hub": 10, "03_korean_english": 10}


def test_a_pair_without_a_side_names_file_row_and_columns(data, refine):
    write(data / "01_raw/03_korean_english/x/train.jsonl", [{"en": "Good evening.", "ko": "좋은 저녁."}, {"en": "x"}])
    with pytest.raises(PipelineError, match=r'x/train\.jsonl, row 2: needs the texts "en" and "ko"; the row has en'):
        refine("01_english_korean")


# rows of Arrow files ------------------------------------------------------------------------------------


def arrow(path, kind, table):
    import pyarrow

    new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_rows_whole_and_cut(tmp_path, kind):
    import pyarrow

    table = pyarrow.table({"text": ["가", "나", None], "n": [1, 2, 3]})
    file = arrow(tmp_path / "x.arrow", kind, table)
    assert list(records.read_rows(file)) == table.to_pylist()
    whole = file.read_bytes()
    for cut in (len(whole) // 2, len(whole) - 8, len(whole) - 2, 3, 0):
        file.write_bytes(whole[:cut])
        with pytest.raises(PipelineError, match=r"x\.arrow: damaged Arrow file"):
            list(records.read_rows(file))


def test_what_datasets_writes_beside_rows_is_no_row_file(tmp_path):
    for name in ("state.json", "dataset_info.json", "dataset_dict.json", "cache-1f.arrow", "data-0.arrow", "a.json"):
        (tmp_path / name).write_text("")
    assert [file.name for file in records.row_files(tmp_path)] == ["a.json", "data-0.arrow"]


# exam questions -----------------------------------------------------------------------------------------

SUBJECTS = (
    ("당뇨병케톤산증", "인슐린 정맥주입"), ("아나필락시스", "에피네프린 근육주사"), ("저혈당 혼수", "포도당 정맥주사"),
    ("긴장기흉", "바늘감압"), ("심실세동", "제세동"), ("심장눌림증", "심낭천자"), ("고칼륨혈증", "글루콘산칼슘"),
    ("아편유사제 중독", "날록손"), ("뇌경색", "혈전용해"), ("뇌전증지속상태", "로라제팜"), ("정맥류 출혈", "결찰"),
    ("급성 담관염", "담도배액"), ("장중첩증", "공기정복술"), ("자간증", "황산마그네슘"), ("패혈쇼크", "수액과 항생제"),
)  # fmt: skip
WRONG = ("경과 관찰", "경구 수분 섭취", "물리치료", "식이 조절")


def exam_row(number, split="train", **changes):
    """A question of its own; the right option stands at `number` % 5."""
    disease, treatment = SUBJECTS[number % len(SUBJECTS)]
    age = 20 + 7 * number % 60
    options = list(WRONG)
    options.insert(number % 5, treatment)
    row = {
        "subject": ("doctor", "nurse", "pharm", "dentist")[number % 4], "year": 2015, "period": 1, "q_number": number,
        "question": f"{age}세 환자가 {number}시간 전부터 증상이 생겼다. {disease} 진단 아래 우선할 처치는? ({split})",
        **dict(zip("ABCDE", options, strict=True)), "answer": number % 5 + 1, "cot": "",
    }  # fmt: skip
    return row | changes


def turned(row, steps=1, **changes):
    """The row with its options moved on; the answer follows."""
    options = [row[letter] for letter in "ABCDE"]
    moved = options[-steps:] + options[:-steps]
    return row | dict(zip("ABCDE", moved, strict=True)) | {"answer": (row["answer"] - 1 + steps) % 5 + 1} | changes


def plant_exam(data, train=(), dev=(), test=(), fewshot=None):
    """Six train items (0-5), two of dev (6, 7), two of test (8, 9), and what is given behind them."""
    folder = data / "01_raw/02_kor_med_test"
    write(folder / "train.jsonl", [*(exam_row(n) for n in range(6)), *train])
    write(folder / "dev.jsonl", [*(exam_row(n, "dev") for n in (6, 7)), *dev])
    write(folder / "test.jsonl", [*(exam_row(n, "test") for n in (8, 9)), *test])
    if fewshot is not None:
        write(folder / "fewshot.jsonl", fewshot)


def refined_items(data, split="train"):
    return rows(data / f"02_refined/02_kor_med_test/{split}.jsonl")


def test_letters_text_and_exam(data, refine):
    odd = exam_row(10, question="체온  38.5℃,\t혈압 ↓\r\n  처치는?", A=" 수액 ", exam_type="doctor", subject="internal")
    plant_exam(data, train=[odd])
    refine("02_kor_med_test")
    item = refined_items(data)[-1]
    assert item == {
        "id": "doctor-2015-1-10", "exam": "doctor", "question": "체온 38.5℃, 혈압 ↓\n처치는?", "A": "수액",
        "B": WRONG[0], "C": WRONG[1], "D": WRONG[2], "E": WRONG[3], "answer": "A",
    }  # fmt: skip
    assert [i["answer"] for i in refined_items(data)[:6]] == list("ABCDEA")


def test_duplicates_within_train_and_across_the_splits(data, refine):
    dev, test, first = exam_row(6, "dev"), exam_row(8, "test"), exam_row(0)
    clash = exam_row(11)
    plant_exam(
        data,
        train=[
            turned(dev, 2, q_number=100),  # in dev, options in another order
            test | {"q_number": 101, "question": test["question"].replace(" ", "  ").replace(".", " . ")},
            turned(first, 3, q_number=102),  # a train item again
            clash,
            clash | {"q_number": 103, "answer": clash["answer"] % 5 + 1},  # the same question, another answer
            exam_row(12, A="같다", B="같다"),
        ],
    )
    record, printed = refine("02_kor_med_test")
    assert record["counts"]["train"] == {
        "read": 12, "unusable": 1, "stands in dev or test": 2, "exact_duplicate": 1, "duplicate with another answer": 2,
        "kept": 6,
    }  # fmt: skip
    assert [i["id"].rsplit("-", 1)[1] for i in refined_items(data)] == ["0", "1", "2", "3", "4", "5"]
    assert "held out elsewhere: nurse-" not in printed and "doctor-2015-1-101" in printed
    assert len(refined_items(data, "dev")) == len(refined_items(data, "test")) == 2
    for line in ("train: duplicate with another answer  2", "train: stands in dev or test  2"):
        assert line.split() in [found.split() for found in printed.splitlines()]


def test_a_train_row_that_stands_there_twice_is_counted(data, refine):
    again = exam_row(1)
    plant_exam(data, train=[again, again | {"question": "  ".join([again["question"], ""])}])
    record, _ = refine("02_kor_med_test")
    assert record["counts"]["train"] == {"read": 8, "exact_duplicate": 2, "kept": 6}
    assert len(refined_items(data)) == 6


@pytest.mark.parametrize("split, change", [("train", {"answer": 4}), ("train", {"C": "다른 처치"}), ("dev", {})])
def test_two_questions_under_one_key_are_an_error(data, refine, split, change):
    row = exam_row(1) if split == "train" else exam_row(6, "dev")
    plant_exam(data, **{split: [row | change]})
    with pytest.raises(PipelineError, match=rf"{split}\.jsonl: 1 key \(exam, year, period, number\) twice, first "):
        refine("02_kor_med_test")


def test_evaluation_rows_are_never_dropped_and_repeats_are_told(data, refine):
    plant_exam(
        data,
        dev=[turned(exam_row(6, "dev"), 1, q_number=200), exam_row(13, "dev", A="같다", B="같다")],
        test=[exam_row(7, "dev", q_number=201)],
    )
    record, printed = refine("02_kor_med_test")
    assert record["counts"]["repeated"] == {"dev": 1, "dev and test": 1}
    assert [i["id"].rsplit("-", 1)[1] for i in refined_items(data, "dev")] == ["6", "7", "200", "13"]
    assert [i["id"].rsplit("-", 1)[1] for i in refined_items(data, "test")] == ["8", "9", "201"]
    assert "repeated within dev, kept" in printed and "repeated within dev and test, kept" in printed


def test_fewshot_never_enters_training(data, refine):
    few = exam_row(14, "fewshot", cot="여러 해 동안 정리한 풀이로 학습에 쓰면 안 되는 글이다. 제세동이 우선이다.")
    plant_exam(data, train=[turned(few, 1, q_number=300, cot="")], fewshot=[few])
    record, printed = refine("02_kor_med_test")
    assert record["counts"]["train"] == {"read": 7, "stands in fewshot": 1, "kept": 6}
    assert record["counts"]["fewshot"] == 1 and record["counts"]["rationales"] == 0
    written = "".join(
        p.read_text(encoding="utf-8") for p in (data / "02_refined").rglob("*.json*") if p.parent.name != ".stages"
    )
    assert "학습에 쓰면 안 되는" not in written
    assert not (data / "02_refined/02_kor_med_test/train_with_reasoning.jsonl").exists()
    assert "rationales: 0, detailed form: 0 %" in printed


@pytest.mark.parametrize("empty", ["absent", "", None])
def test_four_options_show_no_empty_line(data, refine, empty):
    four = exam_row(10, E=empty)
    if empty == "absent":
        del four["E"]
    plant_exam(data, train=[four], test=[exam_row(12, "test", E="", answer=4)])
    refine("02_kor_med_test")
    for item in (refined_items(data)[-1], refined_items(data, "test")[-1]):
        assert "E" not in item and prompts.letters_of(item) == "ABCD"
        for prompt in (prompts.mcq_direct(item), prompts.mcq_reasoning(item)):
            lines = prompt.split("\n")
            assert lines[-1].startswith("D) ") and all(len(line) > 3 for line in lines[-4:]) and "E)" not in prompt
        assert "(A, B, C, D 중 하나)" in prompts.mcq_direct(item)
        assert mcq.extract_answer("E", item).letter is None and mcq.extract_answer("정답: D", item).letter == "D"


def test_a_fifth_answer_of_four_options_is_unusable_in_train_and_an_error_in_dev(data, refine):
    plant_exam(data, train=[exam_row(10, E="", answer=5)])
    record, printed = refine("02_kor_med_test")
    assert record["counts"]["train"]["unusable"] == 1 and "neither 1..4" in printed
    plant_exam(data, dev=[exam_row(10, E="", answer=5)])
    with pytest.raises(PipelineError, match=r"dev\.jsonl, row 3: answer 5 is neither 1\.\.4"):
        refine("02_kor_med_test", "--force")


# symbols ------------------------------------------------------------------------------------------------


def test_symbols_come_from_training_text_by_frequency(data, refine):
    plant_dictionary(data)
    dictionary = data / "01_raw/01_medical_dict/korean_medical_dict.jsonl"
    write(dictionary, [*rows(dictionary), {"term": "β-차단제", "definition": "심박수 ↓ - α 수용체는 아니다 ☃"}])
    refine("01_medical_dict")
    plant_exam(
        data,
        train=[
            exam_row(
                10,
                question="혈압 ↑, 맥박 ↑, 체온 ↑, 호흡 ↓ 이면?",
                B="5 ㎎/㎗",
                cot="ⅲ형이고 α ≥ 3이면 ↓ 이므로 수액을 준다. 다른 것은 아니다.",
            )
        ],
        dev=[exam_row(12, "dev", question="∮ 와 Ⅷ 은?")],
    )
    record, printed = refine("02_kor_med_test")
    symbols = json.loads((data / "02_refined/02_char_dict.json").read_text(encoding="utf-8"))
    counted = [(s["term"], s["count"]) for s in symbols]
    assert counted == [
        ("/", 4), ("↑", 3), ("↓", 3), ("α", 2), ("β", 1), ("ⅲ", 1), ("≥", 1), ("㎎", 1), ("㎗", 1),
    ]  # fmt: skip
    assert all(set(s) == {"term", "definition", "count"} and s["definition"] for s in symbols)
    assert record["counts"]["unknown_symbols"] == {"☃": 1} and "symbols without a meaning: ☃ (1)" in printed
    assert record["counts"]["symbols"] == 9


# rationales ---------------------------------------------------------------------------------------------

WHY = "활력징후가 나빠지고 있어 기다릴 수 없으므로 원인을 바로 없애는 처치가 먼저이다."


def rationale(number, said=None, split="train", response=None, **changes):
    row = exam_row(number, split)
    letter = said or "ABCDE"[row["answer"] - 1]
    kept = {c: row[c] for c in ("question", *"ABCDE", "answer")}
    return kept | {"thinking": "", "response": response or f"{WHY} ({number})\n\n정답: {letter}"} | changes


def plant_rationales(data, found, file="data/train-00000-of-00001.jsonl"):
    write(data / "01_raw/by_source/medical_reasoning_kormedmcqa" / file, found)


def test_rationales_by_reason(data, refine):
    own = "첫째: 저혈당 혼수이다.\n둘째: 포도당을 정맥으로 준다.\n정답은 C입니다."
    plant_exam(data, train=[exam_row(12, cot=own)], fewshot=[exam_row(14, "fewshot")])
    plant_rationales(
        data,
        [
            rationale(0),
            rationale(1, response=f"<think>정답은 A일까? 아니다.</think>\n**{WHY}**\n### 최종 정답\nB"),
            rationale(0),  # the same again
            rationale(0, response=f"다른 설명이다. {WHY}\n정답: A"),
            rationale(12),  # the item has its own
            rationale(2, said="A"),
            rationale(2, response=WHY),
            rationale(2, response=f"정답은 A이다. {WHY}\n정답: C"),
            rationale(2, response=f"{WHY}\n정답은 C가 아니다.\nC"),
            rationale(2, response="정답: C"),
            rationale(2, response=f"{WHY * 40}\n정답: C"),
            rationale(2, response=f"②와 ④는 시간이 걸린다. {WHY}\n정답: C"),
            rationale(2, answer=1, said="A"),  # its own key is wrong
            rationale(2, answer=7),
            rationale(6, split="dev"),
            rationale(8, split="test"),
            rationale(14, split="fewshot"),
            turned(rationale(6, split="dev"), 2),
            # An edited held-out question is still one.
            rationale(9, "E", "test", question="(문제 9) " + exam_row(9, "test")["question"].replace(" ", "")),
            rationale(13),
        ],
    )
    record, printed = refine("02_kor_med_test")
    assert record["counts"]["rationale_rows"] == {
        "own: read": 1, "own: kept": 1, "read": 20, "kept": 2, "exact_duplicate": 1, "the item has one": 2,
        rationales.WRONG_LETTER: 1, rationales.NO_LETTER: 3, rationales.TOO_SHORT: 1, rationales.TOO_LONG: 1,
        rationales.BY_NUMBER: 1, rationales.OTHER_KEY: 1, rationales.UNUSABLE: 1, rationales.HELD_OUT: 5,
        rationales.NO_ITEM: 1,
    }  # fmt: skip
    found = record["counts"]["rationale_rows"]
    assert found["read"] == sum(n for k, n in found.items() if k != "read" and not k.startswith("own"))
    assert record["counts"]["rationales"] == 3
    with_reasoning = refined_items(data, "train_with_reasoning")
    assert with_reasoning == [i for i in refined_items(data) if "reasoning" in i]
    assert [(i["id"].rsplit("-", 1)[1], i["reasoning"], i.get("reasoning_source")) for i in with_reasoning] == [
        ("0", f"{WHY} (0)", "medical_reasoning_kormedmcqa"),
        ("1", WHY, "medical_reasoning_kormedmcqa"),
        ("12", "첫째: 저혈당 혼수이다.\n둘째: 포도당을 정맥으로 준다.", None),
    ]
    for reason in (rationales.HELD_OUT, rationales.WRONG_LETTER):
        assert f"rationales, {reason} {found[reason]}".split() in [line.split() for line in printed.splitlines()]
    assert "detailed form: 0 %" not in printed


def test_most_rationales_unusable_is_a_warning(data, refine):
    plant_exam(data)
    plant_rationales(data, [rationale(n, said="ABCDE"[(n + 1) % 5]) for n in range(5)] + [rationale(5)])
    record, printed = refine("02_kor_med_test")
    (warning,) = record["warnings"]
    assert "5 of 6 rationales are unusable" in warning and warning in printed


def test_a_rationale_follows_the_options_of_its_item(data, refine):
    """The published row has them in another order: letters in the text and the answer are the item's."""
    plant_exam(data)
    said = f"A는 늦고 B와 C는 효과가 없다. D가 알맞다. {WHY}\n정답: D"
    plant_rationales(data, [turned(rationale(1), 2, response=said)])
    record, _ = refine("02_kor_med_test")
    (item,) = refined_items(data, "train_with_reasoning")
    assert (item["id"], item["answer"]) == ("nurse-2015-1-1", "B")
    assert item["reasoning"] == f"D는 늦고 E와 A는 효과가 없다. B가 알맞다. {WHY}"
    assert prompts.mcq_reasoned_answer(item).endswith(f"{WHY}\n</reasoning>B")


def test_a_reworded_question_is_matched_by_its_key(data, refine):
    plant_exam(data)
    key = {c: exam_row(3)[c] for c in ("subject", "year", "period", "q_number")}
    reworded = {"question": "이 환자에게 무엇부터 하는가?"}
    plant_rationales(
        data,
        [
            rationale(3, **key, **reworded),
            rationale(4, **reworded),  # no key
            rationale(5, **key, **reworded),  # the key of another item: options differ
        ],
    )
    record, _ = refine("02_kor_med_test")
    assert [i["id"] for i in refined_items(data, "train_with_reasoning")] == ["dentist-2015-1-3"]
    assert record["counts"]["rationale_rows"] == {"read": 3, "kept": 1, rationales.NO_ITEM: 2}


def test_what_is_too_long_can_be_chosen(data, refine):
    plant_exam(data)
    plant_rationales(data, [rationale(0, response=f"{'길다. ' * 400}\n정답: A")])
    record, _ = refine("02_kor_med_test")
    assert record["counts"]["rationale_rows"] == {"read": 1, rationales.TOO_LONG: 1}
    with pytest.raises(PipelineError, match=r"settings\.longest_rationale: 1200 -> 2000"):
        refine("02_kor_med_test", "--longest-rationale", "2000")
    record, _ = refine("02_kor_med_test", "--longest-rationale", "2000", "--force")
    assert record["counts"]["rationales"] == 1


def test_rationales_that_come_later_are_noticed(data, refine):
    plant_exam(data)
    record, printed = refine("02_kor_med_test")
    assert record["identity"]["inputs"]["rationales"] is None and "rationales: 0, detailed form: 0 %" in printed
    plant_rationales(data, [rationale(0)])
    with pytest.raises(PipelineError, match="input changed: rationales"):
        refine("02_kor_med_test")
    record, _ = refine("02_kor_med_test", "--force")
    assert record["counts"]["rationales"] == 1
    shutil.rmtree(data / "01_raw/by_source")
    with pytest.raises(PipelineError, match="input changed: rationales"):
        refine("02_kor_med_test")


def test_rationales_saved_by_datasets(data, refine):
    import datasets

    plant_exam(data)
    saved = datasets.DatasetDict(train=datasets.Dataset.from_list([rationale(n) for n in range(4)]))
    saved.save_to_disk(data / "01_raw/by_source/medical_reasoning_kormedmcqa")
    record, _ = refine("02_kor_med_test")
    assert record["counts"]["rationales"] == 4


def test_rationales_without_a_column_name_it(data, refine):
    plant_exam(data)
    row = rationale(0)
    del row["response"]
    plant_rationales(data, [row], "a.jsonl")
    with pytest.raises(PipelineError, match=r"a\.jsonl: no column response"):
        refine("02_kor_med_test")
    assert not (data / "02_refined/02_kor_med_test").exists()


ITEM = {
    "id": "doctor-2020-1-1", "exam": "doctor", "question": "흉통과 ST분절 상승이 있다. 진단은?", "A": "협심증",
    "B": "급성 심근경색", "C": "폐색전증", "D": "대동맥박리", "E": "심낭염", "answer": "B",
}  # fmt: skip
GIST = "심전도에서 ST분절 상승과 흉통이 함께 있으므로 관상동맥의 급성 폐색을 먼저 생각한다."
HEADINGS = f"A) 협심증\n- 상승이 계속되지 않는다.\nB) 급성 심근경색\n- {GIST}\nC) 폐색전증\n- 호흡곤란이 주다."
RESPONSES = [
    (f"{GIST}\n\n정답: B", GIST),
    (f"{GIST}\n따라서 정답은 **B) 급성 심근경색**입니다.", GIST),
    (f"{GIST} 정답: B. 급성 심근경색", GIST),
    (f"정답은 B입니다.\n\n{GIST}", GIST),
    (f"**정답: B. 급성 심근경색**\n\n**해설:**\n{GIST}", GIST),
    (f"{GIST}\n\nB", GIST),
    (f"{GIST}\n\n**B. 급성 심근경색**", GIST),
    (f"{GIST}\n\n## 결론\n따라서 가장 적절한 답은 **B**입니다.", GIST),
    (f"{GIST}\nThe answer is B.", GIST),
    (f"{GIST}\nThe final answer is $\\boxed{{B}}$.", GIST),
    (f"{GIST}\n정답은 2번입니다.", GIST),
    (f"<think>정답은 A? 아니다.</think>{GIST}\n정답: B", GIST),
    (f"<reasoning>{GIST}</reasoning>B", GIST),
    (f"<R>{GIST}<R/>B", GIST),
    (f"<bos>{GIST}<unused3>\n정답: B<end_of_turn>\n<start_of_turn>user\n정답: C", GIST),
    (f"{HEADINGS}\n\n---\n정답: B", HEADINGS),  # headings of options stay
    (f"{GIST} 환자는 급성 심근경색이므로 정답은 B입니다.", f"{GIST} 환자는 급성 심근경색이므로 정답은 B입니다."),
    (f"{GIST}\n정답: C", rationales.WRONG_LETTER),
    (f"{GIST}\nC", rationales.WRONG_LETTER),
    (f"{GIST}\n\n**C. 폐색전증**", rationales.WRONG_LETTER),
    (f"정답은 C이다. {GIST}\n정답: B", rationales.NO_LETTER),
    (f"{GIST} 정답은 B가 아니다.\nB", rationales.NO_LETTER),
    (GIST, rationales.NO_LETTER),
    ("", rationales.NO_LETTER),
    (f"<think>{GIST}\n정답: B", rationales.NO_LETTER),
    (f"{GIST}\n정답: F", rationales.NO_LETTER),
    ("정답: B", rationales.TOO_SHORT),
    (f"{GIST} ③은 틀리다.\n정답: B", rationales.BY_NUMBER),
    (f"{GIST} 보기 3은 호흡곤란이 주다.\n정답: B", rationales.BY_NUMBER),
    (f"{GIST * 30}\n정답: B", rationales.TOO_LONG),
]


@pytest.mark.parametrize("response, expected", RESPONSES)
def test_a_response_gives_its_text_or_one_reason(response, expected):
    text, reason = rationales.Judge([ITEM], [], 1200).reasoning("", mcq.cell_text(response, normalise_line, "\n"), ITEM)
    assert (text, reason) == (("", expected) if isinstance(expected, str) and expected in REASONS else (expected, None))


REASONS = {
    rationales.WRONG_LETTER, rationales.NO_LETTER, rationales.TOO_SHORT, rationales.TOO_LONG, rationales.BY_NUMBER,
    rationales.CONTRADICTS,
}  # fmt: skip


def test_the_draft_is_used_where_the_response_is_a_letter_only():
    judge = rationales.Judge([ITEM], [], 1200)
    assert judge.reasoning(f"{GIST} 다른 것은 아니다.", "B", ITEM) == (f"{GIST} 다른 것은 아니다.", None)
    assert judge.reasoning(f"{GIST} 정답은 A이다.", "정답: B", ITEM) == ("", rationales.CONTRADICTS)
    assert (
        judge.reasoning(GIST, f"짧은 답이 아니라 풀어 쓴 설명이 있으면 그것이 먼저이다. {GIST}\n정답: B", ITEM)[0]
        != GIST
    )


def test_what_passes_is_ready_for_the_template_in_every_order():
    """No tag, no control token, no letter but the item's answer, however the options are shuffled."""
    judge = rationales.Judge([ITEM], [], 1200)
    for response, _ in RESPONSES:
        text, reason = judge.reasoning("", mcq.cell_text(response, normalise_line, "\n"), ITEM)
        if reason is not None:
            continue
        assert not rationales._TAGS.search(text) and "**" not in text and not text.startswith("#")
        for order in ([4, 3, 2, 1, 0], [1, 2, 3, 4, 0]):
            moved = prompts.shuffled({**ITEM, "reasoning": text}, order)
            answer = prompts.mcq_reasoned_answer(moved)
            assert mcq.extract_answer(answer, moved).letter == moved["answer"]
            stated = mcq.stated_answer(moved["reasoning"], moved)
            assert stated is None or stated.letter == moved["answer"]


def test_a_rationale_of_the_exam_that_contradicts_its_key_is_left_out(data, refine):
    plant_exam(data, train=[exam_row(10, cot=f"{WHY}\n정답은 C이다."), exam_row(11, cot=WHY)])
    record, _ = refine("02_kor_med_test")
    assert record["counts"]["rationale_rows"] == {
        "own: read": 2, f"own: {rationales.CONTRADICTS}": 1, "own: kept": 1,
    }  # fmt: skip
    assert [i["id"] for i in refined_items(data, "train_with_reasoning")] == ["dentist-2015-1-11"]
    assert len(refined_items(data)) == 8


# real data ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    if not REAL.is_dir():
        pytest.skip("the real data are not here")
    folder = tmp_path_factory.mktemp("real") / "hospital"
    for part in ("01_medical_dict", "02_kor_med_test", "03_korean_english"):
        shutil.copytree(REAL / part, folder / "01_raw" / part, copy_function=shutil.copyfile)
    for path in [folder, *folder.rglob("*/")]:
        path.chmod(0o755)
    return folder


@pytest.fixture
def refined_real(real, load_program):
    for name in ("01_medical_dict", "01_english_korean", "02_kor_med_test"):
        assert load_program(f"refine_{name}").main(["--data-dir", str(real)]) == 0
    counts = {
        name: json.loads((real / f"02_refined/.stages/refine_{name}.json").read_text(encoding="utf-8"))["counts"]
        for name in ("01_medical_dict", "01_english_korean", "02_kor_med_test")
    }
    return real / "02_refined", counts


def test_real_pairs_dictionary_and_questions(refined_real):
    refined, counts = refined_real
    assert counts["01_english_korean"] == {
        "read": 3523, "kept": 3400, "too_short": 71, "length_ratio": 26, "not_korean": 16, "page_furniture": 7,
        "glossary": 2, "too_long": 1,
    }  # fmt: skip
    assert counts["01_medical_dict"] == {
        "read": 1655, "dropped: same sense": 359, "dropped: empty term": 1, "kept terms": 1295, "kept senses": 1295,
    }  # fmt: skip
    terms = {row["term"]: row for row in json.loads((refined / "01_medical_dict.json").read_text(encoding="utf-8"))}
    assert sum(row["senses"] for row in terms.values()) == 1295
    assert terms["결핵성 수막염"]["definition"] == "Tuberculous meningitis - 한국표준질병사인분류 G01*"
    assert terms["좁쌀 결핵"]["aliases"] == ["좁쌀결핵"] and "좁쌀결핵" not in terms
    assert {"열결", "족임읍"} <= set(terms) and terms["귀의"]["senses"] == 1
    exam = counts["02_kor_med_test"]
    assert exam["train"] == {"read": 1391, "unusable": 1, "stands in dev or test": 1, "kept": 1389}
    assert (exam["dev"], exam["test"], exam["repeated"], exam["rationales"]) == (200, 813, {}, 0)
    # A stand-in for KorMedMCQA, where 89 symbols are expected; all that occur are explained.
    assert exam["symbols"] == 35 and exam["unknown_symbols"] == {}
    symbols = json.loads((refined / "02_char_dict.json").read_text(encoding="utf-8"))
    assert {"+", "^", "～", "℃", "α", "μ", "Ⅱ", "≥", "³"} <= {s["term"] for s in symbols}


def test_real_train_and_held_out_questions_share_no_item(refined_real):
    refined, _ = refined_real
    items = {split: rows(refined / f"02_kor_med_test/{split}.jsonl") for split in ("train", "dev", "test")}
    keys = {split: {mcq.item_key(item) for item in of} for split, of in items.items()}
    assert not keys["train"] & (keys["dev"] | keys["test"]) and len(keys["train"]) == 1389
