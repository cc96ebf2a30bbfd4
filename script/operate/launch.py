"""Start a train program in several processes, one a card, and end with the code that the first one ends with.

Reads   the program's own inputs
Writes  the program's own outputs

    python script/operate/launch.py 2 script/train/train_00_plain_text.py --model medgemma-4b

`accelerate launch` starts them too, but ends with 1 and a traceback of its own whatever a program answers, and the
driver has to tell a failed gate from a missing file. SIGTERM, SIGINT and SIGHUP are passed on to every process; when
one of them fails, the others, which wait for it, are ended.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time

from medgemma_korean import cli

PATIENCE = 30.0  # seconds for the other processes to notice that one has failed, and as many to heed SIGTERM


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def begin(number: int, command: list[str]) -> list[subprocess.Popen]:
    """One process a number, each told the variables that torch.distributed asks for."""
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(number)}
    together |= {"LOCAL_WORLD_SIZE": str(number)}
    return [
        subprocess.Popen(
            [sys.executable, *command], env={**os.environ, **together, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(number)
    ]


def wait(processes: list[subprocess.Popen]) -> int:
    """The exit code of all: of the first process, else of the first that failed; 128 + n where signal n killed it."""
    failed_at = None
    while any(process.poll() is None for process in processes):
        if failed_at is None and any(process.poll() for process in processes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > PATIENCE:
            late = time.monotonic() - failed_at > 2 * PATIENCE
            for process in processes:
                if process.poll() is None:
                    process.kill() if late else process.terminate()
        time.sleep(0.1)
    codes = [process.returncode if process.returncode >= 0 else 128 - process.returncode for process in processes]
    return codes[0] or next((code for code in codes if code), 0)


def make_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=cli.positive_int, help="how many processes")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a program and its options")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if not args.command:
        raise cli.PipelineError("no program to start; for instance: launch.py 2 script/train/train_00_plain_text.py")
    program = args.command[0]
    if not program.startswith("-") and not os.path.isfile(program):
        raise cli.PipelineError(f"{program}: no such program; they are in script/train/ and script/evaluate/")
    processes = begin(args.number, args.command)

    def pass_on(number: int, frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    return wait(processes)


if __name__ == "__main__":
    sys.exit(cli.run(main))
