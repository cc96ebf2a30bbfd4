"""The table, the page and the model card hold what the JSON files say, and their paths exist."""

import os
import random
import re
from html.parser import HTMLParser

import pytest
import torch_fixtures as tf

from medgemma_korean import mcq, records, report
from medgemma_korean.stage import RECORD_NAME

NAMES = ["base", "extended", "00", "01", "merged", "02"]


def evaluation_of(name, right, number=60, seed=1):
    """An evaluation with `right` of `number` items right and numbers that occur nowhere else."""
    rng = random.Random(f"{name}/{seed}")
    rows = []
    for i in range(number):
        gold = "ABCDE"[i % 5]
        predicted = gold if i < right else "ABCDE"[(i + 1) % 5]
        rows.append({"id": str(i), "exam": "doctor", "gold": gold, "predicted": predicted, "reason": "x"})
    return {
        "which": name,
        "precision": "8bit",
        "mcq": mcq.score(rows),
        "bits_per_character": {k: rng.uniform(2, 9) for k in ("korean", "medical", "english")},
        "tokens_per_character": {k: rng.uniform(0.1, 0.9) for k in ("korean", "medical", "english")},
        "predictions": rows,
        "samples": [{"prompt": f"{name}: <b>A & B?</b>", "answer": f'{name} "답"<end_of_turn>'}],
    }


@pytest.fixture
def paths():
    """A run with every evaluation and record that a report reads."""
    found = tf.paths()
    places = [found.scores("base"), found.scores("extended"), found.trained_00, found.trained_01]
    places += [found.scores("merged"), found.trained_02]
    for number, (name, place) in enumerate(zip(NAMES, places, strict=True)):
        trained = place.suffix != ".json"
        file = place / "evaluation.json" if trained else place
        records.write_json(file, evaluation_of(name, right=12 + 6 * number))
        if trained:
            gate = {"passed": name != "01", "reasons": [], "p": 0.5, "english_ratio": 1.02}
            gate["reasons"] = [] if gate["passed"] else ["dev accuracy fell <far>"]
            record = {"program": f"train_{name}", "gate": gate, "trainable": {"lora": 12000, "rows": 345 + number}}
            records.write_json(place / RECORD_NAME, {**record, "warnings": [f"{name} was odd"] if name == "02" else []})
    records.write_json(
        found.refined / ".stages" / "refine_00.json", {"counts": {"kept": 1234, "dropped": {"short": [1, 2]}}}
    )
    return found


class Page(HTMLParser):
    """Tables as rows of cells; fails on a tag that does not close."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tables, self.text, self.addresses = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for key, value in attrs if key in ("src", "href")]
        assert tag != "script"
        if tag == "meta":
            return
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


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


def test_the_page(paths):
    page = Page(report.html_page(paths, tf.profile()))
    rows = report.rows(report.evaluations(paths), report.trained_parameters(paths))
    assert page.tables[0] == [report.COLUMNS, *rows]
    assert page.addresses == []  # self-contained
    text = "".join(page.text)
    assert report.NOT_A_DEVICE in text and "02 was odd" in text
    assert "train_01: FAILED (dev accuracy fell <far>)" in text and "train_00: passed" in text
    samples = next(table for table in page.tables if table[0][0] == "prompt")
    assert samples[0] == ["prompt", *NAMES]
    for name, row in zip(NAMES, samples[1:], strict=True):  # each stage was asked another prompt here
        answers = [f'{n} "답"<end_of_turn>' if n == name else "" for n in NAMES]
        assert row == [f"{name}: <b>A & B?</b>", *answers]
    data = next(table for table in page.tables if table[0] == ["program", "count", "number"])
    assert data[1:] == [["refine_00", "kept", "1,234"], ["refine_00", "dropped / short", "2"]]
    for name, evaluation in report.evaluations(paths).items():
        assert f"{name}{evaluation['bits_per_character']['korean']:.3f}" in text  # the bar and its value
    assert report.html_page(paths, tf.profile()) == report.html_page(paths, tf.profile())


def test_the_page_of_a_run_that_has_only_begun():
    page = Page(report.html_page(tf.paths(), tf.profile()))
    assert page.tables[0] == [report.COLUMNS] and "none" in "".join(page.text)


INFO = {
    "steps": 40,
    "train_samples": 1234,
    "learning_rate": 5e-4,
    "lora_scale": 2.0,
    "trainable_parameters": {"lora": 1000, "rows": 234},
    "best_step": 30,
}


@pytest.fixture
def card(paths):
    """A trained folder with its card, beside the base that it needs."""
    import shutil

    base = paths.raw_lora_added / "base"
    folder = paths.trained_02
    shutil.copytree(tf.base_folder(), base)
    shutil.copytree(tf.moved_adapter_folder(), folder / "final")
    tf.tokenizer().save_pretrained(folder / "final")
    evaluation = records.read_json(folder / "evaluation.json")
    text = report.model_card(paths, tf.profile(), "train_02_kor_med_test", INFO, evaluation, base, folder)
    records.write_text(folder / "README.md", text)
    return folder, text, evaluation


def test_the_card_says_what_the_json_says(card):
    _, text, evaluation = card
    score = evaluation["mcq"]
    assert f"{score['correct']} of {score['n']} = {score['accuracy']:.1%}" in text
    assert f"{score['lower']:.1%} to {score['upper']:.1%}" in text
    assert all(f"{value:.3f}" in text for value in evaluation["bits_per_character"].values())
    assert "40 steps over 1,234 rows, learning rate 0.0005 at LoRA scale" in text
    assert "1,234 parameters trained" in text and re.search(r"checkpoint of step\s+30", text)
    assert report.NOT_A_DEVICE in text and "within chance" not in text
    assert text.startswith("---\nlanguage: [ko, en]\n")


def test_the_cards_code_finds_its_files_and_runs(card, monkeypatch, capsys):
    folder, text, _ = card
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (relative,) = re.findall(r'base = folder / "(.*)"', code)
    assert not os.path.isabs(relative) and (folder / relative / "config.json").is_file()
    monkeypatch.chdir(folder)
    # The shipped code generates 64 tokens; two show as much.
    exec(compile(code.replace("max_new_tokens=64", "max_new_tokens=2"), "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_card_of_a_model_within_chance(paths):
    evaluation = evaluation_of("02", right=12)
    text = report.model_card(
        paths, tf.profile(), "p", INFO, evaluation, paths.raw_lora_added / "base", paths.trained_02
    )
    assert "so this is within chance" in text


def test_rationales_are_told_with_their_share_of_the_rows():
    assert report.rationale_line(tf.paths()) == "rationales: 0, detailed form: 0 %"
    paths = tf.paths()
    counts = {"train": {"read": 100, "kept": 75}, "rationales": 25}
    records.write_json(paths.record("refine_02_kor_med_test"), {"counts": counts})
    assert report.rationale_line(paths) == "rationales: 25, detailed form: 25 %"
