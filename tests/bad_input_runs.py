"""Runs the cases of bad_input_cases.py, and writes their table: tests/bad_inputs.md.

    python tests/bad_input_runs.py --write            # run every case and write the table anew
    python tests/bad_input_runs.py --only 17 42       # show what these cases print

A case runs the shipped program as a user does, with one difference: the process is forked from one that has imported
the libraries, because importing torch a hundred times would take longer than everything else.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent
TABLE = TESTS / "bad_inputs.md"
# What a program may leave: its log and the progress of its run, and finished work that the next run goes on with
# (downloads that were checked against what the hub announced, sources of text that are refined or searched already).
LEFT = re.compile(
    r"root/logs/(?:pipeline_[^/]*\.(?:log|lock)|\.?progress_[^/]*\.(?:txt|json|lock))"
    r"|root/data/(?:sample/02_refined/\.shards/|01_raw/(?:\.published|\.stages/origins|00_korean)/).*"
    r"|root/model/report/tiny/validation/(?:\.stages/)?contamination-(?:dev|test)\.json|home/\.cache/matplotlib/.*"
)
# Small enough that every stage of the chain takes a second; the programs are the shipped ones.
CHAIN = (
    ("model/build_tiny_model",),
    ("model/prepare_tokenizer", "--new-tokens", "32"),
    ("model/add_lora", "--precision", "fp32", "--allow-regression"),
    ("train/train_00_plain_text", "--max-samples", "8", "--max-steps", "2", "--allow-regression"),
    ("model/add_lora", "--second", "--precision", "fp32", "--allow-regression"),
)


@dataclass(frozen=True)
class Shown:
    """What a program answered: everything it printed, in order."""

    code: int
    text: str

    @property
    def message(self) -> str:
        """From the error to the end; empty where there is none."""
        found = re.search(r"^error: .*", self.text, re.MULTILINE | re.DOTALL)
        return re.split(r"\n(?=stopped at |this is the demonstration)", found[0])[0].rstrip() if found else ""


# one process for many programs ----------------------------------------------------------------------------


class Server:
    """A process that has imported the libraries and forks for every program."""

    def __init__(self, *, heavy: bool):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MEDGEMMA_"))}
        threads = {
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", *(["--heavy"] if heavy else [])],
            env=environment | threads | ({"HF_HUB_OFFLINE": "1"} if heavy else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, program: str, argv: list[str], folder: Path, environment: dict[str, str], *, bound: bool) -> Shown:
        """program: `train/train_00_plain_text`. folder: of the case; bound: permission bits bind, also for root."""
        asked = {"program": program, "argv": argv, "folder": str(folder), "environment": environment, "bound": bound}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        output = folder / "output"
        text = output.read_bytes().decode("utf-8", "backslashreplace")
        output.unlink()
        return Shown(code, text)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(heavy: bool) -> None:
    """Answer every request on stdin with an exit code on stdout."""
    from dataclasses import replace

    from medgemma_korean import cli, profiles, records, stage  # noqa: F401 - for those that are forked

    if heavy:
        import datasets  # noqa: F401
        import peft  # noqa: F401
        import torch
        import transformers  # noqa: F401
        import trl.trainer.sft_trainer  # noqa: F401

        from medgemma_korean import evaluation, modeling, trained, training  # noqa: F401

        torch.set_num_threads(1)
        modeling.CPU_THREADS = 1
    tiny = profiles.MODELS["tiny"]
    shape = replace(tiny.tiny, base_vocab=1500, hidden=32, intermediate=64, layers=3, heads=2, kv_heads=1, head_dim=16)
    profiles.MODELS["tiny"] = replace(
        tiny,
        tiny=replace(shape, steps=2, batch=2, length=64),
        plain_text=replace(tiny.plain_text, evaluations=1, max_length=128),
        lora_rank=4,
        second_rank=2,
        score_window=64,
        score_characters=400,
    )
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(**asked)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _become(program: str, argv: list[str], folder: str, environment: dict[str, str], bound: bool) -> None:
    """In the forked process: what `python script/<program>.py ARGV` does in a fresh one."""
    import runpy
    import signal
    import traceback

    output = os.open(f"{folder}/output", os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdin = open(0)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    os.chdir(f"{folder}/root")
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(100)
    if bound:
        drop_capabilities()
    file = f"{REPOSITORY}/script/{program}.py"
    sys.argv, sys.path[0] = [file, *argv], os.path.dirname(file)
    code = 1
    try:
        runpy.run_path(file, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def drop_capabilities() -> None:
    """What lets root read and write what its permission bits forbid; for others there is nothing to drop."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    if libc.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)())):
        raise OSError(ctypes.get_errno(), "capset")


# the prepared roots ---------------------------------------------------------------------------------------


class Place:
    """The servers, and the roots that cases start from: made when one is asked for, copied for every case."""

    def __init__(self, home: Path):
        self.home, self.servers, self.roots = home, {}, {}
        home.mkdir(parents=True, exist_ok=True)

    def server(self, heavy: bool) -> Server:
        if heavy not in self.servers:
            self.servers[heavy] = Server(heavy=heavy)
        return self.servers[heavy]

    def close(self) -> None:
        for server in self.servers.values():
            server.close()

    def folder(self, start: str) -> Path:
        """A folder with `root`, `home` and `tmp` in it. start: empty, sample (raw data), refined, chain (models)."""
        if start not in self.roots:
            made = self.home / start
            if start == "empty":
                for name in ("root/data/sample", "home", "tmp"):
                    (made / name).mkdir(parents=True)
            elif start == "sample":
                shutil.copytree(self.folder("empty"), made)
                raw = REPOSITORY / "data" / "sample" / "01_raw"
                ignored = shutil.ignore_patterns(".*")
                shutil.copytree(raw, made / "root" / "data" / "sample" / "01_raw", ignore=ignored)
            elif start == "refined":
                shutil.copytree(self.folder("sample"), made)
                self._make(made, "refine/refine_all", "--workers", "1", heavy=False)
            else:
                shutil.copytree(self.folder("refined"), made)
                for program, *argv in CHAIN:
                    self._make(made, program, *argv, heavy=True)
            self.roots[start] = made
        return self.roots[start]

    def _make(self, folder: Path, program: str, *argv: str, heavy: bool) -> None:
        shown = self.server(heavy).run(program, list(argv), folder, environment(folder), bound=False)
        assert shown.code == 0, f"{program}: {shown.text}"
        shutil.rmtree(folder / "root" / "logs", ignore_errors=True)

    def run(self, case: Any, hub: Any = None) -> tuple[Shown, list[str]]:
        """(what the case's program answered, what it left behind or altered)"""
        folder = Path(tempfile.mkdtemp(prefix="case-", dir=self.home))
        shutil.copytree(self.folder(case.start), folder, dirs_exist_ok=True, symlinks=True)
        root = folder / "root"
        known = environment(folder)
        if case.hub:
            import hub_repositories

            known |= hub_repositories.environment(hub)
            hub.tokens = {hub_repositories.TOKEN: set(hub_repositories.GATED)}
            case.hub(hub)
        known |= case.environment
        if case.prepare:
            case.prepare(root)
        before = snapshot(folder)
        if case.program.endswith(".sh"):
            shown = self._driver(folder, case.program, list(case.argv), known)
        else:
            server = self.server(case.start == "chain")
            shown = server.run(case.program, list(case.argv), folder, known, bound=case.bound)
        after = snapshot(folder)
        logs = "".join(p.read_text(errors="replace") for p in root.glob("logs/*.log") if p.is_file())
        left = [f"{name} is new" for name in sorted(after.keys() - before.keys()) if not LEFT.fullmatch(name)]
        left += [f"{name} is gone" for name in sorted(before.keys() - after.keys())]
        left += [
            f"{name} is altered"
            for name in sorted(before.keys() & after.keys())
            if before[name] != after[name] and not LEFT.fullmatch(name)
        ]
        left += ["Traceback in the log"] if "Traceback" in logs else []
        text = stable(shown.text, folder, hub)
        for below in (folder, *folder.rglob("*")):
            if below.is_dir() and not below.is_symlink():
                with contextlib.suppress(OSError):
                    below.chmod(0o755)
        shutil.rmtree(folder)
        return Shown(shown.code, text), left

    def _driver(self, folder: Path, program: str, argv: list[str], known: dict[str, str]) -> Shown:
        done = subprocess.run(
            [str(REPOSITORY / program), *argv],
            env={**os.environ, **known},
            cwd=folder / "root",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=100,
        )
        return Shown(done.returncode, done.stdout.decode("utf-8", "backslashreplace"))


def environment(folder: Path) -> dict[str, str]:
    return {
        "MEDGEMMA_KOREAN_ROOT": str(folder / "root"),
        "HOME": str(folder / "home"),
        "HF_HOME": str(folder / "home" / "hub"),
        "TMPDIR": str(folder / "tmp"),
        "COLUMNS": "120",
    }


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and link below a folder with its content; folders count only in that files stand in them."""
    found = {}
    for top, folders, names in os.walk(folder):
        for name in [*names, *(f for f in folders if os.path.islink(os.path.join(top, f)))]:
            file = os.path.join(top, name)
            if os.path.islink(file):
                content = os.readlink(file)
            elif not os.path.isfile(file):
                content = "no file"
            elif not os.access(file, os.R_OK):
                content = str(os.stat(file).st_size)
            else:
                content = hashlib.sha256(Path(file).read_bytes()).hexdigest()
            found[os.path.relpath(file, folder)] = content
    return found


def stable(text: str, folder: Path, hub: Any = None) -> str:
    """The text without what differs from run to run and from machine to machine."""
    text = text.replace(f"{folder}/root", "ROOT").replace(str(folder), "").replace(str(REPOSITORY), "PROJECT")
    if hub is not None:
        text = text.replace(hub.url, "HUB").replace(hub.url.removeprefix("http://"), "HUB")
    return re.sub(r"\bpid \d+", "pid N", re.sub(r"\d+(?:\.\d+)? GB free", "N GB free", text))


# the table ------------------------------------------------------------------------------------------------


def problems(case: Any, shown: Shown, left: list[str]) -> list[str]:
    """What of a case's answer is not as it should be."""
    found = [f"{name}" for name in left]
    if shown.code != case.code:
        found.append(f"exit code {shown.code}, not {case.code}")
    if "Traceback" in shown.text:
        found.append("a traceback")
    if (number := len(re.findall(r"^error\b", shown.text, re.MULTILINE))) != 1:
        found.append(f"{number} messages, not one")
    for what, part in (("cause", case.cause), ("next step", case.step)):
        if part not in shown.message:
            found.append(f"no {what} ({part!r}) in the message")
    return found


def heading(number: int, case: Any) -> str:
    """The columns of a row that do not depend on a run."""
    command = " ".join([case.program.rpartition("/")[2], *map(quoted, case.argv)])
    return f"| {number} | {cell(case.title)} | {code_cell(command)} | {case.code} |"


def quoted(argument: str) -> str:
    return argument if re.fullmatch(r"[\w./=+-]+", argument) else json.dumps(argument, ensure_ascii=False)


def cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")


def code_cell(text: str) -> str:
    """As code, line breaks kept; a line of thousands of characters is cut."""
    lines = [line if len(line) < 400 else line[:200] + " … " + line[-100:] for line in text.split("\n")]
    return "<br>".join(f"`{line.strip().replace('|', chr(92) + '|').replace('`', chr(39))}`" for line in lines if line)


def written(cases: list[Any], messages: list[str]) -> str:
    """The whole page."""
    lines = [
        "# Bad inputs",
        "",
        f"{len(cases)} wrong inputs, the exit code and the message of each. Made by `python tests/bad_input_runs.py "
        "--write` from `tests/bad_input_cases.py`; `tests/test_bad_inputs.py` runs them: the exit code is the one "
        "here, there is one message, it names the cause and the next step, there is no traceback in it or in the log, "
        "no input is altered and no file is left behind. What may stay is the log, the progress file, and finished "
        "work that the next run goes on with: downloads as they were published, sources of text that are refined "
        "already. ROOT is the folder that holds data/, model/ and logs/, PROJECT the repository, HUB the hub.",
    ]
    program = None
    for number, (case, message) in enumerate(zip(cases, messages, strict=True), 1):
        if case.program != program:
            program = case.program
            lines += ["", f"## {program}", "", "| # | wrong | command | code | message |", "|---|---|---|---|---|"]
        lines.append(f"{heading(number, case)} {code_cell(message)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--only", nargs="+", type=int, metavar="N", help="these cases alone, and show what they print")
    parser.add_argument("--home", type=Path, help="keep the prepared roots there")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--heavy", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(args.heavy)
        return 0

    from bad_input_cases import CASES
    from loopback_hub import Hub

    home = args.home or Path(tempfile.mkdtemp(prefix="bad-inputs-"))
    place, messages, wrong = Place(home), [], 0
    if args.home:
        place.roots = {p.name: p for p in home.glob("*") if p.name in ("empty", "sample", "refined", "chain")}
    try:
        for number, case in enumerate(CASES, 1):
            if args.only and number not in args.only:
                continue
            with Hub() if case.hub else contextlib.nullcontext() as hub:
                shown, left = place.run(case, hub)
            found = problems(case, shown, left)
            wrong += bool(found)
            messages.append(shown.message)
            if found or args.only:
                print(f"\n== {heading(number, case)}\n{shown.text}")
                print("".join(f"  ** {problem}\n" for problem in found), end="", flush=True)
    finally:
        place.close()
        if not args.home:
            shutil.rmtree(home, ignore_errors=True)
    print(f"{len(messages) - wrong} of {len(messages)} as they should be")
    if args.write and not args.only:
        TABLE.write_text(written(CASES, messages), encoding="utf-8")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
