"""The trainer and its guards, checkpoints and resume: real TRL, PEFT and bitsandbytes."""

import dataclasses
import json
import os
import shutil
import signal

import pytest
import torch_fixtures as tf

from medgemma_korean import batches, cli, evaluation, modeling, prompts, records, training
from medgemma_korean.cli import GateError, Interrupted, PipelineError

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
    held_out = tf.exchanges(HELD_OUT, seed=9)

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
    start = adapter or tf.adapter_folder()
    return training.train(model, tf.tokenizer(), plan, folder, values, tf.paths(), stage, start), model


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
    rows = batches.pack(tf.documents(22), 48) if packed else tf.exchanges(22)
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


@pytest.mark.parametrize("when", ["in the last step", "in its look", "once its checkpoint is written"])
def test_a_stop_at_the_last_step_is_heard_and_continued(tmp_path, monkeypatch, when):
    plan = plan_of(tf.exchanges(12), settings={"evaluations": 3})
    whole, _ = run(tmp_path / "whole", plan)

    def stop():
        cli._stop_requested.append("SIGTERM")

    def look(model):
        looks.append(model)
        if when == "in its look" and len(looks) == 3:
            stop()
        return plan.evaluate(model)

    def mark(folder, best=None):
        marked(folder, best)
        if when == "once its checkpoint is written" and folder.name == "checkpoint-3":
            stop()

    looks, marked = [], training.mark_checkpoint
    monkeypatch.setattr(training, "mark_checkpoint", mark)
    with pytest.raises(Interrupted, match="checkpoint saved at step 3 of 3"):
        run(
            tmp_path / "stopped",
            dataclasses.replace(plan, evaluate=look),
            stop_after(3) if when == "in the last step" else None,
        )
    assert not cli._polling  # from here on a signal ends the program at once
    cli._stop_requested.clear()
    continued, _ = run(tmp_path / "stopped", dataclasses.replace(plan, evaluate=look))
    assert len(looks) == 3 and continued == dataclasses.replace(whole, best=tmp_path / "stopped" / whole.best.name)
    for file in (f"checkpoint-3/{tf.ADAPTER}", f"{whole.best.name}/{tf.ADAPTER}"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert losses(tmp_path / "stopped", 3) == losses(tmp_path / "whole", 3)


def test_a_stop_where_forgetting_ends_a_training_is_heard_and_continued(tmp_path):
    with pytest.raises(Interrupted, match="checkpoint saved at step 6 of 8"):
        run(tmp_path, watched([4.0, 4.1, 4.19, 4.4, 4.0]), stop_after(6))
    cli._stop_requested.clear()
    outcome, _ = run(tmp_path, watched([9.9] * 5))
    assert (outcome.steps, outcome.best_step) == (6, 4) and "forgetting" in outcome.stopped


def test_a_second_signal_ends_a_training_at_once_and_loses_one_checkpoint_at_most(tmp_path, monkeypatch):
    """Whoever presses Ctrl-C again, in the look that follows the last step, does not wait for it."""
    plan = plan_of(tf.exchanges(12), settings={"evaluations": 3})
    whole, _ = run(tmp_path / "whole", plan)
    monkeypatch.setattr(cli, "SIGNAL_ECHO", 0.0)

    def look(model):
        looks.append(model)
        if len(looks) == 3:
            cli._on_signal(signal.SIGINT, None)
            cli._on_signal(signal.SIGINT, None)
        return plan.evaluate(model)

    looks = []
    with pytest.raises(Interrupted, match="SIGINT"):
        run(tmp_path / "stopped", dataclasses.replace(plan, evaluate=look))
    assert not cli._polling and training.newest_checkpoint(tmp_path / "stopped").name == "checkpoint-2"
    cli._stop_requested.clear(), cli._raised.clear()
    continued, _ = run(tmp_path / "stopped", plan)
    assert continued.history == whole.history and losses(tmp_path / "stopped", 3) == losses(tmp_path / "whole", 3)


def test_a_training_learns_and_reports_what_it_did(tmp_path):
    plan = plan_of(tf.exchanges(8) * 3, settings={"evaluations": 3})
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
    rows = tf.exchanges(4, seed=4)
    model = tf.trainable_model("fp32", tf.moved_adapter_folder())
    direct = evaluation.completion_loss(model, rows, tf.tokenizer(), 1)
    run(tmp_path, plan_of(rows), precision="fp32", model=model)
    assert losses(tmp_path, 1) == [pytest.approx(direct, rel=1e-5)]


def test_gradient_checkpointing_trains_the_same(tmp_path):
    plan = plan_of(tf.exchanges(12))
    run(tmp_path / "without", plan, precision="fp32")
    run(tmp_path / "with", plan, precision="fp32", gradient_checkpointing=True)
    assert losses(tmp_path / "with", 3) == pytest.approx(losses(tmp_path / "without", 3), rel=1e-5)


@pytest.mark.parametrize("first, moved", [(3, False), (2, True)])
def test_while_only_rows_train_lora_stays(tmp_path, first, moved):
    model = tf.trainable_model(adapter=tf.moved_adapter_folder())
    before = adapter_of(model)
    run(tmp_path, plan_of(tf.exchanges(12), rows_only_steps=first), model=model)
    for name, now in adapter_of(model).items():
        assert (now == before[name]).all() == ("lora" in name and not moved), name


def test_bfloat16_base_with_float32_adapter(tmp_path):
    """What a GPU profile trains: the adapter stays in float32 and keeps every bit of what it was loaded with."""
    import torch

    model = tf.trainable_model(adapter=tf.moved_adapter_folder(), dtype="bfloat16")
    before = adapter_of(model)
    assert model.get_base_model().dtype == torch.bfloat16
    outcome, model = run(tmp_path, plan_of(tf.exchanges(8), rows_only_steps=2), model=model, dtype="bfloat16")
    after = adapter_of(model)
    assert {p.dtype for p in after.values()} == {torch.float32}
    assert all(torch.equal(p, before[n].float()) for n, p in after.items() if "lora" in n)
    assert outcome.steps == 2 and any(not torch.equal(p, before[n].float()) for n, p in after.items())


def test_learning_rates_by_kind_and_no_decay(tmp_path, monkeypatch):
    trainer = built(tmp_path, monkeypatch, plan_of(tf.exchanges(4), settings={"row_learning_rate": 1e-4}))
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

    rows = batches.pack([r for r in tf.documents(12) if len(r["input_ids"]) > 4], 64) if packed else tf.exchanges(4)
    trainer = built(tmp_path, monkeypatch, plan_of(rows, packed), precision)
    model = trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    lengths = [n for row in rows[:2] for n in row.get("seq_lengths", [len(row["input_ids"])])]
    assert starts == [sum(lengths[:i]) for i in range(len(lengths))] and len(starts) > 1
    labels = batch.pop("labels")
    assert labels.shape == batch["input_ids"].shape == (1, sum(lengths))
    assert (labels[0, starts] == batches.MASKED).all() and "attention_mask" not in batch

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
        run(tmp_path, plan_of(tf.exchanges(12)), model=model)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_no_rows_is_an_error(tmp_path):
    with pytest.raises(PipelineError, match="train_test: no rows to train on"):
        training.train(None, tf.tokenizer(), plan_of([]), tmp_path, tf.profile(), tf.paths(), StageStub(), tmp_path)


def test_bad_rows_never_reach_the_model(tmp_path):
    row = tf.exchanges(1)[0]
    padded = {"input_ids": [*row["input_ids"], 0], "labels": [*row["labels"], 0]}
    with pytest.raises(PipelineError, match="row 1: padding is supervised"):
        run(tmp_path, plan_of([padded]))


def test_no_space_for_the_next_checkpoint_is_said_with_what_is_needed(tmp_path, monkeypatch):
    plan = plan_of(tf.exchanges(24), settings={"evaluations": 3})
    whole, _ = run(tmp_path / "whole", plan)
    folder, disk = tmp_path / "full", shutil.disk_usage

    def full_after(step):
        if step == 3:
            monkeypatch.setattr(training.shutil, "disk_usage", lambda path: disk(path)._replace(free=5000))

    with pytest.raises(
        PipelineError, match=r"needs 1\.\d MB, 5\.0 kB are free .*stopped at step 4; the last checkpoint"
    ):
        run(folder, plan, full_after)
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.setattr(training.shutil, "disk_usage", disk)
    continued, _ = run(folder, plan)
    assert continued.history == whole.history
    assert (continued.best / tf.ADAPTER).read_bytes() == (whole.best / tf.ADAPTER).read_bytes()


def test_a_disk_that_fills_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    import torch

    disk, save = shutil.disk_usage, torch.save

    def fail(*args, **kwargs):
        monkeypatch.setattr(training.shutil, "disk_usage", lambda path: disk(path)._replace(free=0))
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(PipelineError, match="no space for the next checkpoint: .*PytorchStreamWriter"):
        run(tmp_path, plan_of(tf.exchanges(8)))
    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(training.shutil, "disk_usage", disk)
    assert run(tmp_path, plan_of(tf.exchanges(8)))[0].steps == 2  # the torn checkpoint is stepped over


def test_other_rows_than_those_of_the_checkpoint_are_refused(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, plan_of(tf.exchanges(12)), stop_after(2))
    cli._stop_requested.clear()
    with pytest.raises(PipelineError, match=r"train_test: the rows laid out now \(12\) are not those .*--force"):
        run(tmp_path, plan_of(tf.exchanges(12, seed=2)))
    assert run(tmp_path, plan_of(tf.exchanges(12)))[0].steps == 3


# memory -------------------------------------------------------------------------------------------------


def short_of_memory(model, rows, after=0):
    """Make the forward pass of more than so many rows fail as CUDA's does, after a number of good ones."""
    import torch

    calls = []

    def check(module, args, kwargs):
        if "fused_lm_head" in kwargs and (kwargs["position_ids"] == 0).sum() > rows:
            calls.append(1)
            if len(calls) > after:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.51 GiB.")

    model.register_forward_pre_hook(check, with_kwargs=True)
    return model


@pytest.mark.parametrize("after", [0, 4], ids=["at once", "after two checkpoints"])
def test_memory_that_does_not_suffice_halves_the_rows_of_a_pass_and_not_the_batch(tmp_path, after, caplog):
    plan = plan_of(tf.exchanges(16), settings={"evaluations": 4})
    whole, _ = run(tmp_path / "whole", plan, precision="fp32")
    model = short_of_memory(tf.trainable_model("fp32"), 1, after)
    with caplog.at_level("WARNING", "medgemma_korean"):
        halved, _ = run(tmp_path / "halved", plan, precision="fp32", model=model)
    assert "going on with 1 row a forward pass; 4 rows an optimizer step as before" in caplog.text
    assert (whole.micro_batch, halved.micro_batch, halved.steps) == (2, 1, 4)
    assert losses(tmp_path / "halved", 4) == pytest.approx(losses(tmp_path / "whole", 4), rel=1e-4)
    assert tf.read(tmp_path / "halved" / training.MICRO_BATCH)["micro_batch"] == 1


def test_memory_that_does_not_suffice_for_one_row_is_one_error(tmp_path):
    model = short_of_memory(tf.trainable_model("fp32"), 0)
    with pytest.raises(PipelineError, match=r"with one row at a time \(CUDA out of memory. Tried.*check_gpu_memory"):
        run(tmp_path, plan_of(tf.exchanges(8)), model=model)


# forgetting ---------------------------------------------------------------------------------------------


def watched(bits, **settings):
    """A plan with the looks of every second step, whose watched text takes these bits: before, and at each look."""
    values = iter(bits)
    looks = iter([0.5, 0.6, 0.7, 0.8])
    return plan_of(
        tf.exchanges(32),
        metric="accuracy",
        larger=True,
        evaluate=lambda model: {"accuracy": next(looks)},
        monitor=lambda model: {"korean_bits": next(values), "english_bits": 2.0},
        settings={"evaluations": 4, "max_forgetting": 0.05, **settings},
    )


def test_forgetting_stops_a_training_and_goes_back(tmp_path):
    outcome, _ = run(tmp_path, watched([4.0, 4.1, 4.19, 4.4, 4.0]))
    assert (outcome.steps, outcome.best_step) == (6, 4)
    assert outcome.stopped.startswith("forgetting: at step 6 held-out text takes 10.0% more bits per character")
    assert [e["forgetting"] for e in outcome.history] == pytest.approx([0.025, 0.0475, 0.1])
    # The same command again trains nothing more and ends with the same.
    again, _ = run(tmp_path, watched([9.9] * 5))
    assert (again.history, again.best_step) == (outcome.history, 4)


def test_between_looks_only_the_held_out_text_is_looked_at(tmp_path):
    plan = watched([4.0, 4.0, 4.0, 4.0, 4.9], monitor_every=1)
    assert (plan.evaluation_steps, plan.monitor_steps) == ([2, 4, 6, 8], [1, 2, 3, 4, 5, 6, 7])
    outcome, _ = run(tmp_path, plan)
    assert (outcome.steps, outcome.best_step) == (4, 2)  # the look of step 4 has forgotten, so it is not the best
    assert ["accuracy" in entry for entry in outcome.history] == [False, True, False, True]


def test_a_training_that_only_forgot_fails(tmp_path):
    with pytest.raises(GateError, match="forgetting: at step 2 .*no checkpoint from before.*--learning-rate"):
        run(tmp_path, watched([4.0, 5.0]))


def test_a_look_that_is_no_number_stops_the_training(tmp_path):
    with pytest.raises(PipelineError, match="train_test: korean_bits, forgetting at step 4 is no finite number"):
        run(tmp_path, watched([4.0, 4.0, float("nan")]))
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_provoked_case_is_stopped_and_the_best_checkpoint_is_the_result(tmp_path):
    """Dictionary rows alone at a high rate: held-out text is really forgotten, and what is kept is from before."""
    texts = tf.texts(6, 8, tf.ENGLISH)

    def bits(model):
        return {"korean_bits": evaluation.bits_per_character(model, tf.tokenizer(), texts, 64, 4)}

    # A model that has learned English first, so that there is something to forget.
    english = [row for text in tf.texts(60, 7, tf.ENGLISH) for row in batches.text_rows(tf.tokenizer(), [text], 64)]
    learned, model = run(tmp_path / "english", plan_of(english), precision="fp32")
    held_out = tf.exchanges(3, seed=9)
    plan = plan_of(
        tf.exchanges(48),
        settings={"learning_rate": 0.05, "row_learning_rate": 0.05, "evaluations": 12, "max_forgetting": 0.05},
        monitor=bits,
        evaluate=lambda model: {"loss": evaluation.completion_loss(model, held_out, tf.tokenizer(), 4)},
    )
    before = bits(model)["korean_bits"]
    outcome, model = run(tmp_path / "dictionary", plan, precision="fp32", adapter=learned.best, model=model)
    assert outcome.steps < plan.steps and "forgetting" in outcome.stopped
    assert bits(model)["korean_bits"] > 1.05 * before
    modeling.load_adapter_weights(model, outcome.best)
    kept = [entry for entry in outcome.history if entry["forgetting"] <= 0.05]
    assert bits(model)["korean_bits"] <= 1.05 * before
    assert plan.evaluate(model)["loss"] == min(entry["loss"] for entry in kept)


def test_samples_are_answers_to_the_evaluation_prompt(tmp_path, caplog):
    asked = prompts.mcq_direct(tf.ITEMS[1])
    with caplog.at_level("INFO", "medgemma_korean"):
        _, model = run(tmp_path, plan_of(tf.exchanges(8), samples=[asked], settings={"evaluations": 1}))
    answer = evaluation.generate(model, tf.tokenizer(), asked)
    shown = [line for line in caplog.messages if line.startswith("sample: ")]
    assert shown == [f"sample: {' '.join(asked.split())[-80:]} -> {answer}"]


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
    plan = plan_of(tf.numbered(rows), settings=settings)
    assert (plan.steps, plan.evaluation_steps) == (steps, looks)


def test_best_goes_to_the_metric_then_the_loss_then_the_earlier_step():
    history = [
        {"step": 2, "accuracy": 0.5, "loss": 1.0},
        {"step": 4, "accuracy": 0.6, "loss": 1.2},
        {"step": 6, "accuracy": 0.6, "loss": 1.1},
        {"step": 8, "accuracy": 0.6, "loss": 1.1},
    ]
    accuracy = plan_of(tf.numbered(4), metric="accuracy", larger=True)
    assert training.best_of(history, accuracy)["step"] == 6
    assert training.best_of(history[::-1], accuracy)["step"] == 6
    assert training.best_of(history, plan_of(tf.numbered(4)))["step"] == 2
    without = [{"step": s, "korean_bits": 2.0} for s in (3, 1, 2)]
    assert training.best_of(without, plan_of(tf.numbered(4), metric="korean_bits"))["step"] == 1


def test_looks_are_told_in_one_order_whether_resumed_or_not():
    look = {"step": 3, "loss": 2.0, "accuracy": 0.5, "of": {"z": 1, "a": 2}}
    (told,) = training._evaluations([{"loss": 1.0}, {"step": 3, "evaluation": look}])
    assert told == look and json.dumps(told) == json.dumps(look, sort_keys=True)


def test_the_best_adapter_is_kept_whatever_comes_later(tmp_path):
    values = iter([0.5, 0.7, 0.7, 0.6])
    plan = plan_of(
        tf.exchanges(16),
        metric="accuracy",
        larger=True,
        evaluate=lambda model: {"accuracy": next(values)},
        settings={"evaluations": 4},
    )
    outcome, _ = run(tmp_path, plan)
    assert outcome.best_step == 2 and [p.name for p in tmp_path.glob(".best-*")] == [".best-2"]
    mark = tf.read(tmp_path / "checkpoint-4" / training.CHECKPOINT_MARK)
    assert f"../.best-2/{tf.ADAPTER}" in mark  # and is hashed by whoever continues
    assert (outcome.best / tf.ADAPTER).read_bytes() != (tmp_path / "checkpoint-4" / tf.ADAPTER).read_bytes()


# checkpoints --------------------------------------------------------------------------------------------


def checkpoint(folder, step, holds=None):
    target = folder / f"checkpoint-{step}"
    target.mkdir(parents=True)
    for name in training.state_files():
        (target / name).write_text(name)
    records.write_json(target / "trainer_state.json", {"global_step": step if holds is None else holds})
    best = folder / f".best-{target.name}"
    best.mkdir(exist_ok=True)
    (best / tf.ADAPTER).write_text("the best so far")
    training.mark_checkpoint(target, best)
    return target


def test_a_checkpoint_is_on_the_disk_before_its_mark(tmp_path, synced):
    made = checkpoint(tmp_path, 4)
    mark = synced.index(f"checkpoint-4/.{training.CHECKPOINT_MARK}.part")
    weights = {f"checkpoint-4/{name}" for name in training.state_files()} | {f".best-checkpoint-4/{tf.ADAPTER}"}
    assert weights | {made.name, ".best-checkpoint-4", "."} <= set(synced[:mark])


def test_an_adapter_is_on_the_disk_before_it_has_its_name(tmp_path, synced):
    """Those that are kept stand in no checkpoint's mark."""
    plan = plan_of(tf.exchanges(4), keep={1: "kept"})
    run(tmp_path, plan)
    assert f".kept.part/{tf.ADAPTER}" in synced and (tmp_path / "kept" / tf.ADAPTER).is_file()


def damage(kind):
    def truncate(c):
        (c / tf.ADAPTER).write_text("cut")

    def flip(file):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        stat = file.stat()
        file.write_bytes(content)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    return {
        "bit of the optimizer": lambda c: flip(c / "optimizer.pt"),
        "bit of the mark": lambda c: flip(c / training.CHECKPOINT_MARK),
        "mark cut": lambda c: os.truncate(c / training.CHECKPOINT_MARK, 20),
        "bit of the best adapter": lambda c: flip(c.parent / f".best-{c.name}" / tf.ADAPTER),
        "optimizer missing": lambda c: (c / "optimizer.pt").unlink(),
        "scheduler missing": lambda c: (c / "scheduler.pt").unlink(),
        "generator missing": lambda c: (c / "rng_state.pth").unlink(),
        "adapter truncated": truncate,
        "no mark": lambda c: (c / training.CHECKPOINT_MARK).unlink(),
        "empty": lambda c: (shutil.rmtree(c), c.mkdir()),
    }[kind]


KINDS = ["optimizer missing", "scheduler missing", "generator missing", "adapter truncated", "no mark", "empty"]
KINDS += ["bit of the optimizer", "bit of the mark", "mark cut", "bit of the best adapter"]


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


def test_a_mark_of_an_earlier_version_holds_sizes_alone(tmp_path):
    whole = checkpoint(tmp_path, 4)
    sizes = {p.name: p.stat().st_size for p in whole.iterdir() if p.name != training.CHECKPOINT_MARK}
    records.write_json(whole / training.CHECKPOINT_MARK, sizes)
    assert training.newest_checkpoint(tmp_path) == whole
    (whole / "optimizer.pt").write_text("longer than before")
    assert training.newest_checkpoint(tmp_path) is None


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
