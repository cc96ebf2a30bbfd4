"""kill -9 of downloads, again and again: the same command ends with the same bytes and fetches hardly anything twice.

Two kinds. The first kills a slow transfer at seeded random places of its bytes; the hub counts what it sent. The second
kills a quick one before each single change that it makes to its folders, one run a change, so that no state between
the last byte and the record is left to chance. Everything runs the shipped programs against tests/loopback_hub.py.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_repositories import GATED, OPUS, TOKEN, environment, pairs_zip, text_files
from loopback_hub import Hub

pytestmark = pytest.mark.full

DOWNLOAD = Path(__file__).resolve().parents[1] / "script" / "download"
MODEL = ("download_model", "--model", "medgemma-4b", "--connections")
SEED = 9
KILLS = 10
TOTAL = 200_000_000  # bytes of weights
RATE = 25e6  # bytes a second over all connections: 8 s, long beside the start of a program and a poll
MOST = 1.3  # times the weights that the hub may send over all runs of a series
PATIENCE = 120  # seconds for what takes a few: others use this machine too

# Put before the program by PYTHONPATH. It dies before its KILL_AT-th change of a file or folder below KILL_BELOW.
KILLER = """
import os, signal, sys

below, at, seen = os.environ["KILL_BELOW"], int(os.environ["KILL_AT"]), 0
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}


def before(event, arguments):
    global seen
    if event == "open":
        if not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
    elif event not in CHANGES:
        return
    path = arguments[0]
    if event in ("os.remove", "os.rmdir") and arguments[-1] >= 0:  # shutil.rmtree names a file by its folder's number
        path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), path)
    if isinstance(path, int) or not os.path.realpath(path).startswith(below):
        return
    seen += 1
    if seen == at:
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(before)
"""


# what is served -----------------------------------------------------------------------------------------


def weights(size: int, seed: int) -> bytes:
    """A safetensors file of `size` bytes."""
    header = b""
    for _ in range(3):  # the header holds the length of the numbers, which depends on its own
        numbers = size - 8 - len(header)
        header = json.dumps({"w": {"dtype": "U8", "shape": [numbers], "data_offsets": [0, numbers]}}).encode()
    content = struct.pack("<Q", len(header)) + header + random.Random(seed).randbytes(numbers)
    assert len(content) == size
    return content


def model(size: int, shards: int) -> dict[str, bytes]:
    """A model whose weights have `size` bytes altogether."""
    names = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    return {
        "config.json": b'{"model_type": "gemma3"}',
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": dict(enumerate(names))}).encode(),
        **{name: weights(size // shards, seed) for seed, name in enumerate(names)},
    }


@pytest.fixture
def hub(tmp_path):
    with Hub() as hub:
        hub.tokens = {TOKEN: set(GATED)}
        yield hub
    for folder in ("model", "data", "runs"):  # hundreds of megabytes that pytest would keep
        shutil.rmtree(tmp_path / folder, ignore_errors=True)


# the programs -------------------------------------------------------------------------------------------


def begin(hub: Hub, root: Path, program: str, *args: str, **env: str) -> subprocess.Popen:
    root.mkdir(parents=True, exist_ok=True)
    settings = {**os.environ, **environment(hub), "HF_HUB_DOWNLOAD_TIMEOUT": "20", "MEDGEMMA_KOREAN_ROOT": str(root)}
    with open(root / "output.txt", "ab") as output:
        return subprocess.Popen(
            [sys.executable, str(DOWNLOAD / f"{program}.py"), *args],
            env={k: v for k, v in {**settings, **env}.items() if v != ""},
            cwd=root,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, for killpg
        )


def finish(hub: Hub, root: Path, *command: str, **env: str) -> int:
    return begin(hub, root, *command, **env).wait(PATIENCE)


def said(root: Path) -> str:
    return (root / "output.txt").read_text()


def tree(root: Path) -> dict[str, str]:
    """Every file and folder below data/ and model/, and the sha256 of files that are no records (those hold times)."""
    found = {}
    for path in itertools.chain.from_iterable((root / place).rglob("*") for place in ("data", "model")):
        name = str(path.relative_to(root))
        record = path.name == "stage.json" or ".stages" in path.parts or ".origins" in path.parts
        compared = path.is_file() and not record
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if compared else ""
    return found


# at random moments --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shards", "connections"), [(1, 4), (8, 4)], ids=["one file", "eight files, four at once"])
def test_a_transfer_killed_ten_times_is_the_same_and_little_is_fetched_twice(shards, connections, hub, tmp_path):
    files = model(TOTAL, shards)
    hub.add("model", GATED[0], files, gated="auto")
    hub.rate = RATE
    command = (*MODEL, str(connections))
    place, partial = (tmp_path / "model/raw" / name for name in ("medgemma-4b", ".medgemma-4b.partial"))

    def here() -> int:
        return sum(p.stat().st_size for p in partial.glob("*model-*")) if partial.is_dir() else 0

    def sent() -> int:
        return sum(count for name, count in hub.sent.items() if name.endswith(".safetensors"))

    draw = random.Random(SEED)
    lost = []
    for moment in sorted(draw.uniform(0.005, 0.95) for _ in range(KILLS)):
        there, before, deadline = here(), sent(), time.monotonic() + PATIENCE
        wanted = max(int(moment * TOTAL) - there, 1)  # a byte must have come, wherever the last kill was
        program = begin(hub, tmp_path, *command)
        while sent() - before < wanted:
            assert program.poll() is None and time.monotonic() < deadline, said(tmp_path)
            time.sleep(0.002)
        assert program.poll() is None, said(tmp_path)
        os.killpg(program.pid, signal.SIGKILL)
        assert program.wait() == -signal.SIGKILL
        assert sent() > before and here() < TOTAL and not place.exists()
        time.sleep(0.1)  # what the hub had begun to send it counts still
        lost.append(there + sent() - before - here())
    assert finish(hub, tmp_path, *command) == 0, said(tmp_path)

    ratio = sent() / TOTAL
    print(
        f"\n{KILLS} kills, {shards} file(s): the hub sent {ratio:.3f} times the weights; lost by a kill, in MB:",
        end=" ",
    )
    print(*(f"{number / 1e6:.1f}" for number in lost))
    assert ratio <= MOST
    found = tree(tmp_path)
    assert {name: found[f"model/raw/medgemma-4b/{name}"] for name in files} == {
        name: hashlib.sha256(content).hexdigest() for name, content in files.items()
    }
    assert set(found) == {
        "model/raw",
        "model/raw/.origins",
        "model/raw/.origins/medgemma-4b.json",
        "model/raw/medgemma-4b",
        "model/raw/medgemma-4b/stage.json",
        *(f"model/raw/medgemma-4b/{name}" for name in files),
    }
    hub.reset_counts()
    assert finish(hub, tmp_path, *command) == 0 and hub.sent_total == 0


# at every step ------------------------------------------------------------------------------------------

SMALL = 1_500_000  # bytes: more than a block of a transfer, and not a whole number of them
TEXT = ("download_00_plain_text", "--model", "medgemma-4b", "--source", "namu_wiki")
PAIRS = ("download_01_english_korean", "--model", "medgemma-4b")
CASES = {  # the command, the folder that its readers see, and the command that had made an older one
    "model": ((*MODEL, "1"), "model/raw/medgemma-4b", ()),
    "text": (TEXT, "data/01_raw/00_korean/namu_wiki", ()),
    "pairs, updated": ((*PAIRS, "--update"), "data/01_raw/03_korean_english", PAIRS),
}


@pytest.mark.parametrize("case", CASES)
def test_a_kill_before_any_step_leaves_what_the_same_command_completes(case, hub, tmp_path):
    command, place, first = CASES[case]
    hub.add("model", GATED[0], model(SMALL, 1), gated="auto")
    hub.add("dataset", "heegyu/namuwiki", text_files()["heegyu/namuwiki"])
    begun, uninterrupted = tmp_path / "runs/begun", tmp_path / "runs/uninterrupted"
    begun.mkdir(parents=True)
    if first:
        hub.serve(OPUS, pairs_zip([("Hello.", "안녕.")]))
        assert finish(hub, begun, *first) == 0, said(begun)
        hub.reset_counts()
    hub.serve(OPUS, pairs_zip())
    shutil.copytree(begun, uninterrupted)
    assert finish(hub, uninterrupted, *command) == 0, said(uninterrupted)
    expected, once = tree(uninterrupted), dict(hub.sent)
    whole = [{n: d for n, d in found.items() if n.startswith(f"{place}/")} for found in (tree(begun), expected)]

    (tmp_path / "killer").mkdir()
    (tmp_path / "killer/sitecustomize.py").write_text(KILLER)
    path = os.pathsep.join([str(tmp_path / "killer"), *filter(None, [os.environ.get("PYTHONPATH")])])
    for step in itertools.count(1):
        root = tmp_path / f"runs/{step}"
        shutil.copytree(begun, root)
        hub.reset_counts()
        below = str(root / place.split("/")[0])
        code = finish(hub, root, *command, PYTHONPATH=path, KILL_AT=str(step), KILL_BELOW=below)
        if code == 0:
            break
        assert code == -signal.SIGKILL, said(root)
        seen = {n: d for n, d in tree(root).items() if n.startswith(f"{place}/") and "/." not in n}
        assert not seen or seen in whole, f"step {step}: half a folder under its final name"
        assert finish(hub, root, *command) == 0, f"step {step}: {said(root)}"
        other = sorted({name for name, _ in tree(root).items() ^ expected.items()})
        assert other == [], f"step {step} leaves these behind or makes them otherwise"
        assert dict(hub.sent) == once, f"step {step}"  # no byte of a file twice
        shutil.rmtree(root)
    print(f"\n{case}: killed before each of {step - 1} steps")
    assert step > 15
