"""Inside every Python of a chaos run (by PYTHONPATH): a small profile, and the moment at which a fault is due.

Reads   CHAOS (the control folder), CHAOS_AT ("<stage> <n>", "* 1" for every stage, or nothing), MEDGEMMA_KOREAN_STAGE
Writes  CHAOS/changes_<stage>, one byte for every change of a file below data/ and model/; CHAOS/due_<stage>

A moment is "before the n-th change of a file by this stage": the same on a slow machine as on a quick one. At it the
process writes its pid to CHAOS/due_<stage> and stands still until the harness, which does the damage, writes
CHAOS/done_<stage>.
"""

import dataclasses
import os
import select
import sys
import time

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
PATIENCE = 60.0  # seconds to stand still; the harness is dead by then

folder, stage = os.environ.get("CHAOS"), os.environ.get("MEDGEMMA_KOREAN_STAGE")
busy = False


def make_small() -> None:
    """At most 20 steps and three looks in every stage, and scores of 2,000 characters: seconds a stage."""
    from medgemma_korean import profiles

    tiny = profiles.MODELS["tiny"]
    small = dataclasses.replace(
        tiny,
        tiny=dataclasses.replace(tiny.tiny, steps=19, batch=8),
        plain_text=dataclasses.replace(tiny.plain_text, epochs=1, batch=2),
        dictionary=dataclasses.replace(tiny.dictionary, batch=2, micro_batch=2, evaluations=3),
        mcq=dataclasses.replace(tiny.mcq, batch=4),
        score_characters=2_000,
    )
    profiles.MODELS["tiny"] = small


def changes_a_file(event: str, arguments: tuple) -> bool:
    if event == "open":
        # mode and flags: `open` gives both, os.open flags alone
        if not isinstance(arguments[2], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return False
    elif event not in CHANGES:
        return False
    path = arguments[0]
    if event in ("os.remove", "os.rmdir") and arguments[-1] >= 0:  # rmtree names a file by its folder's number
        path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), os.fsdecode(path))
    if isinstance(path, int):
        return False
    path = os.path.realpath(os.fsdecode(path))
    if "/runs/" in path:  # TensorBoard writes in a thread of its own, when it likes
        return False
    return any(path.startswith(os.path.join(root, kind, "")) for kind in ("data", "model"))


def before(event: str, arguments: tuple) -> None:
    global busy
    if busy:
        return
    busy = True
    try:
        if changes_a_file(event, arguments):
            count = os.open(os.path.join(folder, f"changes_{stage}"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.write(count, b".")
            seen = os.fstat(count).st_size  # over all processes of the stage
            os.close(count)
            if seen == at:
                stand_still()
    finally:
        busy = False


def stand_still() -> None:
    due, done = os.path.join(folder, f"due_{stage}"), os.path.join(folder, f"done_{stage}")
    with open(due + ".part", "w") as file:
        file.write(f"{os.getpid()}\n")
    os.rename(due + ".part", due)
    end = time.monotonic() + PATIENCE
    while not os.path.exists(done) and time.monotonic() < end:
        select.select([], [], [], 0.005)  # time.sleep fails now and then where libfaketime moves the clock


if folder:
    if "FAKETIME" in os.environ:  # where the clock is moved, time.sleep fails now and then (EINVAL)
        time.sleep = lambda seconds: select.select([], [], [], seconds)
    make_small()
    if stage:
        root = os.path.realpath(os.environ["MEDGEMMA_KOREAN_ROOT"])
        wanted, _, number = os.environ.get("CHAOS_AT", "").partition(" ")
        at = int(number) if wanted in ("*", stage) else 0
        sys.addaudithook(before)
