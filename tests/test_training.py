"""Rows to labels, packing without leaks, the trainer and its guards, checkpoints: real TRL, PEFT and bitsandbytes."""

import random
import shutil
from collections import Counter

import pytest
import torch_fixtures as tf

from medgemma_korean import cli, evaluation, modeling, prompts, records, training
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import Interrupted, PipelineError
from medgemma_korean.training import MASKED, check_rows, exchange_row, mcq_row, mixed, pack, sample, show_row, text_rows

ITEM = {**tf.ITEMS[1], "reasoning": "첫째: 혈압을 본다\n넷째: A) 아니다 5%, B) 맞다 95%"}
OPTIONS = "A) 항생제를 투여한다\nB) 수술\nC) 혈압을 확인한다\nD) 투석을 받는다\nE) 경과를 관찰한다"


def exchange(prompt, completion, max_length=512):
    return exchange_row(tf.tokenizer(), prompt, completion, max_length)


def exchanges(number, seed=1):
    """Dictionary-like rows with new tokens in them."""
    rng = random.Random(seed)
    words = " ".join(tf.KOREAN).split()
    return [exchange(prompts.dictionary(rng.choice(words)), rng.choice(tf.KOREAN)[:30]) for _ in range(number)]


def documents(number, max_length=48, seed=2):
    return [row for text in tf.texts(number, seed) for row in text_rows(tf.tokenizer(), text, max_length)]


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
    row = exchange(prompt, completion)
    assert show_row(tokenizer, row) == f"<bos><start_of_turn>user\n{expected}"
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1 and row["input_ids"][0] == tokenizer.bos_token_id
    newline, end = tokenizer.convert_tokens_to_ids(["\n", "<end_of_turn>"])
    assert row["labels"][-2:] == row["input_ids"][-2:] == [end, newline]
    asked, _ = prompts.render(tokenizer, prompt)
    start = next(i for i, label in enumerate(row["labels"]) if label != MASKED)
    assert row["input_ids"][:start] == asked  # what evaluation asks is an exact prefix
    check_rows([row], tokenizer, packed=False)


def test_plain_text_is_supervised_whole():
    (row,) = text_rows(tf.tokenizer(), tf.KOREAN[0], 256)
    assert show_row(tf.tokenizer(), row) == f"⟦<bos>{tf.KOREAN[0]}<eos>⟧"


def test_special_tokens_written_in_a_text_do_not_stop_a_training():
    rows = text_rows(tf.tokenizer(), "토큰 <bos>, <pad>, <start_of_turn>은 무엇인가", 24)
    check_rows(rows, tf.tokenizer(), packed=False)


def test_a_row_that_is_too_long_is_none():
    row = exchange("가", "나")
    assert exchange("가", "나", len(row["input_ids"])) == row
    assert exchange("가", "나", len(row["input_ids"]) - 1) is None


@pytest.mark.parametrize("width", [3, 7, 16, 41, 42, 43, 500])
def test_a_long_text_becomes_several_rows_without_loss(width):
    tokenizer, text = tf.tokenizer(), " ".join(tf.texts(2, seed=5))
    ids = tokenizers.encode(tokenizer, text)
    rows = text_rows(tokenizer, text, width)
    inner = [i for row in rows for i in row["input_ids"] if i not in (1, 2)]
    assert inner == ids
    assert all(row["input_ids"][0] == 2 and len(row["input_ids"]) <= width for row in rows)
    assert all(row["labels"] == row["input_ids"] and row["labels"] is not row["input_ids"] for row in rows)
    assert [1 in row["input_ids"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert text_rows(tokenizer, "", width) == []


def direct(item):
    return prompts.mcq_direct(item), item["answer"]


def test_a_long_question_loses_its_beginning_only():
    question = " ".join(tf.KOREAN[:6]) + " 다음 중 가장 먼저 할 일은?"
    item, counts = {**ITEM, "question": question}, {}
    whole = mcq_row(tf.tokenizer(), item, 4096, direct, counts)
    assert counts == {}
    row = mcq_row(tf.tokenizer(), item, len(whole["input_ids"]) - 1, direct, counts)
    assert counts == {"shortened": 1} and len(row["input_ids"]) < len(whole["input_ids"])
    text = show_row(tf.tokenizer(), row)
    asked = text.split("\n\n", 1)[1].split("\nA) ")[0]
    assert asked.startswith("…") and question.endswith(asked[1:]) and asked.endswith("가장 먼저 할 일은?")
    assert text.endswith(f"{OPTIONS}<end_of_turn>\n<start_of_turn>model\n⟦B<end_of_turn>\n⟧")
    check_rows([row], tf.tokenizer(), packed=False)


def test_a_question_that_cannot_fit_is_dropped_and_counted():
    counts = {}
    item = {**ITEM, "question": tf.KOREAN[0] * 3, "A": " ".join(tf.KOREAN)}
    assert mcq_row(tf.tokenizer(), item, 100, direct, counts) is None
    assert mcq_row(tf.tokenizer(), {**item, "question": "?"}, 100, direct, counts) is None
    assert counts == {"too_long": 2}


def test_losses_are_refused_above_five_percent():
    training.refuse_losses("train_x", 5, 100)
    training.refuse_losses("train_x", 0, 0)
    with pytest.raises(PipelineError, match="6 of 100 rows"):
        training.refuse_losses("train_x", 6, 100)


# order --------------------------------------------------------------------------------------------------


def numbered(number, length=10, first=0):
    return [{"input_ids": [first + i] * length, "labels": []} for i in range(number)]


def test_epochs_are_shuffled_apart_and_the_same_again():
    def lay_out(seed):
        return training.epochs_of(lambda epoch: numbered(20, first=100 * epoch), 3, seed)

    rows = lay_out(17)
    assert rows == lay_out(17) != lay_out(18)
    epochs = [[row["input_ids"][0] for row in rows[i : i + 20]] for i in (0, 20, 40)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(e, e + 20)) for e in (0, 100, 200)]
    assert len({tuple(i % 100 for i in epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("share", [0.05, 0.25, 0.4])
@pytest.mark.parametrize("length", [3, 10, 31])
def test_replay_holds_its_share_of_tokens_and_is_spread(share, length):
    main, replay = numbered(200), numbered(12, length, first=1000)
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
    assert mixed(numbered(3), [], 0.5, 1) == mixed(numbered(3), numbered(3), 0.0, 1) == numbered(3)


def test_sample_is_drawn_by_seed_and_keeps_the_order():
    rows = list(range(1000))
    drawn = sample(rows, 50, 1)
    assert drawn == sample(rows, 50, 1) != sample(rows, 50, 2)
    assert drawn == sorted(set(drawn)) and drawn != rows[:50] and max(drawn) > 500
    assert sample(rows, None, 1) == sample(rows, 1000, 1) == sample(rows, 5000, 1) == rows


def test_replay_texts_are_half_korean(tmp_path):
    paths = tf.paths()
    records.write_jsonl(paths.plain_text / "train.jsonl", [{"text": t} for t in tf.texts(30, 1, tf.KOREAN)])
    records.write_jsonl(paths.english_replay / "train.jsonl", [{"text": t} for t in tf.texts(9, 1, tf.ENGLISH)])
    rows = training.replay_texts(tf.tokenizer(), paths, 64, seed=3)
    korean = sum(any("가" <= c <= "힣" for c in tf.tokenizer().decode(row["input_ids"])) for row in rows)
    assert len(rows) == 2 * korean > 0
    assert rows == training.replay_texts(tf.tokenizer(), paths, 64, seed=3)


# packing ------------------------------------------------------------------------------------------------


def test_packing_loses_and_cuts_nothing():
    rows = [*documents(40), *exchanges(10)]
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
    check_rows(packed, tf.tokenizer(), packed=True)
    assert pack([], 64) == []
    with pytest.raises(AssertionError, match="longer than a packed sequence"):
        pack(rows, 8)


# forbidden states ---------------------------------------------------------------------------------------


def changed(**values):
    row = exchange("고혈압은?", "혈압이 높다")
    return {**row, **{key: change(list(row[key])) for key, change in values.items()}}


@pytest.mark.parametrize(
    "row, why",
    [
        (lambda: changed(labels=lambda x: x[:-1]), "lengths differ"),
        (lambda: changed(labels=lambda x: [MASKED] * len(x)), "nothing is supervised"),
        (lambda: changed(labels=lambda x: [2] + [MASKED] * (len(x) - 1)), "nothing is supervised"),
        (lambda: changed(input_ids=lambda x: [*x, 0], labels=lambda x: [*x, MASKED]), "holds padding"),
        (lambda: changed(labels=lambda x: [*x[:-1], 77]), "foreign label"),
        (lambda: changed(input_ids=lambda x: x[1:], labels=lambda x: x[1:]), "no <bos>"),
        (lambda: changed(input_ids=lambda x: [2, *x], labels=lambda x: [MASKED, *x]), "doubled <bos>"),
        (lambda: changed(labels=lambda x: [*x[:-2], MASKED, MASKED]), "end of turn not supervised"),
        (lambda: {**pack(documents(3), 128)[0]}, "packed row in an unpacked stage"),
    ],
)
def test_forbidden_rows(row, why):
    good = exchange("가", "나")
    with pytest.raises(AssertionError, match=f"row 1: {why}"):
        check_rows([good, row()], tf.tokenizer(), packed=False)


def test_forbidden_packed_rows():
    row = pack([r for r in documents(3) if len(r["input_ids"]) > 2], 128)[0]
    first, second, *rest = row["seq_lengths"]
    for lengths in ([first - 1, second + 1, *rest], [first + second, *rest]):
        with pytest.raises(AssertionError, match="no <bos>|doubled <bos>"):
            check_rows([{**row, "seq_lengths": lengths}], tf.tokenizer(), packed=True)


# a training ---------------------------------------------------------------------------------------------


class StageStub:
    """What `train` needs of a stage; calls `at_step` after every step."""

    program = "train_test"

    def __init__(self, at_step=None):
        self.at_step, self.ticks = at_step or (lambda step: None), []

    def tick(self, done, total, metric=""):
        self.ticks.append((done, total))
        self.at_step(done)


@pytest.fixture(autouse=True)
def no_stop():
    yield
    cli._stop_requested.clear()


HELD_OUT = 3


def plan_of(rows, packed=False, **changes):
    held_out = exchanges(HELD_OUT, seed=9)

    def look(model):
        return {"loss": evaluation.completion_loss(model, held_out, tf.tokenizer(), 4)}

    settings = tf.stage_settings(**changes.pop("settings", {}))
    values = {"metric": "loss", "larger": False, "evaluate": look}
    return training.Plan(rows=rows, settings=settings, packed=packed, **values | changes)


def run(folder, plan, at_step=None, precision="8bit", adapter=None, model=None, **profile):
    """Train a fresh model through the plan; returns (outcome, model)."""
    folder.mkdir(exist_ok=True)
    model = model or tf.trainable_model(precision, adapter, **profile)
    stage = StageStub(at_step)
    values = tf.profile(**profile)
    return training.train(model, tf.tokenizer(), plan, folder, values, tf.paths(), stage), model


def losses(folder, step):
    state = tf.read(folder / f"checkpoint-{step}" / "trainer_state.json")
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def adapter_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def stop_after(step):
    """A signal that arrives while `step` runs."""

    def at_step(done):
        if done == step - 1:
            cli._stop_requested.append("SIGTERM")

    return at_step


def kill_after(step):
    """A kill after the evaluation of `step`, before its checkpoint is written."""

    def at_step(done):
        if done == step:
            raise KeyboardInterrupt

    return at_step


@pytest.mark.parametrize(
    "packed", [pytest.param(False, id="exchanges", marks=pytest.mark.slow), pytest.param(True, id="packed text")]
)
def test_an_interrupted_training_ends_with_the_same_bytes(tmp_path, packed):
    rows = pack(documents(22), 48) if packed else exchanges(22)
    plan = plan_of(rows[:22], packed, settings={"evaluations": 3}, rows_only_steps=2)
    assert (plan.steps, plan.evaluation_steps) == (6, [2, 4, 6])  # the last batch holds two rows
    whole, _ = run(tmp_path / "whole", plan)
    with pytest.raises(Interrupted, match="step 3 of 6"):
        run(tmp_path / "stopped", plan, stop_after(3))
    assert (tmp_path / "stopped" / "checkpoint-3").is_dir()
    cli._stop_requested.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", plan, kill_after(6))
    continued, model = run(tmp_path / "stopped", plan)
    assert continued.history == whole.history and continued.loss == whole.loss
    assert (continued.steps, continued.best_step) == (whole.steps, whole.best_step) == (6, whole.best_step)
    for file in (f"checkpoint-6/{tf.ADAPTER}", f"{whole.best.name}/{tf.ADAPTER}"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert losses(tmp_path / "stopped", 6) == losses(tmp_path / "whole", 6)
    # All steps are done: a further run trains nothing and returns the same.
    weights = adapter_of(model)
    again, model = run(tmp_path / "stopped", plan, model=model)
    assert again.history == whole.history and again.best == tmp_path / "stopped" / whole.best.name
    assert all((p == weights[n]).all() for n, p in adapter_of(model).items())


def test_a_training_learns_and_reports_what_it_did(tmp_path):
    plan = plan_of(exchanges(8) * 3, settings={"evaluations": 3})
    outcome, model = run(tmp_path, plan)
    assert outcome.steps == 6 and [entry["step"] for entry in outcome.history] == [2, 4, 6]
    seen = losses(tmp_path, 6)
    assert len(seen) == 6 and seen[-1] < seen[0] and outcome.loss == seen[-1]
    assert outcome.trainable == modeling.trainable_parameters(model)
    assert outcome.tokens == sum(len(row["input_ids"]) for row in plan.rows)
    assert outcome.best == tmp_path / f".best-{outcome.best_step}"
    # The best adapter is whole, and reproduces the value that it was chosen for.
    modeling.load_adapter_weights(model, outcome.best)
    chosen = next(entry for entry in outcome.history if entry["step"] == outcome.best_step)
    assert plan.evaluate(model)["loss"] == chosen["loss"] == min(entry["loss"] for entry in outcome.history)
    events = [e for e in records.read_jsonl(tf.paths().metrics) if e["program"] == "train_test"]
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [e["loss"] for e in events if e["event"] == "evaluation"] == [e["loss"] for e in outcome.history]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    from safetensors import safe_open

    with safe_open(tmp_path / "checkpoint-6" / tf.ADAPTER, "pt") as file:
        assert all(768 not in file.get_slice(name).get_shape() for name in file.keys())  # noqa: SIM118


def test_the_loss_is_that_of_the_supervised_tokens(tmp_path):
    """TRL's chunked head sees the trained rows, micro-batches weigh by tokens, and prompts do not count."""
    rows = exchanges(4, seed=4)
    model = tf.trainable_model("fp32", tf.moved_adapter_folder())
    direct = evaluation.completion_loss(model, rows, tf.tokenizer(), 1)
    run(tmp_path, plan_of(rows), precision="fp32", model=model)
    assert losses(tmp_path, 1) == [pytest.approx(direct, rel=1e-5)]


def test_gradient_checkpointing_trains_the_same(tmp_path):
    plan = plan_of(exchanges(12))
    run(tmp_path / "without", plan, precision="fp32")
    run(tmp_path / "with", plan, precision="fp32", gradient_checkpointing=True)
    assert losses(tmp_path / "with", 3) == pytest.approx(losses(tmp_path / "without", 3), rel=1e-5)


@pytest.mark.parametrize("first, moved", [(3, False), (2, True)])
def test_while_only_rows_train_lora_stays(tmp_path, first, moved):
    model = tf.trainable_model(adapter=tf.moved_adapter_folder())
    before = adapter_of(model)
    run(tmp_path, plan_of(exchanges(12), rows_only_steps=first), model=model)
    for name, now in adapter_of(model).items():
        assert (now == before[name]).all() == ("lora" in name and not moved), name


def test_bfloat16_base_with_float32_adapter(tmp_path):
    """What a GPU profile trains: the adapter stays in float32 and keeps every bit of what it was loaded with."""
    import torch

    model = tf.trainable_model(adapter=tf.moved_adapter_folder(), dtype="bfloat16")
    before = adapter_of(model)
    assert model.get_base_model().dtype == torch.bfloat16
    outcome, model = run(tmp_path, plan_of(exchanges(8), rows_only_steps=2), model=model, dtype="bfloat16")
    after = adapter_of(model)
    assert {p.dtype for p in after.values()} == {torch.float32}
    assert all(torch.equal(p, before[n].float()) for n, p in after.items() if "lora" in n)
    assert outcome.steps == 2 and any(not torch.equal(p, before[n].float()) for n, p in after.items())


def test_learning_rates_by_kind_and_no_decay(tmp_path, monkeypatch):
    trainer = built(tmp_path, monkeypatch, plan_of(exchanges(4), settings={"row_learning_rate": 1e-4}))
    groups = trainer.create_optimizer().param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(5e-3, 0.0), (1e-4, 0.0)]
    assert [len(g["params"]) for g in groups] == [28, 1]
    assert {p.dtype for g in groups for p in g["params"]} == {tf.logits(trainer.model, [2, 5]).dtype}  # float32


def built(folder, monkeypatch, plan, precision="8bit"):
    """The trainer that `train` makes, before it trains."""
    import trl

    made = []

    def catch(self, **_):
        made.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(trl.SFTTrainer, "train", catch)
    with pytest.raises(KeyboardInterrupt):
        run(folder, plan, precision=precision, adapter=tf.moved_adapter_folder())
    return made[0]


@pytest.mark.parametrize("precision", ["8bit", "fp32"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "laid end to end"])
def test_documents_do_not_see_each_other(tmp_path, monkeypatch, precision, packed):
    import torch

    rows = pack([r for r in documents(12) if len(r["input_ids"]) > 4], 64) if packed else exchanges(4)
    trainer = built(tmp_path, monkeypatch, plan_of(rows, packed), precision)
    model = trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    lengths = [n for row in rows[:2] for n in row.get("seq_lengths", [len(row["input_ids"])])]
    assert starts == [sum(lengths[:i]) for i in range(len(lengths))] and len(starts) > 1
    labels = batch.pop("labels")
    assert labels.shape == batch["input_ids"].shape == (1, sum(lengths))
    assert (labels[0, starts] == MASKED).all() and "attention_mask" not in batch

    def logits(change):
        ids = batch["input_ids"].clone()
        ids[0, change] = 300
        with torch.no_grad():
            return model(**{**batch, "input_ids": ids}).logits[0]

    before, second = logits([]), starts[1]
    for document in range(len(starts)):
        end = [*starts, sum(lengths)][document + 1]
        inside = list(range(starts[document] + 1, end))
        after = logits(inside)
        same = (after == before).all(dim=1)
        assert same[: starts[document] + 1].all() and same[end:].all(), document
        assert not same[inside].any()
    # The same without restarting positions does leak: the test sees what it looks for.
    del batch["position_ids"]
    plain = {k: v for k, v in batch.items() if k == "input_ids"}
    batch.clear()
    batch.update(plain)
    assert not torch.equal(logits([])[second:], logits(list(range(1, second)))[second:])


# guards -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    model = tf.trainable_model("fp32")
    next(p for n, p in model.named_parameters() if "lora_A" in n).data.fill_(float("nan"))
    with pytest.raises(PipelineError, match="train_test: the loss is nan .* at step 1.*--learning-rate"):
        run(tmp_path, plan_of(exchanges(12)), model=model)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_no_rows_is_an_error(tmp_path):
    with pytest.raises(PipelineError, match="train_test: no rows to train on"):
        training.train(None, tf.tokenizer(), plan_of([]), tmp_path, tf.profile(), tf.paths(), StageStub())


def test_bad_rows_never_reach_the_model(tmp_path):
    with pytest.raises(AssertionError, match="padding"):
        run(tmp_path, plan_of([changed(input_ids=lambda x: [*x, 0], labels=lambda x: [*x, 0])]))


# the plan and its best ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, settings, steps, looks",
    [
        (40, {"evaluations": 4}, 10, [2, 5, 8, 10]),
        (41, {"evaluations": 1}, 11, [11]),
        (8, {"evaluations": 6}, 2, [1, 2]),
        (1, {"evaluations": 6}, 1, [1]),
        (40, {"look_every": 3}, 10, [3, 6, 9, 10]),
        (40, {"look_every": 5}, 10, [5, 10]),
        (40, {"look_every": 50}, 10, [10]),
        (40, {"max_steps": 3, "evaluations": 3}, 3, [1, 2, 3]),
        (4, {"max_steps": 30}, 1, [1]),
    ],
)
def test_steps_and_looks(rows, settings, steps, looks):
    plan = plan_of(numbered(rows), settings=settings)
    assert (plan.steps, plan.evaluation_steps) == (steps, looks)


def test_best_goes_to_the_metric_then_the_loss_then_the_earlier_step():
    history = [
        {"step": 2, "accuracy": 0.5, "loss": 1.0},
        {"step": 4, "accuracy": 0.6, "loss": 1.2},
        {"step": 6, "accuracy": 0.6, "loss": 1.1},
        {"step": 8, "accuracy": 0.6, "loss": 1.1},
    ]
    accuracy = plan_of(numbered(4), metric="accuracy", larger=True)
    assert training.best_of(history, accuracy)["step"] == 6
    assert training.best_of(history[::-1], accuracy)["step"] == 6
    assert training.best_of(history, plan_of(numbered(4)))["step"] == 2
    without = [{"step": s, "korean_bits": 2.0} for s in (3, 1, 2)]
    assert training.best_of(without, plan_of(numbered(4), metric="korean_bits"))["step"] == 1


def test_the_best_adapter_is_kept_whatever_comes_later(tmp_path):
    values = iter([0.5, 0.7, 0.7, 0.6])
    plan = plan_of(
        exchanges(16),
        metric="accuracy",
        larger=True,
        evaluate=lambda model: {"accuracy": next(values)},
        settings={"evaluations": 4},
    )
    outcome, _ = run(tmp_path, plan)
    assert outcome.best_step == 2 and [p.name for p in tmp_path.glob(".best-*")] == [".best-2"]
    assert (outcome.best / tf.ADAPTER).read_bytes() != (tmp_path / "checkpoint-4" / tf.ADAPTER).read_bytes()


# checkpoints --------------------------------------------------------------------------------------------


def checkpoint(folder, step, holds=None):
    target = folder / f"checkpoint-{step}"
    target.mkdir(parents=True)
    for name in training.STATE_FILES:
        (target / name).write_text(name)
    records.write_json(target / "trainer_state.json", {"global_step": step if holds is None else holds})
    training.mark_checkpoint(target)
    return target


def damage(kind):
    def truncate(c):
        (c / tf.ADAPTER).write_text("cut")

    return {
        "optimizer missing": lambda c: (c / "optimizer.pt").unlink(),
        "scheduler missing": lambda c: (c / "scheduler.pt").unlink(),
        "generator missing": lambda c: (c / "rng_state.pth").unlink(),
        "adapter truncated": truncate,
        "no mark": lambda c: (c / training.CHECKPOINT_MARK).unlink(),
        "empty": lambda c: (shutil.rmtree(c), c.mkdir()),
    }[kind]


KINDS = ["optimizer missing", "scheduler missing", "generator missing", "adapter truncated", "no mark", "empty"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_checkpoint_is_stepped_over(tmp_path, kind):
    good = checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 5)
    bad = checkpoint(tmp_path, 10)
    damage(kind)(bad)
    assert training.newest_checkpoint(tmp_path) == good
    assert not bad.exists() and (tmp_path / "rejected-checkpoint-10").is_dir()


def test_a_checkpoint_of_another_step_is_stepped_over(tmp_path):
    checkpoint(tmp_path, 8, holds=6)
    assert training.newest_checkpoint(tmp_path) is None
    assert training.newest_checkpoint(tmp_path / "nothing") is None


def test_the_same_step_may_be_rejected_twice(tmp_path):
    for _ in range(2):
        damage("no mark")(checkpoint(tmp_path, 8))
        assert training.newest_checkpoint(tmp_path) is None


def test_names_that_are_no_checkpoint_are_left_alone(tmp_path):
    good = checkpoint(tmp_path, 2)
    (tmp_path / "checkpoint-4.partial").mkdir()
    (tmp_path / "checkpoint-9-old").mkdir()
    assert training.newest_checkpoint(tmp_path) == good
    assert (tmp_path / "checkpoint-4.partial").is_dir() and (tmp_path / "checkpoint-9-old").is_dir()


def test_only_a_whole_checkpoint_is_marked(tmp_path):
    whole = checkpoint(tmp_path, 1)
    (whole / "scheduler.pt").unlink()
    with pytest.raises(AssertionError, match="lacks scheduler.pt"):
        training.mark_checkpoint(whole)
