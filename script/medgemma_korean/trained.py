"""What every train program does around its data: options, the place in the chain, scores, gate, publishing.

A train program gives its settings and a function that lays out its rows; the rest is here.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medgemma_korean import (
    base_model,
    chain,
    checkpoints,
    cli,
    evaluation,
    mcq,
    memory,
    model_card,
    modeling,
    precision,
    processes,
    profiles,
    records,
    report,
    training,
)
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.profiles import ModelProfile, StageSettings
from medgemma_korean.stage import RECORD_NAME, Input, Stage, read_record

FORMAT = 2
SEED = 17
TRACKERS = {"trackio": "trackio", "wandb": "wandb"}  # what `pip install` calls them
FRESH = ".fresh"  # in the work folder of a training on a plain base: the adapter that it starts from
PROBED = {"train_00": "00", "train_01": "01", "train_02": "02", "loop": "02"}  # the stage whose settings have to fit


def share(text: str) -> float:
    """argparse type: a number from 0 to below 1."""
    value = cli.real_number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to below 1")
    return value


def make_parser(doc: str) -> argparse.ArgumentParser:
    """The options that every train program has. None inherits the profile's value."""
    parser = cli.make_parser(doc, device=True)
    parser.add_argument("--epochs", type=cli.positive_int, metavar="N", help="passes over the data")
    parser.add_argument(
        "--max-samples", type=cli.positive_int, metavar="N", help="train on at most N rows, drawn by seed"
    )
    parser.add_argument("--max-steps", type=cli.positive_int, metavar="N", help="end after N steps, for trials")
    parser.add_argument("--base-model", metavar="P", help="a trained folder, a base folder, or a hub id")
    parser.add_argument("--output", metavar="P", help="folder to write (default: the stage's own)")
    parser.add_argument("--learning-rate", type=cli.positive_float, metavar="X", help="of LoRA")
    parser.add_argument("--batch-size", type=cli.positive_int, metavar="N", help="rows an optimizer step")
    parser.add_argument("--micro-batch", type=cli.positive_int, metavar="N", help="rows a forward pass; less memory")
    parser.add_argument("--max-length", type=cli.positive_int, metavar="N", help="tokens a row")
    parser.add_argument(
        "--precision", choices=("auto", "8bit", "nf4", "bf16", "fp32"), default="auto",
        help="of the frozen base (default: auto, what add_lora has chosen)",
    )  # fmt: skip
    parser.add_argument(
        "--show-samples-every", type=cli.positive_int, metavar="N", help="steps between looks at dev, with samples"
    )
    parser.add_argument(
        "--eval-samples", type=cli.positive_int, metavar="N", help="dev questions a look (default: all)"
    )
    parser.add_argument(
        "--monitor-every", type=cli.positive_int, metavar="N", help="steps between looks at held-out text (01, loop)"
    )
    parser.add_argument(
        "--max-forgetting", type=cli.positive_float, metavar="X",
        help="end, and go back to the best checkpoint, when held-out text takes this share more bits (default: 0.05)",
    )  # fmt: skip
    parser.add_argument("--replay", type=share, metavar="X", help="share of replayed text, against forgetting")
    parser.add_argument("--report-to", choices=tuple(TRACKERS), help="tracker beside TensorBoard")
    parser.add_argument("--shard", action="store_true", help="divide the base between processes (bf16 and fp32 only)")
    parser.add_argument("--seed", type=cli.seed, default=SEED, help=f"seed of order and shuffles (default: {SEED})")
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
    first: dict[str, Any] = field(default_factory=dict)  # scores of the base, once they are known
    before: dict[str, Any] = field(default_factory=dict)  # of the model that this stage starts from

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
    finish: Callable[[Context, Any, Path, training.Outcome], dict[str, Any]] | None = None,
) -> int:
    """Train one stage from options to published folder; returns the exit code.

    choices: further settings that change the result. finish: called with the model once the best adapter
    is in it, and the work folder; what it returns is added to `training_info.json` and to the record.
    """
    profile, paths = cli.resolve(args)
    cli.start_logging(paths, program)
    settings = _settings(args, stage_settings(profile))
    _require_tracker(args.report_to)
    given = args.base_model is not None
    link = chain.of_argument(paths, args.base_model) if given else chain.nearest(paths, stage_name)
    target = Path(args.output).resolve() if args.output else output(paths)
    _require_apart(link, target)
    asked = _asked(link, args.precision, profile)
    second = stage_name in ("train_02", "loop") if link.untouched else "01_another" in link.role
    stage = Stage(
        program,
        paths,
        outputs=[target],
        inputs=[*link.inputs(paths), *data(paths)],
        settings={
            **dataclasses.asdict(settings),
            "precision": asked,
            "lora_scale": profile.lora_scale,
            "max_samples": args.max_samples,
            "eval_samples": args.eval_samples,
            "seed": args.seed,
            **(_adapter_settings(profile, second) if link.untouched else {}),
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
    if link.plain:
        _require_plain(link)
    chain.check_tokenizer(link.base, link.start)
    tokenizer = tokenizers.load(link.base)
    if link.untouched:
        _require_letters(link.base, tokenizer)
    device = processes.own_device(modeling.pick_device(args.device))
    processes.start(device)
    first, before = {}, {}
    if not link.untouched:
        base_scores = link.folder / report.BEFORE if link.plain else paths.scores("base")
        first, before = (_scored(file, asked, paths, link) for file in (base_scores, scores_before(paths, link)))
        again = "make that folder anew" if link.plain else f"run: {paths.command('model/add_lora', '--force')}"
        for scores in (first, before):
            evaluation.require_current(scores, paths, profile, again)
    # What is predicted and probed of a plain base is of its own shape, not of the run's raw model.
    of_base = base_model.stand_in(profile, paths, link.base) if link.plain else (profile, paths)
    chosen, choice = _precision(link, asked, target, *of_base, device, PROBED[stage_name], args.shard)
    _require_shards(args.shard, chosen)
    settings = _fitting(*of_base, settings, chosen, args, program, second)
    with stage.work(resumable=True) as folder:
        if link.untouched:
            link.fresh = _fresh_adapter(folder, link.base, profile, second, args.seed)
        context = Context(args, profile, paths, settings, tokenizer, link, {}, first=first, before=before)
        context.plan = plan = build(context)
        plan.samples = evaluation.sample_prompts(paths)
        # A base that is divided is read into main memory, and only its parts go to the cards.
        base = modeling.load_base(link.base, profile, "cpu" if args.shard else device, chosen)
        if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
            raise PipelineError(f"{show(link.base)}: the tokenizer has more ids than the model has rows")
        model = modeling.load_adapter(base, link.start, trainable=True)
        model.peft_config["default"].base_model_name_or_path = str(link.base)
        if not modeling.trainable_parameters(model)["rows"]:
            plan.rows_only_steps = 0  # in which nothing would train
        if args.shard:
            processes.shard(model, device)
        if link.plain:
            _keep_of_base(folder, choice, first)
        if link.untouched:
            first = before = _score_base(model, tokenizer, folder, paths, profile, chosen)
            context.first, context.before = first, before
        report_to = [args.report_to] if args.report_to else []
        outcome = training.train(
            model, tokenizer, plan, folder, profile, paths, stage, link.start, report_to, args.shard
        )
        modeling.load_adapter_weights(model, outcome.best)
        log.info("best of %s: step %d", cli.count(len(outcome.history), "evaluation"), outcome.best_step)
        # All of dev, whatever --eval-samples gave the looks while training: the gate compares identical items.
        with processes.gathered(model):
            after = evaluation.evaluate(model, tokenizer, paths, profile, which=stage_name, precision=chosen)
            more = finish(context, model, folder, outcome) if finish else {}
        after = processes.agreed(after)
        log.info("%s: %s", stage_name, evaluation.summary(after))
        gate = evaluation.gate(first, after, profile)
        after |= {
            "against_base": evaluation.compare(first, after),
            "against_before": evaluation.compare(before, after),
        }
        _finish(folder, model, outcome, after, context, program, stage, more)
        try:
            stage.complete(
                counts=context.counts,
                steps=outcome.steps,
                scores={"accuracy": after["mcq"]["accuracy"], "bits_per_character": after["bits_per_character"]},
                gate=gate,
                metric=evaluation.summary(after),
                base_folder=os.path.relpath(link.base, stage.outputs[0]),
                **_base_identity(link),
                trainable=outcome.trainable,
                tokens=outcome.tokens,
                loss=outcome.loss,
                best_step=outcome.best_step,
                micro_batch=outcome.micro_batch,
                processes=processes.count(),
                stopped=outcome.stopped,
                **more,
            )
        finally:  # published, even where the gate failed
            if processes.is_main():
                for adapter in (*stage.outputs[0].glob(".best-*"), *stage.outputs[0].glob(FRESH)):
                    shutil.rmtree(adapter)
                for name in training.OWN_FILES:
                    (stage.outputs[0] / name).unlink(missing_ok=True)
    return 0


def _require_tracker(name: str | None) -> None:
    if name and importlib.util.find_spec(name) is None:
        raise PipelineError(f"--report-to {name}: not installed; run: .venv/bin/pip install {TRACKERS[name]}")


def _require_shards(wanted: bool, chosen: str) -> None:
    if wanted and chosen in memory.QUANTISED:
        raise PipelineError(f"--shard: weights in {chosen} cannot be divided; score and train with --precision bf16")
    if wanted and processes.count() == 1:
        raise PipelineError("--shard: one process has nobody to share with; use accelerate launch --num_processes N")


def _fitting(
    profile: ModelProfile,
    paths: RunPaths,
    settings: StageSettings,
    chosen: str,
    args: argparse.Namespace,
    program: str,
    second: bool,
) -> StageSettings:
    """The settings, with fewer rows a forward pass where more are predicted not to fit; the batch stays.

    Raises PipelineError when not even one row does.
    """
    rows = settings.micro_batch
    if processes.is_main():
        dtype = modeling.dtype_name(modeling.compute_dtype(profile, modeling.pick_device(args.device)))
        shards = processes.count() if args.shard else 1
        case = memory.case(profile, paths, settings, precision=chosen, dtype=dtype, second=second, shards=shards)
        available, where = memory.available_bytes(args.device)
        rows = memory.micro_batch(case, available)
        if rows is None:
            memory.require(memory.least(case), available, where, program)
        if rows < settings.micro_batch:
            log.warning("%s; going on with %s a forward pass", memory.gap(case, available, where), rows)
    return dataclasses.replace(settings, micro_batch=processes.agreed(rows))


def _scores(file: Path) -> dict[str, Any]:
    return records.read_object(file, "precision", "mcq", repair="make that model again with --force")


def _scored(file: Path, chosen: str, paths: RunPaths, link: chain.Link) -> dict[str, Any]:
    """Scores in the precision that is trained in. Raises PipelineError: scores of two precisions compare nothing."""
    for found in (file, file.with_name(f"{file.stem}-{chosen}{file.suffix}")):
        if found.is_file() and (scores := _scores(found))["precision"] == chosen:
            return scores
    if not file.is_file():
        again = "make that folder anew" if link.plain else f"run: {paths.command('model/add_lora', '--force')}"
        raise PipelineError(f"{show(file)} is missing; {again}")
    was = _scores(file)["precision"]
    again = paths.command("model/add_lora", "--precision", chosen, "--force")
    raise PipelineError(
        f"{file.stem} was scored in {was}, and scores of {chosen} cannot be compared with it; "
        + (f"go on with --precision {was}" if link.plain else f"run: {again}")
    )


def _settings(args: argparse.Namespace, settings: StageSettings) -> StageSettings:
    values = {
        "epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "batch": args.batch_size,
        "micro_batch": args.micro_batch,
        "max_length": args.max_length,
        "max_steps": args.max_steps,
        "look_every": args.show_samples_every,
        "monitor_every": args.monitor_every,
        "max_forgetting": args.max_forgetting,
        "replay": args.replay,
    }
    changed = {k: v for k, v in values.items() if v is not None}
    if changed:
        log.info("overridden: %s", ", ".join(f"{k} = {v}" for k, v in changed.items()))
    batch, micro = changed.get("batch", settings.batch), changed.get("micro_batch", settings.micro_batch)
    share = batch // processes.count()
    if share and share % micro:  # the nearest smaller one that divides each process's rows
        changed["micro_batch"] = next(n for n in range(min(micro, share), 0, -1) if share % n == 0)
    return profiles.with_overrides(settings, **changed)


def scores_before(paths: RunPaths, link: chain.Link) -> Path:
    """The evaluation of the model that this stage starts from."""
    if link.adapter is not None:
        return link.folder / "evaluation.json"
    return paths.scores("merged" if link.folder.parent.name == paths.another_lora_added.parent.name else "extended")


def _base_identity(link: chain.Link) -> dict[str, Any]:
    """What the record says of the base, so that an adapter is never put on another one."""
    if link.plain:
        files = base_model.described(link.base)
        return {"base_fingerprint": base_model.fingerprint(files), "base_files": files}
    return {"base_fingerprint": read_record(link.base.parent / RECORD_NAME)["fingerprint"]}


# on a plain base ----------------------------------------------------------------------------------------


def _require_apart(link: chain.Link, target: Path) -> None:
    for folder in (link.folder, link.base):
        if folder.is_relative_to(target) or target.is_relative_to(link.base):
            raise PipelineError(f"{show(target)} would be written, and holds what is trained on; use another --output")


def _require_plain(link: chain.Link) -> None:
    """Raise PipelineError unless a plain base is whole, and the one that an adapter on it was trained on."""
    if link.adapter is not None:
        chain.check_base(link.folder, read_record(link.folder / RECORD_NAME), link.base, thorough=True)
        return
    base_model.require_whole(link.base)


def _require_letters(base: Path, tokenizer: Any) -> None:
    try:
        evaluation.letter_ids(tokenizer)
    except (AssertionError, ValueError) as error:
        raise PipelineError(f"{show(base)}: its tokenizer is not that of a Gemma 3 ({error})") from None


def _adapter_settings(profile: ModelProfile, second: bool) -> dict[str, Any]:
    """What of a fresh adapter changes the result, beside its scale and the seed."""
    rank, dropout = (profile.second_rank, profile.second_dropout) if second else (profile.lora_rank, 0.0)
    return {"rank": rank, "dropout": dropout}


def _measured(link: chain.Link) -> Path:
    """The folder that says how the precision of a base was chosen: its own, else that of what was trained on it."""
    return link.folder if link.plain and precision.stored(link.base) is None else link.base


def _asked(link: chain.Link, wanted: str, profile: ModelProfile) -> str:
    """The precision, or "auto" where one is still to be chosen: the same command is complete without a probe."""
    if wanted != "auto" or (link.untouched and precision.stored(link.base) is None):
        return wanted
    return precision.chosen(_measured(link), profile)


def _precision(
    link: chain.Link,
    asked: str,
    target: Path,
    profile: ModelProfile,
    paths: RunPaths,
    device: str,
    stage: str,
    shard: bool,
) -> tuple[str, dict[str, Any] | None]:
    """The precision to train in, and how it was chosen (None where add_lora did).

    An interrupted training goes on in what it had. Raises PipelineError where a quantised base did not pass its probe.
    """
    if not link.untouched:
        precision.require_passing(_measured(link), asked, paths)
        return asked, precision.stored(_measured(link)) if link.plain else None
    for folder in (target.with_name(f".{target.name}.partial"), link.base):
        if (found := precision.stored(folder)) and (asked == "auto" or _passed(found, asked)):
            return found["precision"] if asked == "auto" else asked, found
    if shard and asked in memory.UNQUANTISED.values():
        # What fits is predicted for a share of it; `choose` would ask for room for all of it on one card.
        dtype = next(name for name, short in memory.UNQUANTISED.items() if short == asked)
        choice = precision.Choice(asked, dtype, asked, "not quantised, so that no probe is needed", "base model")
        return asked, choice.as_dict()
    choice = precision.choose(link.base, asked, profile, paths, device, measured_on="base model", stages=(stage,))
    found = processes.agreed(choice.as_dict())
    return found["precision"], found


def _passed(found: dict[str, Any], asked: str) -> bool:
    return asked not in precision.QUANTISED or any(
        probe["precision"] == asked and probe["passed"] for probe in found["probes"]
    )


def _fresh_adapter(folder: Path, base: Path, profile: ModelProfile, second: bool, seed: int) -> Path:
    """The adapter that training on a plain base starts from, made once by seed: LoRA, and the base's own new rows."""
    made = folder / FRESH
    if processes.is_main() and not made.is_dir():
        part = made.with_name(f"{FRESH}.part")
        shutil.rmtree(part, ignore_errors=True)  # of a kill
        ids = [] if second else base_model.new_ids(base)
        checkpoints.fresh_adapter(base, part, profile, second=second, new_ids=ids, seed=seed)
        records.settle(part)
        part.rename(made)
    processes.wait()
    return made


def _keep_of_base(folder: Path, choice: dict[str, Any] | None, first: dict[str, Any]) -> None:
    """What a later stage asks of the base stays with what was trained on it."""
    if not processes.is_main():
        return
    if choice is not None:
        records.write_json(folder / precision.FILE, choice)
    if first:
        records.write_json(folder / report.BEFORE, first)


def _score_base(
    model: Any, tokenizer: Any, folder: Path, paths: RunPaths, profile: ModelProfile, chosen: str
) -> dict[str, Any]:
    """The scores of the base, taken once: a fresh adapter changes nothing, so that its model is the base."""
    file = folder / report.BEFORE
    if processes.agreed(file.is_file()):
        return records.read_json(file)
    log.info("scoring the base before training")
    with processes.gathered(model):
        found = evaluation.evaluate(model, tokenizer, paths, profile, which="base", precision=chosen)
    found = processes.agreed(found)
    log.info("base: %s", evaluation.summary(found))
    if processes.is_main():
        records.write_json(file, found)
    return found


# what is written ----------------------------------------------------------------------------------------


def _finish(folder, model, outcome, after, context: Context, program: str, stage: Stage, more: dict) -> None:
    """`final/`, `training_info.json`, `evaluation.json` and the model card."""
    final = folder / "final"
    if final.exists() and processes.is_main():
        shutil.rmtree(final)
    # What PEFT writes points from the adapter to its base, so that the folder can be moved with the project.
    target = stage.outputs[0]
    model.peft_config["default"].base_model_name_or_path = os.path.relpath(context.link.base, target / "final")
    modeling.save_adapter(model, final)
    if not processes.is_main():
        return
    for rejected in folder.glob("rejected-checkpoint-*"):  # stepped back from; what replaced it stands
        shutil.rmtree(rejected)
    tokenizers.copy(context.link.base, final)
    records.write_json(folder / "evaluation.json", after)
    info = {
        "script": program,
        "model": context.profile.name,
        "base_model": os.path.relpath(context.link.folder, context.paths.models.parent),
        "epochs": context.settings.epochs,
        "train_samples": context.counts.get("rows", 0),
        "validation_samples": after["mcq"]["n"],
        # What failed at each look is counted in failed_questions.json.
        "validation_history": [{k: v for k, v in entry.items() if k != "wrong"} for entry in outcome.history],
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
    if looks := [(entry["step"], entry["wrong"]) for entry in outcome.history if "wrong" in entry]:
        failed = mcq.failed_questions(looks, evaluation.dev_items(context.paths))
        records.write_json(
            folder / report.FAILED, {"split": "dev", "looks": [step for step, _ in looks], "questions": failed}
        )
    upstream = base_model.terms(context.link.base, context.paths.models.parent) if context.link.plain else None
    card = model_card.model_card(
        context.paths, context.profile, program, info, after, context.link.base, target, upstream, context.first
    )
    records.write_text(folder / "README.md", card)
