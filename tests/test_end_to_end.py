"""The shipped command on the embedded default, from nothing to the report: what a new user sees.

One run of `./run_full_pipeline.sh` in a folder of its own (MEDGEMMA_KOREAN_ROOT) serves all tests here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from medgemma_korean.paths import DRIVER_STAGES

REPOSITORY = Path(__file__).resolve().parents[1]
REAL_DATA = REPOSITORY.parent / "shared" / "real_data"
DRIVER = REPOSITORY / "run_full_pipeline.sh"
pytestmark = pytest.mark.slow


def run(root: Path, *command: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "MEDGEMMA_KOREAN_ROOT": str(root)}
    return subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, cwd=root)


def program(root: Path, name: str, *options: object) -> subprocess.CompletedProcess:
    return run(root, sys.executable, REPOSITORY / "script" / name, *options)


def new_root(folder: Path) -> Path:
    shutil.copytree(REPOSITORY / "data" / "sample" / "01_raw", folder / "data" / "sample" / "01_raw")
    shutil.rmtree(folder / "data" / "sample" / "01_raw" / ".stages", ignore_errors=True)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    root = new_root(tmp_path_factory.mktemp("whole run"))
    return root, run(root, DRIVER)


def scores(root: Path, name: str = "tiny") -> dict:
    return json.loads((root / "model" / "report" / name / "summary.json").read_text())["evaluations"]


def test_ends_with_the_table_and_names_the_report(finished):
    root, result = finished
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    assert "demonstration" in lines[0] and "--model medgemma-4b" in lines[0]
    assert "demonstration" in lines[-1] and "--model medgemma-4b" in lines[-1]
    table = result.stdout[result.stdout.index("bits/char Korean") :]
    for name in ("base", "extended", "00", "01", "02"):
        assert re.search(rf"^{name} .*\d\.\d{{3}} .*% \(.* to .*\)", table, re.MULTILINE), name
    assert "index.html" in table
    assert (root / "model" / "report" / "tiny" / "index.html").is_file()


def test_every_stage_is_complete_in_the_progress_file(finished):
    root, _ = finished
    text = (root / "logs" / "progress_tiny.txt").read_text()
    for stage in DRIVER_STAGES:
        assert re.search(rf"^{stage} +complete +100 %", text, re.MULTILINE), text


def test_numbers_move_as_they_should(finished):
    root, _ = finished
    found = scores(root)
    # The same prompts of every model, the untouched one first.
    files = [root / "model" / "report" / "tiny" / "scores" / f"{name}.json" for name in ("base", "extended", "merged")]
    files += [root / "model" / name / "tiny" / "evaluation.json" for name in ("00_trained", "01_trained", "02_trained")]
    asked = [[sample["prompt"] for sample in json.loads(file.read_text())["samples"]] for file in files]
    assert len(asked[0]) == 3 and asked == [asked[0]] * 6
    looks = json.loads((root / "model" / "02_trained" / "tiny" / "training_info.json").read_text())[
        "validation_history"
    ]
    assert all({"accuracy", "korean_bits", "english_bits", "forgetting"} <= look.keys() for look in looks)
    bits = {name: e["bits_per_character"] for name, e in found.items()}
    assert bits["00"]["korean"] <= 0.9 * bits["extended"]["korean"]
    assert bits["00"]["korean"] < bits["base"]["korean"]
    for name in bits:
        assert bits[name]["english"] <= 1.05 * bits["base"]["english"], name
    for language in ("korean", "medical"):
        before, after = (found[n]["tokens_per_character"][language] for n in ("base", "extended"))
        assert after < before
    assert found["extended"]["tokens_per_character"]["english"] == found["base"]["tokens_per_character"]["english"]
    for name, evaluation in found.items():
        score = evaluation["mcq"]
        assert score["n"] == 30 and 0 <= score["lower"] <= score["accuracy"] <= score["upper"] <= 1, name


def test_accuracy_within_chance_is_called_so(finished):
    _, result = finished
    assert re.search(r"^02 .*(within|above) chance", result.stdout, re.MULTILINE)


def test_old_rows_stayed_and_new_rows_moved(finished):
    from safetensors import safe_open

    root, _ = finished

    def embedding(folder: Path):
        with safe_open(folder / "model.safetensors", "pt") as file:
            return file.get_tensor("model.embed_tokens.weight")

    info = json.loads((root / "model" / "tokenizer" / "tiny" / "tokenizer_info.json").read_text())
    raw = embedding(root / "model" / "raw" / "tiny")
    merged = embedding(root / "model" / "01_another_lora_added" / "tiny" / "base")
    extended = embedding(root / "model" / "raw_lora_added" / "tiny" / "base")
    old, new = info["base_vocab"], slice(info["base_vocab"], info["vocab"])
    assert (raw[:old] == merged[:old]).all()
    assert ((extended[new] != merged[new]).any(dim=1)).all()
    # After stage 00 alone: it trains no other row, and says of each new one whether it moved.
    with safe_open(root / "model" / "00_trained" / "tiny" / "final" / "adapter_model.safetensors", "pt") as file:
        (name,) = (name for name in file.keys() if "embed_tokens" in name)  # noqa: SIM118 - not a mapping
        trained = file.get_tensor(name)
    record = json.loads((root / "model" / "00_trained" / "tiny" / "stage.json").read_text())
    rows = record["token_rows"]
    assert trained.shape[0] == rows["new"] == info["new_tokens"]
    assert int((trained != extended[new]).any(dim=1).sum()) == rows["moved"] == rows["new"]
    assert rows["never_read"] < 0.2 * rows["new"]


def test_right_after_extension_the_model_is_almost_what_it_was(finished):
    """Mean rows beside those of the library, bits per character and probability on English; the verdict names them."""
    root, result = finished
    judged = json.loads((root / "model" / "raw_lora_added" / "tiny" / "verdict.json").read_text())
    mean, base = judged["rows"]["mean of constituents"], judged["base"]
    assert mean["korean"] <= 1.35 * base["korean"] and mean["english"] <= 1.03 * base["english"]
    assert judged["rows"]["library default"]["korean"] != mean["korean"]
    assert judged["verdict"] in ("extend", "do not extend") and judged["verdict"] in result.stdout
    assert "library default" in (root / "model" / "report" / "tiny" / "index.html").read_text()


def test_the_extended_base_is_plain_transformers_and_sentencepiece(finished, tmp_path):
    import sentencepiece
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root, _ = finished
    base = root / "model" / "raw_lora_added" / "tiny" / "base"
    refined = root / "data" / "sample" / "02_refined"
    documents = [
        json.loads(line)["text"]
        for file in sorted(refined.glob("00_*/*.jsonl"))
        if file.stem in ("train", "validation")
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    documents += [row["definition"] for row in json.loads((refined / "01_medical_dict.json").read_text())]
    for line in (refined / "02_kor_med_test" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        documents += [value for value in json.loads(line).values() if isinstance(value, str)]
    assert len(documents) >= 500

    def load(folder: Path):
        return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def texts(model, tokenizer) -> list[str]:
        found = []
        for prompt in ("고혈압은", "환자가 어지럼증을", "The patient", "당뇨병 환자의 혈당"):
            ids = tokenizer(prompt, return_tensors="pt")
            found.append(tokenizer.decode(model.generate(**ids, max_new_tokens=24)[0]))
        return found

    model, tokenizer = load(base)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert texts(*load(tmp_path)) == texts(model, tokenizer)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    assert len(pieces) == len(tokenizer)
    for text in documents:
        assert pieces.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text[:80]


def test_second_run_answers_already_complete(finished):
    root, _ = finished
    before = {p: p.stat().st_mtime_ns for p in (root / "model").rglob("*.safetensors")}
    result = run(root, DRIVER)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert result.stdout.count("already complete") >= 15  # programs, not stages
    assert before == {p: p.stat().st_mtime_ns for p in (root / "model").rglob("*.safetensors")}


def test_verify_passes_and_finds_one_flipped_bit(finished):
    root, _ = finished
    assert run(root, DRIVER, "--verify").returncode == 0
    file = root / "model" / "00_trained" / "tiny" / "final" / "adapter_model.safetensors"
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        result = run(root, DRIVER, "--verify")
        assert result.returncode == 2 and "00_trained" in result.stdout + result.stderr
    finally:
        file.write_bytes(content)


def test_log_is_short_and_clean(finished):
    """Good to tail: no escape codes, no progress bars, no wall of library warnings."""
    root, _ = finished
    text = (root / "logs" / "pipeline_tiny.log").read_text()
    assert "\x1b" not in text and "it/s]" not in text and "Warning" not in text
    assert text.count("\n") < 300


def test_the_report_opens_the_test_split_once(finished):
    root, result = finished
    folder = root / "model" / "report" / "tiny"
    (look,) = json.loads((folder / "test_looks.json").read_text())
    assert list(look["models"]) == ["base", "02"] and "look 1 at the test split" in result.stdout
    found = json.loads((folder / "validation" / "test-letter.json").read_text())
    assert [m["mcq"]["n"] for m in found["models"].values()] == [30, 30]
    assert found["models"]["02"]["against_first"]["before"] == "base"
    again = program(root, "evaluate/report.py")
    assert again.returncode == 0 and "already complete" in again.stdout
    assert len(json.loads((folder / "test_looks.json").read_text())) == 1


def test_stderr_is_quiet(finished):
    _, result = finished
    assert len(result.stderr.splitlines()) < 10, result.stderr[-3000:]


def test_metrics_are_one_event_a_line(finished):
    root, _ = finished
    events = [json.loads(line) for line in (root / "logs" / "metrics_tiny.jsonl").read_text().splitlines()]
    steps = [e for e in events if e["event"] == "step" and e["program"] == "train_00_plain_text"]
    record = json.loads((root / "model" / "00_trained" / "tiny" / "stage.json").read_text())
    assert [e["step"] for e in steps] == list(range(1, record["steps"] + 1))


def test_final_loads_as_the_model_card_shows(finished, tmp_path):
    """Plain transformers and peft, from another working directory, without our package."""
    root, _ = finished
    folder = root / "model" / "02_trained" / "tiny"
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    assert "medgemma_korean" not in code
    script = tmp_path / "use.py"
    script.write_text(
        code.replace('Path(".")', f"Path({str(folder)!r})")
        + "\nimport sys\nassert not any(m.startswith('medgemma_korean') for m in sys.modules)\n"
        + "print('GENERATED', output.shape[1] - inputs['input_ids'].shape[1])\n"
    )
    result = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout.rsplit("GENERATED", 1)[1]) > 0


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.full
def test_killed_training_continues_to_the_same_bytes(finished, tmp_path):
    root, _ = finished
    options = ("--max-steps", "9", "--show-samples-every", "3")
    finals = []
    for kill in (False, True):
        copy = tmp_path / ("killed" if kill else "whole")
        shutil.copytree(root / "data", copy / "data")
        for kind in ("raw_lora_added", "report"):
            shutil.copytree(root / "model" / kind, copy / "model" / kind)
        if kill:
            environment = {**os.environ, "MEDGEMMA_KOREAN_ROOT": str(copy)}
            command = [sys.executable, REPOSITORY / "script" / "train" / "train_00_plain_text.py", *options]
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            marks = copy / "model" / "00_trained"
            while process.poll() is None and not list(marks.rglob("checkpoint-3/complete.json")):
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not (marks / "tiny").exists()
        result = program(copy, "train/train_00_plain_text.py", *options)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        if kill:
            assert "continuing after step" in result.stdout
        folder = copy / "model" / "00_trained" / "tiny"
        evaluation = json.loads((folder / "evaluation.json").read_text())
        finals.append((digest(folder / "final" / "adapter_model.safetensors"), evaluation))
    assert finals[0] == finals[1]


def test_changed_setting_is_told_and_force_keeps_the_old(finished, tmp_path):
    root, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(root / "data", copy / "data")
    shutil.copytree(root / "model", copy / "model")
    result = program(copy, "model/prepare_tokenizer.py", "--new-tokens", "64")
    assert result.returncode == 2 and "new_tokens: 2048 -> 64" in result.stdout
    result = program(copy, "model/prepare_tokenizer.py", "--new-tokens", "64", "--force")
    assert result.returncode == 0, result.stdout
    assert (copy / "model" / "tokenizer" / "tiny.previous" / "tokenizer.json").is_file()
    result = program(copy, "model/add_lora.py")
    assert result.returncode == 2 and "input changed: tokenizer" in result.stdout
    result = program(copy, "train/train_00_plain_text.py")
    assert result.returncode == 0, "train_00 itself is unchanged until add_lora is made anew"


@pytest.mark.full
def test_base_vocabulary_goes_through_the_same_code_and_stands_beside_the_extended_one(finished, tmp_path):
    """--new-tokens 0: no new rows anywhere, and the chain still trains; stage 00 of both on the same text."""
    root, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(root / "data", copy / "data")
    for kind in ("raw", "tokenizer", "raw_lora_added", "report"):
        shutil.copytree(root / "model" / kind, copy / "model" / kind)
    text = ("--max-characters", "9000", "--epochs", "1")
    base = ("--name", "base")
    for name, *options in (
        ("model/prepare_tokenizer.py", "--new-tokens", "0", *base),
        ("model/add_lora.py", *base),
        ("train/train_00_plain_text.py", *text, *base),
        ("model/add_lora.py", "--second", *base),
        ("train/train_02_kor_med_test.py", "--max-steps", "2", *base),
        ("train/train_00_plain_text.py", *text),
    ):
        result = program(copy, name, *options)
        assert result.returncode == 0, (name, result.stdout[-2000:] + result.stderr[-2000:])
    record = json.loads((copy / "model" / "00_trained" / "base" / "stage.json").read_text())
    assert record["trainable"]["rows"] == 0 and record["trainable"]["lora"] > 0
    warnings = json.loads((copy / "model" / "01_another_lora_added" / "base" / "stage.json").read_text())["warnings"]
    assert any("01_trained was skipped" in warning for warning in warnings)

    result = program(copy, "evaluate/report.py", "--beside", "base")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    table = re.findall(r"^(tiny|base), (before|after) +(\d[\d,]*) +(.*)$", result.stdout, re.MULTILINE)
    assert [row[:2] for row in table] == [("tiny", "before"), ("tiny", "after"), ("base", "before"), ("base", "after")]
    assert int(table[0][2].replace(",", "")) > 0 and table[2][2] == "0"
    assert [row[3].split()[0] for row in table if row[1] == "after"] == ["9,000", "9,000"]
    assert "base, after" in (copy / "model" / "report" / "tiny" / "index.html").read_text()


def test_gate_stops_the_chain(finished, tmp_path):
    """A rate that destroys the model: exit 3, again when run again, and nothing is built on it unasked."""
    root, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(root / "data", copy / "data")
    for kind in ("raw_lora_added", "report"):
        shutil.copytree(root / "model" / kind, copy / "model" / kind)
    options = ("--max-steps", "6", "--show-samples-every", "6", "--learning-rate", "0.5")
    result = program(copy, "train/train_00_plain_text.py", *options)
    assert result.returncode == 3 and "English bits per character rose" in result.stdout, result.stdout[-2000:]
    again = program(copy, "train/train_00_plain_text.py", *options)
    assert again.returncode == 3 and "already complete" in again.stdout
    after = program(copy, "model/add_lora.py", "--second")
    assert after.returncode == 3 and "--allow-regression" in after.stdout
    assert not (copy / "model" / "01_another_lora_added" / "tiny").exists()


# what a model can learn, the harness sees ---------------------------------------------------------------

LEARNED = 64  # questions, or entries


def over_fitted(root, folder, monkeypatch, program, changes, settings, look):
    """Train a fresh adapter on the extended base through a stage's own rows; (look before, look after).

    changes: of the profile. settings: of the stage. look(paths, model, tokenizer) -> number, asked before and after.
    """
    from test_programs_more import load

    from medgemma_korean import checkpoints, modeling, profiles, records, tokenizer, trained, training
    from medgemma_korean.paths import RunPaths

    monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(root))
    stage = load(f"train/{program}.py")
    profile = dataclasses.replace(profiles.get("tiny"), **changes)
    paths, second = RunPaths.of("tiny", "data/sample"), program == "train_02_kor_med_test"
    base = paths.raw_lora_added / "base"
    modeling.set_up_torch(17)
    new_ids = [] if second else records.read_json(base / "base_info.json")["new_ids"]
    checkpoints.fresh_adapter(base, folder / "adapter", profile, second=second, new_ids=new_ids, seed=17)
    loaded = tokenizer.load(base)
    args = argparse.Namespace(
        seed=17, max_samples=LEARNED if second else None, eval_samples=1, max_characters=None, keep_option_order=True
    )
    settings = profiles.with_overrides(profile.mcq if second else profile.dictionary, replay=0.0, **settings)
    plan = stage.build(trained.Context(args, profile, paths, settings, loaded, None, {}))
    model = modeling.load_adapter(modeling.load_base(base, profile, "cpu"), folder / "adapter", trainable=True)
    plan.evaluate, plan.metric, plan.larger = (lambda model: {"seen": look(paths, model, loaded)}), "seen", True
    plan.monitor, plan.settings = None, dataclasses.replace(settings, evaluations=1)
    before = look(paths, model, loaded)
    stub = SimpleNamespace(program=program, tick=lambda *values: None)
    outcome = training.train(model, loaded, plan, folder, profile, paths, stub, folder / "adapter")
    return before, outcome.history[-1]["seen"]


@pytest.mark.full
def test_questions_that_are_trained_over_and_over_are_answered(finished, tmp_path, monkeypatch):
    from medgemma_korean import batches, evaluation, mcq

    read = mcq.read_items

    def without_rationales(file, **options):  # whose many tokens would hide the letter's one
        return [{k: v for k, v in item.items() if k != "reasoning"} for item in read(file, **options)]

    monkeypatch.setattr(mcq, "read_items", without_rationales)

    def accuracy(paths, model, tokenizer):
        items = batches.sample(mcq.read_items(paths.mcq / "train.jsonl"), LEARNED, 17)
        assert len(items) == LEARNED
        return evaluation.dev_look(model, tokenizer, items, 16)["accuracy"]

    settings = {"epochs": 10, "batch": 4, "micro_batch": 4, "learning_rate": 4e-3}
    before, after = over_fitted(finished[0], tmp_path, monkeypatch, "train_02_kor_med_test", {}, settings, accuracy)
    assert before <= 0.4 and after >= 0.9, (before, after)


@pytest.mark.full
def test_definitions_that_are_trained_over_and_over_are_recalled(finished, tmp_path, monkeypatch):
    from test_programs_more import load

    from medgemma_korean import evaluation, prompts, records

    stage = load("train/train_01_medical_dict.py")

    def short(paths):
        rows = records.read_json(paths.dictionary)
        found = [r for r in rows if len(r["definition"]) <= 20 and not stage.is_held_out(r["term"])][:LEARNED]
        assert len(found) == LEARNED
        return found

    def exchanges(paths, counts):
        held_out = [r for r in records.read_json(paths.dictionary) if stage.is_held_out(r["term"])]
        return [(r["term"], prompts.dictionary(r["term"]), r["definition"]) for r in [*short(paths), *held_out]]

    monkeypatch.setattr(stage, "exchanges", exchanges)

    def recall(paths, model, tokenizer):
        rows = short(paths)
        asked = [prompts.dictionary(row["term"]) for row in rows]
        answers = [evaluation.generate(model, tokenizer, prompt, most=40) for prompt in asked]
        end = "<end_of_turn>"
        return sum(a == row["definition"] + end for a, row in zip(answers, rows, strict=True)) / len(rows)

    settings = {"epochs": 36, "batch": 8, "micro_batch": 8, "learning_rate": 2e-3, "row_learning_rate": 4e-3}
    before, after = over_fitted(
        finished[0], tmp_path, monkeypatch, "train_01_medical_dict", {"lora_rank": 64}, settings, recall
    )
    assert before <= 0.1 and after >= 0.9, (before, after)


# the plan says what the programs would say --------------------------------------------------------------

# The driver's options -> what differs then, by stage; every other stage is complete.
CHANGES = {
    (): {},
    ("--epochs-00", "2"): {"train_00": "settings.epochs: 3 -> 2"},
    ("--epochs-01", "2"): {"train_01": "settings.epochs: 1 -> 2"},
    ("--epochs-02", "2"): {"train_02": "settings.epochs: 3 -> 2"},
    ("--max-samples", "20"): dict.fromkeys(("train_00", "train_01", "train_02"), "settings.max_samples: None -> 20"),
    ("--new-tokens", "64"): {"prepare_tokenizer": "settings.new_tokens: 2048 -> 64"},
    ("--new-tokens", "auto"): {"prepare_tokenizer": "settings.auto: False -> True"},
    ("--min-count", "9"): {"prepare_tokenizer": "settings.min_count: 4 -> 9"},
    ("--no-veterinary",): {"refine": "settings.veterinary: True -> False"},
    ("--precision", "fp32"): {
        **dict.fromkeys(("add_lora", "add_lora_second"), "settings.precision: 'auto' -> 'fp32'"),
        **dict.fromkeys(("train_00", "train_01", "train_02"), "settings.precision: '8bit' -> 'fp32'"),
    },
    ("--precision", "8bit"): dict.fromkeys(("add_lora", "add_lora_second"), "settings.precision: 'auto' -> '8bit'"),
}


@pytest.fixture
def here(finished, monkeypatch):
    """The finished run for what is called in this process; nothing starts to work in it."""
    from medgemma_korean.stage import Stage

    def never(self, *args, **kwargs):
        raise AssertionError(f"{self.program} began to work")

    monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(finished[0]))
    monkeypatch.setattr(Stage, "work", never)
    return finished[0]


def said(load_program, name: str, options: list[str]) -> list[str]:
    """What a program says differs, when it is run with these options; [] for "already complete"."""
    from medgemma_korean.cli import PipelineError

    try:
        assert load_program(name).main(options) == 0
    except PipelineError as error:
        assert "something differs" in str(error)
        return [line.strip() for line in str(error).split("\n")[1:-1]]
    return []


@pytest.mark.parametrize("options", CHANGES, ids=" ".join)
def test_plan_announces_what_the_programs_answer(options, here, load_program):
    plan = load_program("plan")
    changes = CHANGES[options]
    shown = program(here, "operate/plan.py", *options).stdout
    parts = re.split(rf"^({'|'.join(DRIVER_STAGES)}) +", shown, flags=re.MULTILINE)[1:]
    planned = dict(zip(parts[::2], parts[1::2], strict=True))
    assert {stage for stage, text in planned.items() if text.startswith("differs")} == set(changes), shown
    args = plan.make_parser().parse_args(options)
    for name, (file, _) in plan.PROGRAMS.items():
        lines = said(load_program, Path(file).name, plan.options_of(name, args))
        stage = "refine" if name.startswith("refine") else name
        for line in lines:
            assert line in planned[stage], (name, line, shown)
        if stage in changes and stage != "refine":
            assert changes[stage] in lines
    for stage, line in changes.items():  # and as the driver asks
        result = run(here, DRIVER, *options, "--from", stage, "--to", stage)
        assert result.returncode == 2 and line in result.stdout, result.stdout[-1000:]


def test_plan_announces_a_changed_profile(here, load_program, monkeypatch):
    from medgemma_korean import cli, profiles, progress
    from medgemma_korean.stage import read_record

    tiny = profiles.get("tiny")
    changed = {
        "build_tiny_model": {"tiny": dataclasses.replace(tiny.tiny, steps=291)},
        "refine_00_plain_text": {"validation_share": 0.3},
        "prepare_tokenizer": {"medical_weight": 6, "plain_text": dataclasses.replace(tiny.plain_text, max_rows=270)},
        "add_lora": {"lora_rank": 8},
        "train_00": {"plain_text": dataclasses.replace(tiny.plain_text, learning_rate=1e-3, replay=0.3)},
        "train_01": {"dictionary": dataclasses.replace(tiny.dictionary, max_length=128, batch=8)},
        "add_lora_second": {"second_rank": 4},
        "train_02": {"mcq": dataclasses.replace(tiny.mcq, epochs=1), "lora_scale": 1.0},
    }
    plan = load_program("plan")
    args = plan.make_parser().parse_args([])
    paths = cli.resolve(args)[1]
    found = {name: path for programs in progress.records_of(paths, True).values() for name, path in programs.items()}
    for name, values in changed.items():
        monkeypatch.setitem(profiles.MODELS, "tiny", dataclasses.replace(tiny, **values))
        for other, (file, _) in plan.PROGRAMS.items():
            told = plan.answer_of(other, read_record(found[other]), args)
            assert told == said(load_program, Path(file).name, plan.options_of(other, args)), (name, other)
            assert told or other != name


def test_plan_of_a_finished_run_is_quick_and_imports_no_torch(finished):
    root, _ = finished
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    code = (
        f"import sys, runpy; sys.argv = ['plan']\ntry: runpy.run_path('{REPOSITORY}/script/operate/plan.py', "
        "run_name='__main__')\nexcept SystemExit as end: assert not end.code\nassert 'torch' not in sys.modules"
    )
    result = run(root, sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    assert "nothing would run" in result.stdout and result.stdout.count("complete") == len(DRIVER_STAGES)
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    forced = program(root, "operate/plan.py", "--force", "--epochs-00", "6").stdout
    record = json.loads((root / "model" / "00_trained" / "tiny" / "stage.json").read_text())
    number, unit = re.search(r"^train_00 +forced \(about (\d+) (s|min); memory \d", forced, re.MULTILINE).groups()
    seconds = int(number) * {"s": 1, "min": 60}[unit]
    assert abs(seconds - 2 * record["seconds"]) <= 31  # twice the epochs, rounded
    assert re.search(r"^train_01 +forced .* it is made of train_00_plain_text$", forced, re.MULTILINE), forced


# every bit of what is made is looked after --------------------------------------------------------------


def made_files(root: Path) -> set[Path]:
    folders = (root / "model", root / "data/sample/02_refined", root / "data/sample/01_raw/.stages")
    return {p for folder in folders for p in folder.rglob("*") if p.is_file()}


def test_every_file_of_a_run_is_described_by_a_record(here, load_program):
    from medgemma_korean import cli
    from medgemma_korean.stage import read_record

    verify = load_program("verify")
    described = set()
    for _, path in verify.records_of(*cli.resolve(verify.make_parser().parse_args([]))):
        if record := read_record(path):
            described |= {path, *(Path(os.path.normpath(path.parent / record["home"] / f)) for f in record["outputs"])}
    assert made_files(here) - described == set()


@contextlib.contextmanager
def flipped(file: Path, rng: random.Random):
    content = file.read_bytes()
    at = rng.randrange(len(content))
    try:
        # Not the bit that makes a capital of a letter: 1e-05 is 1E-05.
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(5)]) + content[at + 1 :])
        yield
    finally:
        file.write_bytes(content)


PLACES = (
    "model/raw/tiny/model.safetensors", "model/tokenizer/tiny/tokenizer.json", "model/tokenizer/tiny/new_tokens.txt",
    "model/raw_lora_added/tiny/base/tokenizer.model", "model/raw_lora_added/tiny/base/model.safetensors",
    "model/raw_lora_added/tiny/stage.json", "model/00_trained/tiny/final/adapter_model.safetensors",
    "model/00_trained/tiny/checkpoint-*/optimizer.pt", "model/00_trained/tiny/checkpoint-*/trainer_state.json",
    "model/01_trained/tiny/evaluation.json", "model/01_trained/tiny/training_info.json",
    "model/02_trained/tiny/README.md", "model/02_trained/tiny/stage.json", "model/report/tiny/scores/base.json",
    "model/report/tiny/index.html", "model/report/tiny/summary.json", "data/sample/02_refined/.stages/refine_*.json",
    *["*"] * 3,
)  # fmt: skip


def test_a_flipped_bit_anywhere_is_named(here, load_program, capsys):
    """Twenty places by seed."""
    from medgemma_korean import cli

    verify, rng = load_program("verify"), random.Random(17)
    for place in PLACES:
        files = sorted(made_files(here) if place == "*" else here.glob(place))
        file = rng.choice([f for f in files if f.stat().st_size])
        with flipped(file, rng):
            code = cli.run(lambda: verify.main(["--quick"]))
            text = "".join(capsys.readouterr())
            assert code == 2 and str(file.relative_to(here)) in text, (file, text[-2000:])
    assert cli.run(lambda: verify.main(["--quick"])) == 0


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("model/raw/tiny/model.safetensors", "raw_lora_added"),
        ("model/raw_lora_added/tiny/base/model.safetensors", "00_trained"),
        ("model/raw_lora_added/tiny/adapter/adapter_model.safetensors", "00_trained"),
        ("model/raw_lora_added/tiny/stage.json", "00_trained"),
        ("model/report/tiny/scores/base.json", "00_trained"),
        ("data/sample/02_refined/00_plain_text/train.jsonl", "00_trained"),
        ("model/00_trained/tiny/final/tokenizer.json", "01_trained"),
        ("model/01_trained/tiny/final/adapter_model.safetensors", "01_another_lora_added"),
        ("model/01_another_lora_added/tiny/base/config.json", "02_trained"),
    ],
)
def test_nothing_is_built_on_a_flipped_bit(place, kind, finished):
    root, _ = finished
    command = {
        "raw_lora_added": ("model/add_lora.py",),
        "00_trained": ("train/train_00_plain_text.py",),
        "01_trained": ("train/train_01_medical_dict.py",),
        "01_another_lora_added": ("model/add_lora.py", "--second"),
        "02_trained": ("train/train_02_kor_med_test.py",),
    }[kind]
    folder, aside = root / "model" / kind / "tiny", root / "aside"
    folder.rename(aside)
    try:
        with flipped(root / place, random.Random(3)):
            result = program(root, *command)
        text = result.stdout + result.stderr
        assert result.returncode == 2 and Path(place).name in text and "Traceback" not in text, text[-2000:]
        assert not folder.exists() and not list(folder.parent.glob(".tiny.partial/checkpoint-*"))
    finally:
        shutil.rmtree(folder.parent / ".tiny.partial", ignore_errors=True)
        aside.rename(folder)


def test_verify_asks_the_models_again(here, load_program, tmp_path, monkeypatch):
    """Numbers that are not the model's are found although every hash is right; a model too large is not loaded."""
    from medgemma_korean import cli, evaluation, shapes

    verify = load_program("verify")
    profile, paths = cli.resolve(verify.make_parser().parse_args([]))
    (candidate,) = evaluation.candidates(paths, ["02"])
    recorded = json.loads((paths.trained_02 / "evaluation.json").read_text())

    def problems(change=lambda scores: None, model=candidate) -> list[str]:
        scores = json.loads(json.dumps(recorded))
        change(scores)
        (tmp_path / "evaluation.json").write_text(json.dumps(scores))
        return verify.check_model(model, tmp_path / "evaluation.json", profile, paths)[0]

    def shift(scores):
        for row in scores["predictions"]:
            row["log_probs"]["A"] += 1

    def rename(scores):
        for row in scores["predictions"]:
            row["predicted"] = min(row["log_probs"], key=row["log_probs"].get)

    assert problems() == []
    assert len([p for p in problems(shift) if re.search(r"the log-probability of A is (0\.9|1\.0)", p)]) == verify.ITEMS
    assert len([p for p in problems(rename) if "is not that of its log-probabilities" in p]) == verify.ITEMS
    bits = problems(
        lambda scores: scores["bits_per_character"].update(medical=recorded["bits_per_character"]["medical"] * 1.02)
    )
    assert len(bits) == 1 and "medical bits per character are" in bits[0]
    assert problems(model=dataclasses.replace(candidate, adapter=None))  # the base alone answers otherwise
    monkeypatch.setattr(shapes, "free_ram", lambda: 1e8)
    found, done = verify.check_model(candidate, paths.trained_02 / "evaluation.json", profile, paths)
    assert found == [] and re.fullmatch(r"not loaded: up to 1\.0 GB of main memory, 0\.1 GB are free", done)


def test_files_have_the_mode_of_the_umask(finished):
    root, _ = finished
    umask = os.umask(0o022)
    os.umask(umask)
    wrong = {p: oct(p.stat().st_mode) for p in made_files(root) if p.stat().st_mode & 0o666 != 0o666 & ~umask}
    assert not wrong
