"""Every number of a page is that of the JSON file it names; a page is whole, safe, and there for every kind of run."""

import json
import os
import re
import subprocess
import sys
import types
import urllib.parse
from html.parser import HTMLParser

import pytest
import torch_fixtures as tf
from report_fixtures import HOSTILE, NAMES, evaluation_of, whole_run

from medgemma_korean import page, plots, progress, records, report
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import RunPaths
from medgemma_korean.stage import RECORD_NAME, vouch


class Parsed(HTMLParser):
    """Sections, tables, cited texts; fails on a tag that does not close and on what is fetched or run."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tables, self.text, self.cited, self.images, self.loose = [], [], [], [], [], []
        self.origin, self.section, self.ids, self.targets = None, "", set(), set()
        self.feed(text)
        self.close()
        assert self.open == []
        assert self.targets <= self.ids

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert tag not in ("script", "link", "iframe", "object") and not any(key.startswith("on") for key in attrs)
        self.ids.add(attrs.get("id"))
        if "href" in attrs:
            assert attrs["href"].startswith("#")
            self.targets.add(attrs["href"][1:])
        if tag == "h2":
            self.section = attrs.get("id", "")
        if tag == "img":
            self.images.append(attrs)
        if tag in ("meta", "br", "img"):
            return
        self.open.append(tag)
        if tag == "table":
            self.tables.append((self.section, []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][1][-1].append("")
        if "data-source" in attrs:
            self.origin = attrs["data-source"]
            self.cited.append([self.origin, "", float(attrs.get("data-scale", 1))])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "span":
            self.origin = None

    def handle_data(self, data):
        if "style" in self.open:
            assert "url(" not in data and "@import" not in data
            return
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][1][-1][-1] += data
        if self.origin:
            self.cited[-1][1] += data
        elif "td" in self.open and re.search(r"\d", data):
            self.loose.append((self.section, len(self.tables[-1][1][-1]), data))

    def table(self, section, number=0):
        return [rows for known, rows in self.tables if known == section][number]


def value_at(home, origin):
    """The value that `file#key.key` names, the file relative to the page."""
    file, keys = origin.split("#")
    value = json.loads((home / file).read_text(encoding="utf-8"))
    for key in keys.split("."):
        value = value[int(key)] if isinstance(value, list) else value[urllib.parse.unquote(key)]
    return len(value) if isinstance(value, list) else value


def shown_number(text, times):
    """(value, half a unit of its last digit) of `33.3%`, `1,234`, `2.1e-05`, `203.7 s`, `+6.7` (times 100)."""
    match = re.fullmatch(r"([+-]?[\d,]+(?:\.(\d+))?(?:e([+-]\d+))?)( s| GB|%)?", text)
    assert match, text
    scale = (0.01 if match[4] == "%" else 1) / times
    unit = 10.0 ** (int(match[3] or 0) - len(match[2] or ""))
    return float(match[1].replace(",", "")) * scale, (0.5 * unit) * scale * 1.0001 + 1e-12


def check_numbers(made, home):
    """Every cited text equals its source; returns the parsed page."""
    parsed = Parsed(made.html)
    assert parsed.cited
    for origin, text, times in parsed.cited:
        expected = value_at(home, origin)
        if isinstance(expected, str):
            assert text == expected, origin
        else:
            value, tolerance = shown_number(text, times)
            # `p` and settings are shown with significant digits
            assert abs(value - expected) <= max(tolerance, 0.0 if "%" in text else abs(expected) * 1e-5), (origin, text)
    return parsed


@pytest.fixture(autouse=True)
def figures_without_pixels(request, monkeypatch):
    """Figures are drawn in every test, and turned into images only where a test asks for `real_images`: half a second
    each."""
    if "real_images" not in request.fixturenames:
        monkeypatch.setattr(plots, "image", lambda figure, kind: f"{kind} of {len(figure.axes)} panels".encode())


@pytest.fixture
def real_images():
    """Asked for by tests that look at the bytes of the figures."""


def written(paths, others=()):
    made = page.run_page(paths, tf.profile(), others)
    page.write(made, paths.report / "index.html", paths.report / "summary.json")
    assert made.problems == []
    return made


@pytest.fixture
def paths():
    return whole_run()


# numbers ------------------------------------------------------------------------------------------------


def test_every_number_is_that_of_the_file_it_names(paths):
    parsed = check_numbers(written(paths), paths.report)
    assert len(parsed.cited) > 150
    files = {origin.split("#")[0] for origin, *_ in parsed.cited}
    assert {"scores/base.json", "summary.json", "validation/test-letter.json"} <= files
    assert any(file.endswith("02_trained/tiny/evaluation.json") for file in files)
    assert any(file.endswith("02_trained/tiny/stage.json") for file in files)
    assert any(file.endswith("refine_00.json") for file in files)


def test_a_number_that_is_altered_is_found(paths):
    """The check above can fail."""
    made = written(paths)
    accuracy = f"{evaluation_of('02', right=42)['mcq']['accuracy']:.1%}"
    made.html = made.html.replace(f">{accuracy}<", ">71.0%<")
    with pytest.raises(AssertionError):
        check_numbers(made, paths.report)


def test_no_number_of_a_table_stands_without_its_source(paths):
    parsed = Parsed(written(paths).html)
    sections = ("chain", "questions", "training", "gates")
    allowed = {"8bit"}
    # first column: names of stages and of counts; the second number is the place in the row
    loose = [entry for entry in parsed.loose if entry[0] in sections and entry[1] > 1 and entry[2] not in allowed]
    assert loose == []


def test_the_chain_is_the_table_that_a_run_ends_with(paths):
    chain = Parsed(written(paths).html).table("chain")
    rows = report.rows(report.evaluations(paths), report.trained_parameters(paths))
    assert chain[0][1:] == report.COLUMNS[1:]
    assert [row[1:] for row in chain[1:]] == [row[1:] for row in rows]
    assert [row[0].split()[-1] for row in chain[1:]] == [
        "base",
        "extended",
        "text",
        "dictionary",
        "merged",
        "questions",
    ]


def test_gates_samples_data_and_test_looks_are_told(paths):
    parsed = Parsed(written(paths).html)
    text = "".join(parsed.text)
    assert page.NOT_A_DEVICE in text and page.NOT_A_DEVICE_KOREAN in text and "train_02: 02 was odd" in text
    gates = {row[0]: row for row in parsed.table("gates")[1:]}
    assert "FAILED" in gates["train_01"][1] and gates["train_01"][4] == "dev accuracy fell <far>"
    assert "passed" in gates["train_02"][1]
    ledger = {row[0]: row[1] for row in parsed.table("data")[1:]}
    assert ledger == {"kept": "1,234", "dropped / short": "2", "dropped / v1.5 %": "77"}
    for name in NAMES:
        assert f"{name}: <b>A & B?</b>" in text and f'{name} "답"<end_of_turn>' in text
    assert "looks at the test split: 3" in text
    training = {row[0]: row[-2:] for row in parsed.table("training")[1:]}
    assert training["train_00"] == ["1.25 GB", ""] and training["train_02"] == ["1.28 GB", "9.88 GB"]
    assert parsed.table("questions", 4)[1:] == [["q<7>", "2", "B", "–", "20", "다음 중 <옳은> 것은?"]]
    assert "over 3 looks at dev" in text
    validation, contamination, apart = (parsed.table("questions", number) for number in (1, 2, 3))
    assert validation[0][6:] == [
        "거부 refused", "mean of rotations", "same option in all", "vote of rotations", "clean items",
    ]  # fmt: skip
    assert [row[5:] for row in validation[1:]] == [
        ["", "", "", "", "", "50.9% (37.9% to 64.0%)"], ["0.25", "4", "41.2%", "38.7%", "45.6%", ""],
    ]  # fmt: skip
    assert contamination[:3] == [
        ["학습 자료 training text", "rows read", "dev items touched", "test items touched"],
        ["plain text", "22", "7", "14"],
        ["symbols", "9", "0", "0"],
    ]
    assert contamination[-1] == ["전체 all of it", "", "7 of 60", "14 of 60"]
    # The first 12 items are right in the base's answers, and the first 7 are touched.
    assert len(apart[1:]) == len(NAMES)
    assert apart[1][1].startswith("9.4% (") and apart[1][2].startswith("100.0% (")
    assert "because <it> helps" in text and "1,024" in text
    assert ["learning_rate", "0.002", "0.003", "0.005"] in parsed.table("settings")


def test_an_altered_count_of_looks_is_no_traceback(paths):
    (paths.report / "test_looks.json").write_text("3")
    with pytest.raises(PipelineError, match="test_looks.json: not as it was written"):
        page.run_page(paths, tf.profile())


def test_scores_of_earlier_weights_are_called_so(paths, monkeypatch):
    file = paths.report / "validation" / "dev-letter.json"
    score = evaluation_of("02", right=31)["mcq"]
    now = {"base": "same", "02": "other"}

    class Scored:
        def __init__(self, name):
            self.weights = lambda: now[name]

    def candidates(_, names):
        if names == ["00"]:
            raise PipelineError("not there")
        return [Scored(name) for name in names]

    monkeypatch.setattr(report.evaluation, "candidates", candidates)
    models = {name: {"mcq": score, "weights": "same"} for name in ("base", "02", "00", "a/folder")}
    records.write_json(file, {"split": "dev", "models": models | {"01": {"mcq": score}}})
    parsed = Parsed(written(paths).html)
    (line,) = [text for text in parsed.text if "scored before the model was trained anew" in text]
    told = line.split(":")[1]
    assert "02" in told and "00" in told and "base" not in told and "folder" not in told and "01" not in told


def test_the_same_prompt_stands_once_with_the_answers_in_order(paths):
    for name, file in report.evaluation_files(paths).items():
        if name != "loop":
            scores = records.read_json(file)
            scores["samples"] = [{"prompt": "same?", "answer": f"answer of {name}"}]
            records.write_json(file, scores)
    text = "".join(Parsed(written(paths).html).text)
    assert text.count("same?") == 1
    assert sorted(NAMES, key=lambda name: text.index(f"answer of {name}")) == NAMES


# a page -------------------------------------------------------------------------------------------------


def test_a_page_is_one_file_and_its_figures_lie_beside_it(paths, real_images):
    made = written(paths)
    parsed = Parsed(made.html)
    assert len(parsed.images) == len(made.images) >= 9
    for image in parsed.images:
        assert image["src"].startswith("data:image/svg+xml;base64,") and image["alt"]
    for name in ("accuracy", "bits", "tokens", "loss", "learning_rate", "forgetting", "looks", "exams", "letters"):
        assert made.images[f"{name}.png"] == (paths.report / f"{name}.png").read_bytes()
        assert made.images[f"{name}.png"].startswith(b"\x89PNG")
    assert 'name="viewport"' in made.html and 'charset="utf-8"' in made.html


def test_the_same_run_gives_the_same_bytes_and_is_not_written_again(paths, real_images):
    first, second = written(paths), page.run_page(paths, tf.profile())
    assert (first.html, first.images, first.summary) == (second.html, second.images, second.summary)
    file, cited = paths.report / "index.html", paths.report / "summary.json"
    assert page.write(second, file, cited) is False
    (paths.report / "bits.png").unlink()
    assert page.write(second, file, cited) is True and (paths.report / "bits.png").is_file()


def test_hostile_text_stays_text(paths):
    file = paths.trained_02 / "evaluation.json"
    scores = records.read_json(file)
    scores["samples"] = [{"prompt": HOSTILE, "answer": HOSTILE}]
    scores["mcq"]["exams"][HOSTILE] = scores["mcq"]["exams"]["doctor"]
    records.write_json(file, scores)
    stage = records.read_json(paths.trained_02 / RECORD_NAME)
    stage["warnings"] = stage["gate"]["reasons"] = [HOSTILE]
    stage["settings"][HOSTILE] = HOSTILE
    records.write_json(paths.trained_02 / RECORD_NAME, stage)
    made = page.run_page(paths, tf.profile())
    page.write(made, paths.report / "index.html", paths.report / "summary.json")
    parsed = check_numbers(made, paths.report)
    # prompt, answer, warning, reason, exam, setting and its value; `Parsed` refuses the tags in it
    assert "".join(parsed.text).count(HOSTILE) == 7


def test_a_run_named_in_hangul(real_images):
    paths = whole_run("한글 실행")
    made = written(paths)
    parsed = check_numbers(made, paths.report)
    assert "한글 실행" in "".join(parsed.text)


# every kind of run --------------------------------------------------------------------------------------


def test_a_run_that_has_only_begun():
    paths = tf.paths()
    parsed = Parsed(page.run_page(paths, tf.profile()).html)
    assert "none" in "".join(parsed.text) and parsed.images == []


def test_a_run_with_base_and_extended_alone():
    paths = tf.paths()
    for name, right in (("base", 10), ("extended", 11)):
        scores = evaluation_of(name, right)
        scores.pop("samples")
        records.write_json(paths.scores(name), scores)
    made = written(paths)
    parsed = check_numbers(made, paths.report)
    assert {"accuracy.png", "bits.png", "tokens.png"} <= made.images.keys() and "loss.png" not in made.images
    assert len(parsed.table("chain")) == 3


def test_a_single_model_has_no_change():
    paths = tf.paths()
    records.write_json(paths.scores("base"), evaluation_of("base", 10))
    made = written(paths)
    assert made.summary["change"] is None and 'class="tile"' not in made.html


@pytest.mark.parametrize("skipped", ["01", "00", "merged"])
def test_a_run_with_a_stage_left_out(paths, skipped):
    file = report.evaluation_files(paths)[skipped]
    file.unlink()
    (file.parent / RECORD_NAME).unlink(missing_ok=True)
    parsed = check_numbers(written(paths), paths.report)
    assert len(parsed.table("chain")) == len(NAMES)
    assert not any(f"{skipped}_trained" in origin for origin, *_ in parsed.cited)


def test_a_run_with_a_loop_and_without_checkpoints(paths):
    records.write_json(paths.loop / "evaluation.json", evaluation_of("loop", right=33))
    for folder in report.trained_folders(paths).values():
        for checkpoint in folder.glob("checkpoint-*/trainer_state.json"):
            checkpoint.unlink()
    made = written(paths)
    parsed = check_numbers(made, paths.report)
    assert "loss.png" not in made.images and "forgetting.png" in made.images
    assert parsed.table("chain")[-1][0] == "반복 loop"


def test_a_run_in_progress_says_what_is_not_complete(paths):
    progress.update(paths, "train_02_kor_med_test", "train_02", state="running", percent=3.0)
    progress.update(paths, "train_00_plain_text", "train_00", state="complete")
    progress.update(paths, "report", "report", state="running")
    made = written(paths)
    assert "train_02: running" in made.html and "train_00: complete" not in made.html
    assert "report: running" not in made.html


def test_scores_of_several_precisions_are_called_so(paths):
    assert "different precisions" not in written(paths).html
    file = paths.trained_02 / "evaluation.json"
    records.write_json(file, {**records.read_json(file), "precision": "nf4"})
    assert "different precisions (8bit, nf4)" in written(paths).html


def test_a_damaged_file_is_one_message(paths):
    (paths.trained_00 / RECORD_NAME).write_text("[1, 2]")
    with pytest.raises(PipelineError, match="not a stage record"):
        page.run_page(paths, tf.profile())
    (paths.trained_00 / RECORD_NAME).write_text("{ not")
    with pytest.raises(PipelineError, match="not a stage record.*or move it away"):
        page.run_page(paths, tf.profile())


def test_a_training_on_a_plain_base_is_shown_against_that_base(paths, monkeypatch):
    folder, drawn = paths.trained_02, {}
    scores = evaluation_of("base", right=21, seed=7)
    records.write_json(folder / report.BEFORE, scores)
    record = records.read_json(folder / RECORD_NAME)
    records.write_json(folder / RECORD_NAME, record | {"base_files": {"config.json": "1"}})
    forgetting = plots.forgetting
    monkeypatch.setattr(plots, "forgetting", lambda *given: drawn.update(base=given[1]) or forgetting(*given))
    made = page.run_page(paths, tf.profile())
    page.write(made, paths.report / "index.html", paths.report / "summary.json")
    parsed = check_numbers(made, paths.report)
    files = {origin.partition("#")[0] for origin, _, _ in parsed.cited}
    assert os.path.relpath(folder / report.BEFORE, paths.report) in files and "scores/base.json" not in files
    assert drawn["base"] == scores["bits_per_character"] and made.summary["change"]["from"] == "base"
    assert "tokens.png" not in made.images and "bits.png" in made.images  # extended is of another base
    assert made.html.count("evaluation_before.json#bits_per_character.english") >= 2  # the tile and the chain


# two runs -----------------------------------------------------------------------------------------------


def second_run(paths, name="둘째 <b>"):
    run = RunPaths(paths.model, paths.data, name)
    records.write_json(run.scores("base"), evaluation_of("base", right=12))
    records.write_json(run.trained_02 / "evaluation.json", evaluation_of("02", right=50))
    return run


def test_the_page_of_two_runs_has_the_numbers_of_its_json(paths):
    runs = [paths, second_run(paths)]
    made = page.compare_page(runs, "compare_tiny.json")
    home = runs[1].report
    assert page.write(made, home / "compare_tiny.html", home / "compare_tiny.json")
    parsed = check_numbers(made, home)
    assert made.problems == [] and list(made.images) == ["compare_tiny.png"]
    accuracy, bits = (rows for _, rows in parsed.tables)
    assert [row[0] for row in accuracy[1:]] == ["원본 base", "02 questions"] and len(bits) == 3
    assert accuracy[2][4:] == ["8", "0", f"{2 / 2**8:.2g}"]
    assert "둘째 <b>" in "".join(parsed.text)
    assert (
        page.write(page.compare_page(runs, "compare_tiny.json"), home / "compare_tiny.html", home / "compare_tiny.json")
        is False
    )


def test_the_page_of_two_runs_says_why_there_is_no_test(paths):
    run = second_run(paths)
    records.write_json(run.scores("base"), {**evaluation_of("base", right=12), "precision": "nf4"})
    made = page.compare_page([paths, run], "c.json")
    page.write(made, run.report / "c.html", run.report / "c.json")
    parsed = check_numbers(made, run.report)
    assert "another precision" in "".join(parsed.text) and parsed.tables[0][1][1][4:] == ["", "", ""]


def test_both_pages_say_which_numbers_do_not_compare(paths):
    run = second_run(paths)
    for place, digest in ((paths, "old"), (run, "new")):
        file = place.trained_02 / "evaluation.json"
        records.write_json(file, records.read_json(file) | {"items": digest, "texts": {"english": digest}})
    made = page.compare_page([paths, run], "c.json")
    page.write(made, run.report / "c.html", run.report / "c.json")
    parsed = check_numbers(made, run.report)
    accuracy, bits = (rows for _, rows in parsed.tables)
    assert accuracy[2][3:] == ["", "", "", ""] and "→" in bits[2][1] and "→" not in bits[2][3]
    assert "other texts" in bits[2][3]
    assert "bits per character (english) are of other held-out texts" in "".join(parsed.text)
    # within one run, base and 02
    records.write_json(paths.scores("base"), records.read_json(paths.scores("base")) | {"texts": {"english": "base"}})
    made = page.run_page(paths, tf.profile())
    page.write(made, paths.report / "index.html", paths.report / "summary.json")
    said = "".join(check_numbers(made, paths.report).text)
    assert "Scored on different held-out texts (english)" in said and said.count("not comparable") == 2
    assert made.summary["change"]["bits_per_character"]["english"] is None


# the program --------------------------------------------------------------------------------------------


def test_the_program_writes_the_page_and_says_when_it_is_complete(paths, real_images, load_program, capsys):
    main = load_program("report").main
    assert main(["--model", "tiny", "--no-test"]) == 0
    out = capsys.readouterr().out
    assert report.final_table(paths) in out and "index.html" in out and "gate train_01: FAILED" in out
    check_numbers(page.run_page(paths, tf.profile()), paths.report)
    assert main(["--model", "tiny", "--no-test"]) == 0
    assert "already complete" in capsys.readouterr().out


def test_the_program_opens_the_test_split_once_for_the_same_models(paths, load_program, monkeypatch, capsys):
    """What scores is stood in for: the end-to-end run has the real one."""
    calls, now = [], {"base": "w0", "02": "w2"}
    file = paths.report / "validation" / "test-letter.json"

    def score(argv):
        calls.append(argv)
        found = records.read_json(file)
        for name in now:
            found["models"][name]["weights"] = now[name]
        records.write_json(file, found)
        vouch("x", [file], 0.0)

    monkeypatch.setitem(sys.modules, "validation_kor_med_test", types.SimpleNamespace(main=score))
    scored = types.SimpleNamespace
    monkeypatch.setattr(
        report.evaluation, "candidates", lambda _, names: [scored(name=n, weights=lambda n=n: now[n]) for n in names]
    )
    main = load_program("report").main
    test, away = paths.mcq / "test.jsonl", paths.mcq / "away"
    score([])  # as they are now
    assert main(["--no-test"]) == 0 and main([]) == 0 and len(calls) == 1
    now["02"] = "trained anew"
    test.rename(away)
    assert main(["--no-test"]) == 0 and main([]) == 0 and len(calls) == 1
    away.rename(test)
    assert main(["--name", "tiny", "--force", "--device", "cpu"]) == 0
    assert calls[1:] == [["--model", "tiny", "--name", "tiny", "--device", "cpu", "--final", "--models", "base", "02"]]
    assert main([]) == 0 and len(calls) == 2

    def fails(argv):
        raise PipelineError("out of memory")

    sys.modules["validation_kor_med_test"].main = fails
    file.unlink()
    with pytest.raises(PipelineError, match="out of memory\nfor the report without the test split: --no-test"):
        main([])
    capsys.readouterr()


def test_the_program_compares_two_runs(paths, load_program, capsys):
    run = second_run(paths, "other")
    main = load_program("report").main
    assert main(["--model", "tiny", "--compare", "tiny", "other"]) == 0
    out = capsys.readouterr().out
    assert (run.report / "compare_tiny.html").is_file() and (run.report / "compare_tiny.png").is_file()
    assert re.search(r"^02 .* 0\.0078 ", out, re.MULTILINE)
    with pytest.raises(PipelineError, match="no scores"):
        main(["--model", "tiny", "--compare", "tiny", "nobody"])
    with pytest.raises(SystemExit):
        main(["--model", "tiny", "--compare", "a", "b", "--beside", "c"])


def test_names_of_other_runs_are_plain_names_and_may_end_in_a_slash(paths, load_program):
    """As a shell completes them in model/report/."""
    run = second_run(paths, "other")
    main = load_program("report").main
    assert main(["--model", "tiny", "--compare", "tiny/", "other/"]) == 0
    assert (run.report / "compare_tiny.html").is_file() and (run.report / "compare_tiny.json").is_file()
    assert not [p for p in run.report.iterdir() if p.is_dir() and "compare" in p.name]
    with pytest.raises(PipelineError, match="that is one run"):
        main(["--model", "tiny", "--compare", "tiny/", "tiny"])
    for name in ("../other", "other//", "a/b", "", "/", ".hidden"):
        shown = re.escape(repr(name.removesuffix("/")))
        for option in (["--compare", "tiny", name], ["--compare", name, "tiny"], ["--beside", name]):
            with pytest.raises(PipelineError, match=f"^{option[0]} {shown}: use letters, digits"):
                main(["--model", "tiny", *option])
    assert not paths.report.with_name(".hidden").exists()


def test_the_modules_import_nothing_heavy():
    """Every train program imports them before it knows that it was asked for --help."""
    code = "import sys; from medgemma_korean import model_card, page, plots; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"matplotlib", "jinja2", "yaml", "torch", "numpy"} & set(done.stdout.split())


def test_nothing_scored_is_one_message(load_program):
    tf.paths()
    with pytest.raises(PipelineError, match="nothing was scored yet"):
        load_program("report").main(["--model", "tiny"])
