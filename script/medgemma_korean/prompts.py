"""Every template of the product. Training, evaluation and chat use the same functions.

A prompt is the content of the user turn and a completion that of the model turn; the turn markers come from the
model's own chat template (`render`), never from here. The evaluation prompt is an exact token prefix of the
training row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from medgemma_korean.cli import PipelineError

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


def is_mcq(prompt: str) -> bool:
    """Whether a prompt is one of the exam forms, whose answer ends with one letter."""
    return prompt.startswith(("정답 알파벳만 답하세요", "Reasoning 후 정답 알파벳 하나만 답하세요."))


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


# Letters of one mention, so that "A, B와 C는" is judged as a whole: by what stands before and after it.
_MENTION = re.compile(
    r"(?<![A-Za-z0-9가-힣-])[A-E](?![A-Za-z0-9])(?: *(?:[,·/]|와|과|및|또는|이나|나) *[A-E](?![A-Za-z0-9]))*"
)
# Words that a letter completes to a name: "비타민 D는", "암포테리신 B를", "protein C가", "혈우병 A의", "약물 A와".
_NAMED = re.compile(
    r"(?:[a-z]ine?|virus|influenza|hepatitis|h[a]?emophilia|factor|class|grade|group|type|stage|pugh|rh"
    r"|(?<!대)[닌신린틴]|단백|단백질|인자|독소|글로불린|간염|바이러스|인플루엔자|혈우병|혈액형|항원|효소|코엔자임|보체|섬유|구균|알균"
    r"|등급|단계|병기|유형|그룹|군|약물|환자|대상자|구간|용액|곡선|그림|(?<![가-힣])[표점]) *\Z"
    r"|(?:비타민|vitamin|아데닌|시토신|사이토신|adenine|cytosine) *\(?\Z",
    re.IGNORECASE,
)
_ASKED = re.compile(
    r"(?:(?:정답|답|선택지|보기|옵션)(?:은|는|이|가)?|(?:answer|option|choice)s?(?: is)?) *:? *[(\['\"‘“*]*\Z",
    re.IGNORECASE,
)
# What goes on with the letter's own name: "B 세포", "C 섬유", "E. coli".
_GOES_ON = re.compile(r" ?(?:형|세포|림프구|항원|간염|섬유)|\. ?[a-z]")
_PARTICLE = (
    "(?:은|는|이|가|을|를|와|과|도|의|만|로|에|에서|부터|까지|보다|처럼|뿐)(?:은|는|도|만|이)?"
    "|란|인|인데|일|임|임을|입니다|이?(?:다|며|고|지만|므로|라서|라면|면|라|라고|라는|자)|였다|였고|이었다|여야|이어야|여서|이어서"
)
_OPTION_AFTER = re.compile(
    rf"\)|[\]'\"’”*]*(?:(?:{_PARTICLE})(?![가-힣])|번|\.(?:\s|$)|: "
    r"| (?:선택지|보기|항목|옵션|중|모두|가운데|외|이외)(?:[^가-힣]|에|의|는|$))"
)


def _renamed(mention: re.Match[str], new_letter: Mapping[str, str]) -> str:
    """The letters of a mention under their new names, where they name options and not part of a medical name."""
    before, after = mention.string[: mention.start()][-40:], mention.string[mention.end() :][:20]
    if _NAMED.search(before) or _GOES_ON.match(after):
        return mention.group()
    if not _ASKED.search(before) and not _OPTION_AFTER.match(after):
        return mention.group()
    return re.sub("[A-E]", lambda m: new_letter.get(m.group(), m.group()), mention.group())


_SHARE = re.compile(r"[A-E]\) .*?(?=, [A-E]\) |$)")


def reletter(reasoning: str, new_letter: Mapping[str, str]) -> str:
    """A rationale after its options were reordered. `new_letter` maps an option's old letter to its new one."""
    renamed = _MENTION.sub(lambda mention: _renamed(mention, new_letter), reasoning)
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
    is not an exact token prefix of the whole, which would make training and evaluation differ, and PipelineError
    when a text holds a control token such as `<end_of_turn>`, which would become a real one.
    """
    for text in (prompt, completion or ""):
        known = tokenizer.added_tokens_decoder.values() if "<" in text else ()
        if found := [token.content for token in known if token.special and token.content in text]:
            raise PipelineError(f"control token {found[0]} in the text {text[:80]!r}; take it out of the data")
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
