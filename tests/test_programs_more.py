"""train_01_02_loop, inspect_batches, check_gpu_memory, prepare_all and the validation programs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from medgemma_korean import cli, evaluation, profiles, records, stage, training
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import RunPaths
from medgemma_korean.stage import vouch
from medgemma_korean.statistics import wilson

SCRIPT = Path(__file__).parents[1] / "script"
SAMPLE = Path(__file__).parents[1] / "data" / "sample" / "01_raw"
PROGRAMS = (
    "train/train_01_02_loop.py",
    "train/inspect_batches.py",
    "model/check_gpu_memory.py",
    "model/prepare_all.py",
    "evaluate/validation_plain_text.py",
    "evaluate/validation_kor_med_test.py",
)


def load(program: str) -> ModuleType:
    """A program as a module, its siblings importable."""
    file = SCRIPT / program
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    name = f"program_{file.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules[name]


loop = load("train/train_01_02_loop.py")
inspect_batches = load("train/inspect_batches.py")
plain_text = load("evaluate/validation_plain_text.py")
mcq_test = load("evaluate/validation_kor_med_test.py")
REAL_ANSWERS, REAL_REQUIRE_TASK = mcq_test.answers, mcq_test.harness.require_task


# command lines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_fast_and_loads_no_library(program):
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str((SCRIPT / program).parent)!r})\n"
        f"sys.argv = [{program!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT / program)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    started = time.process_time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and program.split("/")[1] in done.stdout
    assert time.process_time() - started < 5


def test_options():
    args = loop.make_parser().parse_args([])
    assert (args.target_accuracy, args.max_loops, args.model) == (90.0, 10, "tiny")
    assert mcq_test.make_parser().parse_args(["--final", "--models", "base", "02"]).models == ["base", "02"]
    assert inspect_batches.make_parser().parse_args(["--stage", "01"]).stage == "01"
    with pytest.raises(PipelineError, match="at most 100"):
        loop.main(["--target-accuracy", "120"])
    for replay in ("1", "-0.1", "x"):
        with pytest.raises(SystemExit):
            loop.make_parser().parse_args(["--replay", replay])


def test_a_tracker_that_is_not_installed_is_one_error(monkeypatch, root):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PipelineError, match="--report-to wandb: not installed; run: .venv/bin/pip install wandb"):
        loop.main(["--report-to", "wandb"])


# the loop -----------------------------------------------------------------------------------------------


def look(step, accuracy, loss=1.6, train_loss=1.5, half=0.05, korean=1.0, english=1.0, predicted=None):
    return {
        "step": step, "accuracy": accuracy, "lower": accuracy - half, "upper": accuracy + half, "loss": loss,
        "train_loss": train_loss, "korean_bits": korean, "english_bits": english,
        "predicted": predicted or {letter: 20 for letter in "ABCDE"},
    }  # fmt: skip


REFERENCE = {"korean": 1.0, "english": 1.0}


def limits(patience=2, looks=20):
    return loop.Limits(0.9, patience, looks)


def test_stop_reason():
    assert loop.stop_reason([], limits()) is None
    assert loop.stop_reason([look(1, 0.94)], limits()) is None  # the accuracy, not the lower end, is above the target
    assert "target reached" in loop.stop_reason([look(1, 0.2), look(2, 0.96)], limits())
    rising = [look(1, 0.2), look(2, 0.3), look(3, 0.3)]
    assert loop.stop_reason(rising, limits()) is None
    assert "plateau: 2 looks" in loop.stop_reason([*rising, look(4, 0.25)], limits())
    assert loop.stop_reason([*rising, look(4, 0.31)], limits()) is None
    assert "plateau: 1 look " in loop.stop_reason(rising, limits(patience=1))
    assert loop.stop_reason(rising, limits(looks=3)) == "look budget: 3 looks at dev"


@pytest.mark.parametrize(
    ("last", "word"),
    [
        (look(2, 0.3, loss=1.8, train_loss=0.9), "overfit"),
        (
            look(2, 0.3, predicted={"A": 41, "B": 30, "C": 29, "D": 0, "E": 0}),
            "letter bias: 41% of the predictions are A",
        ),
        (look(2, 0.3, english=1.06), "forgetting: English bits per character rose by 6.0%"),
        (look(2, 0.3, korean=1.10), "forgetting: Korean"),
    ],
)
def test_troubles(last, word):
    found = loop.troubles([look(1, 0.3), last], REFERENCE, 1.05)
    assert len(found) == 1 and found[0].startswith(word.split(":")[0]) and word in found[0]
    assert word in loop.diagnosis([look(1, 0.3), last], limits(5), REFERENCE, 1.05)


def test_no_trouble():
    # Dev loss up while the training loss is up too is no overfitting; 40 % of one letter is not above 40 %.
    last = look(2, 0.5, loss=1.8, train_loss=1.7, predicted={"A": 40, "B": 60 - 21, "C": 21})
    assert loop.troubles([look(1, 0.4), last], REFERENCE, 1.05) == []
    line = loop.diagnosis([look(1, 0.4), last], limits(5), REFERENCE, 1.05)
    assert line == "target not reached in 2 looks; best dev 50.0% (45.0% to 55.0%, step 2)"
    line = loop.diagnosis([look(1, 0.4), last], limits(5), REFERENCE, 1.05, stopped="forgetting: at step 3")
    assert line.startswith("forgetting: at step 3; best dev")


def test_alternate_keeps_every_row_in_order():
    first, second = [("a", i) for i in range(7)], [("b", i) for i in range(10)]
    rows, ends = loop.alternate(first, second, loops=3, batch=4)
    assert [r for r in rows if r[0] == "a"] == first and [r for r in rows if r[0] == "b"] == second
    assert len(rows) == 17 and list(ends.values()) == ["loop_1", "loop_2", "loop_3"]
    assert max(ends) == 5  # 17 rows in batches of 4
    assert rows[0][0] == "a" and rows[-1][0] == "b"
    with pytest.raises(PipelineError, match="less than one batch"):
        loop.alternate(first, second, loops=3, batch=8)


def test_plan_looks_and_stop():
    settings = profiles.StageSettings(epochs=1, max_length=8, batch=4, micro_batch=2, learning_rate=1e-3)
    plan = training.Plan([{}] * 40, settings, False, "accuracy", True, lambda model: {})
    assert plan.evaluation_steps == [2, 5, 8, 10] and not plan.ended([look(1, 1.0)])
    kept = replace(plan, keep={4: "loop_1", 8: "loop_2", 99: "loop_3"}, stop=lambda h: "x" if len(h) > 1 else None)
    assert kept.evaluation_steps == [4, 8, 10]
    assert not kept.ended([]) and not kept.ended([look(4, 0.1)]) and kept.ended([look(4, 0.1)] * 2)
    assert replace(kept, settings=replace(settings, look_every=3)).evaluation_steps == [3, 4, 6, 8, 9, 10]


# validation ---------------------------------------------------------------------------------------------


@pytest.fixture
def empty_root(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(tmp_path))
    return tmp_path


def test_perplexity_is_a_value_a_token():
    assert plain_text.perplexity(bits_per_character=3.0, tokens_per_character=0.5) == pytest.approx(64)


def test_items_and_names():
    items = [{"id": str(i), "exam": exam} for i, exam in enumerate(["doctor", "nurse"] * 10)]
    assert {item["exam"] for item in mcq_test.chosen_items(items, ["nurse"], None)} == {"nurse"}
    assert len(mcq_test.chosen_items(items, None, 5)) == 5
    assert mcq_test.chosen_items(items, None, 5) == mcq_test.chosen_items(items, None, 5) != items[:5]
    with pytest.raises(PipelineError, match="doctor, nurse"):
        mcq_test.chosen_items(items, ["vet"], None)
    for split, argv, name in (
        ("dev", "", "dev-letter"),
        ("test", "--mode generate --exams nurse doctor --limit 9", "test-generate-doctor-nurse-limit9"),
        ("dev", "--mode generate --reasoning --rotations 3", "dev-generate-reasoning-rotations3"),
        ("dev", "--mode harness --shots 5", "dev-harness-shots5"),
        ("dev", "--failed-questions --rotations 1", "dev-letter-checkpoints"),
        ("dev", "--models 02 --precision auto", "dev-letter"),
        ("dev", "--precision fp32", "dev-letter-fp32"),
        ("dev", "--mode generate --max-new-tokens 9 --precision nf4", "dev-generate-tokens9-nf4"),
    ):
        assert mcq_test.label(split, mcq_test.make_parser().parse_args(argv.split())) == name


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        ("--reasoning", "--reasoning goes with --mode generate"),
        ("--max-new-tokens 9", "--max-new-tokens goes with --mode generate"),
        ("--shots 5 --mode generate", "--shots goes with --mode harness"),
        ("--rotations 2 --mode harness", "--rotations goes with --mode letter or generate"),
        ("--failed-questions --final", "leave out --final"),
        ("--failed-questions --models 01 02 01", "of one training; give one of --models 01 02$"),
    ],
)
def test_options_that_do_not_go_together(empty_root, argv, why):
    with pytest.raises(PipelineError, match=why):
        mcq_test.main(argv.split())
    assert not (empty_root / "model").exists()


@pytest.mark.parametrize("argv", ["--rotations 0", "--rotations 6", "--limit 0", "--shots x", "--mode loud"])
def test_options_out_of_range(argv, capsys):
    with pytest.raises(SystemExit) as error:
        mcq_test.make_parser().parse_args(argv.split())
    assert error.value.code == 2


def test_a_part_has_a_wider_interval_and_says_so():
    score = {"n": 60, "accuracy": 0.5, "lower": wilson(30, 60)[0], "upper": wilson(30, 60)[1]}
    found = mcq_test.interval_of_limit(score, 435)
    assert (found["n"], found["of"]) == (60, 435)
    assert found["half_width"] == pytest.approx(0.1224, abs=1e-3)
    assert found["half_width_of_all"] == pytest.approx(0.0468, abs=1e-3)


# answers of another file --------------------------------------------------------------------------------

QUESTIONS = [
    {
        "id": str(i),
        "exam": "doctor",
        "question": f"질문 {i}",
        **dict(zip("ABCD", "가나다라", strict=True)),
        "answer": "B",
    }
    for i in range(6)
]


def answers_of(items, right=3, **more):
    return [
        {"id": item["id"], "gold": item["answer"], "predicted": "B" if i < right else None, **more}
        for i, item in enumerate(items)
    ]


def test_answers_of_another_file(tmp_path):
    lines, whole = tmp_path / "a.jsonl", tmp_path / "evaluation.json"
    rows = answers_of(QUESTIONS, precision="8bit", protocol="letter")
    rows = [{**row, "item": mcq_test.digest(item)} for row, item in zip(rows, QUESTIONS, strict=True)]
    records.write_jsonl(lines, rows)
    records.write_json(whole, {"precision": "8bit", "protocol": "letter", "predictions": answers_of(QUESTIONS)})
    for file in (lines, whole):
        found = mcq_test.earlier_answers(file, QUESTIONS, "8bit")
        assert found["mcq"]["accuracy"] == 0.5 and found["protocol"] == "letter" and len(found["predictions"]) == 6
        after = {"mcq": {"accuracy": 1.0}, "predictions": answers_of(QUESTIONS, right=6)}
        change = evaluation.compare_rows(found, after)
        assert (change["wrong_to_right"], change["right_to_wrong"], change["p"]) == (3, 0, 0.25)
        with pytest.raises(PipelineError, match="scored in 8bit, and this call in bf16; add --precision 8bit"):
            mcq_test.earlier_answers(file, QUESTIONS, "bf16")


def test_answers_whose_ids_are_numbers(tmp_path):
    file, after = tmp_path / "a.jsonl", {"mcq": {"accuracy": 1.0}, "predictions": answers_of(QUESTIONS, right=6)}
    records.write_jsonl(file, [{**row, "id": int(row["id"])} for row in answers_of(QUESTIONS)])
    change = evaluation.compare_rows(mcq_test.earlier_answers(file, QUESTIONS, "8bit"), after)
    assert (change["wrong_to_right"], change["right_to_wrong"]) == (3, 0)


def test_answers_to_other_items_are_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    reworded = [{**QUESTIONS[0], "question": "다른 질문"}, *QUESTIONS[1:]]
    with_digests = [
        {**row, "item": mcq_test.digest(item)} for row, item in zip(answers_of(QUESTIONS), reworded, strict=True)
    ]
    for rows, differ in (
        (answers_of(QUESTIONS[:4]), "4 there, 6 here, 2 differ, such as 4"),
        (answers_of([*QUESTIONS, {**QUESTIONS[0], "id": "x"}]), "7 there, 6 here, 1 differ, such as x"),
        (answers_of([{**QUESTIONS[0], "answer": "C"}, *QUESTIONS[1:]]), "1 differ, such as 0"),
        (with_digests, "1 differ, such as 0"),
        ([*answers_of(QUESTIONS), answers_of(QUESTIONS)[0]], "7 there, 6 here, 0 differ"),
    ):
        records.write_jsonl(file, rows)
        with pytest.raises(PipelineError, match=differ):
            mcq_test.earlier_answers(file, QUESTIONS, "8bit")


@pytest.mark.parametrize("content", ["", '{"id": "1"}\n', '{"question": "?", "answer": "A"}\n'])
def test_a_file_without_answers_is_refused(tmp_path, content):
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(PipelineError, match="no answers there"):
        mcq_test.earlier_answers(file, QUESTIONS, "8bit")
    records.write_json(tmp_path / "b.json", {"split": "dev"})
    with pytest.raises(PipelineError, match="no answers there"):
        mcq_test.earlier_answers(tmp_path / "b.json", QUESTIONS, "8bit")
    with pytest.raises(PipelineError, match="no such file"):
        mcq_test.earlier_answers(tmp_path / "c.jsonl", QUESTIONS, "8bit")


# whole calls, with answers by hand -----------------------------------------------------------------------

SOLVED = [{**item, "E": "마", "question": f"{item['question']} {exam}", "exam": exam, "id": f"{exam}{item['id']}"}
          for exam in ("doctor", "nurse") for item in QUESTIONS]  # fmt: skip


@pytest.fixture
def by_hand(empty_root, monkeypatch):
    """A run without models: `say` says what each answers right, by the number of items; `weights` what it is."""
    paths = RunPaths.of("tiny", "data/sample")
    say, weights = {"base": 3, "00": 4, "02": 6}, {}

    class Model(evaluation.Candidate):
        def weights(self):
            return weights.get(self.name, "first")

    def candidates(paths, names=None):
        return [Model(name, empty_root / name, None) for name in names or say]

    def answers(model, tokenizer, items, args, profile, tick, official):
        rows = [{**row, "exam": item["exam"], "reason": "x"}
                for item, row in zip(items, answers_of(items, say[model]), strict=True)]  # fmt: skip
        return rows, {}

    def touches(paths, split, items, built):
        return {"checked": len(items), "sources": {}, "touched": list(say.get("touched", ()))}

    for file in ("dev", "test"):
        records.write_jsonl(paths.mcq / f"{file}.jsonl", SOLVED)
    monkeypatch.setattr(evaluation, "require_held_out", lambda paths: None)
    monkeypatch.setattr(evaluation, "candidates", candidates)
    monkeypatch.setattr(evaluation, "loaded", lambda found, *_: ((one, one.name, None) for one in found))
    monkeypatch.setattr(mcq_test, "answers", answers)
    monkeypatch.setattr(mcq_test.contamination, "ledger", touches)
    monkeypatch.setattr(mcq_test.harness, "require", lambda: "0.4.13")
    monkeypatch.setattr(mcq_test.harness, "require_task", lambda: None)
    monkeypatch.setattr(mcq_test.harness, "_template", lambda: empty_root / "template")
    return SimpleNamespace(paths=paths, say=say, weights=weights, folder=paths.report / "validation")


def test_shots_are_left_out_of_what_is_scored(by_hand, monkeypatch, capsys):
    shots = [{**item, "id": f"shot{i}"} for i, item in enumerate([*SOLVED[:2], *SOLVED[6:8]])]
    monkeypatch.setattr(mcq_test.harness, "shots_of", lambda paths: shots)
    scored = []

    def score(model, tokenizer, folder, tasks, items, *, shots, batch):
        scored.append([item["id"] for item in items])
        return [{**row, "exam": "doctor", "reason": "x"} for row in answers_of(items)], {"shots": shots}

    monkeypatch.setattr(mcq_test, "answers", REAL_ANSWERS)
    monkeypatch.setattr(mcq_test.harness, "score", score)
    harness = ["--mode", "harness", "--models", "base"]
    for argv, left in (
        ([], None),
        (["--shots", "1"], 2),
        (["--shots", "2"], 4),
        (["--shots", "1", "--limit", "7"], 2),
    ):
        assert mcq_test.main([*harness, *argv]) == 0
        of = 12 - (left or 0)
        name = "-".join(["dev-harness", *(f"{a[2:]}{b}" for a, b in zip(argv[::2], argv[1::2], strict=True))])
        found = records.read_json(by_hand.folder / f"{name}.json")["models"]["base"]
        assert found["harness"].get("left_out") == left and found["mcq"]["n"] == min(of, 7 if "--limit" in argv else of)
        assert found.get("limit", {"of": of})["of"] == of
        rows = [*records.read_jsonl(by_hand.folder / f"{name}-tasks" / "doctor-items.jsonl")]
        rows += records.read_jsonl(by_hand.folder / f"{name}-tasks" / "nurse-items.jsonl")
        assert {row["id"] for row in rows} == set(scored[-1])
    assert scored[0] == [item["id"] for item in SOLVED]
    assert scored[1] == [item["id"] for i, item in enumerate(SOLVED) if i not in (0, 6)]
    assert scored[2] == [item["id"] for i, item in enumerate(SOLVED) if i not in (0, 1, 6, 7)]
    assert len(scored[3]) == 7 and set(scored[3]) < set(scored[1])
    assert capsys.readouterr().out.count("base: 2 questions left out: among the shots") == 2


def summary_of(by_hand, *argv, name="dev-letter"):
    """The models of a summary after one more call, by name: right answers, and what each was compared with."""
    assert mcq_test.main(list(argv)) == 0
    file = by_hand.folder / f"{name}.json"
    found = records.read_json(file)["models"]
    assert not stage.check_outputs(stage.record_beside(file))
    outputs = records.read_json(stage.record_beside(file))["outputs"]
    assert set(outputs) == {file.name, *(f"{name}-{model}.jsonl" for model in found)}
    return {k: (v["mcq"]["correct"], v.get("against_first", {}).get("before")) for k, v in found.items()}


def test_scores_of_earlier_calls_stay(by_hand, capsys):
    whole = {"base": (3, None), "00": (4, "base"), "02": (6, "base")}
    assert summary_of(by_hand) == whole
    before = records.read_json(by_hand.folder / "dev-letter.json")
    assert summary_of(by_hand, "--models", "02") == whole  # with its test, which is as true as before
    assert records.read_json(by_hand.folder / "dev-letter.json") == before
    assert "earlier scores of base, 00 stay in it" in capsys.readouterr().out
    assert summary_of(by_hand, "--precision", "fp32", "--models", "00", name="dev-letter-fp32") == {"00": (4, None)}
    assert records.read_json(by_hand.folder / "dev-letter.json") == before

    by_hand.say["02"], by_hand.weights["02"] = 5, "second"  # trained again: no test of the new one was made
    assert summary_of(by_hand, "--models", "02") == whole | {"02": (5, None)}
    assert summary_of(by_hand, "--models", "00", "02") == whole | {"02": (5, "00")}
    by_hand.say["one--x"] = 2
    expected = {"base": (3, None), "00": (4, "base"), "02": (5, "00"), "one--x": (2, None)}
    assert summary_of(by_hand, "--models", "one--x") == expected
    by_hand.weights["base"] = "second"  # what 00 was compared with is gone
    assert summary_of(by_hand, "--models", "base") == expected | {"00": (4, None)}
    by_hand.weights["00"], by_hand.say["00"] = "second", 4
    assert summary_of(by_hand, "--models", "00") == expected | {"00": (4, None), "02": (5, None)}

    # A test against a file names it, and stays as long as its model.
    base = str(by_hand.folder / "dev-letter-base.jsonl")
    assert summary_of(by_hand, "--models", "02", "--against", base)["02"] == (5, None)
    assert summary_of(by_hand, "--models", "base")["02"] == (5, None)
    told = records.read_json(by_hand.folder / "dev-letter.json")["models"]["02"]["against_file"]
    assert told["before"].endswith("dev-letter-base.jsonl") and told["accuracy_change"] == pytest.approx(2 / 12)


def test_what_does_not_belong_together_does_not_stay(by_hand, monkeypatch, capsys):
    file = by_hand.folder / "dev-letter.json"
    assert list(summary_of(by_hand)) == ["base", "00", "02"]
    assert "touched" in records.read_json(file)["models"]["base"]["contamination"]

    by_hand.say["touched"] = [SOLVED[0]["id"]]  # the training text has changed
    asked = "--models", "02"
    assert list(summary_of(by_hand, *asked)) == ["base", "00", "02"]
    found = records.read_json(file)["models"]
    assert "contamination" not in found["base"] and found["02"]["contamination"]["touched"]["n"] == 1
    del by_hand.say["touched"]

    answers = by_hand.folder / "dev-letter-00.jsonl"
    answers.write_text(answers.read_text() + "\n")  # as a call that was interrupted leaves it
    assert list(summary_of(by_hand, *asked)) == ["base", "02"]
    assert "earlier scores of 00 do not: other items, precision, or answers" in capsys.readouterr().out
    (by_hand.folder / "dev-letter-base.jsonl").unlink()
    assert summary_of(by_hand, *asked) == {"02": (6, None)}

    summary_of(by_hand)
    with monkeypatch.context() as patch:
        patch.setattr(mcq_test.precision, "of_run", lambda *_: "bf16")
        assert summary_of(by_hand, *asked) == {"02": (6, None)}
        assert list(summary_of(by_hand, "--models", "base")) == ["02", "base"]
    records.write_jsonl(by_hand.paths.mcq / "dev.jsonl", SOLVED[1:])
    assert summary_of(by_hand, *asked) == {"02": (6, None)}
    summary_of(by_hand)
    records.write_json(file, {"split": "dev", "models": {}})
    assert summary_of(by_hand, *asked) == {"02": (6, None)}
    assert "is not as it was written; what it holds of other models is dropped" in capsys.readouterr().out
    stage.record_beside(file).write_text("{")
    assert summary_of(by_hand, "--models", "base") == {"base": (3, None)}


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        ("--mode harness --shots 5", "--shots 5: doctor has 0 rows"),
        ("--mode harness --exams nurse", "the official prompt has five options; 1 of the questions"),
        ("--mode harness --exams doctor", "another version of the task"),
        ("--device cuda:9", "CUDA devices; use cpu"),
        ("--against nothing.jsonl", "no such file"),
    ],
)
def test_a_slip_costs_no_look(by_hand, monkeypatch, argv, why):
    records.write_jsonl(by_hand.paths.mcq / "test.jsonl", [*SOLVED[:-1], {**SOLVED[-1], "E": ""}])
    if "version" in why:
        monkeypatch.setattr(mcq_test.harness, "require_task", REAL_REQUIRE_TASK)
    with pytest.raises(PipelineError, match=why):
        mcq_test.main(["--final", *argv.split()])
    assert not (by_hand.paths.report / "test_looks.json").exists()
    assert mcq_test.main(["--final"]) == 0
    assert len(records.read_json(by_hand.paths.report / "test_looks.json")) == 1


def test_looks_are_counted(empty_root):
    paths = RunPaths.of("tiny", "data/sample")
    file, scores = paths.report / "test_looks.json", paths.report / "validation" / "test-letter.json"
    assert mcq_test.count_look(paths, scores, models={"base": "a"}) == 1
    assert mcq_test.count_look(paths, scores, models={"02": "b"}) == 2
    # Broken off before a score was written, the same look goes on; of other weights it is another one.
    assert mcq_test.count_look(paths, scores, models={"02": "b"}) == 2
    assert mcq_test.count_look(paths, scores, models={"02": "c"}) == 3
    records.write_json(scores, {})
    vouch("x", [scores], 0.0)
    assert mcq_test.count_look(paths, scores, models={"02": "c"}) == 4
    assert [entry["models"] for entry in records.read_json(file)] == [{"base": "a"}, {"02": "b"}, *[{"02": "c"}] * 2]
    file.write_text("[]" + " " * (file.stat().st_size - 2))
    assert mcq_test.count_look(paths, scores, models={"02": "c"}) == 1
    records.write_json(file, [{"models": {"02": "c"}}] * 2)
    with pytest.raises(PipelineError, match="test_looks.json: not as it was written"):
        mcq_test.count_look(paths, scores, models={"02": "c"})


# on a chain of their own --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The root of a run, and its profile: far smaller than tiny and hardly trained. Model, tokenizer, both adapters."""
    root = tmp_path_factory.mktemp("chain")
    shutil.copytree(SAMPLE, root / "data" / "sample" / "01_raw", ignore=shutil.ignore_patterns(".stages"))
    tiny = profiles.MODELS["tiny"]
    small = replace(
        tiny,
        tiny=replace(tiny.tiny, base_vocab=1500, hidden=32, intermediate=64, layers=2, heads=2, kv_heads=1, steps=3),
        precision="fp32",  # eight bits on a CPU take most of the time, and other tests cover them
        new_tokens=32,
        lora_rank=2,
        second_rank=2,
        score_characters=1500,
        mcq=replace(tiny.mcq, batch=4, micro_batch=2),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDGEMMA_KOREAN_ROOT", str(root))
        patch.setitem(profiles.MODELS, "tiny", small)
        assert load("model/build_tiny_model.py").main([]) == 0
        assert load("refine/refine_all.py").main([]) == 0
        assert load("model/prepare_tokenizer.py").main([]) == 0
        assert load("model/add_lora.py").main([]) == 0
        assert load("model/add_lora.py").main(["--second", "--allow-regression"]) == 0
    return root, small


@pytest.fixture
def chain(built, monkeypatch):
    root, small = built
    monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(root))
    monkeypatch.setitem(profiles.MODELS, "tiny", small)
    return RunPaths.of("tiny", "data/sample")


LOOP = ["--max-samples", "8", "--max-loops", "3", "--target-accuracy", "0.0001", "--allow-regression"]


@pytest.mark.slow
def test_loop_ends_early_and_counts_as_complete(chain):
    assert loop.main(LOOP) == 0
    record = records.read_json(chain.loop / "stage.json")
    info = records.read_json(chain.loop / "training_info.json")
    assert info["diagnosis"].startswith("target reached")
    assert record["steps"] == info["steps"] == info["validation_history"][-1]["step"]
    assert record["loops"] == len(info["validation_history"]) == 1
    assert record["counts"]["rows"] == record["steps"] * 4 == info["train_samples"]
    # What failed at the looks is counted beside the scores, and not repeated in the history.
    failed = records.read_json(chain.loop / "failed_questions.json")
    (look,) = info["validation_history"]
    assert failed["looks"] == [look["step"]] and "wrong" not in look
    assert len(failed["questions"]) == min(10, look["total"] - look["correct"]) > 0
    assert {entry["fail_count"] for entry in failed["questions"]} == {1}
    if look["step"] == info["best_step"]:
        final = {r["id"]: r for r in records.read_json(chain.loop / "evaluation.json")["predictions"]}
        told = {entry["question_id"]: entry["last_predicted"] for entry in failed["questions"]}
        assert told == {key: final[key]["predicted"] for key in told}
        assert all(final[key]["predicted"] != final[key]["gold"] for key in told)
    for name in ("loop_1", "best", "final"):
        config = records.read_json(chain.loop / name / "adapter_config.json")
        assert not os.path.isabs(config["base_model_name_or_path"])
        assert (chain.loop / name / config["base_model_name_or_path"] / "config.json").is_file()
    best, final = (chain.loop / name / "adapter_model.safetensors" for name in ("best", "final"))
    assert best.read_bytes() == final.read_bytes()
    assert loop.main(LOOP) == 0  # already complete
    assert records.read_json(chain.loop / "stage.json") == record


@pytest.mark.slow
def test_loop_killed_before_publishing_trains_nothing_again(chain):
    before = records.read_json(chain.loop / "stage.json")
    work = chain.loop.with_name(".tiny.partial")
    shutil.copytree(chain.loop, work)
    records.write_json(work / ".identity.json", before["identity"])
    for made in ("stage.json", "training_info.json", "evaluation.json"):
        (work / made).unlink()
    (work / "best").rename(work / f".best-{before['best_step']}")
    shutil.rmtree(chain.loop)
    assert loop.main(LOOP) == 0
    after = records.read_json(chain.loop / "stage.json")
    assert (after["steps"], after["fingerprint"]) == (before["steps"], before["fingerprint"])
    same = "final/adapter_model.safetensors"
    assert after["outputs"][same]["sha256"] == before["outputs"][same]["sha256"]


@pytest.mark.slow
def test_interrupted_loop_ends_with_the_same_bytes(chain, monkeypatch):
    argv = ["--max-samples", "8", "--max-loops", "2", "--allow-regression", "--output"]
    whole, broken = (chain.loop.with_name(name) for name in ("whole", "broken"))
    assert loop.main([*argv, str(whole)]) == 0
    steps = records.read_json(whole / "stage.json")["steps"]
    calls = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(cli, "stop_requested", lambda: next(calls) >= steps // 2)  # asked once a step
        with pytest.raises(cli.Interrupted):
            loop.main([*argv, str(broken)])
    assert not broken.exists()
    assert loop.main([*argv, str(broken)]) == 0
    for made in ("loop_1", "loop_2", "best", "final"):
        one, other = (folder / made / "adapter_model.safetensors" for folder in (whole, broken))
        assert one.read_bytes() == other.read_bytes(), made
    history = [records.read_json(f / "training_info.json")["validation_history"] for f in (whole, broken)]
    assert history[0] == history[1] and len(history[0]) == 2


@pytest.mark.slow
def test_validation_programs(chain, capsys, monkeypatch):
    models = ["--models", "base", "merged", str(chain.loop), str(chain.loop / "loop_1")]
    assert plain_text.main(models) == 0
    found = records.read_json(chain.report / "validation_plain_text.json")["models"]
    assert list(found) == ["base", "merged", "01_02_loop-tiny", "01_02_loop-tiny-loop_1"]
    told = records.read_json(chain.scores("merged"))["bits_per_character"]
    assert found["merged"]["bits_per_character"] == pytest.approx(told)
    scored = records.read_json(chain.loop / "evaluation.json")

    assert mcq_test.main(models) == 0
    summary = records.read_json(chain.report / "validation" / "dev-letter.json")["models"]
    assert summary["01_02_loop-tiny"]["mcq"] == scored["mcq"]
    assert summary["base"]["mcq"] == records.read_json(chain.scores("base"))["mcq"]
    assert "against_first" not in summary["base"] and summary["merged"]["against_first"]["before"] == "base"
    assert len(list(records.read_jsonl(chain.report / "validation" / "dev-letter-base.jsonl"))) == 30
    assert mcq_test.main(["--models", "merged"]) == 0  # the others' scores stay
    assert records.read_json(chain.report / "validation" / "dev-letter.json")["models"] == summary

    # Against the file of another call, in rotations: the numbers of the rows.
    base = str(chain.report / "validation" / "dev-letter-base.jsonl")
    assert mcq_test.main(["--models", "merged", "--rotations", "5", "--against", base]) == 0
    turned = records.read_json(chain.report / "validation" / "dev-letter-rotations5.json")["models"]["merged"]
    assert turned["mcq"] == summary["merged"]["mcq"]
    told = {k: v for k, v in summary["merged"]["against_first"].items() if k != "before"}
    assert told.items() <= turned["against_file"].items() and turned["against_file"]["protocol"] == "letter"
    rows = list(records.read_jsonl(chain.report / "validation" / "dev-letter-rotations5-merged.jsonl"))
    chosen = [row["rotations"] for row in rows]
    assert all(len(options) == 5 for options in chosen)
    assert turned["rotations"]["consistency"] == sum(len(set(options)) == 1 for options in chosen) / 30
    assert turned["rotations"]["mean_accuracy"] == pytest.approx(
        sum(option == row["gold"] for row in rows for option in row["rotations"]) / 150
    )
    parts = turned["contamination"]
    assert parts["clean"]["n"] + (parts["touched"] or {"n": 0})["n"] == 30
    with pytest.raises(PipelineError, match="30 there, 4 here, 26 differ"):
        mcq_test.main(["--models", "merged", "--limit", "4", "--against", base])

    # The checkpoints of one training.
    assert mcq_test.main(["--failed-questions", "--models", str(chain.loop)]) == 0
    failed = records.read_json(chain.report / "failed_questions.json")
    steps = [look["step"] for look in failed["looks"]]
    assert steps == sorted(steps) and records.read_json(chain.loop / "training_info.json")["best_step"] in steps
    by_step = {
        step: list(records.read_jsonl(f))
        for step in steps
        for f in (chain.report / "validation").glob(f"dev-letter-checkpoints-*step{step}.jsonl")
    }
    assert len(failed["questions"]) == 10 and set(by_step) == set(steps)
    for entry in failed["questions"]:
        at = {step: row for step, rows in by_step.items() for row in rows if row["id"] == entry["question_id"]}
        wrong = [step for step, row in at.items() if row["predicted"] != row["gold"]]
        assert (entry["fail_count"], entry["last_failed_step"]) == (len(wrong), max(wrong))
        assert entry["last_predicted"] == at[max(wrong)]["predicted"] and entry["expected"] == at[max(wrong)]["gold"]
    with pytest.raises(PipelineError, match="not the folder of a training"):
        mcq_test.main(["--failed-questions", "--models", str(chain.another_lora_added)])

    # The official protocol, where its library is installed.
    official = ["--models", "merged", "--mode", "harness", "--limit", "3"]
    if importlib.util.find_spec("lm_eval") is None:
        with pytest.raises(PipelineError, match=r"not installed; run: .venv/bin/pip install 'lm_eval>=0\.4\.13'"):
            mcq_test.main(official)
    else:
        assert mcq_test.main(official) == 0
        found = records.read_json(chain.report / "validation" / "dev-harness-limit3.json")["models"]["merged"]
        assert found["harness"]["micro"] == found["mcq"]["accuracy"] and found["protocol"] == "harness"
        assert found["harness"]["task_version"] == 3.0 and found["mcq"]["n"] == found["limit"]["n"] == 3
        dev = evaluation.dev_items(chain)
        with monkeypatch.context() as patch:  # the first question of each exam is its shot
            patch.setattr(mcq_test.harness, "shots_of", lambda paths: dev)
            assert mcq_test.main([*official, "--shots", "1"]) == 0
        found = records.read_json(chain.report / "validation" / "dev-harness-shots1-limit3.json")["models"]["merged"]
        left = len({item["exam"] for item in dev})
        assert (found["harness"]["shots"], found["harness"]["left_out"]) == (1, left) and left > 1
        assert (found["limit"]["n"], found["limit"]["of"]) == (3, len(dev) - left)

    # What a person can give wrongly, one message each.
    alone = chain.models / "copied" / "final"
    shutil.copytree(chain.loop / "final", alone)
    with pytest.raises(PipelineError, match="an adapter without its base.*stage.json"):
        mcq_test.main(["--models", str(alone)])
    cut = chain.models / "cut"
    shutil.copytree(chain.raw_model, cut)
    (cut / "model.safetensors").unlink()
    with pytest.raises(PipelineError, match="is no base to train on:\n  no safetensors weights"):
        mcq_test.main(["--models", "base", str(cut)])
    test_file = chain.mcq / "test.jsonl"
    test_file.rename(test_file.with_suffix(".away"))
    with pytest.raises(PipelineError, match="test.jsonl"):
        mcq_test.main(["--models", "base", "--final"])
    test_file.with_suffix(".away").rename(test_file)
    for made in (alone.parent, cut):
        shutil.rmtree(made)

    looks = chain.report / "test_looks.json"
    assert not looks.exists()
    with pytest.raises(PipelineError, match="nosuch"):
        mcq_test.main(["--final", "--models", "nosuch"])
    assert not looks.exists()
    generate = ["--mode", "generate", "--max-new-tokens", "4", "--limit", "5"]
    assert mcq_test.main(["--final", "--models", "merged", *generate]) == 0
    assert [entry["limit"] for entry in records.read_json(looks)] == [5]
    answers = list(records.read_jsonl(chain.report / "validation" / "test-generate-limit5-tokens4-merged.jsonl"))
    assert len(answers) == 5 and all("output" in row and row["reason"] for row in answers)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["00", "01", "02", "loop"])
def test_inspect_batches(chain, stage, capsys, monkeypatch):
    argv = ["--stage", stage, "--rows", "2", "--max-samples", "40"]
    assert inspect_batches.main(argv) == 0
    text = capsys.readouterr().out
    assert "⟦" in text and "no forbidden state" in text and "\033[" not in text
    assert text.count("--- row ") == 2 and f"=== stage {stage}: " in text
    if stage == "02":
        assert "--- its evaluation prompt is exactly its first " in text
        with monkeypatch.context() as patch:
            patch.setattr(sys.stdout, "isatty", lambda: True)
            assert inspect_batches.main(argv) == 0
        assert "\033[1;32m" in capsys.readouterr().out
        real = inspect_batches.plan_of

        def spoilt(*args):
            plan = real(*args)
            plan.rows[3]["labels"] = plan.rows[3]["input_ids"]  # the prompt is trained too
            return plan

        monkeypatch.setattr(inspect_batches, "plan_of", spoilt)
        with pytest.raises(PipelineError, match="row 4: the evaluation prompt is not its prefix") as error:
            inspect_batches.main(argv)
        assert error.value.exit_code == 2
