"""What a training says of its first batch, and every state of rows and batches that it refuses."""

from array import array
from types import SimpleNamespace

import pytest
import torch_fixtures as tf

from medgemma_korean import batches, inspection, prompts
from medgemma_korean.batches import MASKED
from medgemma_korean.cli import PipelineError

ITEM = {**tf.ITEMS[1], "reasoning": "첫째: 혈압을 본다\n넷째: A) 아니다 5%, B) 맞다 95%"}
FOUR = {key: value for key, value in ITEM.items() if key != "E"}


def collator(padding_free=True, **options):
    """What the trainer collates with; the options are those that it must not have."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    pad = tf.tokenizer().pad_token_id
    return DataCollatorForLanguageModeling(pad_token_id=pad, padding_free=padding_free, **options)


def plan(rows, packed=False, micro_batch=4):
    return SimpleNamespace(rows=rows, packed=packed, settings=tf.stage_settings(micro_batch=micro_batch))


def inspected(rows, packed=False, collate=None, embedding_rows=None, micro_batch=4):
    return inspection.first_batch(
        plan(rows, packed, micro_batch), tf.tokenizer(), collate or collator(), embedding_rows or len(tf.tokenizer())
    )


def direct(item=ITEM, answer=None):
    return tf.exchange(prompts.mcq_direct(item), item["answer"] if answer is None else answer)


def reasoned(item=ITEM, example=None):
    return tf.exchange(prompts.mcq_reasoning(item, example), prompts.mcq_reasoned_answer(item))


def packed_rows():
    rows = batches.pack(tf.documents(12), 96)
    assert len(rows[0]["seq_lengths"]) > 1
    return rows


# as text ------------------------------------------------------------------------------------------------


def test_segments():
    ids, labels = [2, 5, 6, 7, 0, 0], [-100, -100, 6, 7, -100, 0]
    assert inspection.segments(ids, labels, pad=0) == [
        ("masked", [2, 5]), ("supervised", [6, 7]), ("padding", [0]), ("supervised", [0]),
    ]  # fmt: skip
    decoder = SimpleNamespace(decode=lambda found: "".join(f"<{i}>" for i in found))
    runs = inspection.segments(ids[:5], labels[:5], pad=0)
    assert inspection.painted(decoder, runs) == "<2><5>⟦<6><7>⟧⟪<0>⟫"
    assert inspection.painted(decoder, runs, colour=True) == (
        "\033[2m<2><5>\033[0m\033[1;32m<6><7>\033[0m\033[41m<0>\033[0m"
    )


def test_a_long_run_loses_its_middle_and_keeps_its_marks():
    decoder = SimpleNamespace(decode=lambda found: "".join(map(str, found)))
    runs = [("masked", [1] * 100), ("supervised", [2] * 100)] * 9
    text = inspection.painted(decoder, runs, limit=40)
    assert text == f"{'1' * 10}[…]{'1' * 10}⟦{'2' * 10}[…]{'2' * 10}⟧[…]"


def test_the_first_batch_of_exchanges():
    exchange, exam = tf.exchange(prompts.dictionary("고혈압"), "혈압이 높은 상태"), direct()
    lengths = [len(exchange["input_ids"]), len(exam["input_ids"])]
    asked = [
        len(prompts.render(tf.tokenizer(), p)[0]) for p in (prompts.dictionary("고혈압"), prompts.mcq_direct(ITEM))
    ]
    assert inspected([exchange, exam, *tf.exchanges(5)]) == (
        "the first 2 rows as trained, supervised in ⟦⟧, padding in ⟪⟫, the rest masked:\n"
        f"--- row 1: {lengths[0]} tokens, {lengths[0] - asked[0]} supervised\n"
        "<bos><start_of_turn>user\nMeaning of word 고혈압:<end_of_turn>\n<start_of_turn>model\n"
        "⟦혈압이 높은 상태<end_of_turn>\n⟧\n"
        f"--- its evaluation prompt is exactly its first {asked[0]} tokens\n"
        f"--- row 2: {lengths[1]} tokens, 3 supervised\n"
        f"<bos><start_of_turn>user\n{prompts.mcq_direct(ITEM)}<end_of_turn>\n<start_of_turn>model\n"
        "⟦B<end_of_turn>\n⟧\n"
        f"--- its evaluation prompt is exactly its first {asked[1]} tokens"
    )


def test_the_first_batch_of_packed_text():
    rows = packed_rows()
    text = inspected(rows, packed=True)
    row = rows[0]
    assert f"--- row 1: {len(row['input_ids'])} tokens in {len(row['seq_lengths'])} documents" in text
    # What a document begins with is not predicted from the document before it.
    assert text.count("<bos>⟦") == text.count("<bos>") >= 3 and "evaluation prompt" not in text
    (one,) = batches.text_rows(tf.tokenizer(), [" ".join(tf.KOREAN * 3)], 4096)
    shown = inspected([one]).split("\n")[2]
    assert shown.startswith(f"<bos>⟦{tf.KOREAN[0]}") and "[…]" in shown
    assert shown.endswith(f"{tf.KOREAN[-1]}<eos>⟧") and len(shown) < 620


# forbidden rows -----------------------------------------------------------------------------------------


def changed(row=None, **values):
    """A row (a short exchange) with other ids or labels, made of the old ones as lists."""
    row = row or tf.exchange("고혈압은?", "혈압이 높다")
    return {**row, **{key: array("i", change(list(row[key]))) for key, change in values.items()}}


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


def cut_before_the_answer():
    """What truncation to a length makes of an exam row: prompt and answer lose their end."""
    row = direct()
    return {key: value[:-20] for key, value in row.items()}


def other_prompt():
    """A row whose prompt was not rendered by the template: a second space where it puts a line break."""
    tokenizer = tf.tokenizer()
    ids = tokenizer(
        "<bos><start_of_turn>user\n고혈압은?  <end_of_turn>\n<start_of_turn>model\n", add_special_tokens=False
    )
    answer = tokenizer("혈압이 높다<end_of_turn>\n", add_special_tokens=False)["input_ids"]
    prompt = ids["input_ids"]
    return {"input_ids": array("i", prompt + answer), "labels": array("i", [MASKED] * len(prompt) + answer)}


def item_without(letter):
    return {**ITEM, letter: ""}


STATES = {
    "supervised padding": (
        lambda: changed(input_ids=lambda x: [*x, 0], labels=lambda x: [*x, 0]), "padding is supervised",
    ),
    "padding": (lambda: changed(input_ids=lambda x: [*x, 0], labels=lambda x: [*x, MASKED]), "holds padding"),
    "no labels": (lambda: without(changed(), "labels"), "has no labels"),
    "empty labels": (lambda: changed(labels=lambda x: []), "has no labels"),
    "all masked": (lambda: changed(labels=lambda x: [MASKED] * len(x)), "nothing is supervised"),
    "only the first": (lambda: changed(labels=lambda x: [2] + [MASKED] * (len(x) - 1)), "nothing is supervised"),
    "other lengths": (lambda: changed(labels=lambda x: x[:-1]), "lengths differ"),
    "foreign label": (lambda: changed(labels=lambda x: [*x[:-1], 77]), "foreign label"),
    "end of turn masked": (
        lambda: changed(labels=lambda x: [*x[:-2], MASKED, MASKED]), "end of turn not supervised",
    ),
    "end of turn absent": (
        lambda: changed(input_ids=lambda x: x[:-2], labels=lambda x: x[:-2]), "end of turn not supervised",
    ),
    "cut": (cut_before_the_answer, "nothing is supervised"),
    "no <bos>": (lambda: changed(input_ids=lambda x: x[1:], labels=lambda x: x[1:]), "no <bos>"),
    "doubled <bos>": (
        lambda: changed(input_ids=lambda x: [2, *x], labels=lambda x: [MASKED, *x]), "doubled <bos>",
    ),
    "prompt trained": (lambda: changed(labels=lambda x: x) | {"labels": changed()["input_ids"]}, "is not its prefix"),
    "other prompt": (other_prompt, "is not its prefix: .*<end_of_turn>.* is asked where"),
    "answer begins masked": (
        lambda: changed(labels=lambda x: [MASKED if i < len(x) - 3 else label for i, label in enumerate(x)]),
        "is not its prefix",
    ),
    "empty completion": (lambda: tf.exchange("고혈압은?", ""), "the completion is empty"),
    "blank completion": (lambda: tf.exchange("고혈압은?", " \n "), "the completion is empty"),
    "id without a row": (
        lambda: changed(input_ids=lambda x: [*x[:5], 4000, *x[6:]]), "token id 4000 is outside of the model's 7.. rows",
    ),
    "negative id": (lambda: changed(input_ids=lambda x: [*x[:5], -1, *x[6:]]), "token id -1 is outside"),
    "packed among exchanges": (lambda: packed_rows()[0], "packed row in an unpacked stage"),
    "no option E": (
        lambda: tf.exchange(prompts.mcq_direct(ITEM).rpartition("\n")[0], "B"),
        "options A, B, C, D, E are not all there",
    ),
    "no option C": (
        lambda: tf.exchange(prompts.mcq_direct(ITEM).replace("C) 혈압을 확인한다\n", ""), "B"), "are not all there",
    ),
    "empty option": (
        lambda: tf.exchange(prompts.mcq_direct(ITEM).replace("C) 혈압을 확인한다", "C) "), "B"), "are not all there",
    ),
    "options swapped": (
        lambda: tf.exchange(prompts.mcq_direct(ITEM).replace("C) ", "X) ").replace("D) ", "C) "), "B"),
        "are not all there",
    ),
    "three options, reasoned": (
        lambda: tf.exchange(prompts.mcq_reasoning(ITEM).partition("\nD) ")[0], prompts.mcq_reasoned_answer(ITEM)),
        "options A, B, C, D are not all there",
    ),
    "detailed, options of the example alone": (
        lambda: tf.exchange(
            prompts.mcq_reasoning(ITEM, ITEM).rpartition("\nD) ")[0], prompts.mcq_reasoned_answer(ITEM)
        ),
        "are not all there",
    ),
    "answer is no option": (lambda: direct(FOUR, "E"), "the answer 'E' is none of A, B, C, D"),
    "answer is a sentence": (lambda: direct(answer="B 혈압"), "the answer 'B 혈압' is none of A, B, C, D, E"),
    "reasoned answer is no option": (
        lambda: tf.exchange(prompts.mcq_reasoning(FOUR), prompts.mcq_reasoned_answer({**FOUR, "answer": "E"})),
        "the answer 'E' is none of A, B, C, D$",
    ),
    "reasoning without an answer": (
        lambda: tf.exchange(prompts.mcq_reasoning(ITEM), "<reasoning>\n첫째: 혈압\n</reasoning>"),
        "the answer '' is none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_a_forbidden_row_is_refused_with_its_number_and_text(state):
    make, why = STATES[state]
    good, spoilt = tf.exchange("가", "나"), make()
    with pytest.raises(PipelineError, match=f"(?m)row 6: .*{why}") as error:
        inspected([good, good, *tf.exchanges(3), spoilt])
    assert error.value.exit_code == 2 and str(error.value).startswith("these rows must not be trained:\n  row 6: ")
    assert "row 1:" not in str(error.value) and len(str(error.value)) < 1000
    assert str(error.value).split("\n")[2:] == [f"    {inspection._excerpt(tf.tokenizer(), spoilt)!r}"]


def test_the_error_shows_the_row():
    with pytest.raises(PipelineError) as error:
        inspected([direct(FOUR, "E")])
    assert str(error.value) == (
        "these rows must not be trained:\n  row 1: the answer 'E' is none of A, B, C, D\n"
        r"    '<bos><start_of_turn>user\n정답 알파벳만 답하세요 (A[…]을 받는다<end_of_turn>\n<start_of_turn>model\n"
        r"⟦E<end_of_turn>\n⟧'"
    )


def test_rows_that_are_right():
    example = {**ITEM, "question": "예시 문제\nA) 라고 적힌 약은?", "answer": "D"}
    rows = [direct(), direct(FOUR), reasoned(), reasoned(FOUR), reasoned(ITEM, example), reasoned(FOUR, example)]
    rows += [direct({**ITEM, "question": "A) 는 무엇인가\nB) 가 아닌 것은?"}), *tf.exchanges(4), *tf.documents(4)]
    tokenizer = tf.tokenizer()
    found = [inspection.row_problems(row, tokenizer, False, len(tokenizer)) for row in rows]
    assert found == [[]] * len(rows)


def test_forbidden_packed_rows():
    rows = packed_rows()
    first, second, *rest = rows[0]["seq_lengths"]
    cases = {
        "no <bos> where a document begins": [first - 1, second + 1, *rest],
        "doubled <bos>": [first + second, *rest],
        "lengths differ": [first, second + 1, *rest],
    }
    for why, lengths in cases.items():
        with pytest.raises(PipelineError, match=f"row 1: {why}"):
            inspected([{**rows[0], "seq_lengths": array("i", lengths)}, *rows[1:]], packed=True)
    with pytest.raises(PipelineError, match="row 1: a row that is not packed in a packed stage"):
        inspected([without(rows[0], "seq_lengths")], packed=True)


def test_all_problems_are_listed_and_the_rest_counted():
    bad = changed(input_ids=lambda x: [2, *x[:-2], 0], labels=lambda x: [MASKED, *x[:-2], 0])
    with pytest.raises(PipelineError, match="row 1: padding is supervised; doubled <bos>\n"):
        inspected([bad])
    rows = [tf.exchange("가", "나") if i % 2 else changed(labels=lambda x: x[:-1]) for i in range(30)]
    with pytest.raises(PipelineError) as error:
        inspected(rows)
    said = str(error.value)
    assert said.count("lengths differ") == 10 and "row 19: " in said and said.endswith("and 5 more")


def test_rows_that_repeat_are_inspected_once(monkeypatch):
    calls, real = [], inspection.row_problems
    monkeypatch.setattr(inspection, "row_problems", lambda row, *rest: calls.append(row) or real(row, *rest))
    rows = tf.exchanges(3)
    assert inspection.problems_of(plan(rows * 5), tf.tokenizer()) == [] and len(calls) == 3


def test_letters_that_are_several_tokens_are_refused(monkeypatch):
    def letters(tokenizer):
        raise AssertionError("C is not one token")

    monkeypatch.setattr(inspection.evaluation, "letter_ids", letters)
    with pytest.raises(PipelineError, match="answer letter C is not one token"):
        inspected(tf.exchanges(3))


# forbidden batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["exchanges", "packed"])
def test_a_batch_that_lets_documents_see_each_other_is_refused(packed):
    rows = packed_rows() if packed else tf.exchanges(4)
    assert inspected(rows, packed)
    with pytest.raises(PipelineError, match="attention mask: documents would attend to each other"):
        inspected(rows, packed, collator(padding_free=False))

    def spoilt(**changes):
        def collate(examples):
            batch = collator()(examples)
            return {k: v for k, v in (batch | {k: f(batch) for k, f in changes.items()}).items() if v is not None}

        return collate

    def running(batch):
        import torch

        return torch.arange(batch["input_ids"].numel())[None]

    def one_late(batch):
        positions = batch["position_ids"].clone()
        second = int((positions[0] == 0).nonzero()[1])
        positions[0, second], positions[0, second + 1] = 9, 0
        return positions

    for positions, why in (
        (lambda batch: None, "the batch has no positions: documents would attend"),
        (running, "positions restart 1 times for .* documents would attend"),
        (one_late, "or at other places: documents would attend"),
    ):
        with pytest.raises(PipelineError, match=why):
            inspected(rows, packed, spoilt(position_ids=positions))
    with pytest.raises(PipelineError, match="document 2: its first token is predicted from the document before it"):
        inspected(rows, packed, spoilt(labels=lambda batch: batch["input_ids"]))
    with pytest.raises(PipelineError, match="document 1: nothing is supervised"):
        inspected(rows, packed, spoilt(labels=lambda batch: batch["labels"] * 0 + MASKED))
    with pytest.raises(PipelineError, match="the batch holds other tokens than its rows"):
        inspected(rows, packed, spoilt(input_ids=lambda batch: batch["input_ids"] + 1))


def test_padding_of_a_batch_is_never_supervised():
    def collate(examples):
        for example in examples:
            example["labels"] = [*example["labels"], 0]
            example["input_ids"] = [*example["input_ids"], 0]
        return collator()(examples)

    with pytest.raises(PipelineError, match="document 1: padding is supervised"):
        inspected(tf.exchanges(2), collate=collate)
