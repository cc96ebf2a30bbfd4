"""Alternates stages 01 and 02 on the second adapter: an epoch of each is a loop, until dev accuracy is good enough.

Reads   model/01_another_lora_added/<name>/ and the data of stages 01 and 02
Writes  model/01_02_loop/<name>/{loop_N/,best/,final/,checkpoint-N/,training_info.json,evaluation.json,README.md}

    python script/train/train_01_02_loop.py --model tiny --max-loops 3
    python script/train/train_01_02_loop.py --model medgemma-4b --target-accuracy 60 --patience 2

The rows of all loops are laid out before training, so one optimizer and one learning-rate schedule run through them.
Dev is looked at after every loop. Training ends when the lower end of its interval reaches the target, when
`--patience` looks brought no better accuracy, after `--max-looks` (each look makes the best of them a little more
flattering), after `--max-loops`, or when held-out text is forgotten; a line says why, and what went wrong.
`final/` is the adapter of the best look with its tokenizer, `best/` the same adapter alone, `loop_N/` that of loop N.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medgemma_korean import batches, cli, evaluation, mcq, processes, profiles, records, trained, training
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.profiles import ModelProfile, StageSettings

import train_01_medical_dict as stage_01
import train_02_kor_med_test as stage_02

PROGRAM = "train_01_02_loop"
TARGET, PATIENCE, MAX_LOOPS, MAX_LOOKS = 90.0, 3, 10, 20
TRAIN_LOOK = 200  # training questions scored beside dev: enough to see whether their loss falls
PARSED_LOOK = 40  # dev questions that the best model answers in words, to see whether an answer can be read
NOISE = 0.01  # relative change of a loss below which it counts as level

Look = Mapping[str, Any]


# when to end, and why -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What ends the loop. target: share that the lower end of the dev interval has to reach."""

    target: float
    patience: int
    looks: int


def stop_reason(history: Sequence[Look], limits: Limits) -> str | None:
    """Why training ends after these looks, or None."""
    if not history:
        return None
    if history[-1]["lower"] >= limits.target:
        return f"target reached: the dev interval starts at {history[-1]['lower']:.1%}"
    accuracies = [look["accuracy"] for look in history]
    since = len(history) - 1 - accuracies.index(max(accuracies))
    if since >= limits.patience:
        return f"plateau: {cli.count(since, 'look')} without a better dev accuracy"
    if len(history) >= limits.looks:
        return f"look budget: {cli.count(len(history), 'look')} at dev"
    return None


def troubles(history: Sequence[Look], reference: Mapping[str, float], gate: float) -> list[str]:
    """What the looks show going wrong: overfit, letter bias, forgetting.

    reference: bits per character by language, of the model that each must not fall behind; gate: allowed ratio.
    """
    found, last = [], history[-1]
    lowest = min(history, key=lambda look: look["loss"])
    if last["loss"] > lowest["loss"] * (1 + NOISE) and last["train_loss"] < lowest["train_loss"] * (1 - NOISE):
        found.append(
            f"overfit: since step {lowest['step']} the loss rose on dev ({lowest['loss']:.3f} to {last['loss']:.3f}) "
            f"and fell on training questions ({lowest['train_loss']:.3f} to {last['train_loss']:.3f})"
        )
    if total := sum(last["predicted"].values()):
        letter, most = max(last["predicted"].items(), key=lambda entry: entry[1])
        if most > mcq.ALARM_SHARE * total:
            found.append(f"letter bias: {most / total:.0%} of the predictions are {letter}")
    for language, bits in reference.items():
        ratio = last[f"{language}_bits"] / bits
        if ratio > gate:
            found.append(f"forgetting: {language.capitalize()} bits per character rose by {ratio - 1:.1%}")
    return found


def diagnosis(
    history: Sequence[Look], limits: Limits, reference: Mapping[str, float], gate: float, stopped: str | None = None
) -> str:
    """The line that a run ends with: why it ended, its best look, and what went wrong."""
    best = min(history, key=lambda look: (-look["accuracy"], look["loss"], look["step"]))  # as the plan chooses
    reason = stopped or stop_reason(history, limits) or f"target not reached in {cli.count(len(history), 'look')}"
    parts = [
        reason,
        f"best dev {best['accuracy']:.1%} ({best['lower']:.1%} to {best['upper']:.1%}, step {best['step']})",
    ]
    return "; ".join(parts + troubles(history, reference, gate))


def unread(model: Any, tokenizer: Any, items: Sequence[dict[str, Any]], batch: int) -> str | None:
    """The trouble with answers that no letter can be read from, of a model that answers in words; None without."""
    answers = evaluation.generate_letters(model, tokenizer, items, batch, most=8)
    reasons = Counter(answer["reason"] for answer in answers if answer["predicted"] is None)
    if not reasons:
        return None
    reason, most = reasons.most_common(1)[0]
    share = f"{reasons.total()} of {cli.count(len(answers), 'answer')}"
    return f"unparsed: {share} name no letter (mostly: {reason}, {most})"


# rows ---------------------------------------------------------------------------------------------------


def pieces(rows: Sequence[Any], number: int) -> list[list[Any]]:
    """The rows in their order as `number` pieces of equal length, give or take one: the epochs they were made of."""
    cuts = [round(len(rows) * i / number) for i in range(number + 1)]
    return [list(rows[start:end]) for start, end in zip(cuts, cuts[1:], strict=False)]


def alternate(
    first: Sequence[Any], second: Sequence[Any], loops: int, batch: int, kept: int | None = None
) -> tuple[list[Any], dict[int, str]]:
    """All rows, a piece of each list in turn, and the step that ends each loop with the loop's folder name.

    A loop ends with the first step that has seen all of it. Raises PipelineError when a loop is less than a batch.
    """
    rows: list[Any] = []
    ends = {}
    for number, (a, b) in enumerate(zip(pieces(first, loops), pieces(second, loops), strict=True), 1):
        if len(a) + len(b) < batch:
            raise PipelineError(
                f"a loop holds {len(a) + len(b)} rows, less than one batch of {batch}; use more samples"
            )
        rows += [*a, *b]
        ends[math.ceil(len(rows) / batch)] = f"loop_{number}"
    return rows, ends


def loop_settings(profile: ModelProfile) -> StageSettings:
    """Those of stage 02, whose adapter this is; an epoch of each data set a loop, and a look after each."""
    return replace(profile.mcq, epochs=1, look_every=None)


def dictionary_settings(context: trained.Context) -> StageSettings:
    return profiles.with_overrides(context.profile.dictionary, max_length=context.args.max_length)


def build(context: trained.Context) -> training.Plan:
    args, settings, paths, profile = context.args, context.settings, context.paths, context.profile
    tokenizer, epochs = context.tokenizer, context.settings.epochs * context.args.max_loops
    part_01 = replace(context, settings=replace(dictionary_settings(context), epochs=epochs), counts={})
    part_02 = replace(context, settings=replace(settings, epochs=epochs), counts={})
    rows, ends = alternate(stage_01.build(part_01).rows, stage_02.build(part_02).rows, args.max_loops, settings.batch)
    context.counts |= {"rows": len(rows), "stage_01": part_01.counts, "stage_02": part_02.counts}
    log.info("loops of about %d rows end at steps %s", len(rows) // args.max_loops, ", ".join(map(str, ends)))

    dev = evaluation.dev_items(paths, args.eval_samples)
    known = batches.sample(mcq.read_items(paths.mcq / "train.jsonl"), args.max_samples, context.seed)
    known = batches.sample(known, TRAIN_LOOK, context.seed)
    texts = evaluation.held_out_texts(paths, profile)

    def monitor(model) -> dict[str, float]:
        return evaluation.text_look(model, tokenizer, texts, profile)

    def look(model) -> dict[str, Any]:
        found = evaluation.dev_look(model, tokenizer, dev, profile.score_batch, histogram=True)
        found["train_loss"] = evaluation.dev_look(model, tokenizer, known, profile.score_batch)["loss"]
        return found | monitor(model)

    return training.Plan(
        rows=rows,
        settings=settings,
        packed=False,
        metric="accuracy",
        larger=True,
        evaluate=look,
        monitor=monitor,
        seed=context.seed,
        keep=ends,
        stop=lambda history: stop_reason(history, limits_of(args)),
    )


def limits_of(args: argparse.Namespace) -> Limits:
    return Limits(args.target_accuracy / 100, args.patience, args.max_looks)


def finish(context: trained.Context, model: Any, folder: Path, outcome: training.Outcome) -> dict[str, Any]:
    """`best/`, portable adapter configurations, and what the run tells beside its scores."""
    args, paths = context.args, context.paths
    items = evaluation.dev_items(paths, PARSED_LOOK)
    trouble = unread(model, context.tokenizer, items, context.profile.score_batch)
    looks = [entry for entry in outcome.history if "accuracy" in entry]
    bits = reference_bits(context)
    line = diagnosis(looks, limits_of(args), bits, context.profile.gate_english, outcome.stopped)
    line = "; ".join(part for part in (line, trouble) if part)
    log.info("diagnosis: %s", line)
    context.counts["rows"] = min(context.counts["rows"], outcome.steps * context.settings.batch)
    loops = sorted(folder.glob("loop_*"), key=lambda found: int(found.name.split("_")[1]))
    if processes.is_main():
        _make_portable(context, folder, outcome, loops)
    return {"diagnosis": line, "loops": len(loops)}


def _make_portable(context: trained.Context, folder: Path, outcome: training.Outcome, loops: Sequence[Path]) -> None:
    best = folder / "best"
    if best.exists():
        shutil.rmtree(best)
    shutil.copytree(outcome.best, best)
    target = Path(context.args.output).resolve() if context.args.output else context.paths.loop
    for adapter in (best, *loops):
        config = records.read_json(adapter / "adapter_config.json")
        config["base_model_name_or_path"] = os.path.relpath(context.link.base, target / adapter.name)
        records.write_json(adapter / "adapter_config.json", config)
        (adapter / "README.md").unlink(missing_ok=True)  # PEFT's template; the stage's own card stands above


def reference_bits(context: trained.Context) -> dict[str, float]:
    """Bits per character that the loop must not lose: the better of the base and the model it starts from."""
    scores = (context.first, context.before)
    return {name: min(s["bits_per_character"][name] for s in scores) for name in ("korean", "english")}


def make_parser() -> argparse.ArgumentParser:
    parser = trained.make_parser(__doc__)
    parser.add_argument(
        "--target-accuracy", type=cli.positive_float, default=TARGET, metavar="P",
        help=f"dev accuracy in %% that the lower end of the interval has to reach (default: {TARGET:g})",
    )  # fmt: skip
    parser.add_argument(
        "--patience", type=cli.positive_int, default=PATIENCE, metavar="N",
        help=f"end after N looks without a better dev accuracy (default: {PATIENCE})",
    )  # fmt: skip
    parser.add_argument(
        "--max-looks", type=cli.positive_int, default=MAX_LOOKS, metavar="N",
        help=f"end after N looks at dev (default: {MAX_LOOKS})",
    )  # fmt: skip
    parser.add_argument(
        "--max-loops", type=cli.positive_int, default=MAX_LOOPS, metavar="N",
        help=f"end after N loops; the learning rate falls over all of them (default: {MAX_LOOPS})",
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.target_accuracy > 100:
        raise PipelineError(f"--target-accuracy {args.target_accuracy:g}: a share in % is at most 100")
    dictionary = cli.resolve(args)[0].dictionary
    return trained.run(
        args,
        program=PROGRAM,
        stage_name="loop",
        stage_settings=loop_settings,
        output=lambda paths: paths.loop,
        data=stage_01.data,
        build=build,
        choices={
            "target_accuracy": args.target_accuracy,
            "patience": args.patience,
            "max_looks": args.max_looks,
            "max_loops": args.max_loops,
            "stage_01": {
                "max_length": args.max_length or dictionary.max_length,
                "max_rows": dictionary.max_rows,
                "replay": dictionary.replay,
            },
        },
        finish=finish,
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
