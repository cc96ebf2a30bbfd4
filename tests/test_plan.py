"""What a run would do, why and how long it takes; test_end_to_end compares it with what the programs answer."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest

from medgemma_korean import cli, memory, profiles, progress, records, shapes
from medgemma_korean.paths import DRIVER_STAGES, RunPaths
from medgemma_korean.stage import read_record

REPOSITORY = Path(__file__).resolve().parents[1]
DRIVER = (REPOSITORY / "run_full_pipeline.sh").read_text()


@pytest.fixture
def plan(load_program):
    return load_program("plan")


@pytest.fixture
def planned(plan, capsys):
    """planned(*options) -> (the two first lines, {stage: what is said of it})."""

    def planned(*options):
        assert plan.main(list(options)) == 0
        text = capsys.readouterr().out
        parts = re.split(rf"^({'|'.join(DRIVER_STAGES)}) +", text, flags=re.MULTILINE)
        return parts[0].splitlines(), dict(zip(parts[1::2], map(str.strip, parts[2::2]), strict=True))

    return planned


def record(path: Path, program: str, *, inputs=None, settings=None, **more):
    """A record as a stage would have written it, of nothing."""
    folder = path.parent
    identity = {"program": program, "format": 1, "settings": settings or {}, "inputs": inputs or {}}
    found = {
        "program": program,
        "fingerprint": records.digest_of(identity),
        "identity": identity,
        "home": ".",
        "inputs": {role: os.path.relpath(where, folder) for role, where in (more.pop("where", {})).items()},
        "settings": settings or {},
        "raw_files": {},
        "outputs": {},
        **more,
    }
    records.write_sealed(path, found)
    return found


# options ------------------------------------------------------------------------------------------------


def test_the_driver_and_the_plan_give_every_program_the_same_options(plan):
    """What an array of the driver holds, which stage it goes to, and what the plan would hand on."""
    arrays = {
        "tokens": {"new_tokens", "min_count"},
        "precision": {"precision"},
        "training": {"precision"},
        "samples": {"max_samples"},
        "veterinary": {"no_veterinary"},
        **{f"epochs_0{n}": {f"epochs_0{n}"} for n in range(3)},
        **dict.fromkeys(("device", "regression", "skip_01"), set()),  # which change no result of a stage that is there
    }
    stages = re.findall(r"^stage (\w+) (\S+)\.py(.*)$", DRIVER, re.MULTILINE)
    assert [stage for stage, _, _ in stages] == list(DRIVER_STAGES)
    for stage, file, rest in stages:
        if stage in ("download", "report"):
            continue
        names = re.findall(r'"\$\{(\w+)\[@\]\}"', rest)
        given = set().union(*(arrays[name] for name in names)) | ({"second"} if "--second" in rest else set())
        ours = {program: about for program, about in plan.PROGRAMS.items() if stage in (program, program.split("_")[0])}
        assert given == set().union(*(set(options) for _, options in ours.values())), stage
        assert stage == "refine" or [path for path, _ in ours.values()] == [file]


def test_options_of_a_program(plan):
    asked = "--name n --data-dir d --epochs-00 2 --max-samples 7 --precision nf4 --new-tokens 0 --no-veterinary"
    args = plan.make_parser().parse_args([*asked.split(), "--force", "--allow-regression"])
    run = ["--model", "tiny", "--data-dir", "d", "--name", "n"]
    assert plan.options_of("train_00", args) == [*run, "--precision", "nf4", "--max-samples", "7", "--epochs", "2"]
    assert plan.options_of("train_01", args) == [*run, "--precision", "nf4", "--max-samples", "7"]
    assert plan.options_of("add_lora_second", args) == [*run, "--second", "--precision", "nf4"]
    assert plan.options_of("prepare_tokenizer", args) == [*run, "--new-tokens", "0"]
    assert plan.options_of("refine_01_medical_dict", args) == [*run, "--no-veterinary"]
    assert plan.options_of("refine_00_plain_text", args) == run


# why ----------------------------------------------------------------------------------------------------


def test_what_is_missing_and_nothing_is_written(planned, root):
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    (first, disk), stages = planned()
    assert first.endswith("how long it takes no earlier run tells") and "GB free" in disk
    assert all(text.startswith("missing (no earlier run") and text.endswith("would run") for text in stages.values())
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob("*")}


def test_a_changed_option_a_changed_profile_and_a_changed_file(planned, refined, monkeypatch):
    assert planned()[1]["refine"] == "complete"
    said = "differs, so the run would stop here until --force:\n"
    assert planned("--no-veterinary")[1]["refine"].startswith(said)
    assert planned("--no-veterinary")[1]["refine"].endswith(
        "refine_01_medical_dict: settings.veterinary: True -> False"
    )
    tiny = profiles.get("tiny")
    with monkeypatch.context() as patch:
        patch.setitem(profiles.MODELS, "tiny", dataclasses.replace(tiny, validation_share=0.3))
        assert "refine_00_plain_text: settings.validation_share: 0.2 -> 0.3" in planned()[1]["refine"]
    raw = refined.raw_pairs / "sample_ko_en" / "train.jsonl"
    raw.write_text(raw.read_text() + '{"en": "One more.", "ko": "하나 더."}\n')
    text = planned()[1]["refine"]
    assert text.startswith(said) and "refine_01_english_korean: input sentence pairs" in text
    forced = planned("--force")[1]["refine"]
    assert re.match(r"forced \(about \d+ s\): would redo, for it differs:\n", forced) and "sentence pairs" in forced


def test_a_damaged_record_is_a_difference(planned, refined):
    path = refined.record("refine_02_kor_med_test")
    path.write_text(path.read_text().replace('"seconds": ', '"seconds": 1'))
    assert "other content than when it was written" in planned()[1]["refine"]


def test_what_is_made_anew_makes_others_anew(planned, plan, refined, monkeypatch):
    """A forced stage with other settings has another fingerprint, so that what is made of it differs for certain."""
    monkeypatch.setattr(plan, "PROGRAMS", {"refine_01_medical_dict": plan.PROGRAMS["refine_01_medical_dict"]})
    dictionary = read_record(refined.record("refine_01_medical_dict"))["fingerprint"]
    where = {"dictionary": refined.dictionary}
    record(refined.raw_model / "stage.json", "build_tiny_model", seconds=1)
    made = record(
        refined.tokenizer / "stage.json", "prepare_tokenizer", inputs={"dictionary": dictionary}, where=where, seconds=5
    )
    where = {"tokenizer": refined.tokenizer}
    inputs = {"tokenizer": made["fingerprint"]}
    record(refined.raw_lora_added / "stage.json", "add_lora", inputs=inputs, where=where, seconds=6)
    stages = planned("--no-veterinary", "--force")[1]
    assert stages["refine"].startswith("forced (about")
    tokenizer = "forced (no earlier run): would redo, for it is made of refine_01_medical_dict"
    assert stages["prepare_tokenizer"] == tokenizer
    assert stages["add_lora"].endswith("for it is made of prepare_tokenizer")
    assert planned()[1]["prepare_tokenizer"] == planned()[1]["add_lora"] == "complete"


def test_an_interrupted_training_continues_or_was_begun_otherwise(planned, plan, refined, monkeypatch):
    """As the program would answer: it refuses to go on with other settings."""
    monkeypatch.setattr(plan, "PROGRAMS", {"train_00": plan.PROGRAMS["train_00"]})
    record(refined.raw_lora_added / "stage.json", "add_lora", seconds=6)
    for name in ("base", "adapter"):
        (refined.raw_lora_added / name).mkdir()
    part = refined.trained_00.with_name(".tiny.partial")
    begun = plan.ask(plan.load("train/train_00_plain_text").main, ["--epochs", "2", "--precision", "fp32"])
    assert begun.program == "train_00_plain_text" and begun.settings["epochs"] == 2
    records.write_json(part / ".identity.json", begun.identity())
    (part / "checkpoint-30").mkdir()
    options = ["--from", "train_00", "--precision", "fp32"]
    said = planned(*options, "--epochs-00", "2")[1]["train_00"]
    assert said.startswith("would continue after step 30 (no earlier run; memory")
    said = planned(*options)[1]["train_00"].splitlines()
    assert said[0].startswith("differs, so the run would stop here") and said[-1].strip() == "settings.epochs: 2 -> 3"
    assert planned(*options, "--max-samples", "5")[1]["train_01"] == "blocked by train_00"


# how long -----------------------------------------------------------------------------------------------


def trained(paths, name, seconds, model="tiny", **settings):
    run = dataclasses.replace(paths, name=name)
    settings = {"epochs": 3, "max_samples": None, **settings}
    record(run.trained_00 / "stage.json", "train_00_plain_text", settings=settings, seconds=seconds)
    where = {"raw model": paths.models / "raw" / model}
    record(run.tokenizer / "stage.json", "prepare_tokenizer", where=where, seconds=1)


def time(plan, *options):
    args = plan.make_parser().parse_args(list(options))
    profile, paths = cli.resolve(args)
    return str(plan.time_of("train_00", paths.trained_00 / "stage.json", args, profile, paths))


def test_time_of_a_training_from_earlier_runs(plan, tmp_path):
    paths = RunPaths.of("tiny", "data/sample")
    assert time(plan) == "no earlier run"
    trained(paths, "other-model", 9000, model="medgemma-4b")
    assert time(plan) == "no earlier run"
    trained(paths, "another", 300)
    assert time(plan) == "about 5 min" and time(plan, "--epochs-00", "6") == "about 10 min"
    assert time(plan, "--max-samples", "10") == "at most 5 min"
    trained(paths, "tiny.previous", 600, max_samples=100)  # nearer than another run's
    assert time(plan) == "more than 10 min"
    assert time(plan, "--max-samples", "50") == "about 5 min"
    trained(paths, "tiny", 120)
    assert time(plan) == "about 2 min" and time(plan, "--name", "fresh") == "about 2 min"
    cut = paths.trained_00 / "stage.json"
    records.write_sealed(cut, {k: v for k, v in read_record(cut).items() if k != records.SEAL} | {"resumed": True})
    assert time(plan) == "more than 10 min"  # the time of its last part says less than a whole earlier run
    cut.write_text("{")
    assert time(plan) == "more than 10 min"


def test_time_to_refine_goes_by_bytes(plan, refined):
    path = refined.record("refine_01_english_korean")
    found = {k: v for k, v in read_record(path).items() if k != records.SEAL} | {"seconds": 100.0}
    records.write_sealed(path, found)
    args = plan.make_parser().parse_args([])
    profile = profiles.get("tiny")
    assert plan.time_of("refine", path, args, profile, refined).seconds == pytest.approx(100)
    raw = next(refined.raw_pairs.rglob("*.jsonl"))
    raw.write_text(raw.read_text() * 3)
    assert plan.time_of("refine", path, args, profile, refined).seconds == pytest.approx(300)
    path.rename(path.with_name(f"{path.name}.previous"))
    assert plan.time_of("refine", path, args, profile, refined).seconds == pytest.approx(300)


def test_total(plan):
    assert plan.total_line([]) == "nothing would run"
    assert plan.total_line([plan.Time()]) == "how long it takes no earlier run tells"
    assert plan.total_line([plan.Time(600.0), plan.Time(900.0, "at most")]) == "about 25 min"
    some = plan.total_line([plan.Time(600.0), plan.Time(), plan.Time()])
    assert some == "about 10 min, and 2 stages of which no earlier run tells"


# how much -----------------------------------------------------------------------------------------------


def test_memory_is_what_a_training_predicts(plan, monkeypatch):
    args = plan.make_parser().parse_args(["--model", "medgemma-27b"])
    profile, paths = cli.resolve(args)
    case = memory.case(profile, paths, profile.plain_text, precision="8bit", dtype=profile.dtype)
    need = memory.total(case) / 1e9

    def said(room, *options):
        asked = plan.make_parser().parse_args(["--model", "medgemma-27b", *options])
        return plan.memory_of("train_00", asked, profile, paths, (room * 1e9, "a card"))

    assert said(80) == f"memory {need:.1f} of 80.0 GB (a card)"
    assert said(need - 0.1) == f"memory {need:.1f} of {need - 0.1:.1f} GB (a card), so 1 row a forward pass"
    assert said(16).endswith("of 16.0 GB (a card), NOT ENOUGH even with one row a forward pass")
    assert "NOT ENOUGH" not in said(need - 10, "--precision", "nf4")
    assert "NOT ENOUGH" not in said(60, "--precision", "bf16", "--processes", "2", "--shard")
    assert plan.memory_of("add_lora", args, profile, paths, (1.0, "a card")) == ""


def test_the_precision_that_was_chosen_counts(plan, monkeypatch):
    args = plan.make_parser().parse_args(["--model", "medgemma-27b"])
    profile, paths = cli.resolve(args)
    before = plan.memory_of("train_00", args, profile, paths, (1e12, "x"))
    records.write_json(paths.raw_lora_added / "base" / "precision.json", {"precision": "nf4"})
    after = plan.memory_of("train_00", args, profile, paths, (1e12, "x"))
    assert float(after.split()[1]) < float(before.split()[1]) - 10


@pytest.mark.parametrize("damaged", ["{}", "[]", "{", '{"precision": "9bit"}', '{"precision": ["nf4"]}', "9" * 5000])
def test_a_damaged_choice_of_precision_leaves_that_of_the_profile(plan, damaged):
    args = plan.make_parser().parse_args(["--model", "medgemma-27b"])
    profile, paths = cli.resolve(args)
    before = plan.memory_of("train_00", args, profile, paths, (1e12, "x"))
    records.write_text(paths.raw_lora_added / "base" / "precision.json", damaged)
    assert plan.memory_of("train_00", args, profile, paths, (1e12, "x")) == before


def test_free_memory_of_the_card_that_would_be_used(plan, tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "$@" > "$0.asked"\necho "70000, NVIDIA H100 80GB HBM3"\n')
    tool.chmod(0o755)
    monkeypatch.setattr(shapes, "free_ram", lambda: 5e9)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert plan.free_memory(None) == (70000 * 2**20, "NVIDIA H100 80GB HBM3")
    assert "--id=3" in tool.with_name("nvidia-smi.asked").read_text()
    assert plan.free_memory("cpu") == (5e9, "main memory")
    tool.write_text("#!/bin/sh\necho 'No devices were found'\n")
    assert plan.free_memory(None) == (5e9, "main memory")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert plan.free_memory("cuda:0") == (5e9, "main memory")


def test_disk_that_refining_needs(plan, planned, refined):
    profile = profiles.get("medgemma-4b")
    paths = dataclasses.replace(refined, model="medgemma-4b", name="x")
    assert plan.text_gigabytes(paths) == 0  # done already
    refined.record("refine_00_plain_text").unlink()
    raw = [f for folder in (refined.raw_korean, refined.raw_english) for f in folder.rglob("*.jsonl")]
    assert plan.text_gigabytes(paths) == pytest.approx(1.4 * sum(f.stat().st_size for f in raw) / 1e9)
    assert "GB to refine the text" in plan.disk_line(profile, paths)


def test_asking_leaves_no_trace(plan, refined):
    def there():
        return {p: p.read_bytes() for p in refined.data.parents[1].rglob("*") if p.is_file()}

    args, before = plan.make_parser().parse_args([]), there()
    for program, path in progress.records_of(refined, True)["refine"].items():
        assert plan.answer_of(program, read_record(path), args) == []
    assert there() == before and not cli.log.disabled and "WORLD_SIZE" not in os.environ
