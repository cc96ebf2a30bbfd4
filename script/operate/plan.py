"""Say what a run would do, stage by stage, without doing it: `./run_full_pipeline.sh --plan`.

Reads   the stage records of the run, and how much room its disk has
Writes  nothing

    python script/operate/plan.py --model medgemma-4b
    python script/operate/plan.py --model tiny --from train_00 --paths     # what the driver asks: key=value lines

Records are compared cheaply: outputs by size and time, inputs by the fingerprint of the stage that made them.
Settings are compared when a stage runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import sys
from pathlib import Path

from medgemma_korean import cli, profiles, progress, shapes
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import DRIVER_STAGES, RunPaths, project_root, show
from medgemma_korean.profiles import ModelProfile
from medgemma_korean.sources import BY_KEY
from medgemma_korean.stage import check_outputs, read_record

SKIPPABLE = ("train_00", "train_01", "train_02")
# What each stage needs; of a tuple one is enough, nearest first, as in `chain`.
NEEDS: dict[str, list[tuple[str, ...]]] = {
    "download": [],
    "refine": [("download",)],
    "prepare_tokenizer": [("download",), ("refine",)],
    "add_lora": [("prepare_tokenizer",), ("refine",)],
    "train_00": [("add_lora",)],
    "train_01": [("train_00", "add_lora")],
    "add_lora_second": [("train_01", "train_00", "add_lora")],
    "train_02": [("add_lora_second",)],
    "report": [("add_lora",)],
}


# what the driver asks -----------------------------------------------------------------------------------


def pick_stage(text: str, option: str) -> str:
    """The stage that a name or unique prefix means. Raises PipelineError naming the stages."""
    matches = [stage for stage in DRIVER_STAGES if stage == text] or [s for s in DRIVER_STAGES if s.startswith(text)]
    if len(matches) == 1:
        return matches[0]
    problem = f"could be {' or '.join(matches)}" if matches else "is no stage"
    raise PipelineError(f"{option} {text}: {problem}; the stages are {' '.join(DRIVER_STAGES)}")


def chosen_stages(args: argparse.Namespace) -> list[str]:
    """The stages of the asked range, skipped ones too. Raises PipelineError for a range that ends before it begins."""
    first = DRIVER_STAGES.index(pick_stage(args.from_stage, "--from"))
    last = DRIVER_STAGES.index(pick_stage(args.to_stage, "--to"))
    if first > last:
        raise PipelineError(f"--from {DRIVER_STAGES[first]} comes after --to {DRIVER_STAGES[last]}; exchange the two")
    return list(DRIVER_STAGES[first : last + 1])


def skipped_stages(args: argparse.Namespace) -> list[str]:
    return [stage for stage in SKIPPABLE if getattr(args, stage.replace("train", "skip"))]


def demonstration(profile: ModelProfile) -> str:
    """What a run of a built model must say of itself; empty for a real one."""
    if profile.tiny is None:
        return ""
    real = next(p.name for p in profiles.MODELS.values() if p.tiny is None)
    return (
        f"{profile.name} is the small demonstration model: it shows that everything works, not what the training "
        f"achieves. A real run: ./run_full_pipeline.sh --model {real} --background"
    )


def answers(args: argparse.Namespace, profile: ModelProfile, paths: RunPaths) -> dict[str, str]:
    """What the driver needs to know, so that the shell spells no folder name."""
    if "\n" in str(paths.logs):
        raise PipelineError(f"{str(project_root())!r}: a line break in the path; set MEDGEMMA_KOREAN_ROOT to another")
    return {
        "name": paths.name,
        "log": str(paths.log),
        "pid": str(paths.pid),
        "lock": str(progress.lock_file(paths)),
        "progress": str(paths.progress),
        "chosen": " ".join(chosen_stages(args)),
        "skipped": " ".join(skipped_stages(args)),
        "demonstration": demonstration(profile),
    }


# the plan -----------------------------------------------------------------------------------------------


def gate_of(record: dict) -> str:
    """How a stage's gate went; empty where it has none."""
    gate = record.get("gate")
    if not gate:
        return ""
    return "gate passed" if gate["passed"] else f"gate FAILED: {'; '.join(gate['reasons'])}"


def unfinished(record: Path) -> str | None:
    """How far an interrupted training came, from its newest checkpoint; None where there is nothing to continue."""
    part = record.parent.with_name(f".{record.parent.name}.partial")
    steps = [int(p.name.split("-")[1]) for p in part.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return f"would continue after step {max(steps)}" if steps else None


def report_state(paths: RunPaths, found: dict[str, dict[str, Path]]) -> str:
    page = paths.report / "index.html"
    newest = max(
        (r.stat().st_mtime for programs in found.values() for r in programs.values() if r.is_file()), default=0
    )
    return "complete" if page.is_file() and page.stat().st_mtime >= newest else "would run"


def stage_state(programs: dict[str, Path], paths: RunPaths) -> tuple[str, str]:
    """("complete" | "differs" | "missing", what to say)."""
    there = {program: record for program, path in programs.items() if (record := read_record(path))}
    differences = []
    for program in there:
        wrong = progress.changed_inputs(programs[program], paths) + check_outputs(programs[program])
        differences += [f"{program}: {line}" if len(programs) > 1 else line for line in wrong]
    if differences:
        return "differs", "\n".join(differences)
    gates = [text for record in there.values() if (text := gate_of(record))]
    if len(there) == len(programs):
        return "complete", ", ".join(["complete", *gates])
    for program, path in programs.items():
        if program not in there and (how := unfinished(path)):
            return "missing", how
    left = [program for program in programs if program not in there]
    return "missing", "would run" if len(left) == len(programs) else f"would run: {', '.join(left)}"


def plan(args: argparse.Namespace, profile: ModelProfile, paths: RunPaths) -> dict[str, str]:
    """Stage -> what would happen to it."""
    chosen, skipped = chosen_stages(args), skipped_stages(args)
    found = progress.records_of(paths, profile.tiny is not None, args.skip_01)
    lines: dict[str, str] = {}
    ready: set[str] = set()  # complete, or made by then
    stop = ""  # the stage that the run would end at
    redone = ""
    for stage in DRIVER_STAGES:
        if stage == "report":
            state, text = "missing", report_state(paths, found)
            if any("would" in lines[s] for s in chosen if s in lines):
                text = "would run"
        else:
            state, text = stage_state(found[stage], paths)
        gated = "gate FAILED" in text and not args.allow_regression
        lacking = [" or ".join(needs) for needs in NEEDS[stage] if not ready.intersection(needs)]
        if state == "complete" and not gated:
            ready.add(stage)
        if stage in skipped:
            lines[stage] = "skipped" + (", its complete result is used" if state == "complete" else "")
        elif stage not in chosen:
            lines[stage] = f"not asked for ({text})" if state != "differs" else "not asked for (differs)"
        elif lacking:
            lines[stage] = f"blocked: {', '.join(lacking)} is not complete" if not stop else f"blocked by {stop}"
            stop = stop or stage
        elif state == "differs" and args.force:
            lines[stage], redone = f"would redo, for it differs:\n{text}", stage
            ready.add(stage)
        elif state == "differs":
            lines[stage] = f"differs, so the run would stop here until --force:\n{text}"
            stop = stop or stage
        elif gated:
            lines[stage] = f"{text}; the run would stop here until --allow-regression"
            stop = stop or stage
        elif state == "complete" and redone:
            lines[stage] = f"complete; redone if {redone} comes out otherwise"
        elif state == "missing" and stop:
            lines[stage] = f"blocked by {stop}"
        elif stage == "download" and state == "missing" and (files := manual_files_missing(args, paths)):
            lines[stage] = "blocked by files that a person brings (MANUAL_DATA.md; --skip-01 goes without):\n" + files
            stop = stage
        else:
            lines[stage] = text
            ready.add(stage)
    return lines


def manual_files_missing(args: argparse.Namespace, paths: RunPaths) -> str:
    from medgemma_korean.dictionary_files import missing_files
    from medgemma_korean.stardict import convert

    folder = paths.raw_dictionary
    missing = [] if args.skip_01 else missing_files(folder)
    converted = {conversion.name for conversion in convert(folder)[0]} if missing else set()
    return "\n".join(f"{show(folder / name)} is missing" for name in missing if name not in converted)


def disk_line(profile: ModelProfile, paths: RunPaths) -> str:
    """Room on the models' disk against a rough need; what is there already is not counted again."""
    place = next(p for p in (paths.models, *paths.models.parents) if p.exists())
    free = shutil.disk_usage(place).free / 1e9
    if profile.tiny is not None:
        return f"disk: {free:.0f} GB free at {place}; a built model needs less than 1 GB"
    shape = shapes.read_shape(profile, paths)
    rows = shapes.extended_rows(profile, paths, shape)[1]
    base = shapes.checkpoint_bytes(dataclasses.replace(shape, rows=rows), profile.dtype) / 1e9
    # At the widest moment of a run: the model as published, and two unquantised text-only bases.
    sizes = {
        paths.raw_model: BY_KEY[profile.name].gigabytes,
        paths.raw_lora_added: base,
        paths.another_lora_added: base,
    }
    need = sum(size for folder, size in sizes.items() if not (folder / "stage.json").is_file())
    short = " - NOT ENOUGH" if free < need else ""
    parts = f"{BY_KEY[profile.name].gigabytes:g} GB raw and two bases of {base:.1f} GB"
    return (
        f"disk: {free:.0f} GB free at {place}; about {need:.0f} of {sum(sizes.values()):.0f} GB are still needed for "
        f"models ({parts}), and the text data beside them{short}"
    )


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, device=True)
    parser.help_of = "./run_full_pipeline.sh"  # which hands its own options over
    parser.add_argument("--from", dest="from_stage", metavar="S", default=DRIVER_STAGES[0], help="first stage")
    parser.add_argument("--to", dest="to_stage", metavar="S", default=DRIVER_STAGES[-1], help="last stage")
    for number in ("00", "01", "02"):
        parser.add_argument(f"--skip-{number}", action="store_true", help=f"leave train_{number} out")
        parser.add_argument(f"--epochs-{number}", type=cli.positive_int, metavar="N", help=f"epochs of train_{number}")
    parser.add_argument("--max-samples", type=cli.positive_int, metavar="N", help="training rows of each stage")
    parser.add_argument("--allow-regression", action="store_true", help="go on where a gate fails")
    # Of stages that come hours later: what is wrong is said at once.
    parser.add_argument("--precision", choices=("auto", "8bit", "nf4", "bf16", "fp32"), help="of the frozen base")
    parser.add_argument("--new-tokens", type=cli.token_number, metavar="N", help="most new tokens, or auto")
    parser.add_argument("--min-count", type=cli.positive_int, metavar="N", help="times a new token has to stand there")
    parser.add_argument("--paths", action="store_true", help="print what the driver needs, as key=value, and end")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    profile, paths = cli.resolve(args)
    if args.paths:
        print("\n".join(f"{key}={value}" for key, value in answers(args, profile, paths).items()))
        return 0
    lines = plan(args, profile, paths)
    print(f"run {paths.name}: model {profile.name} ({profile.hardware}), data {show(paths.data)}")
    print(disk_line(profile, paths))
    for stage, text in lines.items():
        first, *more = text.split("\n")
        print(f"{stage:18}{first}")
        for line in more:
            print(f"{'':20}{line}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
