"""Rows to labels, their order, packing, and the states that no row may be in."""

from collections import Counter

import pytest
import torch_fixtures as tf

from medgemma_korean import batches, inspection, prompts, records
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.batches import MASKED, mcq_row, mixed, pack, sample, text_rows
from medgemma_korean.cli import PipelineError

ITEM = {**tf.ITEMS[1], "reasoning": "첫째: 혈압을 본다\n넷째: A) 아니다 5%, B) 맞다 95%"}
OPTIONS = "A) 항생제를 투여한다\nB) 수술\nC) 혈압을 확인한다\nD) 투석을 받는다\nE) 경과를 관찰한다"


# rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, completion, expected",
    [
        (
            prompts.dictionary("고혈압"),
            "혈압이 높은 상태",
            "Meaning of word 고혈압:<end_of_turn>\n<start_of_turn>model\n⟦혈압이 높은 상태<end_of_turn>\n⟧",
        ),
        (
            prompts.dictionary_reverse("혈압이 높은 상태"),
            "고혈압",
            "다음 뜻에 맞는 의학 용어: 혈압이 높은 상태<end_of_turn>\n<start_of_turn>model\n⟦고혈압<end_of_turn>\n⟧",
        ),
        (
            prompts.to_korean("The patient feels dizzy."),
            "환자는 어지럽다.",
            "다음 영어 문장을 한국어로 번역하세요.\n\nThe patient feels dizzy.<end_of_turn>\n"
            "<start_of_turn>model\n⟦환자는 어지럽다.<end_of_turn>\n⟧",
        ),
        (
            prompts.mcq_direct(ITEM),
            ITEM["answer"],
            f"정답 알파벳만 답하세요 (A, B, C, D, E 중 하나).\n\n{tf.KOREAN[1]}\n{OPTIONS}<end_of_turn>\n"
            "<start_of_turn>model\n⟦B<end_of_turn>\n⟧",
        ),
        (
            prompts.mcq_reasoning(ITEM),
            prompts.mcq_reasoned_answer(ITEM),
            f"Reasoning 후 정답 알파벳 하나만 답하세요.\n\n{tf.KOREAN[1]}\n{OPTIONS}<end_of_turn>\n"
            "<start_of_turn>model\n"
            "⟦<reasoning>\n첫째: 혈압을 본다\n넷째: A) 아니다 5%, B) 맞다 95%\n</reasoning>B<end_of_turn>\n⟧",
        ),
    ],
    ids=["dictionary", "reverse", "translation", "direct", "reasoned"],
)
def test_what_is_supervised(prompt, completion, expected):
    tokenizer = tf.tokenizer()
    row = tf.exchange(prompt, completion)
    assert inspection.marked(tokenizer, row) == f"<bos><start_of_turn>user\n{expected}"
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1 and row["input_ids"][0] == tokenizer.bos_token_id
    newline, end = tokenizer.convert_tokens_to_ids(["\n", "<end_of_turn>"])
    assert row["labels"][-2:].tolist() == row["input_ids"][-2:].tolist() == [end, newline]
    asked, _ = prompts.render(tokenizer, prompt)
    start = next(i for i, label in enumerate(row["labels"]) if label != MASKED)
    assert row["input_ids"][:start].tolist() == asked  # what evaluation asks is an exact prefix
    assert inspection.row_problems(row, tokenizer, packed=False) == []


def test_plain_text_is_supervised_whole():
    (row,) = text_rows(tf.tokenizer(), [tf.KOREAN[0]], 256)
    assert inspection.marked(tf.tokenizer(), row) == f"⟦<bos>{tf.KOREAN[0]}<eos>⟧"


def test_special_tokens_written_in_a_text_do_not_stop_a_training():
    rows = list(text_rows(tf.tokenizer(), ["토큰 <bos>, <pad>, <start_of_turn>은 무엇인가"], 24))
    assert [inspection.row_problems(row, tf.tokenizer(), packed=False) for row in rows] == [[]] * len(rows) != []


def test_a_row_that_is_too_long_is_none():
    row = tf.exchange("가", "나")
    assert tf.exchange("가", "나", len(row["input_ids"])) == row
    assert tf.exchange("가", "나", len(row["input_ids"]) - 1) is None


@pytest.mark.parametrize("width", [3, 7, 16, 41, 42, 43, 500])
def test_a_long_text_becomes_several_rows_without_loss(width):
    tokenizer, text = tf.tokenizer(), " ".join(tf.texts(2, seed=5))
    ids = tokenizers.encode(tokenizer, text)
    rows = list(text_rows(tokenizer, [text], width))
    inner = [i for row in rows for i in row["input_ids"] if i not in (1, 2)]
    assert inner == ids
    assert all(row["input_ids"][0] == 2 and len(row["input_ids"]) <= width for row in rows)
    assert all(row["labels"] is row["input_ids"] for row in rows)  # all of it is supervised, and held once
    assert [1 in row["input_ids"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert list(text_rows(tokenizer, ["", text, ""], width)) == rows


def direct(item):
    return prompts.mcq_direct(item), item["answer"]


def test_a_long_question_loses_its_beginning_only():
    question = " ".join(tf.KOREAN[:6]) + " 다음 중 가장 먼저 할 일은?"
    item, counts = {**ITEM, "question": question}, {}
    whole = mcq_row(tf.tokenizer(), item, 4096, direct, counts)
    assert counts == {}
    row = mcq_row(tf.tokenizer(), item, len(whole["input_ids"]) - 1, direct, counts)
    assert counts == {"shortened": 1} and len(row["input_ids"]) < len(whole["input_ids"])
    text = inspection.marked(tf.tokenizer(), row)
    asked = text.split("\n\n", 1)[1].split("\nA) ")[0]
    assert asked.startswith("…") and question.endswith(asked[1:]) and asked.endswith("가장 먼저 할 일은?")
    assert text.endswith(f"{OPTIONS}<end_of_turn>\n<start_of_turn>model\n⟦B<end_of_turn>\n⟧")
    assert inspection.row_problems(row, tf.tokenizer(), packed=False) == []


def test_a_question_that_cannot_fit_is_dropped_and_counted():
    counts = {}
    item = {**ITEM, "question": tf.KOREAN[0] * 3, "A": " ".join(tf.KOREAN)}
    assert mcq_row(tf.tokenizer(), item, 100, direct, counts) is None
    assert mcq_row(tf.tokenizer(), {**item, "question": "?"}, 100, direct, counts) is None
    assert counts == {"too_long": 2}


def test_losses_are_refused_above_five_percent():
    batches.refuse_losses("train_x", 5, 100)
    batches.refuse_losses("train_x", 0, 0)
    with pytest.raises(PipelineError, match="6 of 100 rows"):
        batches.refuse_losses("train_x", 6, 100)


# order --------------------------------------------------------------------------------------------------


def test_epochs_are_shuffled_apart_and_the_same_again():
    def lay_out(seed):
        return batches.epochs_of(lambda epoch: tf.numbered(20, first=100 * epoch), 3, seed)

    rows = lay_out(17)
    assert rows == lay_out(17) != lay_out(18)
    epochs = [[row["input_ids"][0] for row in rows[i : i + 20]] for i in (0, 20, 40)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(e, e + 20)) for e in (0, 100, 200)]
    assert len({tuple(i % 100 for i in epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("share", [0.05, 0.25, 0.4])
@pytest.mark.parametrize("length", [3, 10, 31])
def test_replay_holds_its_share_of_tokens_and_is_spread(share, length):
    main, replay = tf.numbered(200), tf.numbered(12, length, first=1000)
    rows = mixed(main, replay, share, seed=5)
    assert rows == mixed(main, replay, share, seed=5)
    assert [row for row in rows if row["input_ids"][0] < 1000] == main  # its own order
    replayed = [row for row in rows if row["input_ids"][0] >= 1000]
    tokens = sum(len(row["input_ids"]) for row in replayed)
    assert tokens / (2000 + tokens) == pytest.approx(share, abs=length / 2000)
    uses = Counter(row["input_ids"][0] for row in replayed)
    assert max(uses.values()) - min(uses.values() if len(uses) == 12 else [0]) <= 1  # repeated only when all were used
    for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        inside = sum(row["input_ids"][0] >= 1000 for row in half)
        assert abs(inside - len(replayed) / 2) <= 1


def test_no_replay():
    assert mixed(tf.numbered(3), [], 0.5, 1) == mixed(tf.numbered(3), tf.numbered(3), 0.0, 1) == tf.numbered(3)


def test_sample_is_drawn_by_seed_and_keeps_the_order():
    rows = list(range(1000))
    drawn = sample(rows, 50, 1)
    assert drawn == sample(rows, 50, 1) != sample(rows, 50, 2)
    assert drawn == sorted(set(drawn)) and drawn != rows[:50] and max(drawn) > 500
    assert sample(rows, None, 1) == sample(rows, 1000, 1) == sample(rows, 5000, 1) == rows


def write_texts(folder, texts):
    records.write_jsonl(folder / "train.jsonl", [{"text": text} for text in texts])


def test_replay_texts_are_half_korean(monkeypatch):
    paths = tf.paths()
    write_texts(paths.plain_text, tf.texts(30, 1, tf.KOREAN))
    write_texts(paths.english_replay, tf.texts(9, 1, tf.ENGLISH))

    def replayed(seed=3):
        return batches.replay_texts(tf.tokenizer(), paths, 64, seed)

    rows = replayed()
    korean = sum(any("가" <= c <= "힣" for c in tf.tokenizer().decode(row["input_ids"])) for row in rows)
    assert len(rows) == 2 * korean > 0 and rows == replayed()
    monkeypatch.setattr(batches, "REPLAYED", 4)  # of a language, however many there are
    assert 0 < len(replayed()) < len(rows) and replayed() == replayed() != replayed(4)
    write_texts(paths.english_replay, [])
    with pytest.raises(PipelineError, match="00_english_replay/train.jsonl: no text to replay"):
        replayed()


def test_a_reservoir_draws_evenly_and_keeps_the_order():
    drawn = [batches.reservoir(iter(range(40)), 10, seed) for seed in range(400)]
    assert drawn[5] == batches.reservoir(range(40), 10, 5) != drawn[6]
    assert all(len(found) == 10 and found == sorted(set(found)) for found in drawn)
    counts = Counter(number for found in drawn for number in found)
    assert len(counts) == 40 and all(60 < n < 145 for n in counts.values())  # 100 each, by 5 standard deviations
    assert batches.reservoir(range(7), 10, 1) == list(range(7))


# reading ------------------------------------------------------------------------------------------------


def test_texts_are_drawn_by_seed_and_keep_their_order(tmp_path):
    texts = [f"문서 {number} " + "가나다 " * 5 for number in range(400)]
    write_texts(tmp_path, texts)
    file = tmp_path / "train.jsonl"
    assert list(batches.read_texts(file, 1)) == list(batches.read_texts(file, 1, 10**9, 400)) == texts
    share = list(batches.read_texts(file, 1, characters=sum(map(len, texts)) // 4))
    assert 60 < len(share) < 180 and share == [text for text in texts if text in set(share)]
    few = list(batches.read_texts(file, 1, sum(map(len, texts)) // 4, 20))
    assert few == batches.sample(share, 20, 1) and len(few) == 20
    assert few != list(batches.read_texts(file, 2, sum(map(len, texts)) // 4, 20))


def test_texts_are_read_when_they_are_asked_for(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "가"}\n{"text": "나"}\n{"term": "고혈압", "definition": "병"}\n')
    texts = batches.read_texts(tmp_path / "train.jsonl", 1)
    assert [next(texts), next(texts)] == ["가", "나"]
    with pytest.raises(PipelineError, match=r"train.jsonl, line 3: no text under text; the row has term, definition"):
        next(texts)
    with pytest.raises(PipelineError, match="no such file"):
        list(batches.read_texts(tmp_path / "absent.jsonl", 1, 100))


# packing ------------------------------------------------------------------------------------------------


def test_packing_loses_and_cuts_nothing():
    rows = [*tf.documents(40), *tf.exchanges(10)]
    rows = [row for row in rows if len(row["input_ids"]) <= 64]
    packed = pack(rows, 64)
    assert len(packed) < len(rows)
    found = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 64
        start = 0
        for length in row["seq_lengths"]:
            found.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in rows)
    assert [inspection.row_problems(row, tf.tokenizer(), packed=True) for row in packed] == [[]] * len(packed)
    assert pack([], 64) == []
    with pytest.raises(AssertionError, match="longer than a packed sequence"):
        pack(rows, 8)


@pytest.mark.parametrize("supervised", ["whole", "in part"])
def test_groups_are_packed_as_trl_packs_the_whole(monkeypatch, supervised):
    """The same documents in the same sequences as TRL's own call on plain lists makes."""
    from datasets import Dataset
    from trl import pack_dataset

    rows = tf.documents(60) if supervised == "whole" else [*tf.exchanges(30), *tf.documents(20)]
    lists = [{key: value.tolist() for key, value in row.items()} for row in rows]
    for group in (7, 1000):
        monkeypatch.setattr(batches, "GROUP", group)
        expected = pack_dataset(Dataset.from_list(lists), 96, "bfd", map_kwargs={"batch_size": group})
        packed = pack(iter(rows), 96)
        assert [{key: value.tolist() for key, value in row.items()} for row in packed] == expected.to_list()
        assert supervised != "whole" or all(row["labels"] is row["input_ids"] for row in packed)


# as Arrow rows ------------------------------------------------------------------------------------------


def test_the_dataset_holds_the_rows_in_their_order(monkeypatch):
    exchanges = tf.exchanges(7)
    packed = pack(tf.documents(30), 64)
    for group in (3, 1000):
        monkeypatch.setattr(batches, "GROUP", group)
        for rows in (exchanges, packed, [exchanges[i] for i in (3, 0, 3, 6, 0, 1)]):
            found = batches.dataset(rows)
            assert found.to_list() == [{key: value.tolist() for key, value in row.items()} for row in rows]
            assert {str(feature.feature.dtype) for feature in found.features.values()} == {"int32"}


def test_the_dataset_holds_a_token_once():
    rows = pack(tf.documents(60), 64)
    tokens = sum(len(row["input_ids"]) for row in rows)
    once = batches.dataset(rows)
    values = {once.data.column(name).chunk(0).values.buffers()[1].address for name in ("input_ids", "labels")}
    assert len(values) == 1  # labels of plain text are the ids
    repeated = batches.dataset(rows * 5)
    assert len(repeated) == 5 * len(rows) and repeated.data.num_rows == len(rows)
    assert repeated.data.column("input_ids").chunk(0).values.nbytes == 4 * tokens


def test_the_digest_is_of_ids_labels_and_order():
    rows = tf.exchanges(6)
    same = [{key: value[:] for key, value in row.items()} for row in rows]
    assert batches.digest(rows) == batches.digest(same)
    same[2]["labels"][-1] = MASKED
    assert len({batches.digest(found) for found in (rows, same, rows[::-1], rows[:-1])}) == 4
