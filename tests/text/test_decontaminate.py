"""Decontamination: planted exam items are found however they are printed, and nothing else is."""

from __future__ import annotations

import itertools
import json
import random
import time
from pathlib import Path

import korean_corpus
import numpy as np
import pytest

from medgemma_korean.text.clean import clean_text
from medgemma_korean.text.decontaminate import GRAM, ExamIndex, fold, grams

REAL_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "real_data"

ITEMS = [
    {
        "id": "dev-1",
        "question": "55세 남자가 3시간 전부터 가슴이 쥐어짜듯 아파 응급실에 왔다. 혈압 90/60 mmHg, "
        "맥박 110회/분이었다. 가장 먼저 할 검사는?",
        "A": "심전도", "B": "가슴 X선", "C": "심장초음파", "D": "관상동맥조영", "E": "운동부하검사",
    },
    {
        "id": "dev-2",
        "question": "다음 중 옳은 것은?",
        "A": "갑상샘항진증에서는 심박출량이 늘고 전신 혈관저항이 준다",
        "B": "부신피질부전에서는 저칼륨혈증과 고혈압이 나타난다",
        "C": "요붕증에서는 소변 삼투질농도가 혈장보다 높다",
        "D": "원발알도스테론증에서는 혈장 레닌 활성이 높다",
        "E": "말단비대증은 성장호르몬 결핍으로 생긴다",
    },
    {
        "id": "dev-3",
        "question": "다음 중 옳은 것은?",
        "A": "간경변 환자의 복수는 염분 제한으로만 치료한다",
        "B": "간신증후군에서는 신장의 조직학적 손상이 뚜렷하다",
        "C": "자발세균복막염의 흔한 원인균은 대장균이다",
        "D": "식도정맥류 출혈의 일차 예방에는 항생제를 쓴다",
        "E": "",
    },
    {"id": 4, "question": "혈색소 정상?", "A": "↑", "B": "↓"},
]  # fmt: skip

FILLER = (
    "오늘 병원 매점에서 김밥을 사 먹었다. 날씨가 좋아서 산책을 하기로 했고, 저녁에는 친구를 만나 영화를 보았다. "
    "집에 돌아와 책을 읽다가 잠이 들었다. 다음 날에는 비가 와서 하루 종일 집에서 쉬었다. "
)


@pytest.fixture(scope="module")
def index() -> ExamIndex:
    return ExamIndex(ITEMS)


def _options(item: dict) -> list[str]:
    return [item[key] for key in "ABCDE" if item.get(key)]


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("가슴 X-선, (심전도)!", "가슴x선심전도"),
        ("５㎎ ① Ⅱ형", "5mg1ii형"),
        ("심근ㆍ경색·증 “인용” 〈책〉", "심근경색증인용책"),
        ("3∼4일, 3~4일, 3-4일", "34일34일34일"),
        # Symbols tell options apart, so they stay.
        ("Na↑ K↓ >5 +", "na↑k↓>5+"),
        ("\u200b \t\n_", ""),
        ("심\u034f전\U000e0100도\U000e0020검\u115f사\u1160는\U0001d173\ufe0f", "심전도검사는"),
        ("😀𠀀", "😀𠀀"),
        # Eighteen characters from one.
        ("ﷺ㎎é ﷺ", "صلىاللهعليهوسلمmgéصلىاللهعليهوسلم"),
    ],
)
def test_fold(text: str, folded: str) -> None:
    assert fold(text) == folded


def test_grams_are_position_wise_hashes() -> None:
    text = "가나다라마바사아자차카타파하" * 3
    values = grams(text)
    assert values.dtype == np.uint64
    assert len(values) == len(text) - GRAM + 1
    # The text repeats after 14 characters, and so do its hashes; all others differ.
    assert values[0] == values[14]
    assert len(set(values.tolist())) == 14
    assert values[5] == grams(text[5 : 5 + GRAM])[0]
    assert len(grams("짧다")) == 0
    assert grams("가나다", 1).tolist() == [ord(character) for character in "가나다"]
    with pytest.raises(ValueError, match="n must be at least 1"):
        grams("가", 0)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13, 20])
def test_grams_equal_the_plain_polynomial(n: int) -> None:
    text = fold(FILLER)
    base = 0x9E3779B97F4A7C15
    expected = []
    for start in range(len(text) - n + 1):
        value = 0
        for character in text[start : start + n]:
            value = (value * base + ord(character)) % 2**64
        expected.append(value)
    assert grams(text, n).tolist() == expected


def test_grams_across_chunks() -> None:
    text = "".join(chr(0xAC00 + number * 7 % 11172) for number in range(70_000))
    values = grams(text)
    for position in (0, 32_767, 32_768, 65_535, 69_987):
        assert values[position] == grams(text[position : position + GRAM])[0]


@pytest.mark.parametrize(
    "layout",
    [
        lambda item: item["question"] + " " + " ".join(_options(item)),
        lambda item: item["question"].replace(" ", "") + "".join(_options(item)),
        lambda item: item["question"].replace(" ", "\n") + " / ".join(_options(item)).replace(" ", "  "),
        lambda item: (
            item["question"] + "".join(f" {mark} {text}" for mark, text in zip("①②③④⑤", _options(item), strict=False))
        ),
        lambda item: item["question"] + "".join(f"\n{n}) {text}" for n, text in enumerate(_options(item), 1)),
        lambda item: (
            item["question"] + "".join(f"\n{mark}. {text}" for mark, text in zip("ABCDE", _options(item), strict=False))
        ),
    ],
    ids=["spaces", "no_spaces", "lines", "circled", "numbered", "lettered"],
)
def test_planted_items_are_found(index: ExamIndex, layout) -> None:
    for item in ITEMS[:3]:
        assert index.touched_by(FILLER + layout(item) + FILLER) == [item["id"]]


def test_question_alone_counts_when_it_identifies_the_item(index: ExamIndex) -> None:
    assert index.touched_by(FILLER + ITEMS[0]["question"].replace(" ", "  ").replace(".", " .") + FILLER) == ["dev-1"]
    # Two items ask "다음 중 옳은 것은?", and it is shorter than 13 characters anyway.
    assert index.touched_by(FILLER + "다음 중 옳은 것은?" + FILLER) == []


def test_a_stem_that_items_share_identifies_none() -> None:
    tail = "환자에서 발생할 수 있는 가장 심각한 합병증은 무엇인가?"
    items = [
        {
            "id": str(number),
            "question": f"{disease} {tail}",
            "A": "출혈성 쇼크와 장기 부전",
            "B": "혈전에 의한 폐색전증",
        }
        for number, disease in enumerate(["고관절 탈구", "급성 췌장염", "중증 화상을 입은"])
    ]
    index = ExamIndex(items)
    assert index.touched_by("대퇴골 골절 " + tail) == []
    assert index.touched_by("급성 췌장염 " + tail) == ["1"]


# Questions that identify nothing, with long, short and tiny options.
LOOSE = [
    {"id": str(number), "question": question, **dict(zip("ABCDE", options, strict=False))}
    for number, (question, options) in enumerate(
        [
            ("옳은 것은?", ["간경변", "간암", "담석증", "췌장염", "위궤양"]),
            ("다음 중 옳은 것은?", ["혈압이 높아진다", "맥박이 느려진다", "체온이 내려간다", "호흡이 가쁘다"]),
            ("pH는?", ["7.1", "7.2", "7.3", "7.4", "7.5"]),
            ("전이가 흔한 곳은?", ["간", "폐", "뇌", "뼈", "콩팥"]),
            ("pH는?", ["산", "염기", "중성"]),
            *((item["question"], _options(item)) for item in ITEMS[1:3]),
        ]
    )
]


@pytest.mark.parametrize("marks", [("",) * 5, "①②③④⑤", "ABCDE"], ids=["bare", "numbered", "lettered"])
@pytest.mark.parametrize("moved", [False, True], ids=["counting", "shuffled_marks"])
def test_options_in_any_order_are_found_after_a_question_that_identifies_none(marks, moved: bool) -> None:
    index = ExamIndex(LOOSE)
    for item in LOOSE:
        options = _options(item)
        for order in itertools.permutations(range(len(options))):
            lines = [f"{marks[at if moved else k]} {options[at]}" for k, at in enumerate(order)]
            text = f"{FILLER}{item['question']}\n" + "\n".join(lines) + FILLER
            assert index.touched_by(text) == [item["id"]], text


def test_a_question_that_identifies_none_needs_all_options_near_it() -> None:
    index = ExamIndex(LOOSE)
    # Without the last two, of which half of the grams is enough.
    for item in LOOSE[:5]:
        options = _options(item)
        turned = [*options[1:], options[0]]
        assert index.touched_by(FILLER + item["question"] + " ".join(turned[:-1]) + FILLER) == []
        assert index.touched_by(FILLER + " ".join(turned) + FILLER) == []
        far = item["question"] + " ".join(turned[:-1]) + FILLER * 8 + turned[-1]
        assert index.touched_by(far) == []
    # An option that is a part of another one does not stand where that one does.
    index = ExamIndex([{"id": "x", "question": "다음 중 옳은 것은?", "A": "간", "B": "간경변증", "C": "담도폐쇄"}])
    assert index.touched_by("다음 중 옳은 것은? 간경변증, 담도폐쇄, 위염") == []
    assert index.touched_by("다음 중 옳은 것은? 담도폐쇄, 간경변증, 간") == ["x"]
    # Labels alone are no options.
    index = ExamIndex(
        [{"id": "x", "question": "다음 중 옳은 것을 고르시오", **dict(zip("ABCDE", "12345", strict=True))}]
    )
    assert index.touched_by("다음 중 옳은 것을 고르시오. ② 나 ① 가 ③ 다 ④ 라 ⑤ 마") == []


@pytest.mark.parametrize("hidden", ["\u034f", "\U000e0100", "\U000e0020", "\u1160", "\u115f", "\U0001d173", "\u200b"])
def test_invisible_characters_hide_nothing(index: ExamIndex, hidden: str) -> None:
    for item in ITEMS[:3]:
        text = hidden.join(item["question"] + " ".join(_options(item)))
        assert index.touched_by(FILLER + text) == [item["id"]]
        assert index.touched_by(clean_text(FILLER + text, "web")) == [item["id"]]


def test_ordinary_documents_touch_nothing() -> None:
    rng = random.Random(1)
    texts = [korean_corpus.document(rng) for _ in range(2000)]
    for folder in ("00_korean", "00_english_replay"):
        for file in sorted((korean_corpus.SAMPLE / folder).rglob("*.jsonl")):
            texts += [row["text"] for row in korean_corpus.rows(file)]
    assert len(texts) > 2000
    exam = [
        {**row, "id": f"{split}/{number}"}
        for split in ("dev", "test")
        for number, row in enumerate(korean_corpus.rows(korean_corpus.SAMPLE / "02_kor_med_test" / f"{split}.jsonl"))
    ]
    assert not any(ExamIndex([*exam, *LOOSE]).touched_by_each(texts))


def test_one_stem_of_many_items_ends_quickly() -> None:
    items = [
        {
            "id": str(i),
            "question": "옳은 것은?",
            "A": f"{i}번째 장기의 기능이 낮아진다",
            "B": f"{i} 늘어난다",
            "C": "모두",
        }
        for i in range(300)
    ]
    index = ExamIndex(items)
    # Every item has its longest option there, and none has all of them.
    text = " ".join(f"옳은 것은? {item['A']}" for item in items * 30)
    begun = time.process_time()
    assert index.touched_by(text) == []
    assert time.process_time() - begun < 5


def test_half_of_the_grams_decides() -> None:
    question = "".join(chr(0xAC00 + 31 * number) for number in range(112))
    index = ExamIndex([{"id": "x", "question": question}])
    # 112 characters have 100 grams; 62 characters hold 50 of them, 61 characters 49.
    assert index.touched_by(question[:62]) == ["x"]
    assert index.touched_by(question[:61]) == []
    # Repetition adds nothing: distinct grams count.
    assert index.touched_by(question[:61] + "끝" + question[:61]) == []
    # Halves count together within one document, and never across two.
    assert index.touched_by(question[:40] + "끝" + question[60:100]) == ["x"]
    assert index.touched_by_each([question[:61], question[61:]]) == [[], []]


def test_grams_do_not_cross_documents() -> None:
    question = "".join(chr(0xAC00 + 31 * number) for number in range(26))
    index = ExamIndex([{"id": "x", "question": question}])
    assert index.touched_by_each([question[:13], question[13:], "", question]) == [[], [], [], ["x"]]


def test_short_items_match_exactly(index: ExamIndex) -> None:
    assert index.touched_by("문제: 혈색소 정상? ↑ ↓") == ["4"]
    assert index.touched_by("문제: 혈색소 정상? ① ↓ ② ↑") == ["4"]
    assert index.touched_by("혈색소는 정상이다 ↑ ↓") == []
    assert index.touched_by("혈색소 정상? ↑ ↑") == []


def test_several_documents_keep_their_order(index: ExamIndex) -> None:
    whole = [item["question"] + " ".join(_options(item)) for item in ITEMS[:3]]
    assert index.touched_by_each([FILLER, whole[2] + FILLER + whole[0], "", whole[1]]) == [
        [],
        ["dev-1", "dev-3"],
        [],
        ["dev-2"],
    ]
    assert index.touched_by_each([]) == []
    assert index.touched_by("") == []


def test_same_item_ignores_order_spacing_and_punctuation(index: ExamIndex) -> None:
    copy = {"question": ITEMS[0]["question"].replace(" ", "").replace(".", " . ")}
    copy.update(zip("ABCDE", reversed(_options(ITEMS[0])), strict=True))
    assert index.same_item(copy) == "dev-1"
    assert index.same_item({**copy, "A": "뇌파검사"}) is None
    assert index.same_item({**copy, "question": "다른 질문"}) is None
    # The empty fifth option of a four-option item counts as absent.
    assert index.same_item({key: value for key, value in ITEMS[2].items() if key != "E"}) == "dev-3"
    assert index.same_item({"question": "혈색소 정상?", "A": "↓", "B": "↑"}) == "4"
    assert index.same_item({"question": "혈색소 정상?", "A": "↓", "B": "+"}) is None


def test_an_empty_index_touches_nothing() -> None:
    index = ExamIndex([])
    assert index.touched_by(FILLER) == []
    assert index.same_item(ITEMS[0]) is None


@pytest.mark.parametrize(
    "item", [{"question": "질문"}, {"id": "x"}, {"id": "x", "question": ""}, {"id": "", "question": "가"}]
)
def test_an_item_without_id_or_question_is_refused(item: dict) -> None:
    with pytest.raises(ValueError, match="exam item 1 needs an id and a question"):
        ExamIndex([ITEMS[0], item])


def test_real_exam_against_real_text() -> None:
    folder = REAL_DATA / "01_raw"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    parquet = pytest.importorskip("pyarrow.parquet")
    items = []
    for split in ("dev", "test"):
        with (folder / "02_kor_med_test" / f"{split}.jsonl").open(encoding="utf-8") as lines:
            items += [{**json.loads(line), "id": f"{split}-{number}"} for number, line in enumerate(lines)]
    index = ExamIndex(items)
    planted = [
        FILLER
        + item["question"].replace(" ", "  ")
        + "".join(f" {mark} {text}" for mark, text in zip("①②③④⑤", _options(item), strict=True))
        for item in items
    ]
    found = index.touched_by_each(planted)
    assert sum(item["id"] in ids for item, ids in zip(items, found, strict=True)) == len(items)
    # Petitions, comments and encyclopedia pages hold no exam item.
    for source in ("c4_korean", "wikipedia-korean", "namu_wiki"):
        for path in (folder / "00_korean" / source).glob("*.parquet"):
            texts = parquet.read_table(path, columns=["text"]).column("text").to_pylist()
            assert not any(index.touched_by_each(texts)), source
