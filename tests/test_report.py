"""The tables, the curves and the comparisons hold what the JSON files say."""

import math
import re

import pytest
import torch_fixtures as tf
from report_fixtures import NAMES, evaluation_of, record_of, whole_run

from medgemma_korean import records, report
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import RunPaths
from medgemma_korean.stage import RECORD_NAME


@pytest.fixture
def paths():
    return whole_run()


def numbers(text):
    return re.findall(r"\d[\d,]*\.?\d*", text)


def test_one_row_a_model_in_the_order_of_the_chain(paths):
    rows = report.rows(report.evaluations(paths), report.trained_parameters(paths))
    assert [row[0] for row in rows] == NAMES and all(len(row) == len(report.COLUMNS) for row in rows)
    assert [row[-1] for row in rows] == ["", "", "12,347", "12,348", "", "12,350"]
    paths.scores("merged").unlink()
    assert list(report.evaluations(paths)) == [name for name in NAMES if name != "merged"]


def test_every_number_is_that_of_the_json(paths):
    found = report.evaluations(paths)
    for row in report.rows(found, {}):
        evaluation = found[row[0]]
        score, bits, tokens = evaluation["mcq"], evaluation["bits_per_character"], evaluation["tokens_per_character"]
        expected = [bits[k] for k in ("korean", "medical", "english")] + [tokens[k] for k in ("korean", "medical")]
        assert [float(cell) for cell in row[1:6]] == pytest.approx(expected, abs=5e-4)
        shares = [100 * score[key] for key in ("accuracy", "lower", "upper")]
        assert list(map(float, numbers(row[6]))) == pytest.approx(shares, abs=0.05)
        assert row[7] == f"{score['majority_accuracy']:.1%} ({score['majority_letter']})"


def test_chance_is_called_chance(paths):
    found = report.evaluations(paths)
    verdicts = {row[0]: row[-2] for row in report.rows(found, {})}
    assert verdicts["base"] == "within chance" and verdicts["02"] == "above chance"
    for name, verdict in verdicts.items():
        score = found[name]["mcq"]
        assert (verdict == "within chance") == (score["lower"] <= score["majority_accuracy"])


def test_the_final_table_has_the_same_cells(paths):
    lines = report.final_table(paths).splitlines()
    assert len(lines) == 2 + len(NAMES)
    rows = report.rows(report.evaluations(paths), report.trained_parameters(paths))
    for line, row in zip(lines[2:], rows, strict=True):
        assert line.split() == " ".join(row).split()


def test_rationales_are_told_with_their_share_of_the_rows():
    assert report.rationale_line(tf.paths()) == "rationales: 0, detailed form: 0 %"
    paths = tf.paths()
    counts = {"train": {"read": 100, "kept": 75}, "rationales": 25}
    records.write_json(paths.record("refine_02_kor_med_test"), {"counts": counts})
    assert report.rationale_line(paths) == "rationales: 25, detailed form: 25 %"


# curves -------------------------------------------------------------------------------------------------


def test_a_curve_is_the_whole_log_of_the_newest_checkpoint(paths):
    folder = paths.trained_00
    state = records.read_json(folder / "checkpoint-42" / "trainer_state.json")
    expected = [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]
    assert report.curve(folder, "loss") == expected and len(expected) == 42
    assert [step for step, _ in report.curve(folder, "learning_rate")] == list(range(1, 43))
    assert report.curve(paths.loop, "loss") == []


# two runs -----------------------------------------------------------------------------------------------


def other(paths, name="other", **of):
    """A second run in the same project, with base and 02 alone."""
    run = RunPaths(paths.model, paths.data, name)
    records.write_json(run.scores("base"), evaluation_of("base", right=12, **of))
    records.write_json(run.trained_02 / "evaluation.json", evaluation_of("02", right=50, **of))
    return run


def test_two_runs_are_compared_where_both_were_scored(paths):
    found = report.compared([paths, other(paths)])
    assert list(found["stages"]) == ["base", "02"] and found["runs"] == [paths.name, "other"]
    same, better = found["stages"]["base"], found["stages"]["02"]
    assert same["change"]["accuracy"] == 0 and same["paired"]["p"] == 1
    assert same["paired"]["lower"] == pytest.approx(-same["paired"]["upper"])
    # 42 of 60 against 50 of 60, all 8 discordant items gained: p = 2 / 2^8
    assert better["paired"]["p"] == 2 / 2**8 and better["not_paired"] is None
    assert (better["paired"]["wrong_to_right"], better["paired"]["right_to_wrong"]) == (8, 0)
    assert better["change"]["accuracy"] == pytest.approx(8 / 60)
    expected = report.paired_interval(42, 8, 0, 10)
    assert (better["paired"]["lower"], better["paired"]["upper"]) == expected and expected[0] > 0
    first, second = (e["bits_per_character"]["korean"] for e in (evaluation_of("02", 42), evaluation_of("02", 50)))
    assert better["bits_per_character"][0]["korean"] == first
    assert better["change"]["bits_per_character"]["korean"] == pytest.approx(second / first - 1)


def test_the_interval_of_a_change_is_the_published_one():
    # M. W. Fagerland, S. Lydersen, P. Laake, Recommended tests and confidence intervals for paired binomial
    # proportions, Statistics in Medicine 33 (2014), airway hyper-responsiveness: -0.286 (-0.507 to -0.026)
    lower, upper = report.paired_interval(1, 1, 7, 12)
    assert (round(lower, 3), round(upper, 3)) == (-0.507, -0.026)


def test_the_interval_of_a_change_holds_it_and_turns_with_it():
    for both, gained, lost, neither in ((0, 8, 0, 52), (30, 5, 3, 22), (10, 1, 9, 0), (0, 0, 0, 60), (60, 0, 0, 0)):
        lower, upper = report.paired_interval(both, gained, lost, neither)
        assert -1 <= lower <= (gained - lost) / (both + gained + lost + neither) <= upper <= 1
        assert report.paired_interval(both, lost, gained, neither) == pytest.approx((-upper, -lower))
    # more agreement, a narrower interval
    wide, narrow = report.paired_interval(20, 10, 10, 20), report.paired_interval(28, 2, 2, 28)
    assert narrow[1] - narrow[0] < wide[1] - wide[0]


@pytest.mark.parametrize("cells", [(0.6, 0.1, 0.1, 0.2), (0.3, 0.25, 0.1, 0.35), (0.1, 0.02, 0.08, 0.8)])
def test_the_interval_of_a_change_holds_the_true_one_about_as_often_as_it_says(cells):
    """Exact coverage: over every table of 30 items, its multinomial probability where the interval holds the truth."""
    n, truth, covered = 30, cells[1] - cells[2], 0.0
    logs = [math.log(cell) for cell in cells]
    for both in range(n + 1):
        for gained in range(n + 1 - both):
            for lost in range(n + 1 - both - gained):
                table = (both, gained, lost, n - both - gained - lost)
                lower, upper = report.paired_interval(*table)
                if lower <= truth <= upper:
                    weight = math.lgamma(n + 1) + sum(
                        k * p - math.lgamma(k + 1) for k, p in zip(table, logs, strict=True)
                    )
                    covered += math.exp(weight)
    assert 0.94 < covered < 0.99


@pytest.mark.parametrize(
    "alter, word",
    [
        (lambda e: e.update(items="others"), "other items"),
        (lambda e: e.update(precision="nf4"), "another precision"),
        (lambda e: e.pop("predictions"), "item by item"),
    ],
)
def test_runs_that_cannot_be_paired_say_why(paths, alter, word):
    run = other(paths)
    file = run.trained_02 / "evaluation.json"
    scores = records.read_json(file)
    alter(scores)
    records.write_json(file, scores)
    entry = report.compared([paths, run])["stages"]["02"]
    assert entry["paired"] is None and word in entry["not_paired"]
    assert report.compared_rows(report.compared([paths, run]))[1][4] == "not comparable"


def test_numbers_of_other_texts_and_items_are_not_subtracted(paths):
    run = other(paths)
    for place, digest in ((paths, "old"), (run, "new")):
        file = place.trained_02 / "evaluation.json"
        texts = {"korean": "same", "medical": "same", "english": digest}
        records.write_json(file, records.read_json(file) | {"texts": texts})
    found = report.compared([paths, run])
    entry, row = found["stages"]["02"], report.compared_rows(found)[1]
    change = entry["change"]
    assert change["bits_per_character"]["english"] is None and change["bits_per_character"]["korean"] is not None
    assert change["accuracy"] == pytest.approx(8 / 60) and entry["paired"]["p"] == 2 / 2**8  # the answers are pairs
    assert len(change["not_compared"]) == 1 and "(english)" in change["not_compared"][0]
    assert "->" in row[5] and "->" not in row[7] and "other texts" in row[7]
    file = run.trained_02 / "evaluation.json"
    records.write_json(file, records.read_json(file) | {"items": "others"})
    found = report.compared([paths, run])
    change = found["stages"]["02"]["change"]
    assert change["accuracy"] is None and "dev questions" in change["not_compared"][0]
    assert report.compared_rows(found)[1][3] == "other questions"
    # the other stage was scored before texts were recorded, of which nothing is said
    assert found["stages"]["base"]["change"]["not_compared"] == []


def test_runs_beside_each_other_were_scored_on_the_same_texts(paths):
    runs = [paths, whole_run("other")]
    for run, digest in zip(runs, "ab", strict=True):
        records.write_json(run.trained_00 / RECORD_NAME, {**record_of("00", 2), "counts": {"korean_characters": 99}})
        records.write_json(run.tokenizer / "tokenizer_info.json", {"new_tokens": 1024})
        for file in (run.scores("extended"), run.trained_00 / "evaluation.json"):
            scores = records.read_json(file)
            assert "texts" not in scores
            records.write_json(file, scores | {"texts": {"korean": digest, "english": "same"}})
    assert [row[0] for row in report.beside(runs[:1])] == ["tiny, before", "tiny, after"]
    with pytest.raises(PipelineError, match=r"different held-out texts \(korean\)"):
        report.beside(runs)


def test_a_comparison_of_nothing_is_one_message(paths):
    with pytest.raises(PipelineError, match=f"no scores.*{paths.name}"):
        report.compared([paths, RunPaths(paths.model, paths.data, "nobody")])
    with pytest.raises(PipelineError, match="that is one run"):
        report.compared([paths, paths])
    only = RunPaths(paths.model, paths.data, "loop-only")
    records.write_json(only.loop / "evaluation.json", evaluation_of("loop", 3))
    with pytest.raises(PipelineError, match="no stage in common"):
        report.compared([paths, only])


def test_the_table_of_two_runs_has_its_numbers(paths):
    found = report.compared([paths, other(paths)])
    for row in report.compared_rows(found):
        assert len(row) == len(report.COMPARED)
        entry = found["stages"][row[0]]
        for side in (0, 1):
            expected = [100 * entry[key][side] for key in ("accuracy", "lower", "upper")]
            assert list(map(float, numbers(row[1 + side]))) == pytest.approx(expected, abs=0.05)


def test_what_is_no_evaluation_is_named(paths):
    records.write_json(paths.scores("base"), ["something else"])
    with pytest.raises(PipelineError, match="base.json: not an evaluation"):
        report.evaluations(paths)


def test_the_loop_is_a_row_of_its_own(paths):
    records.write_json(paths.loop / "evaluation.json", evaluation_of("loop", right=20))
    found = report.evaluations(paths)
    assert list(found) == [*NAMES, "loop"] and report.final_of(found) == "02"
    assert report.change(found)["to"] == "02"
    (paths.trained_02 / "evaluation.json").unlink()
    assert report.final_of(report.evaluations(paths)) == "loop"


def on_a_plain_base(paths, name="02"):
    """The stage's record and scores as training on --base-model leaves them; returns the base's scores."""
    folder, number = report.trained_folders(paths)[name], 5
    records.write_json(folder / RECORD_NAME, record_of(name, number) | {"base_files": {"config.json": "1"}})
    scores = evaluation_of("base", right=21, seed=7)
    records.write_json(folder / report.BEFORE, scores)
    return scores


def test_the_base_is_the_one_that_the_final_model_was_trained_on(paths):
    raw = records.read_json(paths.scores("base"))
    assert report.evaluations(paths)["base"] == raw
    scores = on_a_plain_base(paths, "01")  # which is not the final one
    assert report.evaluations(paths)["base"] == raw
    scores = on_a_plain_base(paths)
    found = report.evaluations(paths)
    assert list(found) == NAMES and found["base"] == scores != raw
    change = report.change(found)
    assert (change["from"], change["to"]) == ("base", "02")
    assert change["accuracy"] == pytest.approx((12 + 30 - 21) / 60)
    assert report.run_files(paths)["base"] == paths.scores("base")  # of the raw model, which lies in its folder
    (paths.trained_02 / report.BEFORE).unlink()  # the raw model is still no base of the final one
    assert "base" not in report.evaluations(paths)


def test_a_run_of_one_training_on_a_plain_base_has_its_base():
    paths = tf.paths()
    scores = on_a_plain_base(paths)
    records.write_json(paths.trained_02 / "evaluation.json", evaluation_of("02", right=50))
    found = report.evaluations(paths)
    assert list(found) == ["base", "02"] and found["base"] == scores
    assert report.final_table(paths).splitlines()[2].startswith("base ")


def test_warnings_and_gates_are_those_of_the_records(paths):
    assert report.warnings(paths) == ["train_02: 02 was odd"]
    lines = report.gates(paths)
    assert lines[1] == "train_01: FAILED (dev accuracy fell <far>)" and lines[0].startswith("train_00: passed")
    (paths.trained_01 / RECORD_NAME).unlink()
    assert len(report.gates(paths)) == 2
