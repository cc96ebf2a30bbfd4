"""What every train program does around its data: options, the place in the chain, scores, gate, publishing.

A train program gives its settings and a function that lays out its rows; the rest is here.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgemma_korean import chain, cli, evaluation, modeling, profiles, records, report, training
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.profiles import ModelProfile, StageSettings
from medgemma_korean.stage import Input, Stage

FORMAT = 1
SEED = 17


def make_parser(doc: str) -> argparse.ArgumentParser:
    """The options that every train program has. None inherits the profile's value."""
    parser = cli.make_parser(doc, device=True)
    parser.add_argument("--epochs", type=cli.positive_int, metavar="N", help="passes over the data")
    parser.add_argument(
        "--max-samples", type=cli.positive_int, metavar="N", help="train on at most N rows, drawn by seed"
    )
    parser.add_argument("--max-steps", type=cli.positive_int, metavar="N", help="end after N steps, for trials")
    parser.add_argument("--base-model", metavar="P", help="a trained folder or a folder with base/ and adapter/")
    parser.add_argument("--output", metavar="P", help="folder to write (default: the stage's own)")
    parser.add_argument("--learning-rate", type=cli.positive_float, metavar="X", help="of LoRA")
    parser.add_argument("--batch-size", type=cli.positive_int, metavar="N", help="rows an optimizer step")
    parser.add_argument("--micro-batch", type=cli.positive_int, metavar="N", help="rows a forward pass; less memory")
    parser.add_argument("--max-length", type=cli.positive_int, metavar="N", help="tokens a row")
    parser.add_argument("--precision", choices=("auto", "8bit", "nf4", "bf16", "fp32"), default="auto")
    parser.add_argument("--show-samples-every", type=cli.positive_int, metavar="N", help="steps between looks")
    parser.add_argument(
        "--eval-samples", type=cli.positive_int, metavar="N", help="dev questions a look (default: all)"
    )
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed of order and shuffles (default: {SEED})")
    parser.add_argument("--allow-regression", action="store_true", help="go on where a gate fails")
    return parser


@dataclass
class Context:
    """What a train program's `build` gets: everything needed to lay out rows."""

    args: argparse.Namespace
    profile: ModelProfile
    paths: RunPaths
    settings: StageSettings
    tokenizer: Any
    link: chain.Link
    counts: dict[str, Any]
    plan: training.Plan | None = None  # what `build` returned

    @property
    def seed(self) -> int:
        return self.args.seed


def run(
    args: argparse.Namespace,
    *,
    program: str,
    stage_name: str,
    stage_settings: Callable[[ModelProfile], StageSettings],
    output: Callable[[RunPaths], Path],
    data: Callable[[RunPaths], list[Input]],
    build: Callable[[Context], training.Plan],
    choices: dict[str, Any] | None = None,
    finish: Callable[[Context, Path, training.Outcome], dict[str, Any]] | None = None,
) -> int:
    """Train one stage from options to published folder; returns the exit code.

    choices: further settings that change the result. finish: called on the work folder once the best adapter is
    chosen; what it returns is added to `training_info.json` and to the record.
    """
    profile, paths = cli.resolve(args)
    cli.start_logging(paths, program)
    settings = _settings(args, stage_settings(profile))
    precision = profile.precision if args.precision == "auto" else args.precision
    link = chain.of_folder(paths, _existing(args.base_model)) if args.base_model else chain.nearest(paths, stage_name)
    stage = Stage(
        program,
        paths,
        outputs=[Path(args.output).resolve() if args.output else output(paths)],
        inputs=[*link.inputs(paths), *data(paths)],
        settings={
            **dataclasses.asdict(settings),
            "precision": precision,
            "lora_scale": profile.lora_scale,
            "max_samples": args.max_samples,
            "eval_samples": args.eval_samples,
            "seed": args.seed,
            **(choices or {}),
        },
        format=FORMAT,
        force=args.force,
        allow_regression=args.allow_regression,
        driver_stage=stage_name,
        record_inside=True,
        warnings=list(link.warnings),
    )
    if (code := stage.already_complete()) is not None:
        return code

    modeling.set_up_torch(args.seed)
    chain.check_tokenizer(link.base, link.start)
    tokenizer = tokenizers.load(link.base)
    device = modeling.pick_device(args.device)
    first, before = records.read_json(paths.scores("base")), records.read_json(scores_before(paths, link))
    if first["precision"] != precision:
        raise PipelineError(
            f"the base was scored in {first['precision']}, and scores of {precision} cannot be compared with it; "
            f"run: {paths.command('model/add_lora', '--precision', precision, '--force')}"
        )
    with stage.work(resumable=True) as folder:
        context = Context(args, profile, paths, settings, tokenizer, link, {})
        context.plan = plan = build(context)
        base = modeling.load_base(link.base, profile, device, precision)
        if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
            raise PipelineError(f"{show(link.base)}: the tokenizer has more ids than the model has rows")
        model = modeling.load_adapter(base, link.start, trainable=True)
        model.peft_config["default"].base_model_name_or_path = str(link.base)
        outcome = training.train(model, tokenizer, plan, folder, profile, paths, stage)
        modeling.load_adapter_weights(model, outcome.best)
        log.info("best of %s: step %d", cli.count(len(outcome.history), "evaluation"), outcome.best_step)
        # All of dev, whatever --eval-samples gave the looks while training: the gate compares identical items.
        after = evaluation.evaluate(model, tokenizer, paths, profile, which=stage_name, precision=precision)
        log.info("%s: %s", stage_name, evaluation.summary(after))
        gate = evaluation.gate(first, after, profile)
        after |= {
            "against_base": evaluation.compare(first, after),
            "against_before": evaluation.compare(before, after),
            "samples": _samples(model, tokenizer, paths),
        }
        more = finish(context, folder, outcome) if finish else {}
        _finish(folder, model, outcome, after, context, program, stage, more)
        try:
            stage.complete(
                counts=context.counts,
                steps=outcome.steps,
                scores={"accuracy": after["mcq"]["accuracy"], "bits_per_character": after["bits_per_character"]},
                gate=gate,
                metric=evaluation.summary(after),
                base_folder=os.path.relpath(link.base, stage.outputs[0]),
                base_fingerprint=_base_fingerprint(link),
                trainable=outcome.trainable,
                tokens=outcome.tokens,
                loss=outcome.loss,
                best_step=outcome.best_step,
                **more,
            )
        finally:  # published, even where the gate failed
            for best in stage.outputs[0].glob(".best-*"):
                shutil.rmtree(best)
    return 0


def _settings(args: argparse.Namespace, settings: StageSettings) -> StageSettings:
    values = {
        "epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "batch": args.batch_size,
        "micro_batch": args.micro_batch,
        "max_length": args.max_length,
        "max_steps": args.max_steps,
        "look_every": args.show_samples_every,
    }
    changed = {k: v for k, v in values.items() if v is not None}
    if changed:
        log.info("overridden: %s", ", ".join(f"{k} = {v}" for k, v in changed.items()))
    batch, micro = changed.get("batch", settings.batch), changed.get("micro_batch", settings.micro_batch)
    if batch % micro:  # the nearest smaller one that divides the batch
        changed["micro_batch"] = next(n for n in range(min(micro, batch), 0, -1) if batch % n == 0)
    return profiles.with_overrides(settings, **changed)


def _existing(folder: str) -> Path:
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise PipelineError(f"--base-model {folder}: no such folder; fetch a hub model with download_model.py first")
    return path.parent if path.name in ("base", "adapter", "final") else path


def scores_before(paths: RunPaths, link: chain.Link) -> Path:
    """The evaluation of the model that this stage starts from."""
    if link.adapter is not None:
        return link.folder / "evaluation.json"
    return paths.scores("merged" if link.folder.parent.name == paths.another_lora_added.parent.name else "extended")


def _base_fingerprint(link: chain.Link) -> str:
    record = chain.read_record(link.base.parent / chain.RECORD_NAME)
    return record["fingerprint"]


def _samples(model: Any, tokenizer: Any, paths: RunPaths) -> list[dict[str, str]]:
    """The model's own words on fixed prompts: the same for every stage."""
    from medgemma_korean import prompts

    asked = [prompts.dictionary("고혈압"), prompts.to_english("어디가 아프세요?")]
    asked.append(prompts.mcq_direct(evaluation.dev_items(paths, 1)[0]))
    return [{"prompt": p, "answer": evaluation.generate(model, tokenizer, p)} for p in asked]


def _finish(folder, model, outcome, after, context: Context, program: str, stage: Stage, more: dict) -> None:
    """`final/`, `training_info.json`, `evaluation.json` and the model card."""
    final = folder / "final"
    if final.exists():
        shutil.rmtree(final)
    # What PEFT writes points from the adapter to its base, so that the folder can be moved with the project.
    target = stage.outputs[0]
    model.peft_config["default"].base_model_name_or_path = os.path.relpath(context.link.base, target / "final")
    modeling.save_adapter(model, final)
    tokenizers.copy(context.link.base, final)
    records.write_json(folder / "evaluation.json", after)
    info = {
        "script": program,
        "model": context.profile.name,
        "base_model": os.path.relpath(context.link.folder, context.paths.models.parent),
        "epochs": context.settings.epochs,
        "train_samples": context.counts.get("rows", 0),
        "validation_samples": after["mcq"]["n"],
        "validation_history": outcome.history,
        "final_accuracy": after["mcq"]["accuracy"],
        "best_step": outcome.best_step,
        "steps": outcome.steps,
        "loss": outcome.loss,
        "trainable_parameters": outcome.trainable,
        "learning_rate": context.settings.learning_rate,
        "lora_scale": context.profile.lora_scale,
        **more,
    }
    records.write_json(folder / "training_info.json", info)
    card = report.model_card(context.paths, context.profile, program, info, after, context.link.base, target)
    records.write_text(folder / "README.md", card)
