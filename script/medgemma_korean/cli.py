"""What every program does the same way: shared arguments, one error class, logging, exit codes.

Exit codes: 0 done or already complete, 1 a bug (traceback in the log), 2 usage, input or environment error,
3 gate, 130 interrupted with the state saved.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import io
import logging
import logging.handlers
import math
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from medgemma_korean import processes, profiles
from medgemma_korean.paths import RunPaths

EXIT_DONE, EXIT_BUG, EXIT_INPUT, EXIT_GATE, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

DATA = "give a folder that holds 01_raw"

log = logging.getLogger("medgemma_korean")

# Of logs/pipeline_<name>.log: a day of a training is 1 MB, so that three files hold months.
LOG_BYTES, LOG_FILES = 20_000_000, 3


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

    help_of = ""  # whose --help tells more, where it is another program's

    def error(self, message: str):
        self.exit(EXIT_INPUT, f"error: {message}; see {self.help_of or self.prog} --help\n")


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
        parser.add_argument(
            "--device", type=device_name, help="cuda:0, cpu, ... (default: cuda:0 where there is one, else cpu)"
        )
    return parser


def whole_number(text: str) -> int:
    """argparse type: an integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def real_number(text: str) -> float:
    """argparse type: what Python takes for a number, infinite ones included."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = whole_number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    value = real_number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def seed(text: str) -> int:
    """argparse type: a seed that every random generator takes."""
    value = whole_number(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError("not a seed from 0 to 4,294,967,295")
    return value


def number(text: str) -> float:
    """argparse type: a finite number."""
    value = real_number(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def token_number(text: str) -> int | str:
    """argparse type: "auto", or how many tokens at most."""
    if text == "auto":
        return text
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of tokens nor auto")
    return value


def device_name(text: str) -> str:
    """argparse type: the name of a device; whether this machine has it is asked when it is used."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; use cuda:0 or cpu")
    return text


_NAME = re.compile(r"[\w가-힣][\w가-힣.+-]*")


def require_name(option: str, name: str) -> str:
    """The name of a run that an option gives. Raises PipelineError where it is not one plain folder name."""
    if not _NAME.fullmatch(name):
        raise PipelineError(f"{option} {name!r}: use letters, digits, '.', '_' or '-' only")
    return name


def resolve(args: argparse.Namespace) -> tuple[profiles.ModelProfile, RunPaths]:
    """The profile and the folders that the shared arguments name.

    Raises PipelineError for an unknown model, a run name that is not one plain folder name, or a data folder
    that does not exist.
    """
    profile = profiles.get(args.model)
    if args.name is not None:
        require_name("--name", args.name)
    try:
        paths = RunPaths.of(profile.name, profile.data, args.data_dir, args.name)
    except RuntimeError:  # pathlib's word for it before Python 3.13
        raise PipelineError(f"--data-dir {args.data_dir}: no such folder, for its links lead nowhere; {DATA}") from None
    if args.data_dir and not paths.data.is_dir():
        what = "a file, not a folder" if paths.data.is_file() else "no such folder"
        raise PipelineError(f"--data-dir {args.data_dir}: {what}; {DATA}")
    if not _NAME.fullmatch(paths.name):
        raise PipelineError(f"the run would be called {paths.name!r}; give it a plain name with --name")
    _paths[:] = [paths]
    return profile, paths


_paths: list[RunPaths] = []  # of this program, once it knows them


# logging ------------------------------------------------------------------------------------------------


# Secrets by their shape. What stands in a group of its own stays; the rest of the match becomes ***. Every repetition
# is bounded or follows a word of its own, so that a long line takes no longer than its length.
_SECRETS = re.compile(
    r"""(?ix)
    (?-i:hf_[A-Za-z0-9]{10,})
    | (authorization\\?["']?\s{0,9}[:=]\s{0,9}\\?["']?)(?:[a-z]{1,20}\s{1,9})?[^\s"',}\\]+
    | (\bbearer\s{1,9})[^\s"',}\\]+
    | ([?&](?:x-amz-[\w-]+|x-goog-[\w-]+|signature|sig|policy|key-pair-id|credential|token|access_token)=)[^&\s"']+
    | ((?:api[_-]?key|token|secret|password|passwd)\\?["']?\s{0,9}[=:]\s{0,9}\\?["']?)
      (?![\d.,e+-]{1,40}(?:[\s"',}\\]|$))(?=[^\s"',}\\]{0,99}\d)[^\s"',}\\]{8,}     # no number
    | (://)[^\s/@]{1,256}(?=@)                             # user:password of an address
    | (?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,64}\.[\w.]{2,20}  # an e-mail address
    """
)
_SECRET_NAMES = re.compile(r"(?:TOKEN|API_?KEY|SECRET|PASSWORD)$", re.IGNORECASE)  # of environment variables
# Escape sequences of terminals, and control characters but for tab and line feed: data must not steer a terminal.
_CONTROLS = re.compile(
    r"\x1b\[[0-?]{0,40}[ -/]{0,4}[@-~]|\x1b\][^\x07\x1b]{0,400}(?:\x07|\x1b\\)?|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


def masked(text: str) -> str:
    """The text without access tokens, passwords, signatures of addresses and e-mail addresses."""
    for name in filter(_SECRET_NAMES.search, os.environ):
        if len(value := os.environ[name]) >= 8:
            text = text.replace(value, "***")
    return _SECRETS.sub(lambda found: "".join(group or "" for group in found.groups()) + "***", text)


class _Mask(logging.Filter):
    """Keeps secrets and control characters out of every log line."""

    def filter(self, record: logging.LogRecord) -> bool:
        # A name of a file that is no UTF-8 holds halves of characters, which no log takes.
        text = record.getMessage().encode("utf-8", "backslashreplace").decode()
        if record.exc_info:  # or the formatter would add the traceback after the mask
            text += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
            record.exc_info = record.exc_text = None
        record.msg, record.args = _CONTROLS.sub("", masked(text)), ()
        return True


class LogFile(logging.handlers.WatchedFileHandler):
    """Appends to a log that several processes write, and cuts it over by size: `.log` becomes `.log.1`, and so on.

    A file that another process has renamed is opened anew before the next line, so that no line is lost or cut;
    `tail -F` follows. Together LOG_FILES files of LOG_BYTES stay, and what their last lines have more.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """A line that finds no room, or no folder, is lost: no line of a log is worth a training."""
        file = Path(self.baseFilename)
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)  # somebody may have moved the logs away
            roll(file, LOG_BYTES, LOG_FILES)
        with contextlib.suppress(OSError):  # where the file cannot be opened anew
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def roll(file: Path, most: int, kept: int) -> bool:
    """Rename a file of at least `most` bytes to `<name>.1`, the older ones one further; `kept` files stay in all.

    Of several processes one does it. Who has the file open writes on into the renamed one.
    """
    if _size_of(file) < most:
        return False
    lock = os.open(file.with_name(f".{file.name}.roll"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with contextlib.suppress(OSError):  # a disk that knows no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if _size_of(file) < most:
            return False
        names = [file, *(file.with_name(f"{file.name}.{number}") for number in range(1, kept))]
        for older, newer in zip(reversed(names[1:]), reversed(names[:-1]), strict=True):
            with contextlib.suppress(FileNotFoundError):
                os.replace(newer, older)
        return True
    finally:
        os.close(lock)


def _size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing is logged, and no log is opened: for what asks a program instead of running it (`stage.ask`)."""
    _silent.append(True)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
        _silent.pop()


_silent: list[bool] = []


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
    if _silent:
        return
    from medgemma_korean.records import make_folder  # which imports this module

    make_folder(paths.logs)
    log.setLevel(logging.INFO if processes.is_main() else logging.ERROR)
    log.handlers.clear()
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    file = LogFile(paths.log, encoding="utf-8")
    file.setFormatter(_file_format(program))
    for handler in (terminal, file):
        handler.addFilter(_Mask())
        log.addHandler(handler)
    log.propagate = False
    quiet_libraries()


def to_log(paths: RunPaths, program: str, line: str) -> None:
    """Write one line to `logs/pipeline_<name>.log` alone, as `start_logging` would."""
    handler = LogFile(paths.log, encoding="utf-8")
    handler.setFormatter(_file_format(program))
    handler.addFilter(_Mask())
    handler.handle(logging.LogRecord(program, logging.INFO, "", 0, line, None, None))
    handler.close()


def _file_format(program: str) -> logging.Formatter:
    return logging.Formatter(f"%(asctime)s {program}: %(message)s", "%Y-%m-%d %H:%M:%S")


def quiet_libraries() -> None:
    """No progress bars, no telemetry, and of what the libraries repeat in every process only errors."""
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
    # time: seven times fewer training steps a second. They spin for some microseconds first, from one small operation
    # to the next: the demonstration takes a seventh less, and two programs at once a sixth more.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


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
        _raised.append(True)
        raise Interrupted(_stop_requested[0])


_polling: list[bool] = []
_raised: list[bool] = []  # the handler has ended what ran


def poll_for_stop(active: bool) -> None:
    """While active, a signal only sets `stop_requested()`, so that a step can end and save first."""
    _polling.clear()
    if active:
        _polling.append(True)


# What CUDA, its libraries and its driver say when a card is lost, hung or not theirs to use.
GPU_FAULT = re.compile(
    r"CUDA (error|driver|unknown)|CUBLAS_STATUS|cuDNN error|CUDNN_STATUS|NCCL error|NVML|GPU is lost"
)
GPU_ADVICE = (
    "nvidia-smi and dmesg say whether the card is there; the same command continues from the last checkpoint, and "
    "ends at the same place again where the card is not to blame"
)
# safetensors, tokenizers and torch have errors of their own for what the system said.
DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded|PytorchStreamWriter failed writing")
DENIED = re.compile(r"Read-only file system|Permission denied|Operation not permitted")
# Out of memory in the words of torch's CPU allocator, and of CUDA where it is not torch's allocator that asks for it.
MEMORY_FAULT = re.compile(r"can't allocate memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED")


# A disk, or the way to one, is gone: worn out, unplugged, or a network's or FUSE's that has lost its other end.
DISK_LOST = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice: Python's, the system's, torch's of a card, or in words."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and bool(MEMORY_FAULT.search(str(error))))
    )


def explain(error: Exception) -> tuple[int, str, str]:
    """(exit code, cause, advice) of what ends a program. Libraries' errors are known by name and words alone:
    none of them is imported here. The advice is empty where the cause holds it, as a PipelineError's message does.
    """
    text = str(error)
    first = text.splitlines()[0] if text else ""
    if isinstance(error, PipelineError):
        return error.exit_code, text, ""
    if out_of_memory(error):
        where = "GPU memory" if type(error).__name__ == "OutOfMemoryError" else "memory"
        return EXIT_INPUT, f"out of {where}" + (f" ({first})" if first else ""), MEMORY_ADVICE
    if isinstance(error, OSError):
        place = error.filename or Path.cwd()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return EXIT_INPUT, f"no space left on the disk of {place}", "free some and run again"
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            return (
                EXIT_INPUT,
                f"no permission for {error.filename}: {error.strerror}",
                "chmod or chown it, and run again",
            )
        if error.errno in DISK_LOST or error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            return EXIT_INPUT, f"{place}: {error.strerror}", ""
        if error.errno in (errno.EISDIR, errno.ENOTDIR) and error.filename:
            in_the_way = error.filename2 or error.filename  # of a renaming its target
            return EXIT_INPUT, f"{in_the_way}: {error.strerror}", "move it away, and run again"
        if error.errno == errno.EMFILE:
            return EXIT_INPUT, "too many open files", "raise the limit (ulimit -n 4096), and run again"
    elif type(error).__name__ == "AcceleratorError" or isinstance(error, RuntimeError) and GPU_FAULT.search(text):
        return EXIT_INPUT, f"the GPU failed ({first})", GPU_ADVICE
    elif DISK_FULL.search(text):
        return EXIT_INPUT, f"no space left on a disk ({first})", "free some and run again"
    elif DENIED.search(text):
        return EXIT_INPUT, f"no permission to write ({first})", "make the folder writable, and run again"
    return EXIT_BUG, f"a bug: {type(error).__name__}: {first}", "please report it with the traceback in the log"


def run(main: Callable[[], int | None]) -> int:
    """Run a program's main and turn its outcome into an exit code.

    One message for what a user can cause; a traceback, in the log, only for a bug.
    """
    _raised.clear()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, and a shell's background jobs, set it to ignored
            signal.signal(number, _on_signal)
    if os.environ.get(DRIVER_VARIABLE):
        _outlive_the_terminal()
    try:
        return int(main() or EXIT_DONE)
    except (Interrupted, KeyboardInterrupt) as error:
        if processes.is_main():
            _say(f"interrupted ({error or 'SIGINT'}); run the same command again to continue")
        return EXIT_INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not os.environ.get(DRIVER_VARIABLE):
            return EXIT_DONE  # `program | head` is no fault
        if _raised and not isinstance(error, PipelineError):
            # Libraries catch what ends them in the middle of an import, and go on to an error of their own.
            what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            _say(f"interrupted ({_stop_requested[0]}, on which came {what}); run the same command again to continue")
            return EXIT_INTERRUPTED
        code, cause, advice = explain(error)
        if code == EXIT_BUG:
            whose = "" if isinstance(error, OSError) else "this is a bug; please report it with the lines above"
            _say(traceback.format_exc() + whose)
        else:
            where = "error" if processes.is_main() else f"error in process {processes.rank()}"
            _say(f"{where}: {'; '.join(filter(None, [cause, advice]))}")
        _record(code, cause, advice)
        return code


# The stage that the driver runs a program for, in that program's environment.
DRIVER_VARIABLE = "MEDGEMMA_KOREAN_STAGE"


def _outlive_the_terminal() -> None:
    """What a stage prints is in the log too; a terminal or pipe that has closed must not end a training."""

    class Tolerant(io.FileIO):
        def write(self, data) -> int:
            with contextlib.suppress(OSError):
                return super().write(data)
            return len(data)

    with contextlib.suppress(OSError):  # there is none
        raw = io.BufferedWriter(Tolerant(1, "w", closefd=False))
        sys.stdout = io.TextIOWrapper(raw, sys.stdout.encoding, "backslashreplace", line_buffering=True)


def _record(code: int, cause: str, advice: str) -> None:
    """Put the cause into the progress file: for the driver always, else where the stage has said that it failed."""
    from medgemma_korean import progress  # which imports this module

    stage = os.environ.get(DRIVER_VARIABLE)
    if _paths and processes.is_main():
        state = "gate" if code == EXIT_GATE else "failed"
        cause = masked(cause)[:2000]
        with contextlib.suppress(OSError):  # a disk without any room; the message is on the terminal
            progress.fail(
                _paths[-1],
                Path(sys.argv[0]).stem,
                stage,
                state=state,
                cause=cause,
                advice=advice,
                everywhere=bool(stage),
            )


def _say(message: str) -> None:
    if log.handlers:
        log.error(message)
    else:
        print(_CONTROLS.sub("", masked(message)), file=sys.stderr)


def count(number: int, noun: str) -> str:
    """`1 row`, `2 rows`, `1,234 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listed(counts: Mapping[str, int]) -> str:
    """`read 30, kept 0`."""
    return ", ".join(f"{name} {number:,}" for name, number in counts.items())


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
