"""run_full_pipeline.sh and the programs of script/operate, on a folder of their own; nothing is trained."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from medgemma_korean import progress, records
from medgemma_korean.paths import DRIVER_STAGES, RunPaths

REPOSITORY = Path(__file__).resolve().parents[1]
DRIVER = REPOSITORY / "run_full_pipeline.sh"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project root, with a space in its name, that holds the sample data and nothing else."""
    root = tmp_path / "a root"
    hidden = shutil.ignore_patterns("02_refined", ".stages")
    shutil.copytree(REPOSITORY / "data" / "sample", root / "data" / "sample", ignore=hidden)
    monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(root))
    yield root
    for pid in progress.lock_holders(RunPaths.of("tiny", "data/sample")):
        os.kill(pid, signal.SIGKILL)


def drive(*arguments: str, cwd: str | Path = "/", timeout: float = 60) -> subprocess.CompletedProcess:
    return subprocess.run([str(DRIVER), *arguments], capture_output=True, text=True, timeout=timeout, cwd=cwd)


def refused(*arguments: str) -> str:
    """The one message of a command that must end with 2."""
    done = drive(*arguments)
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    return done.stderr


def wait_for(condition, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return found


# arguments ----------------------------------------------------------------------------------------------


def test_help_is_quick_and_names_everything():
    started = time.monotonic()
    done = drive("--help")
    assert time.monotonic() - started < 0.5
    assert done.returncode == 0
    options = "--model --data-dir --name --from --to --skip-00 --skip-01 --skip-02 --epochs-00 --epochs-01 --epochs-02"
    options += " --device --max-samples --force --allow-regression --background --status --json --stop --plan"
    options += " --verify --no-test --no-veterinary --new-tokens --min-count --on-finish MEDGEMMA_KOREAN_OUTCOME"
    for word in (*options.split(), *DRIVER_STAGES):
        assert word in done.stdout, word


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--frobnicate"], "--frobnicate: no such option"),
        (["tiny"], "tiny: no such option"),
        (["--model"], "--model needs a value"),
        (["--model", "--plan"], "--model needs a value"),
        (["--model", "gpt-5"], "known are tiny, medgemma-4b, medgemma-27b"),
        (["--data-dir", "/no/such"], "no such folder"),
        (["--name", "../x"], "--name"),
        (["--epochs-00", "0"], "not at least 1"),
        (["--max-samples", "many"], "not a whole number"),
        (["--from", "bake"], "is no stage; the stages are download refine"),
        (["--from", "train"], "train_00 or train_01 or train_02"),
        (["--to", "add"], "add_lora or add_lora_second"),
        (["--from", "train_02", "--to", "refine"], "comes after"),
        (["--json"], "--json goes with --status"),
        (["--plan", "--stop"], "exclude each other"),
        (["--background", "--model", "gpt-5"], "known are"),
    ],
)
def test_wrong_arguments(root, arguments, part):
    assert part in refused(*arguments)
    assert not (root / "logs").exists()


def test_exact_name_is_not_ambiguous(root):
    done = drive("--plan", "--to=add_lora")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()[2:]}
    assert list(lines) == list(DRIVER_STAGES)
    assert lines["add_lora"].endswith("would run")
    assert "not asked for" in lines["train_00"]


# operation without a run --------------------------------------------------------------------------------


def test_plan_of_nothing(root):
    done = drive("--plan", "--skip-01")
    assert done.returncode == 0
    assert "GB free" in done.stdout and "CPU" in done.stdout
    assert done.stdout.count("would run") == len(DRIVER_STAGES) - 1
    assert "train_01          skipped" in done.stdout
    assert not (root / "logs").exists()


def test_plan_names_what_blocks(root):
    done = drive("--plan", "--from", "train_00")
    assert "train_00          blocked: add_lora is not complete" in done.stdout
    (root / "data" / "sample" / "01_raw" / "01_medical_dict" / "korean_medical_dict.jsonl").unlink()
    done = drive("--plan")
    assert "korean_medical_dict.jsonl is missing" in done.stdout
    assert "refine            blocked by download" in done.stdout


def test_plan_of_a_large_model_tells_the_room(root):
    done = drive("--plan", "--model", "medgemma-27b", "--data-dir", str(root / "data" / "sample"))
    assert "run medgemma-27b-sample" in done.stdout
    assert "about 163 of 163 GB are still needed for models (55 GB raw and two bases of 54.1 GB)" in done.stdout
    assert "48 GB" in done.stdout


def test_status_without_a_run(root):
    done = drive("--status")
    assert done.returncode == 0
    assert "nothing has run yet" in done.stdout
    status = json.loads(drive("--status", "--json").stdout)
    assert status["running"] is False and status["pid"] is None
    assert {entry["state"] for entry in status["stages"].values()} == {"waiting"}


def test_stop_and_verify_without_a_run(root):
    assert "nothing of the run tiny is running" in refused("--stop")
    assert "no complete stage" in refused("--verify")


def test_a_foreign_pid_is_not_ours(root):
    paths = RunPaths.of("tiny", "data/sample")
    paths.logs.mkdir()
    paths.pid.write_text(str(os.getpid()))
    assert progress.driver_of(paths) is None
    assert "nothing of the run" in refused("--stop")


def test_second_start_is_refused(root):
    paths = RunPaths.of("tiny", "data/sample")
    paths.logs.mkdir()
    with open(progress.lock_file(paths), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for arguments in (["--to", "download"], ["--background"]):
            message = refused(*arguments)
            assert "still at work" in message and str(os.getpid()) in message
        # Another name is another run.
        assert "nothing has run yet" in drive("--status", "--name", "other").stdout


# a run --------------------------------------------------------------------------------------------------


def test_background_status_stop_and_continue(root):
    done = drive("--background", "--to", "download")
    assert done.returncode == 0, done.stderr
    paths = RunPaths.of("tiny", "data/sample")
    pid = int(paths.pid.read_text())
    assert f"pid {pid}" in done.stdout and "tail -F" in done.stdout and "--stop" in done.stdout

    wait_for(lambda: "download_00_plain_text" in paths.log.read_text())
    started = time.monotonic()
    status = json.loads(drive("--status", "--json").stdout)
    assert time.monotonic() - started < 2
    assert status["running"] and status["pid"] == pid
    assert status["stages"]["download"]["state"] == "running"
    assert f"pid {pid}" in refused("--to", "download")

    stopped = drive("--stop")
    assert stopped.returncode == 0, stopped.stderr
    assert "waiting for" in stopped.stdout and "continues" in stopped.stdout
    assert not paths.pid.exists() and not progress.is_alive(pid)
    text = paths.progress.read_text()
    assert "interrupted" in text and "running" not in text
    lines = paths.log.read_text().splitlines()
    assert sum("== download" in line for line in lines) == 1  # nothing is written twice
    assert any("interrupted in download" in line for line in lines)
    assert all("demonstration" in lines[i] and "--model medgemma-4b --background" in lines[i] for i in (0, -1))
    plan = drive("--plan").stdout
    assert "download          would run: build_tiny_model" in plan
    # What is there is sound, and the end of an altered file is noticed.
    assert "4 complete stages, all sound" in drive("--verify").stdout
    with open(paths.raw_dictionary / "korean_medical_dict.jsonl", "a") as file:
        file.write("\n")
    assert "korean_medical_dict.jsonl" in refused("--verify")
    assert "download          differs" in drive("--plan").stdout


def test_kill_of_the_pid_file_does_what_stop_does(root):
    paths = RunPaths.of("tiny", "data/sample")
    driver = subprocess.Popen([str(DRIVER), "--to", "down"], cwd=root, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: paths.log.is_file() and "download_00_plain_text" in paths.log.read_text())
    os.kill(int(paths.pid.read_text()), signal.SIGTERM)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert "the same command continues" in output
    assert progress.lock_holders(paths) == []


def test_a_killed_driver_does_not_free_its_lock(root):
    paths = RunPaths.of("tiny", "data/sample")
    drive("--background", "--to", "download")
    wait_for(lambda: "download_00_plain_text" in paths.log.read_text())
    os.kill(int(paths.pid.read_text()), signal.SIGKILL)
    wait_for(lambda: progress.driver_of(paths) is None)
    assert "driver: gone, but its stage still runs" in drive("--status").stdout
    assert "without its driver" in refused("--to", "download")
    assert drive("--stop").returncode == 0
    assert progress.lock_holders(paths) == []
    assert progress.read_state(paths)["stages"]["download"]["state"] == "interrupted"


def test_error_of_a_stage_is_the_drivers(root):
    (root / "data" / "sample" / "01_raw" / "01_medical_dict" / "korean_medical_dict.jsonl").unlink()
    done = drive("--to", "download", cwd=root)
    assert done.returncode == 2
    assert "korean_medical_dict.jsonl is missing" in done.stdout
    assert "stopped at download (exit code 2)" in done.stdout


def test_refine_alone_and_skips_are_noted(root):
    """Stages out of the range do not run; a skipped one says so; --skip-01 does without the dictionary."""
    shutil.rmtree(root / "data" / "sample" / "01_raw" / "01_medical_dict")
    done = drive("--from", "refine", "--to", "refine", "--skip-01", "--skip-02", cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    paths = RunPaths.of("tiny", "data/sample")
    stages = progress.read_state(paths)["stages"]
    states = {stage: entry["state"] for stage, entry in stages.items()}
    assert states == {"refine": "complete", "train_01": "skipped", "train_02": "skipped"}
    assert not paths.dictionary.exists() and (paths.plain_text / "train.jsonl").is_file()
    assert "refine            complete" in drive("--plan", "--skip-01").stdout


# the records --------------------------------------------------------------------------------------------


def test_a_stage_whose_input_was_made_anew_differs(root):
    """`changed_inputs` follows fingerprints from record to record."""
    paths = RunPaths.of("tiny", "data/sample")
    for kind, inputs in (("raw_lora_added", {}), ("00_trained", {"raw_lora_added": "one"})):
        folder = paths.model_folder(kind)
        identity = {"inputs": inputs}
        where = {role: f"../../{role}/{paths.name}" for role in inputs}
        record = {"fingerprint": "one", "identity": identity, "home": ".", "inputs": where, "raw_files": {}}
        records.write_json(folder / "stage.json", {**record, "outputs": {}})
    trained = paths.trained_00 / "stage.json"
    assert progress.changed_inputs(trained, paths) == []
    base = paths.raw_lora_added / "stage.json"
    records.write_json(base, {**records.read_json(base), "fingerprint": "two"})
    assert "is another one by now" in progress.changed_inputs(trained, paths)[0]
    base.unlink()
    assert "is incomplete" in progress.changed_inputs(trained, paths)[0]


@pytest.mark.parametrize("program", ["note", "plan", "status", "stop", "verify"])
def test_operation_never_imports_torch(program):
    code = f"import sys, runpy; sys.argv = ['{program}', '--help']\n"
    code += f"try: runpy.run_path('{REPOSITORY}/script/operate/{program}.py', run_name='__main__')\n"
    code += "except SystemExit as end: assert not end.code\nassert 'torch' not in sys.modules"
    done = subprocess.run([str(REPOSITORY / ".venv/bin/python"), "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
