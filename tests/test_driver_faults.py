"""What happens to a run between a log-out and the next morning: signals, kills, reboots, full disks, second starts."""

import contextlib
import errno
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medgemma_korean import cli, progress, records
from medgemma_korean.cli import GateError, PipelineError
from medgemma_korean.paths import RunPaths
from medgemma_korean.training import CHECKPOINT_MARK

REPOSITORY = Path(__file__).resolve().parents[1]
DRIVER = REPOSITORY / "run_full_pipeline.sh"
REFINE = ("--from", "refine", "--to", "refine", "--skip-01")  # the cheapest stage with a result
REPEATS = 20


@pytest.fixture
def paths(root):
    paths = RunPaths.of("tiny", "data/sample")
    yield paths
    held = progress.holder_of(paths)
    drivers = {held["pid"]} - {os.getpid()} if held and progress.is_at_work(held) else ()
    for pid in (*progress.lock_holders(paths), *drivers):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def begin(paths, signals_heard):
    """begin(*arguments, **options of Popen): the driver, which hears signals as in a terminal."""

    def begin(*arguments: str, program: Path = DRIVER, **options) -> subprocess.Popen:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options
        return subprocess.Popen([str(program), *arguments], cwd="/", preexec_fn=signals_heard, **options)

    return begin


def drive(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(DRIVER), *arguments], capture_output=True, text=True, timeout=120, cwd="/")


def wait_for(condition, seconds: float = 120.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def downloading(paths: RunPaths) -> int:
    """Wait until the first stage is at work; its pid. It builds the demonstration model, which takes a while."""
    wait_for(lambda: paths.log.is_file() and "download_00_plain_text" in paths.log.read_text())
    return wait_for(lambda: [p for p in progress.lock_holders(paths) if not progress.is_driver(p)])[0]


def run_of(paths: RunPaths) -> dict:
    return progress.read_state(paths)["run"]


def state_of(paths: RunPaths, stage: str = "download") -> str:
    return progress.read_state(paths)["stages"][stage]["state"]


def assert_interrupted(paths: RunPaths) -> None:
    """The run has ended with its state saved, and nothing of it is left."""
    assert (run_of(paths)["outcome"], run_of(paths)["stage"]) == ("interrupted", "download")
    assert state_of(paths) == "interrupted" and "running" not in paths.progress.read_text()
    assert progress.lock_holders(paths) == [] and progress.holder_of(paths) is None and not paths.pid.exists()


# second starts ------------------------------------------------------------------------------------------


def start_twice(paths: RunPaths, begin) -> None:
    """Two starts at one instant: one is refused and says who runs, the other runs; and is then ended at once."""
    both = [begin("--to", "download"), begin("--to", "download")]
    (refused,) = wait_for(lambda: [driver for driver in both if driver.poll() is not None])
    (running,) = [driver for driver in both if driver is not refused]
    said, _ = refused.communicate()
    assert refused.returncode == 2
    assert f"the run tiny is at work already, pid {running.pid} on " in said and " since 2" in said
    assert progress.driver_of(paths) == running.pid == int(paths.pid.read_text())
    stopped = drive("--stop", "now")
    assert stopped.returncode == 0, stopped.stderr
    assert running.wait(timeout=60) == 130
    running.stdout.close()


def test_of_two_starts_one_runs(paths, begin):
    start_twice(paths, begin)
    assert_interrupted(paths)


@pytest.mark.full
def test_of_two_starts_one_runs_every_time(paths, begin):
    for _ in range(REPEATS):
        start_twice(paths, begin)
    assert paths.log.read_text().count("run tiny: download") == REPEATS


# signals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_driver(paths, begin, number):
    driver = begin("--to", "download")
    downloading(paths)
    driver.send_signal(number)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130 and "interrupted in download; the same command continues" in output
    assert_interrupted(paths)


def test_a_background_run_heeds_ctrl_c_too(paths):
    """Bash lets a job that it starts behind ignore SIGINT."""
    assert drive("--background", "--to", "download").returncode == 0
    downloading(paths)
    driver = int(paths.pid.read_text())
    os.kill(driver, signal.SIGINT)
    wait_for(lambda: not progress.is_alive(driver))
    assert_interrupted(paths)


def test_a_signal_to_the_whole_group(paths, begin):
    driver = begin("--to", "download", start_new_session=True)
    downloading(paths)
    os.killpg(driver.pid, signal.SIGINT)
    driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert_interrupted(paths)


def copy_of_the_driver(folder: Path) -> Path:
    for name in ("script", ".venv"):
        (folder / name).symlink_to(REPOSITORY / name)
    return shutil.copy(DRIVER, folder / DRIVER.name)


@pytest.mark.parametrize("times", [5, pytest.param(2 * REPEATS, marks=pytest.mark.full)])
def test_signals_to_the_driver_and_its_stage_at_once(paths, begin, tmp_path, times):
    """As `systemctl stop` and `pkill` do: bash may reap the stage while its trap runs. The stage is one that dies at
    once, which makes that likely.
    """
    copy = copy_of_the_driver(tmp_path)
    text, changed = re.subn(
        r'setsid "\$python" "\$\{several.*&$', "setsid sleep 60 &", copy.read_text(), flags=re.MULTILINE
    )
    assert changed == 1
    copy.write_text(text)
    for _ in range(times):
        driver = begin("--to", "download", program=copy)
        wait_for(lambda: paths.holder.is_file() and run_of(paths)["stage"] == "download")
        stage = wait_for(lambda: [p for p in progress.lock_holders(paths) if b"sleep" in command_of(p)])[0]
        os.kill(stage, signal.SIGTERM)
        driver.send_signal(signal.SIGTERM)
        driver.communicate(timeout=60)
        assert driver.returncode == 130
        assert_interrupted(paths)


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def in_a_terminal(*arguments: str) -> tuple[int, int]:
    """(pid, the terminal's other side) of a driver that leads the session of a terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(DRIVER, [str(DRIVER), *arguments])
    return pid, terminal


def test_a_terminal_that_closes_interrupts_what_runs_in_it(paths):
    driver, terminal = in_a_terminal(
        "--to", "download", "--on-finish", f"echo $MEDGEMMA_KOREAN_OUTCOME > {paths.logs}/on"
    )
    downloading(paths)
    os.close(terminal)
    _, status = os.waitpid(driver, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert_interrupted(paths)
    assert (paths.logs / "on").read_text() == "interrupted\n"


def test_a_terminal_that_closes_does_not_end_a_background_run(paths):
    starter, terminal = in_a_terminal("--background", "--to", "download")
    with contextlib.suppress(OSError):  # so Linux says that the other side is closed
        while os.read(terminal, 65536):
            pass
    _, status = os.waitpid(starter, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    driver, stage = int(paths.pid.read_text()), downloading(paths)
    os.close(terminal)
    os.kill(driver, signal.SIGHUP)  # which a shell sends to its jobs
    assert os.getsid(driver) == os.getpgid(driver) == driver and os.getsid(stage) == stage
    status = json.loads(drive("--status", "--json").stdout)
    assert status["running"] and status["pid"] == driver and status["run"]["outcome"] == "running"
    assert status["quiet"]["download"]["alive"] and status["quiet"]["download"]["text"] == ""
    os.kill(int(paths.pid.read_text()), signal.SIGTERM)
    wait_for(lambda: not paths.pid.exists() and not progress.lock_holders(paths))
    assert_interrupted(paths)


def test_a_driver_that_is_edited_while_it_runs(paths, begin, tmp_path):
    """Bash reads a script bit by bit, and an update of the project may come in the middle of a run."""
    copy = copy_of_the_driver(tmp_path)
    driver = begin("--from", "refine", "--to", "prepare_tokenizer", "--skip-01", program=copy)
    wait_for(lambda: paths.log.is_file() and "== refine" in paths.log.read_text())
    copy.write_text("exit 99 '\n" * 2000)
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 2 and "stopped at prepare_tokenizer" in output  # it has no base model
    assert run_of(paths)["outcome"] == "failed" and state_of(paths, "refine") == "complete"


def test_a_reader_that_goes_away_does_not_end_a_run(paths, begin):
    driver = begin(*REFINE)
    driver.stdout.close()
    assert driver.wait(timeout=120) == 0
    assert state_of(paths, "refine") == "complete" and run_of(paths)["outcome"] == "done"


# kills --------------------------------------------------------------------------------------------------


def test_stop_now(paths):
    told = paths.logs / "told"
    started = drive("--background", "--to", "download", "--on-finish", f"echo $MEDGEMMA_KOREAN_CODE > '{told}'")
    assert started.returncode == 0
    # From the first moment there is something to look at.
    assert paths.progress.read_text().startswith("run tiny, written ")
    held = progress.holder_of(paths)
    assert held["pid"] == int(paths.pid.read_text()) and held["started_ticks"] == progress.started(held["pid"])
    assert (
        held["boot_id"] == progress.boot() and held["command"] == "./run_full_pipeline.sh --to download --on-finish ..."
    )
    stage = downloading(paths)
    os.kill(stage, signal.SIGSTOP)  # a step that does not end
    stopped = drive("--stop", "now")
    assert stopped.returncode == 0 and "the same command continues" in stopped.stdout
    assert not progress.is_alive(stage)
    assert_interrupted(paths)
    wait_for(lambda: told.is_file() and told.read_text() == "130\n")
    assert "last run: interrupted" in drive("--status").stdout


def test_a_stage_that_is_killed_says_why_and_what_to_do(paths, begin):
    driver = begin("--to", "download", "--on-finish", "echo $MEDGEMMA_KOREAN_OUTCOME, $MEDGEMMA_KOREAN_MESSAGE; exit 7")
    os.kill(downloading(paths), signal.SIGKILL)  # as the kernel does that has no memory left
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 2 and "its process was killed, perhaps for lack of memory" in output
    assert progress.lock_holders(paths) == []  # nor do its workers go on
    entry = progress.read_state(paths)["stages"]["download"]
    assert entry["state"] == "failed" and "killed" in entry["cause"] and "--micro-batch" in entry["advice"]
    shown = drive("--status").stdout
    assert entry["cause"] in shown and entry["advice"] in shown and "last run: failed" in shown
    lines = paths.log.read_text().splitlines()
    assert any(" on-finish: failed, stopped at download: its process was killed" in line for line in lines)
    assert lines[-1].endswith("warning: the command of --on-finish ended with exit code 7")


def test_a_driver_and_its_stage_are_killed_and_the_run_continues(paths):
    assert drive("--background", "--to", "download").returncode == 0
    driver, stage = int(paths.pid.read_text()), downloading(paths)
    os.kill(driver, signal.SIGKILL)
    os.killpg(stage, signal.SIGKILL)
    wait_for(lambda: not progress.is_alive(driver) and not progress.lock_holders(paths))
    assert paths.pid.is_file() and progress.driver_of(paths) is None  # it could not clean up
    shown = drive("--status").stdout
    assert f"driver: gone (pid {driver} on " in shown and "its process was killed" in shown
    assert "download: no sign of life for" in shown and "is gone" in shown
    assert "nothing of the run tiny is running" in drive("--stop").stderr
    done = drive(*REFINE)
    assert done.returncode == 0
    assert f"a stale lock is cleaned up: pid {driver}, which began" in done.stdout
    assert state_of(paths) == "interrupted" and run_of(paths)["outcome"] == "done"
    assert "stale" not in drive(*REFINE).stdout


@pytest.mark.full
def test_a_killed_training_continues_with_the_same_command(paths):
    command = ("--to", "train_00", "--skip-01", "--max-samples", "40", "--epochs-00", "3", "--allow-regression")
    assert drive("--background", *command).returncode == 0
    wait_for(lambda: list(paths.models.glob(f"00_trained/.tiny.partial/checkpoint-*/{CHECKPOINT_MARK}")), 900)
    driver = int(paths.pid.read_text())
    (stage,) = [p for p in progress.lock_holders(paths) if not progress.is_driver(p)]
    os.kill(driver, signal.SIGKILL)
    os.killpg(stage, signal.SIGKILL)
    wait_for(lambda: not progress.is_alive(driver) and not progress.lock_holders(paths))
    done = subprocess.run([str(DRIVER), *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a stale lock is cleaned up" in done.stdout and "continuing after step" in done.stdout
    assert (paths.trained_00 / "stage.json").is_file()


# who holds a run ----------------------------------------------------------------------------------------


def note(load_program, *arguments: str) -> int:
    return load_program("note").main(list(arguments))


def test_a_lock_file_that_was_deleted_lets_no_second_driver_in(paths, begin):
    driver = begin("--to", "download")
    downloading(paths)
    progress.lock_file(paths).unlink()
    second = drive("--to", "download")
    assert second.returncode == 2
    assert f"is at work already, pid {driver.pid}, though its lock file was deleted" in second.stderr
    assert progress.driver_of(paths) == driver.pid and paths.pid.read_text() == f"{driver.pid}\n"
    assert drive("--stop").returncode == 0
    driver.communicate(timeout=60)
    assert_interrupted(paths)


def test_the_end_of_a_driver_leaves_another_ones_run_alone(paths):
    progress.take(paths, os.getpid(), "x")
    before = paths.holder.read_bytes()
    progress.finish(paths, "done", "report", "", os.getppid())
    assert paths.holder.read_bytes() == before and paths.pid.exists() and "run" not in progress.read_state(paths)
    progress.finish(paths, "done", "report", "", os.getpid())
    assert not paths.holder.exists() and not paths.pid.exists() and run_of(paths)["outcome"] == "done"


def test_a_driver_of_a_machine_that_is_not_seen_counts_while_it_beats(paths, load_program, capsys):
    """On a disk without locks; where there are some, the lock itself says whether it is at work."""
    progress.take(paths, os.getpid(), "x")
    held = records.read_json(paths.holder) | {"host": "gone-container", "started_ticks": 1}
    records.write_json(paths.holder, held)
    progress.draw(paths)
    assert note(load_program, "holder") == 0
    assert f"is at work already, pid {os.getpid()} on gone-container" in capsys.readouterr().out
    then = time.time() - 400
    os.utime(paths.progress, (then, then))
    assert note(load_program, "holder") == 0 and capsys.readouterr().out == ""
    assert note(load_program, "begin", "--pid", str(os.getpid()), "--stages", "report") == 0
    assert "a stale lock is cleaned up" in capsys.readouterr().out


def test_what_a_notifier_prints_is_masked_and_without_escape_codes(paths):
    told = "echo 'Authorization: Bearer hf_AbCdEfGhIjKlMnOp'; printf '10 %%\\r\\033[31m20 %%\\n'; sleep 60 & exit 0"
    done = drive("--from", "report", "--to", "report", "--on-finish", told)
    assert done.returncode == 2  # nothing was scored
    lines = paths.log.read_text().splitlines()
    assert [line.split(" on-finish: ")[1] for line in lines if " on-finish: " in line] == [
        "Authorization: ***",
        "10 %",
        "20 %",
    ]


def test_a_holder_is_known_by_pid_boot_and_start_time(paths):
    progress.take(paths, os.getpid(), "a command")
    assert progress.driver_of(paths) == os.getpid() and int(paths.pid.read_text()) == os.getpid()
    held = records.read_json(paths.holder)
    progress.update(paths, "download_model", state="running")
    for change, why in (
        ({"started_ticks": held["started_ticks"] - 1}, "its process was killed"),  # its pid is another's by now
        ({"pid": 2**22 + 1}, "its process was killed"),
        ({"boot_id": "another"}, "its machine was started anew"),
        ({"boot_id": "another", "host": "elsewhere"}, "it runs, or ran, on elsewhere, which cannot be seen from here"),
    ):
        records.write_json(paths.holder, held | change)
        assert progress.driver_of(paths) is None
        assert progress.why_gone(progress.holder_of(paths)) == why
        assert why in drive("--status").stdout
    assert "was started on elsewhere; stop it there" in drive("--stop").stderr


ODD_TIME = '{"pid": 3, "started_ticks": 1, "boot_id": "x", "host": "y", "since": 1e300}'


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"pid": 3}', ODD_TIME])
def test_a_damaged_holder_file_is_nobody(paths, damage):
    paths.logs.mkdir()
    paths.holder.write_text(damage)
    assert progress.holder_of(paths) is None and progress.driver_of(paths) is None


def test_a_start_after_a_reboot_clears_up(paths, load_program, capsys):
    progress.take(paths, os.getpid(), "a command")
    records.write_json(paths.holder, records.read_json(paths.holder) | {"boot_id": "another"})
    for stage, state in (("download", "complete"), ("refine", "running"), ("train_01", "failed"), ("report", "failed")):
        progress.update(paths, stage, stage, state=state, percent=40.0, cause="why" if state == "failed" else None)
    state = records.read_json(paths.progress_state)
    state["stages"]["refine"]["boot_id"] = "another"
    records.write_json(paths.progress_state, state)
    assert note(load_program, "begin", "--pid", str(os.getpid()), "--stages", "refine train_01") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"a stale lock is cleaned up: pid {os.getpid()}, which began 2")
    assert line.endswith("its machine was started anew")
    states = {stage: entry["state"] for stage, entry in progress.read_state(paths)["stages"].items()}
    assert states == {"download": "complete", "refine": "waiting", "train_01": "waiting", "report": "failed"}
    assert paths.progress.read_text().count("why") == 1  # of the stage that this run does not touch
    assert progress.driver_of(paths) == os.getpid()


def test_a_disk_without_locks_goes_by_the_file(paths, tmp_path, monkeypatch):
    """There flock fails with another code than for a lock that is taken."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "flock").write_text("#!/bin/sh\nexit 71\n")
    (folder / "flock").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    progress.take(paths, os.getpid(), "a command")
    refused = drive(*REFINE)
    assert refused.returncode == 2 and f"at work already, pid {os.getpid()}" in refused.stderr
    progress.release(paths)
    assert drive(*REFINE).returncode == 0


# causes -------------------------------------------------------------------------------------------------


class AcceleratorError(RuntimeError):
    """Named as torch's."""


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    "error, code, cause, advice",
    [
        (PipelineError("x: absent\nrun: y"), 2, "x: absent\nrun: y", ""),
        (GateError("worse"), 3, "worse", ""),
        (OutOfMemoryError("CUDA out of memory.\nmore"), 2, "out of GPU memory (CUDA out of memory.)", "--micro-batch"),
        (
            AcceleratorError("CUDA error: unspecified launch failure\nx"),
            2,
            "the GPU failed (CUDA error: unspec",
            "dmesg",
        ),
        (RuntimeError("CUDA error: device-side assert triggered"), 2, "the GPU failed", "same command continues"),
        (RuntimeError("CUDA driver initialization failed"), 2, "the GPU failed", "nvidia-smi"),
        (RuntimeError("CUDA error: out of memory"), 2, "out of memory", "--micro-batch"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), 2, "out of memory (CUDA", "--micro-batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "out of memory", "--micro-batch"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), 2, "no space left", "free some"),
        (Exception("I/O error: No space left on device (os error 28)"), 2, "no space left", "free some"),
        (OSError(errno.EDQUOT, "Quota", "/x/y"), 2, "no space left on the disk of /x/y", "free some"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, "out of memory ([Errno 12] Cannot", "--micro-batch"),
        (OSError(errno.EMFILE, "Too many", "/x/y"), 2, "too many open files", "ulimit -n"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/x/y"), 2, "/x/y: Is a directory", "move it away, and run"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x"), 2, "/x: Not a directory", "move it away, and run"),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x", None, "/y"),
            2,
            "/y: Not a directory",
            "move it away",
        ),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), 1, "a bug: NotADirectoryError", "report"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x/y"), 1, "a bug: FileNotFoundError", "report"),
        *(
            (OSError(number, os.strerror(number), "/x/y"), 2, f"/x/y: {os.strerror(number)}", "")
            for number in (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ELOOP)
        ),
        (RuntimeError("shapes differ"), 1, "a bug: RuntimeError: shapes differ", "report"),
    ],
)
def test_causes_and_advice(error, code, cause, advice):
    found = cli.explain(error)
    assert found[0] == code and found[1].startswith(cause) and advice in found[2]
    assert bool(advice) == bool(found[2])


@pytest.mark.parametrize("stage, recorded", [("download", True), ("", False)])
def test_an_error_before_a_stage_has_begun_is_recorded_for_the_driver(paths, monkeypatch, stage, recorded):
    """Started by hand, a program that refuses to begin leaves the state of its stage alone."""
    monkeypatch.setenv(cli.DRIVER_VARIABLE, stage)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    progress.update(paths, "download_model", state="complete")

    def main():
        cli.resolve(cli.make_parser("x").parse_args([]))
        raise PipelineError("hf_abcdefghijklmnop: no entry\nask for it")

    assert cli.run(main) == 2
    text = paths.progress.read_text()
    assert (state_of(paths) == "failed") == recorded and ("***: no entry\nask for it" in text) == recorded
    assert "hf_abc" not in text


def test_the_cause_of_a_failed_stage_is_shown(paths):
    (paths.raw_dictionary / "korean_medical_dict.jsonl").unlink()
    done = drive("--to", "download", "--on-finish", "echo $MEDGEMMA_KOREAN_OUTCOME $MEDGEMMA_KOREAN_LAST_STAGE")
    assert done.returncode == 2
    shown = drive("--status").stdout
    assert "korean_medical_dict.jsonl is missing" in shown and "last run: failed" in shown
    status = json.loads(drive("--status", "--json").stdout)
    assert "is missing" in status["stages"]["download"]["cause"] and status["run"]["outcome"] == "failed"
    assert paths.log.read_text().endswith("failed download\n")


def test_a_full_disk_is_told_on_that_disk(root, tmp_path):
    """Why the run ended finds room where nothing else does."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run([*namespace, "mount", "-t", "tmpfs", "x", str(small)], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    work = f"""
mount -t tmpfs -o size=8m x '{small}'
cp -r '{root}/data' '{small}'
export MEDGEMMA_KOREAN_ROOT='{small}'
'{DRIVER}' --from prepare_tokenizer --to prepare_tokenizer > /dev/null; echo "first $?"
cat /dev/zero > '{small}/full' 2> /dev/null
'{DRIVER}' {" ".join(REFINE)}; echo "second $?"
'{DRIVER}' --status
"""
    done = subprocess.run([*namespace, "bash", "-c", work], capture_output=True, text=True, timeout=120)
    assert "first 2" in done.stdout and "second 2" in done.stdout, done
    shown = done.stdout.partition("second 2")[2]
    assert "refine            failed" in shown and "no space left on the disk of" in shown and "free some" in shown


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--on-finish"], "--on-finish needs a value"),
        (["--on-finish", "true", "--status"], "--on-finish goes with a run"),
        (["--stop", "never"], "never: no such option"),
    ],
)
def test_wrong_arguments(paths, arguments, part):
    done = drive(*arguments)
    assert done.returncode == 2 and part in done.stderr and not paths.logs.exists()
