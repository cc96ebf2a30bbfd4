"""Say what a run would do, stage by stage, why, and what it takes, without doing it: `./run_full_pipeline.sh --plan`.

Reads   the stage records of the run, earlier ones of the same model, how much room its disk has, free memory
Writes  nothing

    python script/operate/plan.py --model medgemma-4b
    python script/operate/plan.py --model tiny --from train_00 --paths     # what the driver asks: key=value lines

Records are compared cheaply: outputs by size and time, inputs by the fingerprint of the stage that made them. Whether
settings differ each program is asked itself (`stage.ask`), with the options that the driver would hand to it. Times
are those of earlier runs, scaled by epochs, samples and bytes; memory is predicted from shapes. Nothing imports torch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from medgemma_korean import cli, profiles, progress, records, shapes
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import DRIVER_STAGES, RunPaths, project_root, show
from medgemma_korean.profiles import ModelProfile
from medgemma_korean.sources import BY_KEY
from medgemma_korean.stage import ask, check_outputs, files_under, read_record, record_beside

REFINING = 1.4  # bytes of the disk while plain text is refined, of a raw byte
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


# what a program would say -------------------------------------------------------------------------------

SCRIPT = Path(__file__).resolve().parents[1]
# Program -> its file below script/, and which of the driver's options it gets beside those that name the run. Programs
# that fetch are not among them: they have no settings, and would ask the hub first.
PROGRAMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "build_tiny_model": ("model/build_tiny_model", ()),
    "refine_00_plain_text": ("refine/refine_00_plain_text", ()),
    "refine_01_medical_dict": ("refine/refine_01_medical_dict", ("no_veterinary",)),
    "refine_01_english_korean": ("refine/refine_01_english_korean", ()),
    "refine_02_kor_med_test": ("refine/refine_02_kor_med_test", ()),
    "prepare_tokenizer": ("model/prepare_tokenizer", ("new_tokens", "min_count")),
    "add_lora": ("model/add_lora", ("precision",)),
    "train_00": ("train/train_00_plain_text", ("precision", "max_samples", "epochs_00")),
    "train_01": ("train/train_01_medical_dict", ("precision", "max_samples", "epochs_01")),
    "add_lora_second": ("model/add_lora", ("second", "precision")),
    "train_02": ("train/train_02_kor_med_test", ("precision", "max_samples", "epochs_02")),
}


def options_of(program: str, args: argparse.Namespace) -> list[str]:
    """The command line that the driver would give a program."""
    argv = ["--model", args.model]
    argv += [
        part for name in ("data_dir", "name") if (value := getattr(args, name)) for part in (f"--{flag(name)}", value)
    ]
    for name in PROGRAMS[program][1]:
        value = True if name == "second" else getattr(args, name)
        if value is True:
            argv.append(f"--{flag(name)}")
        elif value not in (None, False):
            argv += ["--epochs" if name.startswith("epochs") else f"--{flag(name)}", str(value)]
    return argv


def flag(name: str) -> str:
    return name.replace("_", "-")


def load(name: str) -> ModuleType:
    """The module of script/<name>.py."""
    file = SCRIPT / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"asked_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def together(number: int) -> Iterator[None]:
    """A program sees as many processes as the driver would start: rows a forward pass must divide their shares."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(number)
    try:
        yield
    finally:
        os.environ.pop("WORLD_SIZE") if before is None else os.environ.update(WORLD_SIZE=before)


def answer_of(program: str, record: dict[str, Any] | None, args: argparse.Namespace) -> list[str]:
    """What a program says differs from its record, with these options; [] where it says "already complete".

    Without a record: from what an interrupted training was begun with; [] where it would continue, or begin.
    """
    if program not in PROGRAMS:
        return []
    file = PROGRAMS[program][0]
    with together(args.processes if file.startswith("train/") else 1):
        try:
            stage = ask(load(file).main, options_of(program, args))
            if record is None:
                return stage.begun_otherwise() or [] if stage else []
            return stage.differences(record) if stage else []
        except PipelineError as error:
            return str(error).split("\n") if record is not None else []


# how long -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Time:
    """Seconds of a stage, None where no earlier run tells. bound: "", "more than" or "at most"."""

    seconds: float | None = None
    bound: str = ""

    def __str__(self) -> str:
        if self.seconds is None:
            return "no earlier run"
        return f"{self.bound or 'about'} {progress.duration(max(self.seconds, 1.0))}"


def model_of(paths: RunPaths, run: str) -> str | None:
    """The model of a run, from what its tokenizer or its first base was made of; None where neither is there."""
    for kind in ("tokenizer", "raw_lora_added"):
        with contextlib.suppress(PipelineError, KeyError, TypeError):
            if record := read_record(paths.models / kind / run / "stage.json"):
                return Path(record["inputs"]["raw model"]).name
    return None


def earlier(path: Path, paths: RunPaths) -> list[dict[str, Any]]:
    """Records that tell how long a stage takes, the best first: its own, its former ones, other runs' of the model."""
    if path.name != "stage.json":  # of data
        files = [path, *sorted(path.parent.glob(f"{path.name}.previous*"), reverse=True)]
    else:
        own = path.parent.name
        found = sorted(path.parent.parent.glob("*/stage.json"), key=lambda file: -file.stat().st_mtime)
        runs = {file: re.sub(r"\.previous(\.\d+)?$", "", file.parent.name) for file in found}
        shared = path.parent == paths.raw_model  # the folder is a model's, not a run's
        others = [f for f in found if runs[f] != own and not shared and model_of(paths, runs[f]) == paths.model]
        files = [path, *(f for f in found if runs[f] == own and f != path), *others]
    known = []
    for file in files:
        with contextlib.suppress(PipelineError):
            if (record := read_record(file)) and isinstance(record.get("seconds"), (int, float)):
                known.append(record | {"at": file})
    return sorted(known, key=lambda record: record.get("resumed", False))  # stable: whole runs before parts


def raw_bytes(record: dict[str, Any]) -> tuple[float, float]:
    """Bytes of the raw files that a record's stage read, then and now."""
    then = sum(entry["size"] for entry in record.get("raw_files", {}).values())
    home = record["at"].parent / record["home"]
    raw = {Path(os.path.normpath(home / name)) for name in record.get("raw_files", {})}
    folders = [Path(os.path.normpath(home / path)) for path in record["inputs"].values()]
    read = [path for path in folders if path.exists() and any(file.is_relative_to(path) for file in raw)]
    return then, sum(file.stat().st_size for path in read for file in files_under(path))


def time_of(stage: str, path: Path, args: argparse.Namespace, profile: ModelProfile, paths: RunPaths) -> Time:
    """How long one program took before, scaled to what it is to do now."""
    for record in earlier(path, paths):
        seconds, bound = float(record["seconds"]), "more than" if record.get("resumed") else ""
        if stage in TRAINED:
            then, number = record["settings"], stage.removeprefix("train_")
            epochs = getattr(args, f"epochs_{number}") or getattr(profile, TRAINED[stage]).epochs
            seconds *= epochs / then.get("epochs", epochs)
            before, now = then.get("max_samples"), args.max_samples
            if before and now:
                seconds *= now / before
            elif before != now:  # all rows, which the record does not count
                bound = "at most" if now else "more than"
        elif record.get("raw_files"):
            old, new = raw_bytes(record)
            seconds *= new / old if old else 1.0
        return Time(seconds, bound)
    return Time()


TRAINED = {"train_00": "plain_text", "train_01": "dictionary", "train_02": "mcq"}  # stage -> its profile field


def time_of_stage(
    stage: str, programs: dict[str, Path], args: argparse.Namespace, profile: ModelProfile, paths: RunPaths
) -> Time:
    """The sum over the programs that have to run; a fetch takes what the network makes of it, and is not counted."""
    found = [
        time_of(stage, path, args, profile, paths)
        for program, path in programs.items()
        if program in (*PROGRAMS, "report")
    ]
    known = [time.seconds for time in found if time.seconds is not None]
    if not known:
        return Time()
    bounds = {time.bound for time in found if time.bound} | ({"more than"} if len(known) < len(programs) else set())
    return Time(sum(known), "more than" if "more than" in bounds else "".join(bounds))


# how much -----------------------------------------------------------------------------------------------


def free_memory(device: str | None) -> tuple[float, str]:
    """Free bytes and where: of the card that a training would take, else of the machine. Without torch."""
    if device is None or device.startswith("cuda"):
        card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        tool = shutil.which("nvidia-smi")
        if tool and card:
            query = [tool, f"--id={card}", "--query-gpu=memory.free,name", "--format=csv,noheader,nounits"]
            with contextlib.suppress(OSError, subprocess.TimeoutExpired, ValueError):
                told = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
                free, _, name = told.partition(", ")
                return float(free) * 2**20, name
    return shapes.free_ram(), "main memory"


def chosen_precision(file: Path, profile: ModelProfile) -> str:
    """What a base's `precision.json` says; the profile's precision where there is none or a damaged one."""
    with contextlib.suppress(PipelineError):
        if (found := records.read_object(file, "precision")["precision"]) in tuple(shapes.BITS):
            return found
    return profile.precision


def memory_of(
    stage: str, args: argparse.Namespace, profile: ModelProfile, paths: RunPaths, available: tuple[float, str]
) -> str:
    """What a training is predicted to need of what there is; empty for the other stages."""
    if stage not in TRAINED:
        return ""
    from medgemma_korean import memory

    second = stage == "train_02"
    base = (paths.another_lora_added if second else paths.raw_lora_added) / "base" / "precision.json"
    precision = args.precision if args.precision not in (None, "auto") else chosen_precision(base, profile)
    shards = args.processes if args.shard else 1
    settings = getattr(profile, TRAINED[stage])
    case = memory.case(profile, paths, settings, precision=precision, dtype=profile.dtype, second=second, shards=shards)
    room, where = available
    rows = memory.micro_batch(case, room)
    text = f"memory {memory.total(case) / memory.GB:.1f} of {room / memory.GB:.1f} GB ({where})"
    if rows is None:
        return f"{text}, NOT ENOUGH even with one row a forward pass"
    return text if rows == settings.micro_batch else f"{text}, so {cli.count(rows, 'row')} a forward pass"


# the plan -----------------------------------------------------------------------------------------------


@dataclass
class State:
    """What is there of a stage. kind: "complete", "differs" or "missing". lines: what differs. left: to be made."""

    kind: str
    text: str = ""
    lines: list[str] = field(default_factory=list)
    left: dict[str, Path] = field(default_factory=dict)
    gated: bool = False  # its gate failed


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


def report_state(paths: RunPaths, found: dict[str, dict[str, Path]]) -> State:
    page = paths.report / "index.html"
    record = record_beside(page)
    newest = max(
        (r.stat().st_mtime for programs in found.values() for r in programs.values() if r.is_file()), default=0
    )
    current = page.is_file() and record.is_file() and page.stat().st_mtime >= newest
    return State("complete", "complete") if current else State("missing", "would run", left={"report": record})


def stage_state(programs: dict[str, Path], paths: RunPaths, args: argparse.Namespace) -> State:
    """What is there of a stage, and what its programs would say of it."""
    there, differences, left = {}, [], {}
    for program, path in programs.items():
        try:
            record = read_record(path)
            if record is None:
                left[program] = path
                if unfinished(path) and (told := answer_of(program, None, args)):
                    differences += ["an interrupted training was begun with something else:", *told]
                continue
            there[program] = record
            wrong = progress.changed_inputs(path, paths) + check_outputs(path)
            told = answer_of(program, record, args)
            wrong = wrong + [line for line in told if line.startswith(("settings", "format of"))] if wrong else told
        except PipelineError as error:  # a record that is damaged
            wrong = [str(error)]
        except (KeyError, TypeError, AttributeError) as error:
            wrong = [f"{show(path)}: not a stage record ({type(error).__name__}: {error})"]
        if wrong:
            left[program] = path
        differences += [f"{program}: {line}" if len(programs) > 1 else line for line in wrong]
    if differences:
        return State("differs", lines=differences, left=left)
    gates = [text for record in there.values() if (text := gate_of(record))]
    if not left:
        return State("complete", ", ".join(["complete", *gates]), gated=any("FAILED" in gate for gate in gates))
    for path in left.values():
        if how := unfinished(path):
            return State("missing", how, left=left)
    return State("missing", "would run" if not there else f"would run: {', '.join(left)}", left=left)


def made_anew(programs: dict[str, Path], anew: set[str]) -> list[str]:
    """Which of the programs that are made anew a complete stage was made from."""
    from_what = set()
    for path in programs.values():
        record = read_record(path)
        home = path.parent / record["home"]
        for where in record["inputs"].values():
            maker = progress.maker_of(Path(os.path.normpath(home / where)))
            from_what |= {maker["program"]} if maker else set()
    return sorted(from_what & anew)


def plan(args: argparse.Namespace, profile: ModelProfile, paths: RunPaths) -> tuple[dict[str, str], list[Time]]:
    """Stage -> what would happen to it and why, and how long each takes that would run."""
    chosen, skipped = chosen_stages(args), skipped_stages(args)
    found = progress.records_of(paths, profile.tiny is not None, args.skip_01)
    available = free_memory(args.device)
    lines: dict[str, str] = {}
    times: list[Time] = []
    ready: set[str] = set()  # complete, or made by then
    anew: set[str] = set()  # programs whose result changes, so that what was made of it does
    stop = ""  # the stage that the run would end at
    runs = False

    def costs(stage: str, left: dict[str, Path]) -> str:
        times.append(time_of_stage(stage, left, args, profile, paths))
        return "; ".join(part for part in (str(times[-1]), memory_of(stage, args, profile, paths, available)) if part)

    for stage in DRIVER_STAGES:
        if stage == "report":
            state = report_state(paths, found)
            if runs and state.kind == "complete":
                state = State("missing", "would run", left={"report": record_beside(paths.report / "index.html")})
        else:
            state = stage_state(found[stage], paths, args)
        gated = state.gated and not args.allow_regression
        lacking = [" or ".join(needs) for needs in NEEDS[stage] if not ready.intersection(needs)]
        if state.kind == "complete" and not gated:
            ready.add(stage)
        redo = made_anew(found[stage], anew) if state.kind == "complete" and anew and stage != "report" else []
        text = "\n".join(state.lines)
        if stage in skipped:
            lines[stage] = "skipped" + (", its complete result is used" if state.kind == "complete" else "")
            continue
        elif stage not in chosen:
            lines[stage] = "not asked for (differs)" if state.kind == "differs" else f"not asked for ({state.text})"
            continue
        elif state.kind == "differs" and not args.force:
            lines[stage] = f"differs, so the run would stop here until --force:\n{text}"
            stop = stop or stage
            continue
        elif lacking:
            lines[stage] = f"blocked: {', '.join(lacking)} is not complete" if not stop else f"blocked by {stop}"
            stop = stop or stage
            continue
        elif gated and not redo:
            lines[stage] = f"{state.text}; the run would stop here until --allow-regression"
            stop = stop or stage
            continue
        elif state.kind == "missing" and stop:
            lines[stage] = f"blocked by {stop}"
            continue
        elif stage == "download" and state.kind == "missing" and (files := manual_files_missing(args, paths)):
            lines[stage] = "blocked by files that a person brings (MANUAL_DATA.md; --skip-01 goes without):\n" + files
            stop = stage
            continue
        ready.add(stage)
        if state.kind == "complete" and not redo:
            lines[stage] = state.text
            continue
        runs = True
        if state.kind == "differs":
            anew |= {read.get("program", name) for name, read in _readable(state.left)}
            lines[stage] = f"forced ({costs(stage, state.left)}): would redo, for it differs:\n{text}"
        elif redo:
            anew |= {record["program"] for _, record in _readable(found[stage])}
            lines[stage] = f"forced ({costs(stage, found[stage])}): would redo, for it is made of {', '.join(redo)}"
        else:
            part = state.text != "would run"  # some of it is there
            cost = costs(stage, state.left)
            lines[stage] = f"{state.text} ({cost})" if part else f"missing ({cost}): {state.text}"
    return lines, times


def _readable(programs: dict[str, Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for program, path in programs.items():
        with contextlib.suppress(PipelineError):
            yield program, read_record(path) or {}


def total_line(times: list[Time]) -> str:
    """How long all of it takes."""
    known = [time.seconds for time in times if time.seconds is not None]
    unknown = len(times) - len(known)
    if not times:
        return "nothing would run"
    if not known:
        return "how long it takes no earlier run tells"
    return f"about {progress.duration(sum(known))}" + (
        f", and {cli.count(unknown, 'stage')} of which no earlier run tells" if unknown else ""
    )


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
    text = text_gigabytes(paths)
    short = " - NOT ENOUGH" if free < need + text else ""
    parts = f"{BY_KEY[profile.name].gigabytes:g} GB raw and two bases of {base:.1f} GB"
    return (
        f"disk: {free:.0f} GB free at {place}; about {need:.0f} of {sum(sizes.values()):.0f} GB are still needed for "
        f"models ({parts}), and {f'{text:.0f} GB to refine the text' if text else 'the text data beside them'}{short}"
    )


def text_gigabytes(paths: RunPaths) -> float:
    """Room to refine the plain text that is here; 0 where that is done, or where there is none yet."""
    if paths.record("refine_00_plain_text").is_file():
        return 0.0
    folders = [folder for folder in (paths.raw_korean, paths.raw_english) if folder.exists()]
    return REFINING * sum(file.stat().st_size for folder in folders for file in files_under(folder)) / 1e9


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
    parser.add_argument(
        "--new-tokens",
        type=lambda text: str(cli.token_number(text)),
        metavar="N",
        help="most new tokens, or auto",
    )
    parser.add_argument("--min-count", type=cli.positive_int, metavar="N", help="times the text must hold a new token")
    parser.add_argument("--precision", choices=("auto", "8bit", "nf4", "bf16", "fp32"), help="of the frozen base")
    parser.add_argument("--no-veterinary", action="store_true", help="leave the animal dictionary out")
    parser.add_argument("--processes", type=cli.positive_int, default=1, metavar="N", help="cards to train on")
    parser.add_argument("--shard", action="store_true", help="divide the base between them")
    parser.add_argument("--paths", action="store_true", help="print what the driver needs, as key=value, and end")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    profile, paths = cli.resolve(args)
    if args.paths:
        print("\n".join(f"{key}={value}" for key, value in answers(args, profile, paths).items()))
        return 0
    if args.new_tokens not in (None, "auto"):  # which is what memory and disk go by
        profile = dataclasses.replace(profile, new_tokens=int(args.new_tokens))
    lines, times = plan(args, profile, paths)
    print(f"run {paths.name}: model {profile.name} ({profile.hardware}), data {show(paths.data)}; {total_line(times)}")
    print(disk_line(profile, paths))
    for stage, text in lines.items():
        first, *more = text.split("\n")
        print(f"{stage:18}{first}")
        for line in more:
            print(f"{'':20}{line}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
