"""The trainer with its guards, checkpoints and resume. One trainer for all stages.

torch, transformers and trl are imported inside functions.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medgemma_korean import batches, cli, evaluation, inspection, modeling, processes, progress, records, token_rows
from medgemma_korean.cli import GateError, Interrupted, PipelineError, log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.profiles import ModelProfile, StageSettings

# checkpoints --------------------------------------------------------------------------------------------

CHECKPOINT_MARK = "complete.json"


def state_files() -> list[str]:
    """What a whole checkpoint holds: adapter, optimizer, schedule, and the generators of every process."""
    found = ["adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"]
    several = processes.count() > 1
    return found + [f"rng_state_{i}.pth" if several else "rng_state.pth" for i in range(processes.count())]


def mark_checkpoint(folder: Path, best: Path | None = None) -> None:
    """Write size and hash of a checkpoint's files last: its presence means the checkpoint is whole.

    best: the best adapter so far, which whoever continues from here needs as well.
    """
    missing = [name for name in state_files() if not (folder / name).is_file()]
    if missing:
        raise AssertionError(f"{folder} lacks {', '.join(missing)}")
    files = [p for p in sorted(folder.iterdir()) if p.name != CHECKPOINT_MARK]
    files += sorted(best.iterdir()) if best else []
    records.settle(folder, *([best] if best else []))  # torch and safetensors leave that to the system
    about = {os.path.relpath(p, folder): {"size": p.stat().st_size, "sha256": records.sha256(p)} for p in files}
    records.write_sealed(folder / CHECKPOINT_MARK, about)


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: -int(p.name.split("-")[1]))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; broken ones are renamed aside.

    A missing optimizer or scheduler file would silently start a fresh one, so every file is asked for, with its
    content, and the step inside must be the folder's.
    """
    for checkpoint in checkpoints_of(folder):
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
    about = records.read_sealed(mark, state_files())
    if about is None:
        return f"{mark.name} is damaged"
    for name, made in about.items():
        file = checkpoint / name
        made = made if isinstance(made, dict) else {"size": made}  # of an earlier version
        if not file.is_file() or file.stat().st_size != made["size"]:
            return f"{name} is missing or has another size"
        if "sha256" in made and records.sha256(file) != made["sha256"]:
            return f"{name} has other content than when it was written"
    step = records.read_json(checkpoint / "trainer_state.json")["global_step"]
    return None if f"checkpoint-{step}" == checkpoint.name else f"it holds step {step}"


# the trainer --------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a training really did."""

    steps: int
    best_step: int
    best: Path  # adapter of the best evaluation
    history: list[dict[str, Any]]  # one entry a look, with its step; those of the monitor alone lack the metric
    loss: float  # mean of the last tenth of the steps
    trainable: dict[str, int]
    tokens: int = 0
    micro_batch: int = 0  # rows a forward pass at the end; smaller than asked for where memory did not suffice
    stopped: str | None = None  # why it ended before its last step


@dataclass
class Plan:
    """Everything a training needs beside the model.

    rows: all rows in the order they are trained. packed: they carry seq_lengths. rows_only_steps: steps in which
    only the new token rows move. evaluate: called on the model, returns a dict with the value under `metric`;
    `larger` says whether more is better, ties go to the smaller "loss" and then to the earlier step.
    monitor: bits per character of held-out text, lower is better; measured before the first step, at every look and
    every `monitor_every` steps. When one is more than `max_forgetting` worse than before, training ends, and looks
    that are so are never the best.
    keep: steps at which to evaluate and to keep the adapter, with the folder's name. stop: called on the evaluations so
    far, returns the reason to end before the last step, or None. samples: prompts that the model answers in the log at
    every look.
    """

    rows: list[batches.Row]
    settings: StageSettings
    packed: bool
    metric: str
    larger: bool
    evaluate: Callable[[Any], dict[str, Any]]
    rows_only_steps: int = 0
    seed: int = 17
    keep: dict[int, str] = field(default_factory=dict)
    stop: Callable[[list[dict[str, Any]]], str | None] | None = None
    monitor: Callable[[Any], dict[str, float]] | None = None
    samples: Sequence[str] = ()

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

    @property
    def monitor_steps(self) -> list[int]:
        """Steps at which only the monitor looks."""
        every = self.settings.monitor_every
        return list(range(every, self.steps, every)) if self.monitor and every else []

    def ended(self, history: list[dict[str, Any]]) -> str | None:
        """Why training ends with the last of these evaluations, before its last step; None where it goes on."""
        if history and self.forgot(history[-1]):
            return (
                f"forgetting: at step {history[-1]['step']} held-out text takes {history[-1]['forgetting']:.1%} more "
                f"bits per character than before this stage, more than {self.settings.max_forgetting:.0%}"
            )
        looks = [entry for entry in history if self.metric in entry]
        return self.stop(looks) if self.stop and looks else None

    def forgot(self, entry: dict[str, Any]) -> bool:
        return entry.get("forgetting", 0.0) > self.settings.max_forgetting

    def candidates(self, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The looks of which one may become the result."""
        return [entry for entry in history if self.metric in entry and not self.forgot(entry)]


# In a training's folder, for the command that continues it: rows a forward pass, the monitor's numbers before the
# first step, and what the rows were.
OWN_FILES = MICRO_BATCH, REFERENCE, ROWS = ".micro_batch.json", ".reference.json", ".rows.json"


def train(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    folder: Path,
    profile: ModelProfile,
    paths: RunPaths,
    stage: Any,
    start: Path,
    report_to: Sequence[str] = (),
    sharded: bool = False,
) -> Outcome:
    """Train the adapter in `model` through a plan, with checkpoints in `folder`; continue from the newest one.

    start: the adapter's folder. When memory does not suffice the rows of a forward pass are halved, and the rows of
    an optimizer step stay. sharded: the base is divided between the processes.

    Raises PipelineError for a loss that is not finite, rows that are not those of the checkpoint, no space for a
    checkpoint or when nothing would train; GateError when all looks have forgotten; Interrupted after a signal, once
    the checkpoint is saved.
    """
    if not plan.rows or plan.steps < 1:
        raise PipelineError(f"{stage.program}: no rows to train on")
    micro = plan.settings.micro_batch
    # An interrupted training goes on with what it had: other sums would give other last bits.
    if begun := records.read_sealed(folder / MICRO_BATCH, ("micro_batch",)):
        micro = begun["micro_batch"]
    _same_rows(plan, folder, stage.program)
    while True:
        if processes.is_main():
            records.write_sealed(folder / MICRO_BATCH, {"micro_batch": micro})
        try:
            return _train(model, tokenizer, plan, folder, profile, paths, stage, report_to, sharded, micro)
        except (MemoryError, RuntimeError) as error:
            if not cli.out_of_memory(error):
                raise
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Outside of the handler, where nothing holds the frames of the failed step any more.
        if micro == 1:
            raise PipelineError(f"{stage.program}: out of memory with one row at a time ({why}); {cli.MEMORY_ADVICE}")
        micro = next(n for n in range(micro // 2, 0, -1) if plan.settings.batch % n == 0)
        log.warning(
            "out of memory (%s): going on with %s a forward pass; %s an optimizer step as before",
            why, cli.count(micro, "row"), cli.count(plan.settings.batch, "row"),
        )  # fmt: skip
        if processes.count() > 1:  # the others wait for this one in the middle of a step
            records.write_sealed(folder / MICRO_BATCH, {"micro_batch": micro})
            raise PipelineError(f"{stage.program}: out of memory in one of several processes; run the command again")
        modeling.free_memory()
        modeling.load_adapter_weights(model, start)


def _same_rows(plan: Plan, folder: Path, program: str) -> None:
    """Raise PipelineError when the rows are not those that the checkpoints in the folder were trained on."""
    now = {"rows": len(plan.rows), "sha256": batches.digest(plan.rows), "processes": processes.count()}
    file = folder / ROWS
    begun = records.read_sealed(file, tuple(now))
    if begun is None:
        if processes.is_main():
            records.write_sealed(file, now)
        return
    if begun["processes"] != now["processes"]:
        raise PipelineError(
            f"{program} was begun with {begun['processes']} process{'es' if begun['processes'] > 1 else ''}, "
            f"and {now['processes']} run now; continue with as many, or add --force to start anew"
        )
    if begun != now:
        raise PipelineError(
            f"{program}: the rows laid out now ({now['rows']:,}) are not those that the checkpoint was trained on "
            f"({begun['rows']:,}); add --force to start anew"
        )


def _train(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    folder: Path,
    profile: ModelProfile,
    paths: RunPaths,
    stage: Any,
    report_to: Sequence[str],
    sharded: bool,
    micro_batch: int,
) -> Outcome:
    import torch
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    settings, program = plan.settings, stage.program
    looks, monitored = plan.evaluation_steps, plan.monitor_steps
    device = next(model.parameters()).device
    checkpoint = processes.agreed(newest_checkpoint(folder) if processes.is_main() else None)
    if checkpoint is not None:
        done = int(checkpoint.name.split("-")[1])
        if done >= plan.steps:
            log.info("all %d steps are done; only the last evaluation is left", plan.steps)
        else:
            log.info("continuing after step %d of %d", done, plan.steps)
    reference = _reference(model, plan, folder) if plan.monitor else {}

    class Guard(TrainerCallback):
        """Evaluates at fixed steps, keeps the best adapter, saves on a signal, stops on a bad loss, tells progress."""

        minute = cli.Every(60)

        def on_step_end(self, args, state, control, **_):
            step = state.global_step
            if step in looks or step in monitored:
                self.look(state, control)
            if processes.any_of(cli.stop_requested()):
                control.should_save = control.should_training_stop = True
            if control.should_save:
                require_space(folder, model, step)
            stage.tick(step, plan.steps, self.last(state))
            return control

        def look(self, state, control):
            step = state.global_step
            # Process 0's numbers are everybody's: a decision on the last bit of a number must not differ.
            entry = processes.agreed({"step": step, **_look(model, plan, step in looks, reference)})
            wrong = [name for name, value in entry.items() if isinstance(value, float) and not math.isfinite(value)]
            if wrong:
                raise PipelineError(
                    f"{program}: {', '.join(wrong)} at step {step} is no finite number; training stopped and the last "
                    "good checkpoint stands. Try a smaller --learning-rate."
                )
            history = _evaluations(state.log_history)
            state.log_history.append({"step": step, "evaluation": entry})
            if plan.candidates([entry]) and _better(entry, history, plan):
                _save_adapter(model, folder / f".best-{step}")
            if step in plan.keep:
                _save_adapter(model, folder / plan.keep[step])
            log.info("step %d of %d: %s", step, plan.steps, _line(entry))
            if step in looks:
                _show_samples(model, tokenizer, plan.samples)
            told = {key: value for key, value in entry.items() if key != "wrong"}  # hundreds of ids are no event
            progress.event(paths, program, event="evaluation", **told)
            control.should_save = True
            if plan.ended([*history, entry]):
                control.should_training_stop = True

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
            processes.wait()  # each has written the state of its generators
            if not processes.is_main():
                return
            history = plan.candidates(_evaluations(state.log_history))
            # Whoever steps back to the checkpoint before this one needs the best of then.
            saved = [int(p.name.split("-")[1]) for p in checkpoints_of(folder)]
            so_far = [[e for e in history if e["step"] <= step] for step in saved]
            kept = {f".best-{best_of(looks, plan)['step']}" for looks in so_far if looks}
            best = folder / f".best-{best_of(history, plan)['step']}" if history else None
            mark_checkpoint(folder / f"checkpoint-{state.global_step}", best)
            for old in folder.glob(".best-*"):
                if old.name not in kept and int(old.name.split("-")[1]) <= state.global_step:
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

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step < plan.rows_only_steps:
                # Before the norm of all gradients is clipped, which has to be that of the rows.
                for name, parameter in self.model.named_parameters():
                    if parameter.requires_grad and "trainable_tokens" not in name:
                        parameter.grad = None
            return loss

        def save_model(self, output_dir=None, _internal_call=False):
            """The adapter alone: the tokenizer is the base's, and pickled arguments are nobody's business."""
            modeling.save_adapter(self.model, Path(output_dir))

        def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
            modeling.load_adapter_weights(self.model, Path(resume_from_checkpoint))

        def _save_checkpoint(self, *args, **kwargs):
            try:
                super()._save_checkpoint(*args, **kwargs)
            except (OSError, RuntimeError) as error:  # torch and safetensors have words of their own for a full disk
                require_space(folder, model, self.state.global_step, str(error).splitlines()[0])
                raise

        def create_model_card(self, *args, **kwargs):
            """Our own card is written when the stage completes."""

    on_gpu = device.type == "cuda"
    config = SFTConfig(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=_accumulation(settings.batch, micro_batch),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=settings.warmup,
        weight_decay=0.0,
        max_grad_norm=settings.max_grad_norm,
        bf16=on_gpu and model.get_base_model().get_input_embeddings().weight.dtype is torch.bfloat16,
        gradient_checkpointing=profile.gradient_checkpointing,
        logging_steps=1 if plan.steps <= 1000 else 10,
        logging_nan_inf_filter=False,
        save_strategy="no",  # the guard asks for every save
        save_total_limit=2,
        report_to=["tensorboard", *report_to],
        run_name=f"{paths.name}-{program}",
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
        ddp_find_unused_parameters=False,
    )
    if processes.count() == 1:
        config._n_gpu = 1  # one process, one GPU: with a second one visible the library would double every batch
    assert config.train_batch_size == micro_batch
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "runs")
    exact = {name: p.detach().float() for name, p in model.named_parameters() if p.requires_grad}
    trainer = Trainer(
        model=model,
        args=config,
        train_dataset=batches.dataset(plan.rows),
        processing_class=tokenizer,
        callbacks=[Guard()],
    )
    try:
        trainer.remove_callback(PrinterCallback)  # the guard reports; raw dictionaries are no log
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # TRL has rounded them to bfloat16: too coarse for small updates, and for what a stage before learned.
                parameter.data = exact.pop(name)
        token_rows.after_head(model)
        if sharded:
            processes.own_shards(trainer)
        rows = model.get_base_model().get_input_embeddings().weight.shape[0]
        log.info("%s", inspection.first_batch(plan, tokenizer, trainer.data_collator, rows))
        assert model.config.use_cache is False
        trainable = modeling.trainable_parameters(model)
        log.info(
            "%d steps of %d rows, %s LoRA and %s token-row parameters train, learning rate %g (rows %g), scale %g",
            plan.steps, settings.batch, f"{trainable['lora']:,}", f"{trainable['rows']:,}",
            settings.learning_rate, settings.row_learning_rate, profile.lora_scale,
        )  # fmt: skip
        require_space(folder, model, 0)

        state = json.loads((checkpoint / "trainer_state.json").read_text()) if checkpoint else {}
        log_history, steps = state.get("log_history", []), state.get("global_step", 0)
        if steps < plan.steps and not plan.ended(_evaluations(log_history)):
            cli.poll_for_stop(True)
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            finally:
                cli.poll_for_stop(False)
            log_history, steps = trainer.state.log_history, trainer.state.global_step
            # Also at the last step: scoring and publishing may take hours, and the same command goes on with them.
            if processes.any_of(cli.stop_requested()):
                raise Interrupted(f"checkpoint saved at step {steps} of {plan.steps}")
    finally:
        # What TRL and accelerate have put on the forward passes would be there twice after a second start.
        token_rows.without_head(model)
    history = _evaluations(log_history)
    stopped = plan.ended(history)
    if steps != plan.steps and not stopped:
        raise AssertionError(f"trained {steps} steps instead of {plan.steps}")
    if stopped:
        log.warning("ended at step %d of %d: %s", steps, plan.steps, stopped)
    if not plan.candidates(history):
        raise GateError(
            f"{program}: {stopped}; there is no checkpoint from before to go back to. Try a smaller --learning-rate, "
            "more replay, or a smaller --show-samples-every"
        )
    best = best_of(plan.candidates(history), plan)
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
        micro_batch=micro_batch,
        stopped=stopped,
    )


def _accumulation(batch: int, micro_batch: int) -> int:
    """Forward passes an optimizer step of each process. Raises PipelineError when the rows cannot be shared equally."""
    together = micro_batch * processes.count()
    if batch % together:
        raise PipelineError(
            f"{batch} rows an optimizer step cannot be shared by {processes.count()} processes of {micro_batch} rows; "
            "use another --batch-size or --micro-batch"
        )
    return batch // together


def _look(model: Any, plan: Plan, whole: bool, reference: dict[str, float]) -> dict[str, Any]:
    """What a look sees: everything, or the monitor's bits alone; "forgetting" against the bits before the stage."""
    with processes.gathered(model):
        entry = plan.evaluate(model) if whole else {}
        if plan.monitor and not reference.keys() <= entry.keys():
            entry |= plan.monitor(model)
    model.train()
    if reference:
        entry["forgetting"] = max(entry[name] / before for name, before in reference.items()) - 1
    return entry


def _reference(model: Any, plan: Plan, folder: Path) -> dict[str, float]:
    """The monitor's numbers before the first step. Those of an interrupted training are kept beside it."""
    file = folder / REFERENCE
    found = records.read_sealed(file, ())
    if found is None:
        with processes.gathered(model):
            found = processes.agreed(plan.monitor(model))
        if processes.is_main():
            records.write_sealed(file, found)
        log.info("before the first step: %s", _line(found))
    return found


def _show_samples(model: Any, tokenizer: Any, asked: Sequence[str]) -> None:
    with processes.gathered(model):
        for prompt in asked:
            answer = evaluation.generate(model, tokenizer, prompt)
            log.info("sample: %s -> %s", " ".join(prompt.split())[-80:], answer)
    model.train()


def require_space(folder: Path, model: Any, step: int, why: str = "") -> None:
    """Raise PipelineError unless the disk has room for the next checkpoint; what is needed stands in the message."""
    # Values, and the two moments of Adam, in float32; the best adapter beside the checkpoint.
    need = 4 * 4 * sum(modeling.trainable_parameters(model).values()) + 1e6
    free = shutil.disk_usage(folder).free
    if free < need:
        raise PipelineError(
            f"no space for the next checkpoint: it needs {cli.size_text(need)}, {cli.size_text(free)} are free on the "
            f"disk of {show(folder)}{f' ({why})' if why else ''}. "
            + (f"Training stopped at step {step}; the last checkpoint stands. " if step else "")
            + "Free some space and run the same command again."
        )


def _key(entry: dict[str, Any], plan: Plan) -> tuple[float, float, int]:
    value = entry[plan.metric]
    return (-value if plan.larger else value, entry.get("loss", 0.0), entry["step"])


def best_of(history: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The best evaluation: by the plan's metric, ties by loss, then the earlier one."""
    return min(history, key=lambda entry: _key(entry, plan))


def _better(entry: dict[str, Any], history: list[dict[str, Any]], plan: Plan) -> bool:
    before = plan.candidates(history)
    return not before or _key(entry, plan) < _key(best_of(before, plan), plan)


def _evaluations(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # Keys in the order in which the trainer's state brings them back, or a resumed training tells them in another one.
    found = [entry["evaluation"] for entry in log_history if "evaluation" in entry]
    return json.loads(json.dumps(found, sort_keys=True))


def _save_adapter(model: Any, target: Path) -> None:
    part = target.with_name(f".{target.name}.part")
    if processes.is_main():
        for old in (part, target):
            if old.exists():
                shutil.rmtree(old)  # the same step of a run that was killed before its checkpoint
    modeling.save_adapter(model, part)
    if processes.is_main():
        records.settle(part)
        part.rename(target)
    processes.wait()


def _line(entry: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
        for key, value in entry.items()
        if key != "step" and not isinstance(value, dict | list)
    )
