"""Every wrong input of bad_input_cases.py: the exit code, one message with cause and next step, and nothing left."""

from __future__ import annotations

import re

import bad_input_runs as runs
import pytest
from bad_input_cases import CASES, DRIVER, Case

LEAST = 120
# Programs that are driver or library to others, and those that a wrong input cannot reach.
PROGRAMS = sorted(
    str(file.relative_to(runs.REPOSITORY / "script")).removesuffix(".py")
    for kind in ("download", "refine", "model", "train", "evaluate", "operate")
    for file in (runs.REPOSITORY / "script" / kind).glob("*.py")
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The prepared roots, made once; the processes that programs are forked from."""
    place = runs.Place(tmp_path_factory.mktemp("bad") / "roots")
    yield place
    place.close()


@pytest.fixture
def hub_of(request):
    """hub_of(case): a hub for the cases that need one, else None."""
    from loopback_hub import Hub

    def start(case: Case):
        if not case.hub:
            return None
        hub = Hub()
        request.addfinalizer(lambda: hub.__exit__(None, None, None))
        return hub.__enter__()

    return start


def name(case: Case) -> str:
    return f"{case.program.rpartition('/')[2]}: {case.title}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_wrong_input_is_one_message_and_leaves_nothing(case, place, hub_of):
    shown, left = place.run(case, hub_of(case))
    assert runs.problems(case, shown, left) == [], shown.text


def test_every_program_has_cases_and_every_case_says_what_it_expects():
    assert len(CASES) >= LEAST
    assert {case.program for case in CASES} == {DRIVER, *PROGRAMS}
    assert all(case.cause and case.step and case.code in (2, 3) for case in CASES)
    assert len({name(case) for case in CASES}) == len(CASES)


def test_the_table_is_that_of_the_cases():
    """After a change of the cases: python tests/bad_input_runs.py --write"""
    page = runs.TABLE.read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| \d+ \|", line)]
    assert len(rows) == len(CASES)
    for number, (row, case) in enumerate(zip(rows, CASES, strict=True), 1):
        assert row.startswith(runs.heading(number, case)), f"{row}\n{runs.heading(number, case)}"
        message = row.removeprefix(runs.heading(number, case))
        for part in (case.cause, case.step):
            assert all(runs.code_cell(line).strip("`") in message for line in part.split("\n")), (part, message)
    assert "Traceback" not in page and str(runs.REPOSITORY) not in page
    assert all(f"## {program}" in page for program in (DRIVER, *PROGRAMS))


# names that are no wrong input ----------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["my data", "한글 자료", "a'b\"c", "$(touch x);&", "-dash", "line\nbreak"])
def test_odd_names_of_folders_work(folder, place, tmp_path):
    """With a plain --name; the next run's commands, which messages show, are quoted."""
    import shutil

    case = tmp_path / "case"
    shutil.copytree(place.folder("sample"), case)
    root = case / "root"
    (root / "data" / "sample").rename(root / folder)
    server = place.server(False)
    argv = [f"--data-dir={folder}", "--name", "시험"]
    shown = server.run("refine/refine_01_english_korean", argv, case, runs.environment(case), bound=False)
    assert shown.code == 0, shown.text
    assert (root / folder / "02_refined/01_english_korean/en_to_ko.jsonl").is_file() and not (root / "x").exists()
    (root / folder / "01_raw/03_korean_english/sample_ko_en/train.jsonl").unlink()
    shown = server.run("refine/refine_01_english_korean", argv, case, runs.environment(case), bound=False)
    assert shown.code == 2 and "holds no files; run: python script/download/" in shown.text, shown.text


def test_marks_that_windows_leaves_are_no_wrong_input(place, tmp_path):
    """A byte-order mark, CRLF, NUL and half a character in a text are cleaned away, and what is written is UTF-8."""
    import json
    import shutil

    case = tmp_path / "case"
    shutil.copytree(place.folder("sample"), case)
    raw = case / "root" / "data/sample/01_raw"
    pairs = raw / "03_korean_english/sample_ko_en/train.jsonl"
    lines = pairs.read_text(encoding="utf-8").splitlines()
    lines[0] = json.dumps({"en": "The patient\u0000 has \ud83d a fever today.", "ko": "환자는 \ud83d 오늘 열이 난다."})
    pairs.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    exam = raw / "02_kor_med_test/dev.jsonl"
    exam.write_bytes(b"\xef\xbb\xbf" + exam.read_bytes().replace(b"\n", b"\r\n"))
    for program in ("refine_01_english_korean", "refine_02_kor_med_test"):
        shown = place.server(False).run(f"refine/{program}", [], case, runs.environment(case), bound=False)
        assert shown.code == 0, shown.text
    written = (case / "root/data/sample/02_refined/01_english_korean/en_to_ko.jsonl").read_text(encoding="utf-8")
    first = next(json.loads(line) for line in written.splitlines() if "fever today" in line)
    assert (first["source"], first["target"]) == ("The patient has a fever today.", "환자는 오늘 열이 난다.")
