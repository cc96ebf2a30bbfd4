"""What every program does the same way: shared arguments, one error class, logging, exit codes.

Exit codes: 0 done or already complete, 1 a bug (traceback in the log), 2 usage, input or environment error,
3 gate, 130 interrupted with the state saved.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from medgemma_korean import processes, profiles
from medgemma_korean.paths import RunPaths

EXIT_DONE, EXIT_BUG, EXIT_INPUT, EXIT_GATE, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

log = logging.getLogger("medgemma_korean")


class PipelineError(Exception):
    """Something a user can cause and repair. Its message is the whole answer: path, gap, next command."""

    exit_code = EXIT_INPUT


class GateError(PipelineError):
    """A model is worse than the one it started from."""

    exit_code = EXIT_GATE


class Interrupted(BaseException):
    """A signal asked the program to end; what it had is saved.

    No Exception: a library that turns those into its own, as trl does while it is imported, must not catch it.
    """


class Parser(argparse.ArgumentParser):
    """argparse in the words of this project: a wrong option is one line and exit code 2."""

    def error(self, message: str):
        self.exit(EXIT_INPUT, f"error: {message}; see {self.prog} --help\n")


def make_parser(doc: str, *, device: bool = False, force: bool = True) -> argparse.ArgumentParser:
    """A parser with the arguments that every program shares. `doc` is the program's docstring."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help=f"one of: {', '.join(profiles.MODELS)} (default: tiny)")
    parser.add_argument("--data-dir", metavar="D", help="folder that holds 01_raw (default: the model's own)")
    parser.add_argument("--name", metavar="N", help="name of the run (default: the model, or <model>-<folder of D>)")
    if force:
        parser.add_argument(
            "--force", action="store_true", help="redo a stage whose input or settings differ; old results are kept"
        )
    if device:
        parser.add_argument("--device", help="cuda:0, cpu, ... (default: cuda:0 where there is one, else cpu)")
    return parser


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def resolve(args: argparse.Namespace) -> tuple[profiles.ModelProfile, RunPaths]:
    """The profile and the folders that the shared arguments name.

    Raises PipelineError for an unknown model, a run name that is not one plain folder name, or a data folder
    that does not exist.
    """
    profile = profiles.get(args.model)
    if args.name is not None and not re.fullmatch(r"[\w가-힣][\w가-힣.+-]*", args.name):
        raise PipelineError(f"--name {args.name!r}: use letters, digits, '.', '_' or '-' only")
    paths = RunPaths.of(profile.name, profile.data, args.data_dir, args.name)
    if args.data_dir and not paths.data.is_dir():
        raise PipelineError(f"--data-dir {args.data_dir}: no such folder")
    if not re.fullmatch(r"[\w가-힣][\w가-힣.+-]*", paths.name):
        raise PipelineError(f"the run would be called {paths.name!r}; give it a plain name with --name")
    return profile, paths


# logging ------------------------------------------------------------------------------------------------


class _Mask(logging.Filter):
    """Keeps access tokens and e-mail addresses out of every log line."""

    SECRETS = re.compile(r"hf_[A-Za-z0-9]{10,}|(?<=Bearer )\S+|[\w.+-]{1,64}@[\w-]{1,64}\.[\w.]{2,20}")

    def filter(self, record: logging.LogRecord) -> bool:
        # A name of a file that is no UTF-8 holds halves of characters, which no log takes.
        text = record.getMessage().encode("utf-8", "backslashreplace").decode()
        record.msg, record.args = self.SECRETS.sub("***", text), ()
        return True


# Loggers whose warnings repeat in every process and tell a user nothing. Named one by one, so that a warning
# of any other library is still seen.
QUIET_LOGGERS = (
    "transformers.modeling_utils",
    "transformers.trainer",
    "transformers.configuration_utils",
    "transformers.generation.utils",
    "transformers.tokenization_utils_base",
    "transformers.utils.import_utils",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "torch.utils.checkpoint",
    "torchao",
    "absl",
)


def start_logging(paths: RunPaths, program: str) -> None:
    """Log to the terminal and, with the time, to `logs/pipeline_<name>.log`; of several processes only errors."""
    paths.logs.mkdir(parents=True, exist_ok=True)
    log.setLevel(logging.INFO if processes.is_main() else logging.ERROR)
    log.handlers.clear()
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    file = logging.FileHandler(paths.log, encoding="utf-8")
    file.setFormatter(logging.Formatter(f"%(asctime)s {program}: %(message)s", "%Y-%m-%d %H:%M:%S"))
    for handler in (terminal, file):
        handler.addFilter(_Mask())
        log.addHandler(handler)
    log.propagate = False
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Deprecation notes are for the developers of libraries; ranges in requirements.txt hold their versions.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    # Progress bars belong to a terminal. Libraries draw theirs unless told otherwise.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # what a person trains is nobody else's business
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads of torch that wait for work sleep. By default they spin, and two programs on two cores take each other's
    # time: seven times fewer training steps a second.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


# signals ------------------------------------------------------------------------------------------------

MEMORY_ADVICE = "try a smaller --micro-batch or --max-length; script/model/check_gpu_memory.py says what fits"
SIGNAL_ECHO = 2.0  # seconds
_stop_requested: list[str] = []
_stopped_at: list[float] = []


def stop_requested() -> bool:
    """True once SIGTERM, SIGINT or SIGHUP has arrived."""
    return bool(_stop_requested)


def _on_signal(number: int, frame: object) -> None:
    # The first signal lets a training step finish and save; a program that does not poll ends at once. One request
    # may arrive twice, from a driver and from whoever signals every process, so an echo does not count.
    if _stop_requested and time.monotonic() - _stopped_at[0] < SIGNAL_ECHO:
        return
    _stopped_at[:] = [time.monotonic()]
    _stop_requested.append(signal.Signals(number).name)
    if not _polling or len(_stop_requested) > 1:
        raise Interrupted(_stop_requested[0])


_polling: list[bool] = []


def poll_for_stop(active: bool) -> None:
    """While active, a signal only sets `stop_requested()`, so that a step can end and save first."""
    _polling.clear()
    if active:
        _polling.append(True)


DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded|PytorchStreamWriter failed writing")
DENIED = re.compile(r"Read-only file system|Permission denied|Operation not permitted")


def run(main: Callable[[], int | None]) -> int:
    """Run a program's main and turn its outcome into an exit code.

    One message for what a user can cause; a traceback, in the log, only for a bug.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, and a shell's background jobs, set it to ignored
            signal.signal(number, _on_signal)
    try:
        return int(main() or EXIT_DONE)
    except PipelineError as error:
        _say(f"error: {error}" if processes.is_main() else f"error in process {processes.rank()}: {error}")
        return error.exit_code
    except (Interrupted, KeyboardInterrupt) as error:
        if processes.is_main():
            _say(f"interrupted ({error or 'SIGINT'}); run the same command again to continue")
        return EXIT_INTERRUPTED
    except MemoryError:
        _say(f"error: out of memory; {MEMORY_ADVICE}")
        return EXIT_INPUT
    except BrokenPipeError:  # before OSError, which it is one of: `program | head` is no fault
        return EXIT_DONE
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _say(f"error: no space left on the disk of {error.filename or Path.cwd()}; free some and run again")
        elif error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            _say(f"error: no permission for {error.filename}: {error.strerror}")
        elif error.errno in (errno.EIO, errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE):
            _say(f"error: {error.filename or Path.cwd()}: {error.strerror}")
        else:
            _say(traceback.format_exc())
            return EXIT_BUG
        return EXIT_INPUT
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, by name: it is not imported here
            _say(f"error: out of GPU memory ({str(error).splitlines()[0]}); {MEMORY_ADVICE}")
            return EXIT_INPUT
        # safetensors, tokenizers and torch have errors of their own for what the system said.
        if found := DISK_FULL.search(str(error)):
            _say(f"error: no space left on a disk ({found[0]}); free some and run again")
            return EXIT_INPUT
        if DENIED.search(str(error)):
            _say(f"error: no permission: {str(error).splitlines()[0]}")
            return EXIT_INPUT
        _say(traceback.format_exc() + "this is a bug; please report it with the lines above")
        return EXIT_BUG


def _say(message: str) -> None:
    if log.handlers:
        log.error(message)
    else:
        print(_Mask.SECRETS.sub("***", message), file=sys.stderr)


def count(number: int, noun: str) -> str:
    """`1 row`, `2 rows`, `1,234 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def size_text(number: float) -> str:
    """Bytes for people, in powers of ten as disks and lines are sold: `8.5 GB`, `12 MB`, `340 B`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            value = number / factor
            return f"{value:.1f} {unit}" if value < 100 else f"{value:,.0f} {unit}"
    return f"{number:.0f} B"


def table(rows: list[list[str]], header: list[str]) -> str:
    """Left-aligned first column, right-aligned others, widths counted in terminal cells (Hangul is two wide)."""
    from unicodedata import east_asian_width

    def width(cell: str) -> int:
        return sum(2 if east_asian_width(c) in "WF" else 1 for c in cell)

    cells = [header, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(width(row[i]) for row in cells) for i in range(len(header))]

    def line(row: list[str]) -> str:
        padded = [
            cell + " " * (w - width(cell)) if i == 0 else " " * (w - width(cell)) + cell
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])


class Every:
    """True at most once in `seconds`: `if tick(): log.info(...)` keeps a log to one line a minute."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.last = seconds, time.monotonic()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True


def shared_argv(args: argparse.Namespace) -> list[str]:
    """The shared arguments of a parsed command line, to hand to another program."""
    argv = ["--model", args.model]
    for option in ("data_dir", "name", "device"):
        if getattr(args, option, None):
            argv += [f"--{option.replace('_', '-')}", getattr(args, option)]
    return argv + (["--force"] if getattr(args, "force", False) else [])
