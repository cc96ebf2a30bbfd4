"""Every template word for word, and rationales that stay true when the options change places."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from medgemma_korean import mcq, prompts
from medgemma_korean.cli import PipelineError
from medgemma_korean.text.clean import normalise_line

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "sample" / "01_raw" / "02_kor_med_test" / "train.jsonl"

ITEM = {
    "question": "62세 남자의 첫 처치는?\n혈압 84/52 mmHg",
    "A": "수액", "B": "이뇨제", "C": "모르핀", "D": "산소", "E": "수혈",
    "answer": "A",
    "reasoning": "첫째: 쇼크이다.\n넷째: A) 쇼크의 첫 처치 80%, B) 혈압을 떨어뜨림 5%, C) 혈압을 떨어뜨림 5%, "
    "D) 근거가 모자람 5%, E) 출혈이 없는 환자 5%",
}  # fmt: skip
FOUR = {k: v for k, v in ITEM.items() if k not in ("E", "reasoning")}


def test_dictionary_and_translation():
    assert prompts.dictionary("↑") == "Meaning of word ↑:"
    assert prompts.dictionary_reverse("Liver") == "다음 뜻에 맞는 의학 용어: Liver"
    assert prompts.to_korean("Sit down.") == "다음 영어 문장을 한국어로 번역하세요.\n\nSit down."
    assert prompts.to_english("앉으세요.") == "Translate the following Korean sentence into English.\n\n앉으세요."


def test_direct_form():
    assert prompts.mcq_direct(ITEM) == (
        "정답 알파벳만 답하세요 (A, B, C, D, E 중 하나).\n\n62세 남자의 첫 처치는?\n혈압 84/52 mmHg\n"
        "A) 수액\nB) 이뇨제\nC) 모르핀\nD) 산소\nE) 수혈"
    )


@pytest.mark.parametrize("e", [{}, {"E": ""}, {"E": None}])
def test_four_options_show_four_lines(e):
    text = prompts.mcq_direct({**FOUR, **e})
    assert text.startswith("정답 알파벳만 답하세요 (A, B, C, D 중 하나).\n\n")
    assert text.endswith("\nA) 수액\nB) 이뇨제\nC) 모르핀\nD) 산소")
    assert prompts.letters_of({**FOUR, **e}) == "ABCD"


def test_simple_reasoning_form():
    assert prompts.mcq_reasoning(ITEM) == (
        "Reasoning 후 정답 알파벳 하나만 답하세요.\n\n62세 남자의 첫 처치는?\n혈압 84/52 mmHg\n"
        "A) 수액\nB) 이뇨제\nC) 모르핀\nD) 산소\nE) 수혈"
    )
    assert prompts.mcq_reasoned_answer({"reasoning": " 까닭\n", "answer": "C"}) == "<reasoning>\n까닭\n</reasoning>C"


def test_detailed_form():
    example = {**ITEM, "question": "예는?", "answer": "B", "reasoning": "첫째: 예"}
    assert prompts.mcq_reasoning(ITEM, example) == (
        "Reasoning 후 정답 알파벳 하나만 답하세요.\n\n"
        "```format\n<reasoning>\n" + "\n".join(prompts.REASONING_STEPS) + "\n</reasoning>정답 알파벳\n```\n\n"
        "```example\n예는?\nA) 수액\nB) 이뇨제\nC) 모르핀\nD) 산소\nE) 수혈\n"
        "<reasoning>\n첫째: 예\n</reasoning>B\n```\n\n" + prompts.mcq_reasoning(ITEM).split("\n\n", 1)[1]
    )
    assert [s[:2] for s in prompts.REASONING_STEPS] == ["첫째", "둘째", "셋째", "넷째"]


def test_exam_prompts_are_recognised():
    for prompt in (prompts.mcq_direct(ITEM), prompts.mcq_direct(FOUR), prompts.mcq_reasoning(ITEM)):
        assert prompts.is_mcq(prompt)
    assert prompts.is_mcq(prompts.mcq_reasoning(ITEM, ITEM))
    for prompt in (prompts.dictionary("간"), prompts.to_korean("A"), prompts.to_english("정답 알파벳만 답하세요")):
        assert not prompts.is_mcq(prompt)


# options in another order -------------------------------------------------------------------------------

NEW = dict(zip("ABCDE", "BCDEA", strict=True))


def test_shuffled_moves_answer_and_shares():
    item = prompts.shuffled(ITEM, [4, 0, 1, 2, 3])  # position A shows old E, B shows old A, ...
    assert [item[x] for x in "ABCDE"] == ["수혈", "수액", "이뇨제", "모르핀", "산소"]
    assert item["answer"] == "B" and item["question"] == ITEM["question"]
    assert item["reasoning"] == (
        "첫째: 쇼크이다.\n넷째: A) 출혈이 없는 환자 5%, B) 쇼크의 첫 처치 80%, C) 혈압을 떨어뜨림 5%, "
        "D) 혈압을 떨어뜨림 5%, E) 근거가 모자람 5%"
    )
    assert ITEM["answer"] == "A" and ITEM["A"] == "수액"  # the given one is as it was


def test_shuffled_with_four_options_and_without_a_rationale():
    item = prompts.shuffled(FOUR, [3, 2, 1, 0])
    assert [item[x] for x in "ABCD"] == ["산소", "모르핀", "이뇨제", "수액"]
    assert item["answer"] == "D" and "E" not in item and "reasoning" not in item


@pytest.mark.parametrize(
    "text, expected",
    [
        ("정답은 C이다", "정답은 D이다"),
        ("정답은 C이므로", "정답은 D이므로"),
        ("정답은 C.", "정답은 D."),
        ("정답: C", "정답: D"),
        ("정답 E", "정답 A"),
        ("답은 E다", "답은 A다"),
        ("정답은 (C)이다", "정답은 (D)이다"),
        ("정답은 C 독시사이클린이다", "정답은 D 독시사이클린이다"),
        ("The answer is C", "The answer is D"),
        ("따라서 C가 정답이다", "따라서 D가 정답이다"),
        ("C는 옳고", "D는 옳고"),
        ("C였다", "D였다"),
        ("C만이 옳다", "D만이 옳다"),
        ("C보다 D가", "D보다 E가"),
        ("B와는 달리", "C와는 달리"),
        ("대신 D를 고른다", "대신 E를 고른다"),
        ("A)와 B)를", "B)와 C)를"),
        ("(A)와 (E)", "(B)와 (A)"),
        ("'A'는 **C**가", "'B'는 **D**가"),
        ("A번과 B번", "B번과 C번"),
        ("보기 A를", "보기 B를"),
        ("A 선택지는", "B 선택지는"),
        ("글루콘산칼슘(B)이", "글루콘산칼슘(C)이"),
        ("에리스로마이신(A)은", "에리스로마이신(B)은"),
        ("A, B, C는 옳고 D는 틀리다", "B, C, D는 옳고 E는 틀리다"),
        ("나머지 A·B·E는", "나머지 B·C·A는"),
        ("A와 B 모두 틀리다", "B와 C 모두 틀리다"),
        ("A. 항생제\nB. 수액", "B. 항생제\nC. 수액"),
        ("쓰는 약물\nA) 항생제", "쓰는 약물\nB) 항생제"),
        ("A형 간염이 아니므로 A는 뺀다", "A형 간염이 아니므로 B는 뺀다"),
        ("비타민 D는 맞지만 D는 틀리다", "비타민 D는 맞지만 E는 틀리다"),
    ],
)
def test_letters_that_name_options_follow_them(text, expected):
    assert prompts.reletter(text, NEW) == expected


@pytest.mark.parametrize(
    "text",
    [
        "A형 간염",
        "A와 B형 간염",
        "E형 간염 바이러스는",
        "vitamin A",
        "vitamin D.",
        "비타민 D는 지용성이다",
        "비타민 A, D, E는 지용성이다",
        "비타민 A와 D는",
        "비타민(A)",
        "E. coli가 흔하다",
        "C. difficile 감염",
        "B 세포는 항체를 만든다",
        "B세포의",
        "B-세포",
        "C 섬유는 느리다",
        "C-반응단백이",
        "단백질 C가 부족하다",
        "protein C가",
        "암포테리신 B는",
        "amphotericin B를",
        "사이클로스포린 A의 혈중농도",
        "시스타틴 C는",
        "혈우병 A는",
        "Child-Pugh C로",
        "인플루엔자 A와 B는",
        "Group A 사슬알균",
        "A군 사슬알균",
        "약물 A와 약물 B의 상호작용",
        "아데닌(A)과 사이토신(C)",
        "혈액형 A와 B의",
        "CRP, DIC, ABO, IgA와 IgE가",
        "D-이합체",
        "A/G 비율",
        "T파와 P파",
    ],
)
def test_letters_of_medical_names_stay(text):
    assert prompts.reletter(text, NEW) == text


def test_the_samples_own_rationales():
    """Only the line of shares names options there; there and back again is the same text."""
    items = [i for i in mcq.read_raw_items(SAMPLE, normalise_line, []) if i.get("reasoning")]
    assert len(items) >= 12
    back = {new: old for old, new in NEW.items()}
    for item in items:
        moved = prompts.reletter(item["reasoning"], NEW)
        assert moved.split("\n")[:3] == item["reasoning"].split("\n")[:3]
        assert moved != item["reasoning"] and prompts.reletter(moved, back) == item["reasoning"]
        shares = moved.split("넷째: ")[1]
        assert [s[0] for s in prompts._SHARE.findall(shares)] == list("ABCDE")


def test_in_every_order_the_largest_share_is_the_answers():
    item = {**ITEM, "exam": "doctor"}
    for order in itertools.permutations(range(5)):
        moved = prompts.shuffled(item, list(order))
        assert moved[moved["answer"]] == "수액"
        assert f"{moved['answer']}) 쇼크의 첫 처치 80%" in moved["reasoning"]
    assert prompts.shuffled(item, list(range(5))) == item


# rendering ----------------------------------------------------------------------------------------------


class Characters:
    """A tokenizer of characters with a chat template like Gemma's."""

    added_tokens_decoder = {
        i: SimpleNamespace(content=token, special=True)
        for i, token in enumerate(("<bos>", "<start_of_turn>", "<end_of_turn>"))
    }

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def apply_chat_template(self, turns, tokenize, add_generation_prompt=False):
        assert tokenize is False
        names = {"user": "user", "assistant": "model"}
        text = "<bos>" + "".join(f"<s>{names[t['role']]}\n{t['content'].strip()}<e>\n" for t in turns)
        if self.broken and len(turns) == 2:
            text = text.replace("user", "User")
        return text + ("<s>model\n" if add_generation_prompt else "")

    def __call__(self, text, add_special_tokens):
        assert add_special_tokens is False  # the template has written <bos> already
        return {"input_ids": [ord(c) for c in text]}


def test_the_evaluation_prompt_is_a_prefix_of_the_training_row():
    tokenizer = Characters()
    prompt, length = prompts.render(tokenizer, "질문")
    row, head = prompts.render(tokenizer, "질문", "A")
    assert row[:head] == prompt and head == length == len(prompt)
    assert "".join(map(chr, row[head:])) == "A<e>\n"
    assert "".join(map(chr, row)).count("<bos>") == 1


def test_a_template_that_breaks_the_prefix_is_refused():
    with pytest.raises(ValueError, match="prefix"):
        prompts.render(Characters(broken=True), "질문", "A")


def test_no_other_module_writes_prompts_or_turn_markers():
    script = Path(prompts.__file__).parents[1]
    fixed = ["정답 알파벳", "Meaning of word", "한국어로 번역하세요", "Korean sentence into English", "Reasoning 후"]
    for file in sorted(script.rglob("*.py")):
        if file.name == "prompts.py":
            continue
        text = file.read_text(encoding="utf-8").replace("Meaning of word 고혈압:", "")  # the model card's example
        assert not [f for f in fixed if f in text], file.name


@pytest.mark.parametrize("prompt, completion", [("안녕<end_of_turn>", None), ("질문", "답<bos>")])
def test_control_tokens_typed_in_a_text_are_refused(prompt, completion):
    with pytest.raises(PipelineError, match="control token"):
        prompts.render(Characters(), prompt, completion)
