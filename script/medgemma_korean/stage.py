"""The stage record: what a program read, with which settings, and that it is complete.

A stage writes into a hidden temporary neighbour, publishes by rename, and writes its record last: the record's
presence means complete. The fingerprint is made of upstream fingerprints, settings and the stage's format
number; paths, versions and times are recorded, not compared, so that a move or an update does not throw away a
training.

    stage = Stage("refine_01_english_korean", paths, settings=..., inputs=[...], outputs=[paths.pairs], format=1)
    if (code := stage.already_complete()) is not None:
        return code
    with stage.work() as folder:
        ...                                # write folder / "01_english_korean" / ...
        stage.complete(counts={...})
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import os
import platform
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from medgemma_korean import cli, processes, progress, records
from medgemma_korean.cli import EXIT_DONE, EXIT_GATE, Every, GateError, Interrupted, PipelineError, log
from medgemma_korean.paths import REPOSITORY, RunPaths, show

RECORD_NAME = "stage.json"
# What a record holds under these keys, and what it says of a file.
KINDS = {"program": str, "fingerprint": str, "identity": dict, "home": str}
KINDS |= {"inputs": dict, "raw_files": dict, "outputs": dict}
FILE = {"size", "mtime_ns", "sha256"}
IDENTITY = {"format", "settings", "inputs"}
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
)


@dataclass(frozen=True)
class Input:
    """Something a stage reads.

    role: the name it is compared under, for instance "plain text".
    path: a file or folder.
    record: the record of the stage that made it; None for raw files, which are compared by content.
    repair: the command that makes it.
    optional: absent is allowed, and is itself part of the fingerprint.
    """

    role: str
    path: Path
    record: Path | None = None
    repair: str = ""
    optional: bool = False


def files_under(path: Path) -> list[Path]:
    """Regular files of a file or folder, sorted, records and hidden files left out."""
    return [path] if path.is_file() else [p for p in records.files_below(path) if p.name != RECORD_NAME]


def describe(paths: list[Path], home: Path, hashed: bool = True) -> dict[str, dict[str, Any]]:
    """Size, time and sha256 of every file under `paths`, by its path relative to `home`."""
    described = {}
    for path in paths:
        for file in files_under(path):
            stat = file.stat()
            entry: dict[str, Any] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            if hashed:
                entry["sha256"] = records.sha256_once(file)
            described[os.path.relpath(file, home)] = entry
    return described


def changed_files(described: dict[str, dict[str, Any]], home: Path, thorough: bool = False) -> list[str]:
    """What no longer matches its description. Quick: size and time; a new time alone makes it compare sha256."""
    wrong = []
    for relative, entry in described.items():
        file = Path(os.path.normpath(home / relative))  # "..": of the name, also where a folder is a link
        if not file.is_file():
            wrong.append(f"{show(file)} is missing")
            continue
        stat = file.stat()
        if stat.st_size != entry["size"]:
            wrong.append(f"{show(file)} has {stat.st_size:,} bytes, not {entry['size']:,}")
        elif (thorough or stat.st_mtime_ns != entry["mtime_ns"]) and records.sha256(file) != entry["sha256"]:
            wrong.append(f"{show(file)} has other content than when it was made")
    return wrong


def read_record(path: Path) -> dict[str, Any] | None:
    """The record at `path`, or None where the stage is not complete. Raises PipelineError for what is no record."""
    if not path.is_file():
        return None
    try:
        record = records.read_json(path)
    except PipelineError as error:
        why = str(error).removeprefix(str(path)).removeprefix(show(path)).removesuffix("; bring it anew")
        raise no_record(path, why.strip(":, ")) from None
    if not isinstance(record, dict) or not all(isinstance(record.get(k, kind()), kind) for k, kind in KINDS.items()):
        raise no_record(path)
    if any(not isinstance(entry, dict) or not FILE <= entry.keys() for entry in record.get("outputs", {}).values()):
        raise no_record(path)
    if not records.seal_holds(record):
        raise no_record(path, "other content than when it was written")
    return record


def require_linked(folder: Path) -> None:
    """Raise PipelineError where a folder is a link to what is not there: nothing could be published under its name."""
    if folder.is_symlink() and not folder.exists():
        raise PipelineError(
            f"{show(folder)}: a link to {os.readlink(folder)}, which is not there; mount that disk, or remove the link"
        )


def no_record(path: Path, why: str = "") -> PipelineError:
    return PipelineError(
        f"{show(path)}: not a stage record, or a damaged one{f' ({why})' if why else ''}; "
        "./run_full_pipeline.sh, the same command with --force, makes that stage again (its old result is kept as "
        ".previous); or move it away, and the stage counts as incomplete"
    )


def check_outputs(record_path: Path, thorough: bool = False) -> list[str]:
    """What of a complete stage's outputs is missing or altered."""
    record = read_record(record_path)
    if not record or not {"outputs", "home"} <= record.keys():
        raise no_record(record_path)
    return changed_files(record["outputs"], record_path.parent / record["home"], thorough)


def versions() -> dict[str, str]:
    """Python and library versions, read without importing the libraries."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def peak_memory() -> dict[str, int]:
    """Bytes at most: {"main"} resident in this process, {"gpu"} allocated by torch on its cards where it used one."""
    found = {"main": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    torch = sys.modules.get("torch")  # a program that did without it is not made to import it
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        found["gpu"] = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return found


@dataclass
class Stage:
    """One program's run over its folders.

    program: its name, as in the record. paths: the run's folders.
    outputs: what it publishes. record_inside: it publishes one folder, and the record lies in it (model stages).
    settings: resolved values that change the result (JSON). format: raise it when the code changes the result.
    """

    program: str
    paths: RunPaths
    outputs: list[Path]
    inputs: list[Input]
    settings: dict[str, Any]
    format: int = 1
    force: bool = False
    allow_regression: bool = False
    driver_stage: str | None = None
    record_inside: bool = False
    beside: list[Path] = field(default_factory=list)  # files outside of its folder that its record vouches for too
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.record_inside:
            assert len(self.outputs) == 1
            self.record_path = self.outputs[0] / RECORD_NAME
            self._work = self.outputs[0].with_name(f".{self.outputs[0].name}.partial")
        else:
            self.record_path = self.paths.record(self.program)
            self._work = self.record_path.parent / f"{self.program}.partial"
        self._identity: dict[str, Any] | None = None
        self._started = time.monotonic()
        self._resumed = self._verified = False
        self._tick = Every(1.0)  # a step may take milliseconds; the progress file is for people
        self._seen: list[dict[str, Any] | None] = []  # the record, once `already_complete` has looked for it

    # identity -------------------------------------------------------------------------------------------
    def identity(self) -> dict[str, Any]:
        """What the fingerprint is made of. Raises PipelineError for an input that is absent or incomplete."""
        if self._identity is None:
            problems: list[str] = []
            inputs = {}
            for item in self.inputs:
                value = self._input_fingerprint(item, problems)
                inputs[item.role] = value
            if problems:
                raise PipelineError("\n".join(problems))
            self._identity = {
                "program": self.program,
                "format": self.format,
                "settings": records.read_back(self.settings),
                "inputs": inputs,
            }
        return self._identity

    def _input_fingerprint(self, item: Input, problems: list[str]) -> str | None:
        hint = f"; run: {item.repair}" if item.repair else ""
        if item.record is not None:
            record = read_record(item.record)
            if record is None:
                if item.optional:
                    return None
                state = "is incomplete (no stage record)" if item.path.exists() else "does not exist"
                problems.append(f"{item.role}: {show(item.path)} {state}{hint}")
                return None
            if "fingerprint" not in record:
                raise no_record(item.record)
            return record["fingerprint"]
        if not item.path.exists():
            if not item.optional:
                problems.append(f"{item.role}: {show(item.path)} does not exist{hint}")
            return None
        files = files_under(item.path)
        if not files and not item.optional:
            problems.append(f"{item.role}: {show(item.path)} holds no files{hint}")
        base = item.path if item.path.is_dir() else item.path.parent
        if unreadable := [f for f in files if not _is_utf8(f.relative_to(base))]:
            problems.append(
                f"{item.role}: {records.readable_name(unreadable[0])}: the name is not UTF-8; rename it, or all of "
                "them with: convmv -f cp949 -t utf-8 -r --notest FOLDER"
            )
            return None
        return records.digest_of({str(f.relative_to(base)): self._known_sha256(f) for f in files})

    def _known_sha256(self, file: Path) -> str:
        """sha256 of a raw file, taken from our own record while size and time are unchanged."""
        if not hasattr(self, "_known"):
            record = self._own_record() or {}
            self._known = {str(Path(k)): v for k, v in record.get("raw_files", {}).items()}
        stat = file.stat()
        entry = self._known.get(os.path.relpath(file, self.paths.data))
        if entry and entry["size"] == stat.st_size and entry["mtime_ns"] == stat.st_mtime_ns:
            return entry["sha256"]
        return records.sha256_once(file)

    @property
    def fingerprint(self) -> str:
        return records.digest_of(self.identity())

    # before ---------------------------------------------------------------------------------------------
    def already_complete(self) -> int | None:
        """0 when this stage is complete with the same fingerprint (3 if its gate failed), None when it must run.

        Raises PipelineError when an input is absent or incomplete, when a complete result differs and `force` was not
        given, or when its folder is a link to nothing; where it must run also when an input is not what was made
        (GateError when its gate failed): libraries that load a damaged file have other words for it.
        """
        if self.record_inside:
            require_linked(self.outputs[0])
        if _asking:
            raise _Asked(self)
        code = self._complete_already()
        if code is None and processes.is_main():
            self._verify_inputs()
        return code

    def _complete_already(self) -> int | None:
        self.identity()
        record = self._own_record()
        self._seen = [record]
        if record is None:
            return None
        differences = self.differences(record)
        if differences:
            if self.force:
                log.info("redoing %s: %s", self.program, "; ".join(differences))
                return None
            raise PipelineError(
                f"{show(self.record_path)}: this stage is complete, but something differs:\n  "
                + "\n  ".join(differences)
                + "\nTo redo it and what depends on it, add --force (old results are kept as .previous)."
            )
        gate = record.get("gate")
        if gate and not gate["passed"]:
            self._report(
                state="gate", cause="; ".join(gate["reasons"]), advice="--allow-regression goes on all the same"
            )
        else:
            self._report(state="complete")
        if gate and not gate["passed"] and not self.allow_regression:
            log.error("already complete, and its gate failed: %s", "; ".join(gate["reasons"]))
            return EXIT_GATE
        # A kill may have come between the renaming and the last step of `complete`, or before the lock was given up.
        if processes.is_main():
            if self.record_inside:
                (self.outputs[0] / ".identity.json").unlink(missing_ok=True)
            self._remove_stale_lock()
        log.info("%s: already complete (%s)", self.program, show(self.record_path.parent))
        return EXIT_DONE

    @property
    def _lock_file(self) -> Path:
        return self._work.with_name(f"{self._work.name.removesuffix('.partial')}.lock")

    def _remove_stale_lock(self) -> None:
        """Remove a lock file that nobody holds; one on a disk that is read-only does no harm."""
        with contextlib.suppress(OSError):
            if self._lock_file.is_file() and (file := _locked(self._lock_file) or -1) >= 0:
                self._lock_file.unlink(missing_ok=True)
                os.close(file)

    def _own_record(self) -> dict[str, Any] | None:
        """This stage's record; None where there is none, or a damaged one that --force makes anew."""
        try:
            record = read_record(self.record_path)
            if record is not None:
                self._require_identity(record)
        except PipelineError as error:
            if not self.force:
                raise
            log.info("redoing %s: %s", self.program, str(error).splitlines()[0])
            return None
        return record

    def _require_identity(self, record: dict[str, Any]) -> None:
        if not {"identity", "outputs", "home"} <= record.keys() or not IDENTITY <= record["identity"].keys():
            raise no_record(self.record_path)

    def differences(self, record: dict[str, Any]) -> list[str]:
        """What keeps a record from being that of this stage as it is asked for, one line each."""
        self._require_identity(record)
        # A disk may alter a file and not its time. Who asks for --force has been told of one, or suspects it.
        return self._differences(record) or check_outputs(self.record_path, thorough=self.force)

    def _differences(self, record: dict[str, Any]) -> list[str]:
        old, new = record["identity"], self.identity()
        if records.digest_of(old) == records.digest_of(new):
            return []
        if old.get("program", self.program) != self.program:
            return [f"it is of {old['program']}, not of {self.program}"]
        found = []
        if old["format"] != new["format"]:
            found.append(f"format of {self.program}: {old['format']} -> {new['format']}")
        for role in sorted(old["inputs"].keys() | new["inputs"].keys()):
            if old["inputs"].get(role) != new["inputs"].get(role):
                found.append(f"input changed: {role}")
        found += _differing("settings", old["settings"], new["settings"])
        return found or ["the record"]

    def _verify_inputs(self) -> None:
        """Hash every input made by another stage, once; refuse an incomplete, altered or gate-failed one."""
        if self._verified:
            return
        for item in self.inputs:
            record = read_record(item.record) if item.record else None
            if record is None:
                continue
            if not {"program", "outputs", "home"} <= record.keys():
                raise no_record(item.record)
            home = item.record.parent / record["home"]
            folder = item.path.resolve()
            inside = {
                name: entry
                for name, entry in record["outputs"].items()
                # Scores beside it count too, unless the folder alone was brought from elsewhere.
                if (home / name).resolve().is_relative_to(folder)
                or (name.startswith("..") and Path(os.path.normpath(home / name)).is_file())
            }
            wrong = changed_files(inside, home, thorough=True)
            if wrong:
                again = record.get("command") or item.repair
                raise PipelineError(
                    f"{item.role} is not what {record['program']} made:\n  "
                    + "\n  ".join(wrong)
                    + (f"\nMake it again: {again} --force" if again else "")
                )
            gate = record.get("gate")
            if gate and not gate["passed"] and not self.allow_regression:
                raise GateError(
                    f"{item.role}: the gate of {record['program']} failed ({'; '.join(gate['reasons'])}); "
                    "to build on it all the same, add --allow-regression"
                )
        self._verified = True

    # during ---------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held by one process at a time; it ends with the process, however that ends.

        Raises PipelineError while another process holds it, or when one has made the stage since we looked.
        """
        path = self._lock_file
        records.make_folder(path.parent)
        file = _locked(path)
        if file is None:
            raise PipelineError(
                f"{show(path)}: another process is at work on {self.program} (pid {_first_line(path)}); "
                "wait for it to end, or stop it, and run the same command again"
            )
        try:
            if self._seen and self._own_record() != self._seen[0]:
                raise PipelineError(
                    f"{show(self.record_path)}: another process has just finished {self.program}; "
                    "run the same command again"
                )
            yield
        finally:
            if file >= 0:
                path.unlink(missing_ok=True)
                os.close(file)

    @contextlib.contextmanager
    def work(self, resumable: bool = False) -> Iterator[Path]:
        """The temporary neighbour to write into. What a resumable stage has in it is kept on error, to be continued.

        Raises PipelineError while another process is at work in it. Of processes that train together the first one
        checks, locks and makes it; the others wait for that.
        """
        if not processes.is_main():
            processes.wait()
            yield self._work
            return
        self._verify_inputs()
        with self.lock():
            yield from self._at_work(resumable)

    def begun_otherwise(self) -> list[str] | None:
        """What keeps a resumable stage from continuing in its work folder, one line each; None where none was begun."""
        begun = records.read_sealed(self._work / ".identity.json", ("format", "inputs", "settings"))
        return None if begun is None else self._differences({"identity": begun})

    def _at_work(self, resumable: bool) -> Iterator[Path]:
        identity_file = self._work / ".identity.json"
        if self._work.is_symlink():
            self._work.unlink()
        if self._work.exists():
            differences = self.begun_otherwise() if resumable else None
            if differences is not None:
                if not differences:
                    self._resumed = True
                    log.info("continuing in %s", show(self._work))
                elif not self.force:
                    raise PipelineError(
                        f"{show(self._work)} was begun with something else:\n  "
                        + "\n  ".join(differences)
                        + "\nRepeat the command that began it, or add --force to start anew (the old one is kept)."
                    )
                else:
                    records.move_aside(self._work)
            elif resumable and identity_file.is_file():
                old = records.move_aside(self._work)
                log.warning("%s is damaged; starting anew, what was begun is kept in %s", identity_file.name, show(old))
            else:
                shutil.rmtree(self._work)
        self._work.mkdir(parents=True, exist_ok=True)
        records.write_sealed(identity_file, self.identity())
        self._report(state="running", percent=0.0)
        processes.wait()
        try:
            yield self._work
        except (Interrupted, KeyboardInterrupt):
            self._report(state="interrupted")
            raise
        except GateError:
            self._report(state="gate")
            raise
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and not error.filename:
                error.filename = show(self.record_path.parents[1])  # a full disk says nothing of where it is
            self._report(state="failed", cause=str(error).splitlines()[0][:200] if str(error) else type(error).__name__)
            if isinstance(error, (PipelineError, OSError)):
                self._clear(resumable)
            raise

    def _clear(self, resumable: bool) -> None:
        """Leave nothing of a run that a wrong input ended, unless there is something to continue."""
        with contextlib.suppress(OSError):
            if not resumable or os.listdir(self._work) == [".identity.json"]:
                shutil.rmtree(self._work)

    @property
    def resumed(self) -> bool:
        """True when `work` continued an interrupted run."""
        return self._resumed

    def _report(self, **values: Any) -> None:
        values |= {key: cli.masked(values[key]) for key in ("metric", "cause") if values.get(key)}
        progress.update(self.paths, self.program, self.driver_stage, **values)

    def tick(self, done: int, total: int, metric: str = "") -> None:
        """Tell the progress file how far this stage is."""
        if self._tick() or done >= total:
            self._report(state="running", done=done, total=total, metric=metric)

    # after ----------------------------------------------------------------------------------------------
    def complete(
        self,
        *,
        counts: dict[str, Any] | None = None,
        steps: int | None = None,
        scores: dict[str, Any] | None = None,
        gate: dict[str, Any] | None = None,
        metric: str = "",
        **more: Any,
    ) -> None:
        """Publish the work folder's content under the outputs' names, and last the record.

        Raises PipelineError when a raw input is no longer what it was, AssertionError when an output was not made,
        GateError (after publishing) when the gate failed.
        """
        if processes.is_main():
            self._publish(counts, steps, scores, gate, metric, more)
        processes.wait()
        if gate and not gate["passed"]:
            message = f"gate: {'; '.join(gate['reasons'])}"
            if not self.allow_regression:
                raise GateError(message + "\nTo go on all the same, add --allow-regression.")
            log.warning("%s (allowed by --allow-regression)", message)

    def _publish(
        self,
        counts: dict[str, Any] | None,
        steps: int | None,
        scores: dict[str, Any] | None,
        gate: dict[str, Any] | None,
        metric: str,
        more: dict[str, Any],
    ) -> None:
        self._check_raw_inputs()
        home = self.outputs[0] if self.record_inside else self.paths.data
        record: dict[str, Any] = {
            "program": self.program,
            "fingerprint": self.fingerprint,
            "identity": self.identity(),
            "home": os.path.relpath(home, self.record_path.parent),
            "inputs": {i.role: os.path.relpath(i.path, home) for i in self.inputs},
            "raw_files": self._raw_files(),
            "settings": records.read_back(self.settings),
            "counts": counts or {},
            "steps": steps,
            "scores": scores,
            "gate": gate,
            "warnings": [cli.masked(text) for text in self.warnings],
            "command": cli.masked(_command()),
            "versions": versions(),
            "seconds": round(time.monotonic() - self._started, 1),
            "resumed": self._resumed,  # `seconds` are then those of its last part
            "peak_memory": peak_memory(),
            "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            **more,
        }
        records.share(self._work)
        if self.record_inside:
            beside = [path for path in self.beside if path.is_file()]
            records.settle(self._work, *beside)
            record["outputs"] = describe([self._work], self._work) | describe(beside, self.outputs[0])
            records.write_sealed(self._work / RECORD_NAME, record)
            if old := records.move_aside(self.outputs[0]):
                log.info("the old result is kept as %s", show(old))
            self.outputs[0].parent.mkdir(parents=True, exist_ok=True)
            self._work.rename(self.outputs[0])
            # Last: a kill while the files were hashed must find the work folder still resumable.
            (self.outputs[0] / ".identity.json").unlink()
        else:
            self._publish_data(record)
        self._report(state="complete" if not gate or gate["passed"] else "gate", percent=100.0, metric=metric)

    def _publish_data(self, record: dict[str, Any]) -> None:
        missing = [o for o in self.outputs if not self._made(o).exists() and self._made(o) != o]
        if missing:
            raise AssertionError(f"{self.program} did not make {', '.join(map(str, missing))}")
        # A complete old result is kept; the record goes first, so that a kill in between reads as incomplete.
        if self.record_path.exists():
            records.move_aside(self.record_path)
            for output in self.outputs:
                if self._made(output) != output and (old := records.move_aside(output)):
                    log.info("the old result is kept as %s", show(old))
        for output in self.outputs:
            made = self._made(output)
            if made == output:
                continue
            if output.is_symlink():
                output.unlink()  # what it points to is not ours
            elif output.is_dir():
                shutil.rmtree(output)  # left by a kill between renames; no record vouches for it
            os.replace(made, output)
        shutil.rmtree(self._work)
        records.settle(*self.outputs)
        record["outputs"] = describe(self.outputs, self.paths.data)
        records.write_sealed(self.record_path, record)

    def _check_raw_inputs(self) -> None:
        """Refuse to vouch for what was made of files that have changed meanwhile; only these are hashed again."""
        changed: list[str] = []
        for item in (i for i in self.inputs if i.record is None):
            if self._input_fingerprint(item, changed) != self.identity()["inputs"][item.role] and not changed:
                changed.append(f"{item.role}: {show(item.path)} has changed")
        if changed:
            problems = "\n".join(changed)
            raise PipelineError(f"{problems}\nwhile {self.program} was at work; run the same command again")

    def _made(self, output: Path) -> Path:
        """Where the work folder holds an output; the output itself for a stage that only checks files in place."""
        made = self._work / output.name
        return made if made.exists() or not output.exists() else output

    def _raw_files(self) -> dict[str, dict[str, Any]]:
        raw = [i.path for i in self.inputs if i.record is None and i.path.exists()]
        return describe(raw, self.paths.data)


def _command() -> str:
    """The command line of this program, to make the same result again; "" where it was called by something else."""
    program = Path(sys.argv[0]).resolve()
    if not program.is_relative_to(REPOSITORY / "script"):
        return ""
    given = [argument for argument in sys.argv[1:] if argument != "--force"]
    return shlex.join(["python", str(program.relative_to(REPOSITORY)), *given])


# asking -------------------------------------------------------------------------------------------------

_asking: list[bool] = []


class _Asked(Exception):
    """Ends a program at the question whether it is complete."""


def ask(main: Callable[[list[str]], int | None], argv: list[str]) -> Stage | None:
    """The stage that a program would run with these options: its main, up to the question whether it is complete.

    Nothing is written or logged. None where it asked nothing. Raises what stops the program before that question.
    """
    _asking.append(True)
    try:
        with cli.silent():
            main(argv)
    except _Asked as asked:
        return asked.args[0]
    finally:
        _asking.pop()
    return None


def record_beside(file: Path) -> Path:
    """Where the record of a file lies that no stage publishes (`vouch`)."""
    return file.parent / ".stages" / f"{file.stem}.json"


def vouch(program: str, files: list[Path], seconds: float) -> None:
    """A record, beside the first of them, of files that no fingerprint guards: pages and tables, made anew at will."""
    records.settle(*files)
    record_path = record_beside(files[0])
    identity = {"program": program, "format": 1, "settings": {}, "inputs": {}}
    home = files[0].parent
    record = {
        "program": program,
        "fingerprint": records.digest_of(identity),
        "identity": identity,
        "home": "..",
        "inputs": {},
        "raw_files": {},
        "seconds": round(seconds, 1),
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "outputs": describe(files, home),
    }
    records.write_sealed(record_path, record)


def vouched(file: Path) -> bool:
    """Whether a file has a record of `vouch`, and is as that says."""
    record = record_beside(file)
    try:
        return read_record(record) is not None and not check_outputs(record)
    except PipelineError:
        return False


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock file; None while another process has it, -1 where a disk knows no locks."""
    while True:
        # A data folder may come with links where ours go: the lock is emptied, and must not be another's file.
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        except OSError:
            path.unlink(missing_ok=True)
            os.close(file)
            return -1
        with contextlib.suppress(FileNotFoundError):  # who held it before deletes the file
            if os.path.samestat(os.fstat(file), path.stat()):
                os.truncate(file, 0)
                os.write(file, f"{os.getpid()}\n".encode())
                return file
        os.close(file)


def _first_line(path: Path) -> str:
    with contextlib.suppress(OSError):
        if line := path.read_text().strip():
            return line
    return "unknown"


def _is_utf8(path: Path) -> bool:
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def _differing(prefix: str, old: Any, new: Any) -> list[str]:
    """Leaf by leaf, what differs between two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += _differing(f"{prefix}.{key}", old.get(key), new.get(key))
        return found
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]
