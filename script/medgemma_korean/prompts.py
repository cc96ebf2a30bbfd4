"""Every template of the product. Training, evaluation and chat use the same functions.

A prompt is the content of the user turn and a completion that of the model turn; the turn markers come from the
model's own chat template (`render`), never from here. The evaluation prompt is an exact token prefix of the
training row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

LETTERS = "ABCDE"

REASONING_STEPS = (
    "첫째: 문제를 분석한다",
    "둘째: 선택지를 하나씩 검토한다",
    "셋째: 결정적인 개념을 적용한다",
    "넷째: 선택지마다 세 단어 이상의 판단과 확률(%)을 적는다",
)


def dictionary(term: str) -> str:
    return f"Meaning of word {term}:"


def dictionary_reverse(definition: str) -> str:
    return f"다음 뜻에 맞는 의학 용어: {definition}"


def to_korean(english: str) -> str:
    return f"다음 영어 문장을 한국어로 번역하세요.\n\n{english}"


def to_english(korean: str) -> str:
    return f"Translate the following Korean sentence into English.\n\n{korean}"


def letters_of(item: Mapping[str, Any]) -> str:
    """The letters of the options an item has: "ABCDE", or "ABCD" where E is absent or empty."""
    return "".join(letter for letter in LETTERS if item.get(letter))


def options(item: Mapping[str, Any]) -> str:
    return "\n".join(f"{letter}) {item[letter]}" for letter in letters_of(item))


def mcq_direct(item: Mapping[str, Any]) -> str:
    """Question and options; the answer is one bare letter."""
    known = ", ".join(letters_of(item))
    return f"정답 알파벳만 답하세요 ({known} 중 하나).\n\n{item['question']}\n{options(item)}"


def mcq_reasoning(item: Mapping[str, Any], example: Mapping[str, Any] | None = None) -> str:
    """Reasoning first: the simple form, or the detailed form with the steps and one worked `example`."""
    detail = ""
    if example is not None:
        steps = "\n".join(REASONING_STEPS)
        worked = f"{example['question']}\n{options(example)}\n{mcq_reasoned_answer(example)}"
        detail = f"```format\n<reasoning>\n{steps}\n</reasoning>정답 알파벳\n```\n\n```example\n{worked}\n```\n\n"
    return f"Reasoning 후 정답 알파벳 하나만 답하세요.\n\n{detail}{item['question']}\n{options(item)}"


def mcq_reasoned_answer(item: Mapping[str, Any]) -> str:
    return f"<reasoning>\n{item['reasoning'].strip()}\n</reasoning>{item['answer']}"


def shuffled(item: Mapping[str, Any], order: list[int]) -> dict[str, Any]:
    """The item with its options in another order: position j shows old option order[j].

    The answer follows its option, and so do the letters that head the options of a rationale ("A) ..."), whose
    last line is put back into alphabetical order.
    """
    letters = letters_of(item)
    new_letter = {letters[old]: letters[new] for new, old in enumerate(order)}
    result = {**item, **{letters[new]: item[letters[old]] for new, old in enumerate(order)}}
    result["answer"] = new_letter[item["answer"]]
    if item.get("reasoning"):
        result["reasoning"] = reletter(item["reasoning"], new_letter)
    return result


# A letter that names an option: "A)", "A는", "A가", "(A)", "정답은 A" - but not the A of "A형 간염" or "vitamin A".
_OPTION = re.compile(
    r"(?<![A-Za-z0-9가-힣])([A-E])(?=\)|\.(?:\s|$)|번|(?:은|는|이|가|을|를|와|과|도|의|만|로|이다|입니다)(?![가-힣]))"
)
_SHARE = re.compile(r"[A-E]\) .*?(?=, [A-E]\) |$)")


def reletter(reasoning: str, new_letter: Mapping[str, str]) -> str:
    """A rationale after its options were reordered. `new_letter` maps an option's old letter to its new one."""
    renamed = _OPTION.sub(lambda m: new_letter.get(m.group(1), m.group(1)), reasoning)
    lines = renamed.split("\n")
    for i, line in enumerate(lines):
        head, colon, rest = line.partition("넷째: ")
        shares = _SHARE.findall(rest)
        if colon and len(shares) == len(new_letter):
            lines[i] = head + colon + ", ".join(sorted(shares))
    return "\n".join(lines)


# rendering ----------------------------------------------------------------------------------------------


def render(tokenizer: Any, prompt: str, completion: str | None = None) -> tuple[list[int], int]:
    """Token ids of one exchange and the length of its prompt part.

    The prompt part ends with the generation prompt (`<start_of_turn>model\\n`); the rest is the completion with
    `<end_of_turn>\\n`. Without a completion the ids are the evaluation prompt. Raises ValueError when the prompt
    is not an exact token prefix of the whole, which would make training and evaluation differ.
    """
    user = {"role": "user", "content": prompt}
    head = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    head_ids = tokenizer(head, add_special_tokens=False)["input_ids"]
    if completion is None:
        return head_ids, len(head_ids)
    turns = [user, {"role": "assistant", "content": completion}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    if ids[: len(head_ids)] != head_ids:
        raise ValueError(f"the evaluation prompt is not a token prefix of the training row: {prompt[:80]!r}")
    return ids, len(head_ids)
