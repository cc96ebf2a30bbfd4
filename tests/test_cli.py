"""What every program does the same way: docstring, --help, one line for a wrong option, exit codes, masked logs."""

import ast
import errno
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medgemma_korean import cli, profiles
from medgemma_korean.cli import GateError, Interrupted, PipelineError
from medgemma_korean.paths import RunPaths

SCRIPT = Path(__file__).resolve().parents[1] / "script"
PROGRAMS = sorted(f for f in SCRIPT.glob("*/*.py") if f.parent.name != "medgemma_korean")
HEAVY = {"torch", "transformers", "datasets", "peft", "trl", "bitsandbytes"}

every_program = pytest.mark.parametrize("file", PROGRAMS, ids=lambda f: f.stem)


@pytest.fixture(autouse=True)
def signals_as_before():
    """cli.run installs handlers; pytest wants its own back."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(n) for n in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    cli._stop_requested.clear()
    cli.poll_for_stop(False)


def test_there_are_programs():
    assert {"download", "refine", "model", "train", "evaluate"} <= {f.parent.name for f in PROGRAMS}
    assert not list(SCRIPT.glob("[!m]*/__init__.py")) and not (SCRIPT / "model" / "__init__.py").exists()


@every_program
def test_a_program_says_what_it_reads_and_writes(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    doc = ast.get_docstring(tree) or ""
    first = doc.split("\n")[0]
    assert first.endswith(".") and len(first) > 20, f"{file.name}: the first line is no sentence: {first!r}"
    for word in ("Reads", "Writes"):
        assert re.search(rf"^{word}\b", doc, re.MULTILINE), f"{file.name}: the docstring does not say what it {word}"
    assert f"python script/{file.parent.name}/{file.name}" in doc, f"{file.name}: no command to paste"
    assert "sys.path" not in file.read_text(encoding="utf-8")


@every_program
def test_help_is_quick_and_imports_nothing_heavy(file, tmp_path):
    def ask():
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", str(file), "--help"], capture_output=True, text=True, cwd=tmp_path
        )
        return done, time.monotonic() - started

    done, seconds = ask()
    if seconds > 2:  # the machine was busy; once more
        done, seconds = ask()
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode == 0 and "usage:" in done.stdout
    assert not imported & HEAVY
    assert seconds < 2


@every_program
def test_a_wrong_option_and_a_wrong_model_are_one_line(file, load_program, monkeypatch, capfd):
    if file.stem == "launch":
        pytest.skip("hands its options on")
    monkeypatch.syspath_prepend(file.parent)  # as Python does for a program; *_all import their siblings
    monkeypatch.setattr(cli.log, "handlers", [])
    main = load_program(file.stem).main
    for args, part in ((["--no-such-option"], "--no-such-option"), (["--model", "gpt-9"], "gpt-9")):
        try:
            code = cli.run(lambda args=args: main(args))
        except SystemExit as exit:
            code = exit.code
        said = "".join(capfd.readouterr())
        (line,) = said.strip().splitlines()
        assert code == 2 and line.startswith("error: ") and part in line, said
    assert all(known in line for known in profiles.MODELS)  # the second message lists what there is


def test_a_wrong_option_in_a_process_of_its_own(run_program):
    for args in (["--no-such-option"], ["--max-samples", "0"], ["--model", "gpt-9"]):
        outcome = run_program("refine_00_plain_text", *args)
        assert outcome.code == 2 and outcome.stdout == "" and outcome.stderr.count("\n") == 1, outcome.text


def test_a_data_folder_that_is_absent(run_program):
    outcome = run_program("refine_all", "--data-dir", "nowhere")
    assert (
        outcome.code == 2
        and outcome.text.strip() == "error: --data-dir nowhere: no such folder; give a folder that holds 01_raw"
    )


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "x", ""])
def test_positive_int(text):
    import argparse

    with pytest.raises(argparse.ArgumentTypeError):
        cli.positive_int(text)
    assert cli.positive_int("7") == 7


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "x"])
def test_positive_float(text):
    import argparse

    with pytest.raises(argparse.ArgumentTypeError):
        cli.positive_float(text)
    assert cli.positive_float("1e-3") == 0.001


# exit codes ---------------------------------------------------------------------------------------------


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "main, code, part",
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raising(PipelineError("data/x: absent; run: y")), 2, "error: data/x: absent; run: y"),
        (raising(GateError("worse")), 3, "error: worse"),
        (raising(Interrupted("SIGTERM")), 130, "SIGTERM"),
        (raising(KeyboardInterrupt()), 130, "run the same command again"),
        (raising(MemoryError()), 2, "out of memory"),
        (raising(OSError(errno.ENOSPC, "No space", "/x/y")), 2, "no space left"),
        (raising(RuntimeError("while serializing: No space left on device (os error 28)")), 2, "no space left"),
        (raising(RuntimeError("while serializing: Read-only file system (os error 30)")), 2, "no permission"),
        (raising(PermissionError(errno.EACCES, "Permission denied", "/x/y")), 2, "/x/y"),
        (raising(BrokenPipeError(errno.EPIPE, "Broken pipe")), 0, ""),
        (raising(FileNotFoundError(errno.ENOENT, "No such file", "z")), 1, "Traceback"),
        (raising(ZeroDivisionError("bug")), 1, "this is a bug"),
    ],
)
def test_exit_codes(main, code, part, capsys):
    assert cli.run(main) == code
    said = "".join(capsys.readouterr())
    assert part in said
    assert ("Traceback" in said) == (code == 1)
    if not part:
        assert said == ""


def test_a_signal_is_no_error_that_a_library_may_wrap(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_stop_requested", [])

    def imports():  # as trl does
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception as error:
            raise RuntimeError("Failed to import") from error

    assert cli.run(imports) == 130
    assert "run the same command again to continue" in "".join(capsys.readouterr())
    cli._stop_requested.clear()

    def imports_twice():  # as torch does with numpy, which then cannot be loaded
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            raise ImportError("cannot load module more than once per process") from None

    assert cli.run(imports_twice) == 130
    said = "".join(capsys.readouterr())
    assert "SIGTERM, on which came ImportError: cannot load module more than once" in said and "Traceback" not in said
    assert cli.run(raising(ImportError("x"))) == 1  # without a signal it is a bug


def test_a_signal_ends_a_program_and_a_polling_one_saves_first(capsys, monkeypatch):
    def stops_at_once():
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("not reached")

    assert cli.run(stops_at_once) == 130
    cli._stop_requested.clear()

    def polls():
        cli.poll_for_stop(True)
        signal.raise_signal(signal.SIGTERM)
        assert cli.stop_requested()
        signal.raise_signal(signal.SIGTERM)  # the same request, by another way
        return 0

    assert cli.run(polls) == 0

    monkeypatch.setattr(cli, "SIGNAL_ECHO", 0.0)

    def polls_and_is_told_twice():
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("not reached")

    assert cli.run(polls_and_is_told_twice) == 130


# logging ------------------------------------------------------------------------------------------------


def test_secrets_stay_out_of_the_log(tmp_path, capsys):
    paths = RunPaths.of("tiny", "data/sample")
    cli.start_logging(paths, "test_program")
    cli.log.info("token %s and %s", "hf_abcdefghijklmnop", "Authorization: Bearer abc.def-123")
    cli.log.info("mail a.person@example.org, 100 %, 40 %")
    assert cli.run(raising(PipelineError("401 for hf_abcdefghijklmnop"))) == 2
    written = paths.log.read_text(encoding="utf-8")
    for text in (written, "".join(capsys.readouterr())):
        assert "hf_abc" not in text and "abc.def" not in text and "a.person" not in text
        assert "100 %, 40 %" in text
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d test_program: token \*\*\*", written)


def test_secrets_stay_out_before_logging_starts(capsys, monkeypatch):
    monkeypatch.setattr(cli.log, "handlers", [])
    cli.run(raising(PipelineError("401 for hf_abcdefghijklmnop")))
    assert capsys.readouterr().err == "error: 401 for ***\n"


# small things -------------------------------------------------------------------------------------------


def test_shared_arguments_are_handed_on(tmp_path):
    parser = cli.make_parser("x", device=True)
    args = parser.parse_args(["--model", "tiny", "--data-dir", "a b", "--name", "n", "--device", "cpu", "--force"])
    assert cli.shared_argv(args) == [
        "--model", "tiny", "--data-dir", "a b", "--name", "n", "--device", "cpu", "--force",
    ]  # fmt: skip
    assert cli.shared_argv(parser.parse_args([])) == ["--model", "tiny"]
    run = RunPaths.of("tiny", "data/sample", "a b", "n")
    assert run.command("model/add_lora", "--second") == (
        "python script/model/add_lora.py --model tiny --data-dir 'a b' --name n --second"
    )


def test_table_counts_terminal_cells():
    lines = cli.table([["간", "1"], ["liver", "1,234"]], ["term", "n"]).split("\n")
    assert lines == ["term       n", "-----  -----", "간         1", "liver  1,234"]
    assert cli.count(1, "row") == "1 row" and cli.count(1234, "row") == "1,234 rows" and cli.count(0, "row") == "0 rows"
