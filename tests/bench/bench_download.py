"""How fast a download is: the shipped program beside `hf download`, and our transfer beside huggingface_hub's.

Reads   nothing: the files are made, and served by tests/loopback_hub.py in a process of its own
Writes  a table to stdout, with --json the numbers; its files (three times --gb) go into --folder and are removed

    .venv/bin/python tests/bench/bench_download.py                        # three cases, five rounds, minutes
    .venv/bin/python tests/bench/bench_download.py --gb 0.1 --rounds 3    # the same, small

The ways are taken in turn, each round in the opposite order of the last, so that what else the machine does meets all
of them. Ours computes sha256 and flushes to the disk, hf does neither: user and system time are shown beside.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = "google/medgemma-4b-it"  # what download_model --model medgemma-4b fetches
BESIDE = {"download_model": "hf download", "Transfer": "snapshot_download"}  # ours: what it is compared with
CASES = {  # files, bytes of each, at --gb 1
    "one large file": (1, 1_000_000_000),
    "8 shards": (8, 128_000_000),
    "200 small files": (200, 100_000),
}


@dataclass(frozen=True)
class Run:
    """One download: seconds by the clock, seconds of user and of system time, most memory in bytes."""

    wall: float
    user: float
    system: float
    memory: int


# what is served -----------------------------------------------------------------------------------------


def write_weights(file: Path, size: int) -> None:
    """A safetensors file of about `size` bytes that nothing can compress."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with open(file, "wb") as opened:
        opened.write(struct.pack("<Q", len(header)) + header)
        for start in range(0, size, 1 << 22):
            opened.write(os.urandom(min(1 << 22, size - start)))


def make_model(folder: Path, number: int, size: int) -> None:
    folder.mkdir(parents=True)
    names = [f"model-{i:05}-of-{number:05}.safetensors" for i in range(1, number + 1)]
    for name in names:
        write_weights(folder / name, size)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(names))}))


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a hub with the repositories of a folder."""
    hub = [sys.executable, str(REPOSITORY / "tests" / "loopback_hub.py"), "--serve", str(folder)]
    with subprocess.Popen(hub, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


# the ways -----------------------------------------------------------------------------------------------


def environment(url: str, out: Path) -> dict[str, str]:
    """Ours and hf's: nothing cached, plain HTTP from the hub at `url`, and nothing asked of any other host."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MEDGEMMA_"))}
    switches = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_UPDATE_CHECK", "HF_HUB_DISABLE_TELEMETRY")
    return clean | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(out / "home"),
        "MEDGEMMA_KOREAN_ROOT": str(out),
        "no_proxy": "127.0.0.1",
        **dict.fromkeys(switches, "1"),
    }


def measured(command: list[str], env: dict[str, str]) -> Run:
    """A whole process, from its start to its end."""
    with tempfile.TemporaryFile() as output:
        begun = time.perf_counter()
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}\n{output.read().decode()[-2000:]}")
    return Run(wall, used.ru_utime, used.ru_stime, used.ru_maxrss * 1024)


def alone(way: str, env: dict[str, str], out: Path) -> Run:
    """The transfer alone, as the process that does it measured it: without imports and the start of Python."""
    command = [sys.executable, __file__, "--alone", way, "--folder", str(out)]
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return Run(**json.loads(done.stdout))


def ways(url: str, out: Path) -> dict[str, tuple[Callable[[], Run], Path]]:
    """By name: what runs it, and the folder that it fills."""
    env = environment(url, out)
    program = str(REPOSITORY / "script" / "download" / "download_model.py")
    hf = [str(Path(sys.executable).with_name("hf")), "download", MODEL, "--local-dir", str(out / "files")]
    return {
        "download_model": (
            lambda: measured([sys.executable, program, "--model", "medgemma-4b"], env),
            out / "model" / "raw" / "medgemma-4b",
        ),
        "hf download": (lambda: measured(hf, env), out / "files"),
        "Transfer": (lambda: alone("Transfer", env, out), out / "files"),
        "snapshot_download": (lambda: alone("snapshot_download", env, out), out / "files"),
    }


def run_alone(way: str, folder: Path) -> Run:
    """Fetch the model into a folder and measure that alone; imports and the first question to the hub come before."""
    from huggingface_hub import HfApi, hf_hub_url, snapshot_download

    from medgemma_korean import hub
    from medgemma_korean.transfer import File, Transfer

    info = HfApi().repo_info(MODEL, files_metadata=True)

    def ours() -> None:
        files = [
            File(
                file.rfilename,
                file.size,
                hf_hub_url(MODEL, file.rfilename, revision=info.sha),
                {"Accept-Encoding": "identity"},
                **({"sha256": file.lfs.sha256} if file.lfs else {"git": file.blob_id}),
            )
            for file in info.siblings
        ]
        Transfer("bench", files, folder, 0, hub.CONNECTIONS).run(lambda done, of, text: None)

    def theirs() -> None:
        snapshot_download(MODEL, revision=info.sha, local_dir=folder)

    before, begun = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    (ours if way == "Transfer" else theirs)()
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF)
    return Run(wall, after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime, after.ru_maxrss * 1024)


# measuring ----------------------------------------------------------------------------------------------


def same(made: Path, served: Path, thorough: bool) -> bool:
    """Whether a folder holds the files that were served: their sizes, and thorough: their bytes."""
    for file in served.iterdir():
        other = made / file.name
        if not other.is_file() or other.stat().st_size != file.stat().st_size:
            return False
        if thorough and subprocess.run(["cmp", "-s", file, other]).returncode:
            return False
    return True


def measure(case: str, gb: float, rounds: int, scratch: Path) -> dict[str, list[Run]]:
    """All ways, `rounds` times each. Raises RuntimeError when one of them fails or makes other files."""
    number, size = CASES[case]
    home, out = scratch / "served" / "models" / MODEL, scratch / "out"
    make_model(home, number, max(1, int(size * gb)))
    found: dict[str, list[Run]] = {}
    try:
        with served(scratch / "served") as url:
            for turn in range(rounds):
                for way, (run, made) in list(ways(url, out).items())[:: -1 if turn % 2 else 1]:
                    out.mkdir(parents=True)
                    os.sync()  # what the last one left to write is not this one's to wait for
                    found.setdefault(way, []).append(run())
                    if not same(made, home, thorough=turn == 0):
                        raise RuntimeError(f"{case}: {way} made other files than were served")
                    shutil.rmtree(out)
    finally:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(scratch / "served")
    return {way: found[way] for pair in BESIDE.items() for way in pair}


def median(runs: list[Run], what: str) -> float:
    return statistics.median(getattr(run, what) for run in runs)


def rows(case: str, gb: float, found: dict[str, list[Run]]) -> Iterator[str]:
    """The case's lines of the table, in Markdown."""
    total = CASES[case][0] * CASES[case][1] * gb
    against = dict(BESIDE)
    for way, runs in found.items():
        wall, spread = median(runs, "wall"), [run.wall for run in runs]
        other = against.get(way)
        times = f"{wall / median(found[other], 'wall'):.2f}" if other else ""
        yield (
            f"| {case} | {way} | {wall:.2f} | {min(spread):.2f} to {max(spread):.2f} | {total / wall / 1e6:.0f} "
            f"| {median(runs, 'user'):.2f} | {median(runs, 'system'):.2f} | {median(runs, 'memory') / 1e6:.0f} "
            f"| {times} |"
        )


HEAD = """| case | way | seconds | least to most | MB/s | user s | system s | memory MB | of hf's seconds |
|---|---|---|---|---|---|---|---|---|"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the large cases (the small one shrinks too)")
    parser.add_argument("--rounds", type=int, default=5, help="of each way; the table shows medians")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one; may be repeated")
    parser.add_argument("--folder", type=Path, help="where the files go (a temporary folder); decides on the disk")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run to this file")
    parser.add_argument("--alone", choices=("Transfer", "snapshot_download"), help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.alone:
        print(json.dumps(asdict(run_alone(args.alone, args.folder / "files"))))
        return 0
    everything = {}
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench_download.") as scratch:
        for case in args.case or CASES:
            everything[case] = measure(case, args.gb, args.rounds, Path(scratch))
            print(*rows(case, args.gb, everything[case]), sep="\n", flush=True)
    if args.json:
        numbers = {case: {way: [asdict(r) for r in runs] for way, runs in e.items()} for case, e in everything.items()}
        args.json.write_text(json.dumps({"gb": args.gb, "rounds": args.rounds, "cases": numbers}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
