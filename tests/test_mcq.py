"""Reading items, extracting answers (the whole reference table, and real model outputs) and scores."""

import csv
import json
import random
import re
import time
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from medgemma_korean import mcq, records
from medgemma_korean.cli import PipelineError
from medgemma_korean.mcq import combined_score, extract_answer, format_score, read_raw_item, score, within_chance

REAL = Path(__file__).resolve().parents[1].parent / "shared" / "real_data"


def normalise(line: str) -> str:
    """Stands in for text.clean.normalise_line."""
    return re.sub(r"[ \t]+", " ", unicodedata.normalize("NFKC", line)).strip()


def raw(**changes):
    row = {"subject": "doctor", "year": 2021, "period": 1, "q_number": 7, "question": "가장 알맞은 치료는?"}
    row |= {"A": "아스피린", "B": "헤파린", "C": "와파린", "D": "수술", "E": "경과 관찰", "answer": 3, "cot": ""}
    row |= changes
    return {key: value for key, value in row.items() if value != "absent"}


def read(**changes):
    return read_raw_item(raw(**changes), "test.jsonl, line 7", normalise)


# reading ------------------------------------------------------------------------------------------------


def test_read_five_options():
    assert read() == {
        "id": "doctor-2021-1-7",
        "exam": "doctor",
        "question": "가장 알맞은 치료는?",
        "A": "아스피린",
        "B": "헤파린",
        "C": "와파린",
        "D": "수술",
        "E": "경과 관찰",
        "answer": "C",
    }


@pytest.mark.parametrize("value", [1, "1", "1.0", 1.0, "A", "a", " A ", "Ａ"])
def test_read_answer_forms(value):
    assert read(answer=value)["answer"] == "A"


@pytest.mark.parametrize("value", [0, 6, -1, "F", "", "AB", None, True, 1.5, "E "])
def test_read_answer_out_of_range(value):
    with pytest.raises(PipelineError, match=r"test.jsonl, line 7: .*answer"):
        read(answer=value, **({"E": ""} if value == "E " else {}))


@pytest.mark.parametrize("value", ["absent", "", "  ", None, float("nan")])
def test_read_four_options(value):
    item = read(E=value)
    assert "E" not in item and item["answer"] == "C"
    with pytest.raises(PipelineError, match="neither 1..4"):
        read(E=value, answer=5)


@pytest.mark.parametrize("column", ["exam_type", "exam"])
def test_read_other_names_of_the_exam(column):
    assert read(subject="absent", **{column: "nurse"})["id"] == "nurse-2021-1-7"


@pytest.mark.parametrize("column", ["subject", "year", "period", "q_number", "question", "A", "D", "answer"])
def test_read_missing_column(column):
    with pytest.raises(PipelineError, match=f"test.jsonl, line 7: missing column {column}"):
        read(**{column: "absent"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": " \n\t"}, "question is empty"),
        ({"subject": ""}, "subject is empty"),
        ({"B": None}, "option B is empty"),
        ({"D": "　"}, "option D is empty"),
        ({"B": "와파린 "}, "options B and C are equal"),
        ({"B": "５ ㎎", "C": "5\tmg"}, "options B and C are equal"),
        ({"year": "이천"}, "year is '이천'"),
        ({"period": None}, "period is None"),
        ({"A": ["아스피린"]}, "A: expected text, found list"),
        ({"question": {"ko": "?"}}, "question: expected text, found dict"),
    ],
)
def test_read_bad_row(changes, message):
    with pytest.raises(PipelineError, match=f"^test.jsonl, line 7: .*{re.escape(message)}"):
        read(**changes)


def test_read_names_all_problems_at_once():
    with pytest.raises(PipelineError) as error:
        read(question="", A="", answer=9)
    assert all(part in str(error.value) for part in ("question is empty", "option A is empty", "answer 9"))


def test_read_keeps_lines_and_symbols():
    item = read(question="혈압 90/60㎜Hg,\t맥박 ↑\r\n\r\n<보기>\nNa⁺ ≥ 150", A="37.5 ℃\n이상", cot="첫째\n둘째 ")
    assert item["question"] == normalise("혈압 90/60㎜Hg, 맥박 ↑") + "\n<보기>\n" + normalise("Na⁺ ≥ 150")
    assert "↑" in item["question"] and "≥" in item["question"]
    assert "\n" not in item["A"]
    assert item["reasoning"] == "첫째\n둘째"
    assert read_raw_item(raw(A="37.5 ℃ ≥ ½ μg"), "x", str.strip)["A"] == "37.5 ℃ ≥ ½ μg", (
        "only `normalise` changes text"
    )


def test_read_numbers_as_options():
    item = read(A=1, B=2, C=3, D=4, E=5, year="2021", q_number="7.0")
    assert item["C"] == "3" and item["id"] == "doctor-2021-1-7"


def test_refined_items_are_read_back(tmp_path):
    four = {"id": "a", "question": "?", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "D"}
    items = [four, {**four, "E": "5", "answer": "E", "reasoning": "첫째"}]
    file = tmp_path / "dev.jsonl"
    for row, said in (
        ({**four, "answer": "E"}, "row 3: answer 'E' is none of ABCD"),
        ({**four, "answer": "AB"}, "row 3: answer 'AB' is none of ABCD"),
        ({**four, "answer": ""}, "row 3: answer '' is none of ABCD"),
        ({**four, "answer": 4}, "line 3: no text under answer; the row has id, question, A, B, C, D, answer"),
        ({**four, "D": "", "E": "5", "answer": "E"}, "row 3: option D is empty"),
        ({**four, "B": ""}, "row 3: option B is empty"),
        ({"id": "a", "text": "가"}, "line 3: no text under question, A, B, C, D, answer; the row has id, text"),
    ):
        records.write_jsonl(file, items)
        assert mcq.read_items(file) == mcq.read_items(file, also=("id",)) == items
        records.write_jsonl(file, [*items, row])
        with pytest.raises(PipelineError, match=f"dev.jsonl, {said}$"):
            mcq.read_items(file)
    records.write_jsonl(file, [{key: value for key, value in four.items() if key != "id"}])
    assert len(mcq.read_items(file)) == 1
    with pytest.raises(PipelineError, match="line 1: no text under id"):
        mcq.read_items(file, also=("id",))


def test_read_real_items():
    folder = REAL / "01_raw" / "02_kor_med_test"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    rejected = []
    for split, expected in {"train": 1391, "dev": 200, "test": 813}.items():
        rows = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        ids = set()
        for number, row in enumerate(rows, 1):
            try:
                ids.add(read_raw_item(json.loads(row), f"{split} {number}", normalise)["id"])
            except PipelineError as error:
                rejected.append(str(error))
                ids.add(None)
        assert len(ids) == len(rows) == expected
    assert len(rejected) == 1 and rejected[0].startswith("train 473: options B and E are equal")
    with open(REAL / "kormedmcqa_excerpt_doctor_dev.csv", encoding="utf-8") as file:
        items = [read_raw_item(row, "csv", normalise) for row in csv.DictReader(file)]
    assert [item["answer"] for item in items] == ["A", "C", "A"]


# extraction ---------------------------------------------------------------------------------------------

ITEM = {"A": "협심증", "B": "심근경색", "C": "Chronic bronchitis", "D": "E. coli 감염", "E": "B 세포 림프종"}
FOUR = {"A": "협심증", "B": "심근경색", "C": "폐렴", "D": "천식"}

# Output -> letter, or None where no single answer is named.
ANSWERS_B = [
    *("B", " B\n", "b", "B.", "**B**"),
    *("(B)", "（Ｂ）", "Ｂ"),
    "B. 심근경색",
    *("정답: B", "정답：B", "정답：Ｂ", "정답: b", "정답: (B)"),
    '{"정답": "B"}',
    *("정답은 B입니다", "정답은 B이다", "정답은 B번입니다"),
    *("B입니다", "따라서 B입니다.", "B가 정답입니다"),
    *("B번", "②", "2번", "정답: ②", "정답: 2"),
    *("답은 B", "답: B", "The answer is B"),
    "B\n\n해설: A는 틀리다",
    *("<reasoning>A는 아니다</reasoning>B", "<R>근거<R/>B"),
    "근거</reasoning>B",
    "<reasoning>x</reasoning>B<end_of_turn>…</reasoning>C",
    "A와 B 중 정답은 B입니다",
]
ANSWERS_NONE = [
    "<reasoning>첫째: A는",
    "<reasoning>정답은 B입니다",
    *("<reasoning>x</reasoning>", ""),
    *("A와 B", "A, B", "A 또는 B", "AB"),
    *("정답: A, B", "정답: A 또는 B"),
    "정답: B\n정답: C",
    "정답은 A가 아니다",
    *("죄송하지만 답할 수 없습니다.", "모르겠습니다", "정답: 없음", "I cannot answer this."),
    *("Which of the following", "A patient presents"),
    *("정답: Chronic", "정답: BMI", "E. coli 감염"),
    *("비타민 B입니다", "vitamin B12"),
    *("F", "정답: F", "⑥", "6번", "2"),
    "심근경색",
]


@pytest.mark.parametrize("item", [None, ITEM, FOUR], ids=["no item", "five options", "four options"])
@pytest.mark.parametrize("output", ANSWERS_B)
def test_table_letter(output, item):
    assert extract_answer(output, item).letter == "B"


@pytest.mark.parametrize("item", [None, ITEM, FOUR], ids=["no item", "five options", "four options"])
@pytest.mark.parametrize("output", ANSWERS_NONE)
def test_table_none(output, item):
    letter, reason = extract_answer(output, item)
    assert letter is None and reason


def test_table_letter_outside_the_options():
    assert extract_answer("E").letter == "E"
    assert extract_answer("E", FOUR) == (None, mcq.NOT_OPTION)
    assert extract_answer("정답: 5", FOUR) == (None, mcq.NOT_OPTION)
    assert extract_answer("E", letters="ABCD") == (None, mcq.NOT_OPTION)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("정답: B", mcq.MARKED),
        ("B", mcq.BARE),
        ("B. 심근경색", mcq.WITH_TEXT),
        ("<end_of_turn>B", mcq.EMPTY),
        ("<R>근거", mcq.UNCLOSED),
        ("정답: F", mcq.NOT_OPTION),
        ("정답: A, B", mcq.AMBIGUOUS),
        ("A. 협심증\nB. 심근경색\nC. 폐렴", mcq.OPTION_LIST),
        ("모르겠습니다", mcq.REFUSED),
        ("죄송하지만 답할 수 없습니다.", mcq.REFUSED),
        ("I cannot answer this.", mcq.REFUSED),
        ("I'm sorry, but I can’t help with that.", mcq.REFUSED),
        ("정답: 없음", mcq.NOT_FOUND),
        ("원인을 알 수 없는 발열", mcq.NOT_FOUND),  # a text about what is unknown refuses nothing
        ("<reasoning>죄송하지만", mcq.UNCLOSED),
        ("죄송하지만 A, B", mcq.REFUSED),
        ("A, B", mcq.AMBIGUOUS),
        ("", mcq.EMPTY),
    ],
)
def test_reasons(output, reason):
    assert extract_answer(output).reason == reason


REFUSALS = [
    *(
        "A. 모르겠습니다",
        "A. 답변할 수 없습니다",
        "A. 죄송합니다",
        "A) 죄송하지만 답변을 드릴 수 없습니다.",
        "A: 모르겠습니다.",
    ),
    *(
        "A번. 잘 모르겠습니다",
        'A. "모르겠습니다"',
        "A. 질문이 불분명합니다. 정답을 알 수 없습니다.",
        "**A.** 모르겠습니다",
    ),
    *("A 죄송합니다", "A.\n모르겠습니다", "A. 심근경색인지 협심증인지 판단할 수 없습니다"),
    *("정답: A. 모르겠습니다", "정답: A 죄송합니다", "정답은 (A) 모르겠습니다", "Answer: A. I'm sorry, I cannot help"),
    "I'm sorry, but as an AI, I can't give answer: A",
    *(
        "I cannot provide an answer: A",
        "I can’t give you a definitive answer: A",
        "I'm unable to provide the answer: A",
    ),
    *("I am not able to provide any answer: A", "I cannot answer: A", "I am sorry, I cannot give a final answer: A"),
]


@pytest.mark.parametrize("output", REFUSALS)
def test_a_refusal_has_no_letter(output):
    for item in (None, ITEM, FOUR):
        assert extract_answer(output, item) == (None, mcq.REFUSED)


@pytest.mark.parametrize(
    "output",
    [
        # An explicit answer after a refusal is one: whoever reads it has been given a letter.
        "죄송하지만 답변을 드릴 수 없습니다. 정답: B",
        "모르겠습니다만 굳이 고르면 정답은 B입니다",
        "I'm sorry, I don't know for sure. The answer is B",
        # not refusals
        "B. 심근경색\n\n죄송합니다, 해설은 제공할 수 없습니다.",
        "B\n\n죄송합니다, 해설은 제공할 수 없습니다.",
        "B. 원인을 알 수 없는 발열",
        "I will give the answer: B",
        "Here I provide an answer: B",
        "Not easy, but my answer: B",
    ],
)
def test_an_answer_beside_a_refusal_is_one(output):
    assert extract_answer(output).letter == "B"


def test_an_option_may_read_like_a_refusal():
    item = ITEM | {"B": "수술 여부는 판단할 수 없다"}
    for output in (
        "B. 수술 여부는 판단할 수 없다",
        "정답: B. 수술 여부는 판단할 수 없다",
        "B. 수술 여부는 판단할 수 없다 – 정보 부족",
    ):
        assert extract_answer(output, item).letter == "B"
    item = ITEM | {"B": "모르겠습니다"}
    for output in ("B. 모르겠습니다", "정답: B. 모르겠습니다", "정답: B 모르겠습니다.", "B) 모르겠습니다라고 답한다"):
        assert extract_answer(output, item).letter == "B"
        assert extract_answer(output.replace("B", "A"), item).letter is None


# Beyond the table: each line is a way in which a letter gets lost, or one is made up.
@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("### ANSWER  \nB", "B"),
        ("B\n\n### ANSWER\nB\n\n**Reasoning:**\n- **Option A** is wrong", "B"),
        ("```json\n{'정답': 'B', '해설': 'A는 틀리다'}\n```", "B"),
        ("<answer>B</answer>", "B"),
        ("B\n\n</answer>", "B"),
        ("The final answer is $\\boxed{B}$.", "B"),
        ("The answer is B. The patient has chest pain.", "B"),
        ("답 (Answer): B", "B"),
        ("최종 정답: **B. 심근경색**", "B"),
        ("정답은 B: 1.0입니다.", "B"),
        ("정답: B (심근경색)", "B"),
        ("정답: B 과민반응", "B"),
        ("정답은 ②번입니다.", "B"),
        ("B입니다. IPv6의 주소는", "B"),
        ("B를 선택합니다.", "B"),
        ("A와 B 중 B가 정답입니다", "B"),
        ("A는 정답이 아니다. 정답은 B입니다.", "B"),
        ("<reasoning>x</reasoning>B<reasoning>C", "B"),
        ("B<eos>정답: C", "B"),
        ("B. 대장균 E. coli 감염", "B"),
        ("B. 칼시트리올(비타민 D) 투여", "B"),
        ("B: ㄱ, ㄹ", "B"),
        ("정답은 A가 아니라 B입니다", None),
        ("B가 정답이 아니다", None),
        ("비타민 B가 정답", None),
        ("A, B가 정답이다", None),
        ("정답: (A), (B)", None),
        ("정답: A/B", None),
        ("정답은 A와 C", None),
        ("정답: ①, ③", None),
        ("정답은 (A)일 수 없다", None),
        ("정답은 A라고 할 수 없다", None),
        ("오답은 A입니다", None),
        ("응답: A", None),
        ("정답률 A", None),
        ("정답: B형 간염", None),
        ("정답: B-cell", None),
        ("정답: E. coli", None),
        ("The answer is a matter of debate", None),
        ("I cannot answer a medical question", None),
        ("Answer: A 65-year-old man", None),
        ("정답: 2.5 mg", None),
        ("정답: 3배", None),
        ("정답은 2 가지", None),
        ("정답: 5%", None),
        ("37 ℃가 정답", None),
        ("A: 5%, B: 80%", None),
        ("A: 정답이 아니다", None),
        ("A) 협심증 B) 심근경색 C) 폐렴", None),
        ("A\nB\nC", None),
        ("정답 알파벳만 답하세요 (A, B, C, D, E 중 하나).", None),
        ("[EMPTY_RESPONSE]", None),
        ("B형 간염", None),
        ("A부동산 가격이", None),
        ("C. difficile", None),
    ],
)
def test_beyond_the_table(output, letter):
    assert extract_answer(output).letter == letter


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("C. Chronic bronchitis", "C"),
        ("C Chronic bronchitis.", "C"),
        ("정답: C Chronic bronchitis", "C"),
        ("C. Chronic hepatitis", None),
        ("E. coli 감염", None),
        ("D. E. coli 감염", "D"),
        ("B 세포 림프종", None),
        ("정답: B 세포 림프종", None),
        ("② 심근경색", "B"),
    ],
)
def test_option_text(output, letter):
    assert extract_answer(output, ITEM).letter == letter


def test_option_text_that_is_a_sentence():
    item = {"A": "협심증이다.", "B": "rifapentine을 쓴다.", "C": "지켜본다", "D": "수술한다."}
    assert extract_answer("정답은 **B. rifapentine을 쓴다.**입니다.", item).letter == "B"
    assert extract_answer("정답은 B. rifapentine을 쓴다입니다.", item).letter == "B"
    assert extract_answer("정답은 C. rifapentine을 쓴다.", item).letter is None
    assert extract_answer("B. rifapentine을 쓴다.", item) == ("B", mcq.WITH_TEXT)


def test_options_that_are_numbers():
    item = {"A": "34.9%", "B": "3", "C": "2", "D": "2번"}
    assert extract_answer("A: 34.9%").letter is None, "a value says nothing without the options"
    assert extract_answer("A: 34.9%", item).letter == "A"
    assert extract_answer("정답: 2", item) == (None, mcq.OPTION_TEXT)
    assert extract_answer("2번", item) == (None, mcq.OPTION_TEXT)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("첫째: 흉통이다.\n따라서 정답은 B이다.", "B"),
        ("ST분절이 올라가므로 B가 정답이다.", None),  # the B of "비타민 B가 정답" looks the same
        ("ST분절이 올라간다. B가 정답이다.", "B"),
        ("<reasoning>정답은 B</reasoning>", "B"),  # inside the reasoning too
        ("A는 심장이 멎지 않는다. B) 심근경색\nC) 폐렴", "nothing"),
        ("정답은 A가 아니다.", None),
        ("정답은 A이다. 정답은 B이다.", None),
        ("정답: F", None),
        ("", "nothing"),
    ],
)
def test_stated_answer(text, letter):
    found = mcq.stated_answer(text, FOUR)
    if letter == "nothing":
        assert found is None
    else:
        assert (found.letter if found else None) == letter


def test_item_key_is_of_the_question_and_the_set_of_options():
    item = read()
    same = [
        read(question="가장  알맞은\n치료는 ?"),
        read(A="와파린", C="아스피린", answer=1),
        read(A="아스피린.", D="수 술"),
        read(year=2019, q_number=99, answer=1),
    ]
    assert {mcq.item_key(other) for other in same} == {mcq.item_key(item)}
    for changed in (read(E="absent"), read(question="가장 나쁜 치료는?"), read(A="아스피린 100 ㎎"), read(A="↑")):
        assert mcq.item_key(changed) != mcq.item_key(item)


def test_every_letter_in_every_layout():
    layouts = (
        "{}",
        "정답: {}",
        "{}입니다",
        "{}가 정답입니다",
        "<reasoning>A) B)</reasoning>{}",
        "({})",
        "{}. 폐렴",
        "답은 {}번",
    )
    for layout in layouts:
        for letter in "ABCDE":
            assert extract_answer(layout.format(letter)).letter == letter, layout


def test_never_raises_and_stays_fast():
    rng = random.Random(0)
    pieces = [
        "정답",
        "답",
        "answer",
        "A",
        "B",
        "e",
        "2",
        "②",
        "번",
        "가",
        "은",
        "와",
        "또는",
        "아니",
        "입니다",
        "\n",
        " ",
        ",",
    ]
    pieces += [
        ".",
        ")",
        "(",
        ":",
        '"',
        "<R>",
        "<R/>",
        "<reasoning>",
        "</reasoning>",
        "<eos>",
        "Chronic",
        "\\boxed{",
        "㎎",
        "*",
    ]
    for _ in range(5000):
        output = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        for item in (None, FOUR):
            letter, reason = extract_answer(output, item)
            assert reason and (letter is None or letter in ("ABCDE" if item is None else "ABCD")), output
    for repeated in (
        "정답",
        "정답 ",
        " ",
        "\n",
        "정답은 A ",
        "A, ",
        "정답: A\n",
        "(",
        "B가 정답 ",
        "<R>",
        "#",
        "답 2 ",
    ):
        start = time.perf_counter()
        extract_answer(repeated * 3000, ITEM)
        assert time.perf_counter() - start < 2, repeated


REFUSAL = re.compile(r"죄송|모르겠|답할 수 없|알 수 없|cannot answer|can't answer|unable to|EMPTY_RESPONSE")


def real_rows():
    """(file, number, row) of every stored output; the answers of many span lines."""
    files = sorted((REAL / "eval_outputs").glob("*.csv"))
    if not files:
        pytest.skip(f"{REAL / 'eval_outputs'} is absent")
    for path in files:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 1):
                yield path.stem, number, row


def test_real_outputs():
    """Measured on 23,039 rows of nine models' outputs, 7,493 of them with several lines. Of the 13,675 whose stored
    letter is right we give another letter in 0 and none in 62 (0.5 %), of which 8 have several lines; of all 22,599
    with a stored letter, in 0 and 239 (1.1 %). The Llama file alone has 216 of 3,984 (5.4 %), nearly all `C: 34.9%`,
    which need the item's options; the rest reason without a mark and end in a letter, or are not answers at all.
    """
    rows, differing, unlike = Counter(), Counter(), []
    for file, number, row in real_rows():
        ours = extract_answer(row["response"])
        assert ours.reason
        lines = "several lines" if "\n" in row["response"].strip() else "one line"
        if row["pred"]:
            kind = "same" if ours.letter == row["pred"] else "none" if ours.letter is None else "other"
            rows.update(["stored", kind])
            if row["pred"] == row["answer"]:
                rows.update(["right", f"right {kind}", lines, f"{lines} {kind}"])
                if kind != "same":
                    differing[ours.reason] += 1
                    text = " ".join(row["response"].split())
                    unlike.append(f"{file}:{number} stored {row['pred']}, ours {ours}: {text[:60]} … {text[-40:]}")
    print(*unlike, sep="\n")  # each with its reason: pytest -rP
    print(dict(rows), dict(differing))
    assert rows["stored"] > 20_000 and rows["several lines"] > 4000
    for group in ("right", "several lines", "one line"):
        assert rows[f"{group} other"] <= 0.005 * rows[group] and rows[f"{group} none"] <= 0.05 * rows[group]
    assert len(unlike) == differing.total() == rows["right other"] + rows["right none"]
    # What it does now, and a little more: a change for the worse must be seen.
    assert rows["other"] <= 0.001 * rows["stored"] and rows["none"] <= 0.015 * rows["stored"]
    assert rows["right none"] <= 0.01 * rows["right"]


def test_real_refusals_and_unfinished_reasoning_give_no_letter():
    refusals = unfinished = 0
    for _, number, row in real_rows():
        if len(row["response"]) < 200 and REFUSAL.search(row["response"]):
            assert extract_answer(row["response"]).letter is None, row["response"]
            refusals += 1
        if number % 5 == 0:  # as reasoning whose end never came, whole and cut anywhere
            for text in (row["response"], row["response"][: number % 97]):
                assert extract_answer(f"<reasoning>\n{text}") == (None, mcq.UNCLOSED)
                assert extract_answer(f"<R>{text}<end_of_turn>") == (None, mcq.UNCLOSED)
            unfinished += 1
    assert refusals > 300 and unfinished > 4000


# scores -------------------------------------------------------------------------------------------------


def predictions(gold, predicted, exam="doctor"):
    return [
        {
            "id": f"{exam}-{i}",
            "exam": exam,
            "gold": g,
            "predicted": None if p == "-" else p,
            "reason": mcq.NOT_FOUND if p == "-" else mcq.BARE,
        }
        for i, (g, p) in enumerate(zip(gold, predicted, strict=True))
    ]


def test_score_counts_every_row():
    result = score(predictions("ABCDEA", "ABD-EB") + predictions("CC", "-C", exam="nurse"))
    assert (result["n"], result["correct"], result["unparsed"]) == (8, 4, 2)
    assert result["accuracy"] == 0.5 and result["accuracy_parsed"] == 4 / 6
    assert (result["lower"], result["upper"]) == mcq.wilson(4, 8)
    assert (result["majority_letter"], result["majority_accuracy"]) == ("C", 3 / 8)
    assert result["predicted"] == {"A": 1, "B": 2, "C": 1, "D": 1, "E": 1}
    assert result["gold"] == {"A": 2, "B": 1, "C": 3, "D": 1, "E": 1}
    assert result["accuracy_by_gold"] == {"A": 0.5, "B": 1, "C": 1 / 3, "D": 0, "E": 1}
    assert result["unparsed_reasons"] == {mcq.NOT_FOUND: 2}
    assert list(result["exams"]) == ["doctor", "nurse"]
    assert result["exams"]["nurse"]["n"] == 2 and result["exams"]["nurse"]["accuracy"] == 0.5
    assert sum(exam["n"] for exam in result["exams"].values()) == result["n"]
    assert json.loads(json.dumps(result)) == result, "a score is plain JSON"


def test_score_nothing_parsed():
    result = score(predictions("ABCDE", "-----"))
    assert result["accuracy"] == 0 and result["accuracy_parsed"] is None and result["alarm"] is None
    assert result["unparsed"] == result["n"] == 5 and within_chance(result)


def test_score_needs_rows():
    with pytest.raises(ValueError):
        score([])


def test_alarm():
    gold = "ABCDE" * 4
    assert score(predictions(gold, "AAAAAAAABBBCCCDDDEEE"))["alarm"] is None, "40 % is still quiet"
    assert score(predictions(gold, "AAAAAAAAABBCCCDDDEEE"))["alarm"] == "A"
    assert score(predictions(gold, "CCCCC---------------"))["alarm"] == "C", "a share of the predicted letters"


def test_refused_are_counted_apart():
    rows = predictions("ABCD", "A---")
    rows[1]["reason"], rows[2]["reason"] = mcq.REFUSED, mcq.EMPTY
    result = score(rows)
    assert (result["unparsed"], result["refused"], result["n"]) == (3, 1, 4)
    assert result["unparsed_reasons"] == {mcq.REFUSED: 1, mcq.EMPTY: 1, mcq.NOT_FOUND: 1}
    assert result["accuracy"] == 0.25 and result["accuracy_parsed"] == 1


@pytest.mark.parametrize("split", ["dev", "test"])
def test_always_c_is_at_the_majority_baseline(split):
    """Whoever answers C on every real question has the share of C, and is told to be within chance."""
    file = REAL / "01_raw" / "02_kor_med_test" / f"{split}.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is absent")
    items = [read_raw_item(row, split, normalise) for row in records.read_jsonl(file)]
    gold = [item["answer"] for item in items]
    result = score(predictions(gold, "C" * len(gold)))
    assert result["alarm"] == "C" and result["accuracy"] == gold.count("C") / len(gold) <= result["majority_accuracy"]
    assert within_chance(result) and result["accuracy_by_gold"] == {k: float(k == "C") for k in "ABCDE"}
    if result["majority_letter"] == "C":
        assert result["accuracy"] == result["majority_accuracy"]


def test_within_chance():
    gold = "ABCDE" * 40

    def right(share):
        return "".join(g if i < share * len(gold) else "EABCD"["ABCDE".index(g)] for i, g in enumerate(gold))

    assert within_chance(score(predictions(gold, "A" * 200)))
    assert within_chance(score(predictions(gold, right(0.05)))), "worse than the majority letter"
    assert within_chance(score(predictions(gold, right(0.25)))), "40 of 200 lies within the interval of 50 of 200"
    assert not within_chance(score(predictions(gold, right(0.30))))
    assert within_chance({"lower": 0.22, "majority_accuracy": 0.22})


# rotated options ----------------------------------------------------------------------------------------

ROTATED = {"id": "1", "question": "?", "A": "가", "B": "나", "C": "다", "D": "라", "E": "마", "answer": "B"}


def test_rotation_shows_option_j_plus_s_at_position_j():
    for shift in range(7):
        turned = mcq.rotated({**ROTATED, "reasoning": "A) 가"}, shift)
        assert [turned[letter] for letter in "ABCDE"] == [ROTATED["ABCDE"[(j + shift) % 5]] for j in range(5)]
        assert turned[turned["answer"]] == "나" and turned["id"] == "1" and "reasoning" not in turned
        for letter in "ABCDE":
            assert ROTATED[mcq.chosen_option(ROTATED, letter, shift)] == turned[letter]
    assert mcq.chosen_option(ROTATED, None, 3) is None
    four = {key: value for key, value in ROTATED.items() if key != "E"}
    turned = mcq.rotated(four, 3)
    assert "E" not in turned and [turned[k] for k in "ABCD"] == ["라", "가", "나", "다"] and turned["answer"] == "C"
    assert mcq.rotated(four, 4) == {**four}


def test_rotation_scores_by_hand():
    golds = ["A", "B", "C", "D"]
    chosen = [
        ["A", "A", "A", "A", "A"],  # consistent and right
        ["C", "C", "C", "C", "C"],  # consistent and wrong
        ["A", "C", "B", "C", None],  # the vote is right; no answer once
        ["E", "D", "D", "E", "A"],  # two of each: the first one counts
    ]
    found = mcq.rotation_scores(golds, chosen)
    assert found["accuracies"] == [0.25, 0.75, 0.5, 0.5, 0.25] and found["n"] == 5
    assert found["mean_accuracy"] == (5 + 0 + 2 + 2) / 20 and found["consistency"] == 0.5
    assert (found["vote_correct"], found["vote_accuracy"], found["unparsed"]) == (2, 0.5, 1)
    assert (found["vote_lower"], found["vote_upper"]) == mcq.wilson(2, 4)
    nothing = mcq.rotation_scores(["A"], [[None, None]])
    assert (nothing["consistency"], nothing["vote_accuracy"], nothing["unparsed"]) == (0, 0, 2)
    ragged = mcq.rotation_scores(["A", "D"], [["A", "A", "A", "A"], ["D", "C", "E", "D", "A"]])
    assert ragged["n"] == 5 and ragged["accuracies"] == [1, 0.5, 0.5, 1, 0]  # the last one of one item
    assert ragged["mean_accuracy"] == (4 / 4 + 2 / 5) / 2
    assert (ragged["consistency"], ragged["vote_accuracy"], ragged["unparsed"]) == (0.5, 1, 0)
    one = mcq.rotation_scores(["A", "B"], [["A"], ["A"]])
    assert (one["mean_accuracy"], one["vote_accuracy"], one["consistency"]) == (0.5, 0.5, 1)


def test_a_position_is_no_opinion():
    """Who answers C wherever it stands is right once in five rotations, and never consistent."""
    items = [{**ROTATED, "answer": letter} for letter in "ABCDE" * 3]
    chosen = [[mcq.chosen_option(item, "C", shift) for shift in range(5)] for item in items]
    found = mcq.rotation_scores([item["answer"] for item in items], chosen)
    assert found["consistency"] == 0 and found["mean_accuracy"] == pytest.approx(0.2)


# questions that keep failing ----------------------------------------------------------------------------


def test_failed_questions():
    items = [
        {"id": f"q{i:02}", "question": f"질문 {i}\n" + "긴 " * (60 if i == 2 else 1), "answer": "B"} for i in range(14)
    ]

    def look(wrong):
        return {f"q{i:02}": predicted for i, predicted in wrong.items()}

    everywhere = {i: "A" for i in range(2, 13)}
    looks = [(10, look({**everywhere, 0: "C"})), (20, look({**everywhere, 1: "D"})), (30, look({2: None, 3: "E"}))]
    found = mcq.failed_questions(looks, items)
    assert [entry["question_id"] for entry in found] == [f"q{i:02}" for i in (2, 3, *range(4, 12))]
    assert found[0] == {
        "question_id": "q02",
        "fail_count": 3,
        "expected": "B",
        "last_predicted": None,
        "question_preview": found[0]["question_preview"],
        "last_failed_step": 30,
    }
    assert len(found[0]["question_preview"]) == 80 and found[0]["question_preview"].startswith("질문 2 긴 긴")
    assert found[2]["question_preview"] == "질문 4 긴" and (found[2]["last_failed_step"], found[2]["fail_count"]) == (
        20,
        2,
    )
    rest = mcq.failed_questions(looks, items, most=20)[11:]
    assert [(e["question_id"], e["last_failed_step"]) for e in rest] == [("q01", 20), ("q00", 10)]
    assert mcq.failed_questions([(5, look({}))], items) == []


# training-time scores -----------------------------------------------------------------------------------

STEPS = "첫째: 흉통과 ST 상승이다\n둘째: 선택지를 하나씩 본다\n셋째: 트로포닌 상승이 결정적이다\n넷째: "
SHARES = ", ".join(f"{letter}) 가능성이 매우 {word} {share}%" for letter, word, share in zip(
    "ABCDE", ("낮다", "높다", "낮다", "낮다", "낮다"), (5, 80, 5, 5, 5), strict=True
))  # fmt: skip
FULL = f"<reasoning>\n{STEPS}{SHARES}\n</reasoning>B"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FULL, 1.0),
        (FULL.replace("<reasoning>", "<R>").replace("</reasoning>", "<R/>"), 1.0),
        (FULL.replace("</reasoning>", ""), 0.9),
        (FULL.replace("둘째:", "두번째"), 0.9),
        (FULL.replace("선택지를 하나씩 본다", "선택지를 본다"), 0.9),
        (FULL.replace(" 80%", ""), 0.9),
        (FULL.replace("가능성이 매우 높다 80%", "높다 80%"), 0.9),
        (FULL.replace("A) 가능성이 매우 낮다 5%, B) 가능성이 매우 높다 80%, C) 가능성이 매우 낮다 5%, ", ""), 0.7),
        (f"{STEPS}{SHARES}", 0.9),
        ("<reasoning>x</reasoning>B", 0.1),
        ("</reasoning>B<reasoning>", 0.0),
        ("첫째: 둘째: 셋째: 넷째: A) B) C) D) E) 5% 80%", 0.0),
        ("B", 0.0),
        ("", 0.0),
    ],
)
def test_format_score(text, expected):
    assert format_score(text) == expected


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        (FULL, "B", 1.0),
        (FULL.replace("A) 가능성이 매우 낮다 5%, B) 가능성이 매우 높다 80%, C) 가능성이 매우 낮다 5%, ", ""), "B", 0.9),
        ("B", "B", 0.6667),
        (FULL, "C", 0.25),
        (
            FULL.replace("A) 가능성이 매우 낮다 5%, B) 가능성이 매우 높다 80%, C) 가능성이 매우 낮다 5%, ", ""),
            "C",
            0.175,
        ),
        ("B", "C", 0.0),
        (FULL.removesuffix("B"), "B", 0.25),
    ],
)
def test_combined_score(text, gold, expected):
    assert combined_score(text, gold) == pytest.approx(expected, abs=5e-5)
