"""Rows to labels, packing, the trainer with its guards, checkpoints and resume. One trainer for all stages.

The whole order of a stage's rows (epochs, shuffles, replay) is laid out before training and read sequentially, so
that an interrupted run continues with exactly the row it stopped before.

torch, transformers and trl are imported inside functions.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medgemma_korean import cli, modeling, progress, prompts, records
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import Interrupted, PipelineError, log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.profiles import ModelProfile, StageSettings

Row = dict[str, list[int]]  # input_ids and labels; a packed row has seq_lengths too
MASKED = -100
MAX_DROPPED = 0.05  # share of rows that may be too long before a stage refuses to train on the rest


# rows ---------------------------------------------------------------------------------------------------


def exchange_row(tokenizer: Any, prompt: str, completion: str, max_length: int) -> Row | None:
    """One exchange; only the completion and its `<end_of_turn>\\n` are supervised. None when it is too long."""
    ids, start = prompts.render(tokenizer, prompt, completion)
    if len(ids) > max_length:
        return None
    return {"input_ids": ids, "labels": [MASKED] * start + ids[start:]}


def mcq_row(
    tokenizer: Any,
    item: dict[str, Any],
    max_length: int,
    build: Callable[[dict[str, Any]], tuple[str, str]],
    counts: dict[str, int],
) -> Row | None:
    """An exam question as a row. When it is too long the question loses its beginning, never options or answer.

    build: prompt and completion of an item. Counts "shortened" and "too_long".
    """
    row = exchange_row(tokenizer, *build(item), max_length)
    question = item["question"]
    while row is None and len(question) > 40:
        # A fifth at a time from the left: the sentence that asks stands at the end.
        question = question[max(len(question) // 5, 1) :]
        row = exchange_row(tokenizer, *build({**item, "question": "…" + question.lstrip()}), max_length)
        if row is not None:
            counts["shortened"] = counts.get("shortened", 0) + 1
    if row is None:
        counts["too_long"] = counts.get("too_long", 0) + 1
    return row


def text_rows(tokenizer: Any, text: str, max_length: int) -> list[Row]:
    """Plain text as rows: `<bos>` text `<eos>`, everything supervised; a long text becomes several rows."""
    ids = tokenizers.encode(tokenizer, text)
    width = max_length - 2  # room for <bos> and <eos>
    rows = []
    for start in range(0, len(ids), width):
        end = [tokenizer.eos_token_id] if start + width >= len(ids) else []
        part = [tokenizer.bos_token_id, *ids[start : start + width], *end]
        rows.append({"input_ids": part, "labels": list(part)})
    return rows


def pack(rows: Sequence[Row], max_length: int) -> list[Row]:
    """Pack rows into sequences of at most `max_length` tokens, best fit first (TRL), with `seq_lengths`.

    Raises AssertionError for a row that is longer: the library would cut it.
    """
    from datasets import Dataset
    from trl import pack_dataset

    assert all(len(row["input_ids"]) <= max_length for row in rows), "a row is longer than a packed sequence"
    if not rows:
        return []
    packed = pack_dataset(Dataset.from_list(list(rows)), max_length, "bfd")
    return [{key: list(row[key]) for key in ("input_ids", "labels", "seq_lengths")} for row in packed]


def epochs_of(make: Callable[[int], list[Row]], epochs: int, seed: int) -> list[Row]:
    """The rows of all epochs in order; each epoch is made anew (`make(epoch)`) and shuffled with its own seed."""
    ordered: list[Row] = []
    for epoch in range(epochs):
        rows = list(make(epoch))
        random.Random(seed * 1000 + epoch).shuffle(rows)
        ordered += rows
    return ordered


def mixed(main: list[Row], replay: list[Row], share: float, seed: int) -> list[Row]:
    """`main` in its order with replay rows spread evenly until they hold `share` of the whole's tokens.

    Replay rows are taken in a seeded shuffle and repeated, shuffled anew, where they do not suffice.
    """
    if not share or not replay:
        return list(main)
    wanted = sum(len(row["input_ids"]) for row in main) * share / (1 - share)
    rng, chosen, queue, tokens = random.Random(seed), [], [], 0
    while tokens < wanted:
        if not queue:
            queue = list(replay)
            rng.shuffle(queue)
        chosen.append(queue.pop())
        tokens += len(chosen[-1]["input_ids"])
    # Even spacing keeps every batch a mix; a shuffle would leave runs without replay.
    keyed = [((i + 0.5) / len(main), 0, row) for i, row in enumerate(main)]
    keyed += [((i + 0.5) / len(chosen), 1, row) for i, row in enumerate(chosen)]
    return [row for *_, row in sorted(keyed, key=lambda entry: entry[:2])]


def read_texts(file: Path, characters: int | None, seed: int) -> list[str]:
    """The texts of a JSONL file; of a file that holds more than `characters`, a seeded share of about that many.

    The share is taken from the file's size, so that one pass suffices and only what is used is held in memory.
    """
    # Hangul takes three bytes of UTF-8, Latin and the JSON around it one.
    share = 1.0 if characters is None else min(1.0, characters / (file.stat().st_size / 3))
    rng = random.Random(seed)
    return [row["text"] for row in records.read_jsonl(file) if share == 1.0 or rng.random() < share]


def sample(rows: list[Any], limit: int | None, seed: int) -> list[Any]:
    """At most `limit` rows, drawn with a seed and kept in their order: never simply the first ones."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def replay_texts(tokenizer: Any, paths: RunPaths, max_length: int, seed: int) -> list[Row]:
    """Rows of stage-00 training text to replay against forgetting: as many Korean as English ones."""
    rows: dict[str, list[Row]] = {}
    for folder in (paths.plain_text, paths.english_replay):
        texts = [row["text"] for row in records.read_jsonl(folder / "train.jsonl")]
        texts = sample(texts, 5000, seed)  # enough for any share; the real folders hold millions
        rows[folder.name] = [row for text in texts for row in text_rows(tokenizer, text, max_length)]
    size = min(map(len, rows.values()))
    return [row for found in rows.values() for row in sample(found, size, seed)]


def refuse_losses(program: str, dropped: int, total: int) -> None:
    """Raise PipelineError when more than 5 % of the rows are too long: the rest would be another data set."""
    if total and dropped / total > MAX_DROPPED:
        raise PipelineError(
            f"{program}: {dropped} of {total} rows are longer than --max-length; raise it "
            f"(at most {MAX_DROPPED:.0%} may be)"
        )


def check_rows(rows: Sequence[Row], tokenizer: Any, packed: bool) -> None:
    """Assert that no row is in a state that must be impossible; runs before every training."""
    end_of_turn = tokenizer.convert_tokens_to_ids(tokenizers.END_OF_TURN)
    start_of_turn = tokenizer.convert_tokens_to_ids(tokenizers.START_OF_TURN)
    for number, row in enumerate(rows):
        ids, labels = row["input_ids"], row["labels"]
        lengths = row.get("seq_lengths", [len(ids)])
        where = f"row {number}"
        assert len(ids) == len(labels) and sum(lengths) == len(ids), f"{where}: lengths differ"
        assert any(label != MASKED for label in labels[1:]), f"{where}: nothing is supervised"
        assert tokenizer.pad_token_id not in ids, f"{where}: holds padding before batching"
        assert all(label in (MASKED, i) for i, label in zip(ids, labels, strict=True)), f"{where}: foreign label"
        start = 0
        for length in lengths:
            part = ids[start : start + length]
            assert part[0] == tokenizer.bos_token_id, f"{where}: no <bos>"
            assert part.count(tokenizer.bos_token_id) == 1, f"{where}: doubled <bos>"
            start += length
        if start_of_turn in ids:
            assert end_of_turn in [label for label in labels if label != MASKED], f"{where}: end of turn not supervised"
        assert packed or "seq_lengths" not in row, f"{where}: packed row in an unpacked stage"


def show_row(tokenizer: Any, row: Row) -> str:
    """A row as text, its supervised part between ⟦ and ⟧."""
    text, supervised, run = "", False, []
    for token, label in zip([*row["input_ids"], None], [*row["labels"], None], strict=True):
        if token is None or (label != MASKED) != supervised:
            text += tokenizer.decode(run)
            text += "⟧" if supervised else ""
            supervised, run = not supervised, []
            text += "⟦" if supervised and token is not None else ""
        run.append(token)
    return text


# checkpoints --------------------------------------------------------------------------------------------

STATE_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)
CHECKPOINT_MARK = "complete.json"


def mark_checkpoint(folder: Path) -> None:
    """Write the sizes of a checkpoint's files last: its presence means the checkpoint is whole."""
    missing = [name for name in STATE_FILES if not (folder / name).is_file()]
    if missing:
        raise AssertionError(f"{folder} lacks {', '.join(missing)}")
    sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.name != CHECKPOINT_MARK}
    records.write_json(folder / CHECKPOINT_MARK, sizes)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; broken ones are renamed aside.

    A missing optimizer or scheduler file would silently start a fresh one, so every file is asked for, with its
    size, and the step inside must be the folder's.
    """
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    for checkpoint in sorted(found, key=lambda p: -int(p.name.split("-")[1])):
        if why := _broken(checkpoint):
            log.warning("%s is not whole (%s); stepping back", show(checkpoint), why)
            rejected = checkpoint.with_name(f"rejected-{checkpoint.name}")
            shutil.rmtree(rejected, ignore_errors=True)  # of an earlier kill at the same step
            checkpoint.rename(rejected)
            continue
        return checkpoint
    return None


def _broken(checkpoint: Path) -> str | None:
    mark = checkpoint / CHECKPOINT_MARK
    if not mark.is_file():
        return "it was being written"
    for name, size in records.read_json(mark).items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or has another size"
    step = records.read_json(checkpoint / "trainer_state.json")["global_step"]
    return None if f"checkpoint-{step}" == checkpoint.name else f"it holds step {step}"


# the trainer --------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a training really did."""

    steps: int
    best_step: int
    best: Path  # adapter of the best evaluation
    history: list[dict[str, Any]]  # one entry an evaluation
    loss: float  # mean of the last tenth of the steps
    trainable: dict[str, int]
    tokens: int = 0


@dataclass
class Plan:
    """Everything a training needs beside the model.

    rows: all rows in the order they are trained. packed: they carry seq_lengths. rows_only_steps: steps in which
    only the new token rows move. evaluate: called on the model, returns a dict with the value under `metric`;
    `larger` says whether more is better, ties go to the smaller "loss" and then to the earlier step.
    keep: steps at which to evaluate and to keep the adapter, with the folder's name. stop: called on the evaluations so
    far, returns the reason to end before the last step, or None.
    """

    rows: list[Row]
    settings: StageSettings
    packed: bool
    metric: str
    larger: bool
    evaluate: Callable[[Any], dict[str, Any]]
    rows_only_steps: int = 0
    seed: int = 17
    keep: dict[int, str] = field(default_factory=dict)
    stop: Callable[[list[dict[str, Any]]], str | None] | None = None

    @property
    def steps(self) -> int:
        steps = math.ceil(len(self.rows) / self.settings.batch)
        return min(steps, self.settings.max_steps) if self.settings.max_steps else steps

    @property
    def evaluation_steps(self) -> list[int]:
        """Evenly spread steps, the last one always; the steps of `keep` where there are any."""
        if self.keep:
            every = self.settings.look_every or self.steps
            return sorted({*(s for s in self.keep if s < self.steps), *range(every, self.steps, every), self.steps})
        if self.settings.look_every:
            return sorted({*range(self.settings.look_every, self.steps, self.settings.look_every), self.steps})
        n = max(1, min(self.settings.evaluations, self.steps))
        return sorted({round(self.steps * (i + 1) / n) for i in range(n)})

    def ended(self, history: list[dict[str, Any]]) -> bool:
        """Whether training ends with the last of these evaluations, before its last step."""
        return bool(self.stop and history and self.stop(history))


def train(
    model: Any, tokenizer: Any, plan: Plan, folder: Path, profile: ModelProfile, paths: RunPaths, stage: Any
) -> Outcome:
    """Train the adapter in `model` through a plan, with checkpoints in `folder`; continue from the newest one.

    Raises PipelineError for a loss that is not finite or when nothing would train, Interrupted after a signal once
    the checkpoint is saved.
    """
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    settings, program = plan.settings, stage.program
    if not plan.rows or plan.steps < 1:
        raise PipelineError(f"{program}: no rows to train on")
    check_rows(plan.rows, tokenizer, plan.packed)
    log.info("first row, supervised part in ⟦⟧:\n%s", _shortened(show_row(tokenizer, plan.rows[0])))
    looks = plan.evaluation_steps
    device = next(model.parameters()).device
    checkpoint = newest_checkpoint(folder)
    if checkpoint is not None:
        done = int(checkpoint.name.split("-")[1])
        if done >= plan.steps:
            log.info("all %d steps are done; only the last evaluation is left", plan.steps)
        else:
            log.info("continuing after step %d of %d", done, plan.steps)

    class Guard(TrainerCallback):
        """Evaluates at fixed steps, keeps the best adapter, saves on a signal, stops on a bad loss, tells progress."""

        minute = cli.Every(60)

        def on_pre_optimizer_step(self, args, state, control, **_):
            if state.global_step < plan.rows_only_steps:
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad and "trainable_tokens" not in name:
                        parameter.grad = None

        def on_step_end(self, args, state, control, **_):
            step = state.global_step
            if step in looks:
                entry = {"step": step, **plan.evaluate(model)}
                model.train()
                history = _evaluations(state.log_history)
                state.log_history.append({"step": step, "evaluation": entry})
                if _better(entry, history, plan):
                    _save_adapter(model, folder / f".best-{step}")
                if step in plan.keep:
                    _save_adapter(model, folder / plan.keep[step])
                log.info("step %d of %d: %s", step, plan.steps, _line(entry))
                progress.event(paths, program, event="evaluation", **entry)
                control.should_save = True
                if plan.ended([*history, entry]):
                    control.should_training_stop = True
            if cli.stop_requested():
                control.should_save = control.should_training_stop = True
            stage.tick(step, plan.steps, self.last(state))
            return control

        def on_log(self, args, state, control, logs=None, **_):
            loss = (logs or {}).get("loss")
            if loss is None:
                return
            if not math.isfinite(loss) or not math.isfinite(logs.get("grad_norm", 0.0)):
                raise PipelineError(
                    f"{program}: the loss is {loss} (gradient norm {logs.get('grad_norm')}) at step "
                    f"{state.global_step}; training stopped and the last good checkpoint stands. "
                    "Try a smaller --learning-rate."
                )
            progress.event(
                paths, program, event="step", step=state.global_step, loss=loss,
                learning_rate=logs.get("learning_rate"), grad_norm=logs.get("grad_norm"),
            )  # fmt: skip
            if self.minute():
                log.info("step %d of %d, loss %.3f", state.global_step, plan.steps, loss)

        def on_save(self, args, state, control, **_):
            mark_checkpoint(folder / f"checkpoint-{state.global_step}")
            history = _evaluations(state.log_history)
            if history:
                keep = f".best-{best_of(history, plan)['step']}"
                for old in folder.glob(".best-*"):
                    if old.name != keep and int(old.name.split("-")[1]) <= state.global_step:
                        shutil.rmtree(old)

        @staticmethod
        def last(state) -> str:
            losses = [e["loss"] for e in state.log_history[-5:] if "loss" in e]
            return f"loss {losses[-1]:.3f}" if losses else ""

    class Trainer(SFTTrainer):
        """SFTTrainer with two learning rates and no weight decay: decay would pull token rows to zero."""

        def create_optimizer(self, *args, **kwargs):
            lora, rows = [], []
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    (rows if "trainable_tokens" in name else lora).append(parameter)
            groups = [{"params": lora, "lr": settings.learning_rate, "weight_decay": 0.0}]
            if rows:
                rate = settings.row_learning_rate or settings.learning_rate
                groups.append({"params": rows, "lr": rate, "weight_decay": 0.0})
            self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=0.0)
            return self.optimizer

        def create_model_card(self, *args, **kwargs):
            """Our own card is written when the stage completes."""

    on_gpu = device.type == "cuda"
    config = SFTConfig(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.batch // settings.micro_batch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=settings.warmup,
        weight_decay=0.0,
        max_grad_norm=settings.max_grad_norm,
        bf16=on_gpu and profile.dtype == "bfloat16",
        gradient_checkpointing=profile.gradient_checkpointing,
        logging_steps=1 if plan.steps <= 1000 else 10,
        logging_nan_inf_filter=False,
        save_strategy="no",  # the guard asks for every save
        save_total_limit=2,
        report_to=["tensorboard"],
        disable_tqdm=True,
        seed=plan.seed,
        data_seed=plan.seed,
        train_sampling_strategy="sequential",
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        # Rows are laid end to end with restarting positions and no attention mask: no padding, no leaks.
        padding_free=True,
        max_length=None,
        pad_to_multiple_of=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        save_only_model=False,
        enable_jit_checkpoint=False,
    )
    config._n_gpu = 1  # one process, one GPU: with a second one visible the library would double every batch
    assert config.train_batch_size == settings.micro_batch
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "runs")
    exact = {name: p.detach().float() for name, p in model.named_parameters() if p.requires_grad}
    trainer = Trainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(plan.rows),
        processing_class=tokenizer,
        callbacks=[Guard()],
    )
    trainer.remove_callback(PrinterCallback)  # the guard reports; raw dictionaries are no log
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # TRL has rounded them to bfloat16: too coarse for small updates, and for what an earlier stage learned.
            parameter.data = exact[name]
    # With an attention mask, or without restarting positions, rows laid end to end would attend to each other.
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(min(2, len(plan.rows)))])
    assert "attention_mask" not in batch and (batch["position_ids"] == 0).sum() >= min(2, len(plan.rows))
    assert model.config.use_cache is False
    trainable = modeling.trainable_parameters(model)
    log.info(
        "%d steps of %d rows, %s LoRA and %s token-row parameters train, learning rate %g (rows %g), scale %g",
        plan.steps, settings.batch, f"{trainable['lora']:,}", f"{trainable['rows']:,}",
        settings.learning_rate, settings.row_learning_rate, profile.lora_scale,
    )  # fmt: skip

    state = json.loads((checkpoint / "trainer_state.json").read_text()) if checkpoint else {}
    log_history, steps = state.get("log_history", []), state.get("global_step", 0)
    if steps < plan.steps and not plan.ended(_evaluations(log_history)):
        cli.poll_for_stop(True)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            cli.poll_for_stop(False)
        log_history, steps = trainer.state.log_history, trainer.state.global_step
        if cli.stop_requested() and steps < plan.steps and not plan.ended(_evaluations(log_history)):
            raise Interrupted(f"checkpoint saved at step {steps} of {plan.steps}")
    history = _evaluations(log_history)
    if steps != plan.steps and not plan.ended(history):
        raise AssertionError(f"trained {steps} steps instead of {plan.steps}")
    best = best_of(history, plan)
    losses = [e["loss"] for e in log_history if "loss" in e]
    tail = losses[-max(1, len(losses) // 10) :]
    return Outcome(
        steps=steps,
        best_step=best["step"],
        best=folder / f".best-{best['step']}",
        history=history,
        loss=sum(tail) / len(tail),
        trainable=trainable,
        tokens=sum(len(row["input_ids"]) for row in plan.rows[: steps * settings.batch]),
    )


def _key(entry: dict[str, Any], plan: Plan) -> tuple[float, float, int]:
    value = entry[plan.metric]
    return (-value if plan.larger else value, entry.get("loss", 0.0), entry["step"])


def best_of(history: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The best evaluation: by the plan's metric, ties by loss, then the earlier one."""
    return min(history, key=lambda entry: _key(entry, plan))


def _better(entry: dict[str, Any], history: list[dict[str, Any]], plan: Plan) -> bool:
    return not history or _key(entry, plan) < _key(best_of(history, plan), plan)


def _evaluations(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry["evaluation"] for entry in log_history if "evaluation" in entry]


def _save_adapter(model: Any, target: Path) -> None:
    part = target.with_name(f".{target.name}.part")
    for old in (part, target):
        if old.exists():
            shutil.rmtree(old)  # the same step of a run that was killed before its checkpoint
    modeling.save_adapter(model, part)
    part.rename(target)


def _line(entry: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
        for key, value in entry.items()
        if key != "step" and not isinstance(value, dict | list)
    )


def _shortened(text: str, limit: int = 600) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]}\n[…]\n{text[-limit // 2 :]}"
