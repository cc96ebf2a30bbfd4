"""Bytes over a network that breaks: continued where it broke, verified, given up in the end."""

import errno
import hashlib
import os
import random
import re
import threading
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from medgemma_korean import cli, records, transfer
from medgemma_korean.paths import RunPaths
from medgemma_korean.transfer import Altered, File, PartFile, Transfer

ID = "someone/things"
SIZE = 4_200_000
BIG = random.Random(1).randbytes(SIZE)
SMALL = "작은 파일\n".encode() * 40
CONTENT = {"a/big.parquet": BIG, "small.json": SMALL}
MB = 1 << 20  # a multiple of transfer.BLOCK: what of it has come is kept


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def git(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def published(hub, name="a/big.parquet", content=CONTENT):
    """A file of the hub as a pin describes it."""
    data = content[name]
    commit = hub.add("dataset", ID, content)
    known = {"sha256": sha256(data)} if name.endswith(".parquet") else {"git": git(data)}
    url = hf_hub_url(ID, name, repo_type="dataset", revision=commit, endpoint=hub.url)
    return File(name, len(data), url, {"Accept-Encoding": "identity"}, **known)


def plain(hub, data, path="/files/pairs.zip"):
    """A file outside any repository, of which only size and ETag are known."""
    hub.serve(path, data)
    headers = {"Accept-Encoding": "identity", "If-Range": f'"{sha256(data)[:32]}"'}
    return File("pairs.zip", len(data), hub.url + path, headers)


class Counted:
    """What `fetch_file` tells: bytes there, bytes fetched, and what it waits for."""

    def __init__(self):
        self.there = self.fetched = 0
        self.said = []

    def add(self, number, fetched):
        self.there += number
        self.fetched += number if fetched else 0

    def pause(self, message, seconds):
        self.said.append(message)


def fetch(file, folder):
    """(digest, counted) of one file fetched into a folder."""
    counted = Counted()
    return transfer.fetch_file(file, folder, counted.add, counted.pause), counted


def parts(folder):
    return sorted(p.name for p in folder.rglob(".*.part"))


def ranges(hub, where="cdn"):
    return [r["range"] for r in hub.requests if r["where"] == where and r["method"] == "GET"]


# one file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTENT)
def test_a_file_takes_its_name_when_it_is_whole(name, hub, client, tmp_path):
    digest, counted = fetch(published(hub, name), tmp_path)
    assert (tmp_path / name).read_bytes() == CONTENT[name] and digest == sha256(CONTENT[name])
    assert counted.there == counted.fetched == len(CONTENT[name]) and not counted.said and not parts(tmp_path)
    assert records.sha256_once(tmp_path / name) == digest


def test_a_part_is_continued(hub, client, tmp_path):
    file = published(hub)
    file.part(tmp_path).parent.mkdir()
    file.part(tmp_path).write_bytes(BIG[:3_000_001])
    digest, counted = fetch(file, tmp_path)
    assert digest == sha256(BIG) and ranges(hub) == ["bytes=3000001-"]
    assert hub.sent["a/big.parquet"] == counted.fetched == SIZE - 3_000_001 and counted.there == SIZE


def test_a_whole_part_is_only_verified(hub, client, tmp_path):
    file = published(hub)
    file.part(tmp_path).parent.mkdir()
    file.part(tmp_path).write_bytes(BIG)
    assert fetch(file, tmp_path)[0] == sha256(BIG) and hub.requests == []


@pytest.mark.parametrize("wrong", [BIG[:-1] + b"?", BIG + b"more", b"\0" * 3 * MB])
def test_a_part_that_is_no_piece_of_the_file_costs_a_second_fetch(wrong, hub, client, tmp_path):
    file = published(hub)
    file.part(tmp_path).parent.mkdir()
    file.part(tmp_path).write_bytes(wrong)
    digest, counted = fetch(file, tmp_path)
    assert digest == sha256(BIG) and counted.there == SIZE and not parts(tmp_path)


def test_pieces_of_two_contents_never_meet(tmp_path):
    files = [File("x.bin", 3, "http://…", sha256=sha256(data)) for data in (b"one", b"two")]
    files += [File("x.bin", 3, "http://…", {"If-Range": etag}) for etag in ('"a"', '"b"')]
    files += [File("x.bin", size, "http://…") for size in (3, 4)]
    assert len({file.part(tmp_path) for file in files}) == 6


# connections that break ---------------------------------------------------------------------------------


@pytest.mark.parametrize("times, asked", [(1, [None, MB]), (3, [None, MB, 2 * MB, 3 * MB])])
def test_a_cut_connection_continues_where_it_broke(times, asked, hub, client, tmp_path):
    file = published(hub)
    hub.fault("cut", "big.parquet", times, where="cdn", after=MB + 1000)
    digest, counted = fetch(file, tmp_path)
    assert digest == sha256(BIG) and ranges(hub) == [start and f"bytes={start}-" for start in asked]
    # Of each connection only the block that was not full is lost.
    assert counted.fetched == SIZE and hub.sent["a/big.parquet"] == SIZE + times * 1000


def test_a_connection_that_is_reset_is_tried_again(hub, client, tmp_path):
    file = published(hub)
    hub.fault("cut", "big.parquet", 2, where="cdn", after=MB + 1000, reset=True)
    digest, counted = fetch(file, tmp_path)
    assert digest == sha256(BIG) and counted.fetched == SIZE  # what it brought may be lost with it
    assert len(counted.said) == 2 and "trying again" in counted.said[0]


def test_a_server_that_falls_silent_is_left(hub, client, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    file = published(hub)
    stall = hub.fault("stall", "big.parquet", where="cdn", after=2 * MB + 10, seconds=30)
    digest, counted = fetch(file, tmp_path)
    assert digest == sha256(BIG) and stall.used == 1 and ranges(hub) == [None, f"bytes={2 * MB}-"]


def test_a_server_that_ignores_ranges_sends_the_whole_again(hub, client, tmp_path):
    file = published(hub)
    file.part(tmp_path).parent.mkdir()
    file.part(tmp_path).write_bytes(BIG[: 2 * MB])
    ignored = hub.fault("no_range", "big.parquet", times=None)
    digest, counted = fetch(file, tmp_path)
    assert digest == sha256(BIG) and ignored.used == 1
    assert counted.there == SIZE == counted.fetched == hub.sent["a/big.parquet"]


@pytest.mark.parametrize("code", [500, 502, 503, 504])
def test_a_server_in_trouble_is_asked_again(code, hub, client, tmp_path):
    file = published(hub)
    trouble = hub.fault("status", "big.parquet", 3, code=code)
    digest, counted = fetch(file, tmp_path)
    assert digest == sha256(BIG) and trouble.used == 3
    assert counted.said == [f"a/big.parquet: HTTP {code} at 0 B; trying again"] * 3


def test_trouble_without_end_is_given_up_and_what_came_is_kept(hub, client, tmp_path):
    file = published(hub)
    file.part(tmp_path).parent.mkdir()
    file.part(tmp_path).write_bytes(BIG[: 2 * MB])
    trouble = hub.fault("status", "big.parquet", None, code=503, where="cdn")
    counted = Counted()
    with pytest.raises(HfHubHTTPError):
        transfer.fetch_file(file, tmp_path, counted.add, counted.pause)
    assert trouble.used == 1 + len(transfer.WAITS) and len(counted.said) == len(transfer.WAITS)
    assert file.part(tmp_path).read_bytes() == BIG[: 2 * MB] and not (tmp_path / file.name).exists()


@pytest.mark.parametrize("headers", [{"retry_after": 1}, {"ratelimit": 1}])
def test_a_hub_that_asks_to_wait_gets_its_time(headers, hub, client, tmp_path):
    file = published(hub)
    busy = hub.fault("status", "big.parquet", code=429, **headers)
    assert fetch(file, tmp_path)[0] == sha256(BIG) and busy.used == 1
    assert client == [2.0]  # the library adds a second


@pytest.mark.parametrize("headers", [{"retry_after": 300}, {"ratelimit": 300}])
def test_a_hub_that_asks_to_wait_for_ever_is_left_after_minutes_and_not_hours(headers, hub, client, tmp_path):
    file = published(hub)
    hub.fault("status", "big.parquet", None, code=429, **headers)
    with pytest.raises(HfHubHTTPError):
        fetch(file, tmp_path)
    assert 600 < sum(client) < 3600


# content that is not the announced ----------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTENT)
def test_altered_once_is_fetched_again(name, hub, client, tmp_path):
    file = published(hub, name)
    altered = hub.fault("altered", name)
    digest, counted = fetch(file, tmp_path)
    assert digest == sha256(CONTENT[name]) and altered.used == 1 and counted.there == file.size
    assert len(counted.said) == 1 and "is not what was announced" in counted.said[0]


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize("fault, words", [("altered", "hash|sha256"), ("short", "shorter than announced")])
def test_altered_always_is_refused(fault, words, name, hub, client, tmp_path):
    file = published(hub, name)
    ordered = hub.fault(fault, name, None)
    counted = Counted()
    with pytest.raises(Altered, match=words):
        transfer.fetch_file(file, tmp_path, counted.add, counted.pause)
    assert ordered.used >= transfer.ATTEMPTS_AT_CONTENT and len(counted.said) >= transfer.ATTEMPTS_AT_CONTENT - 1
    assert not (tmp_path / name).exists() and not parts(tmp_path) and counted.there == 0


def test_more_than_announced_is_refused(hub, client, tmp_path):
    file = published(hub)
    longer = File(file.name, file.size - 1, file.url, file.headers, sha256=file.sha256)
    with pytest.raises(Altered, match="more than the announced"):
        fetch(longer, tmp_path)
    assert not parts(tmp_path)


@pytest.mark.parametrize("new", [BIG[::-1], BIG[:-500_000]])
def test_a_file_that_is_replaced_between_two_attempts_is_never_a_mixture(new, hub, client, tmp_path):
    """Nothing but its ETag tells the two contents apart: If-Range has the second one sent from its start."""
    file = plain(hub, BIG)
    hub.fault("cut", "pairs.zip", after=2 * MB + 7)
    counted = Counted()

    def add(number, fetched):
        hub.serve("/files/pairs.zip", new)
        counted.add(number, fetched)

    if len(new) == SIZE:
        assert transfer.fetch_file(file, tmp_path, add, counted.pause) == sha256(new)
        assert (tmp_path / "pairs.zip").read_bytes() == new and counted.there == SIZE
    else:
        with pytest.raises(Altered, match="shorter than announced"):
            transfer.fetch_file(file, tmp_path, add, counted.pause)
        assert not (tmp_path / "pairs.zip").exists() and not parts(tmp_path)
    assert ranges(hub, "static")[:2] == [None, f"bytes={2 * MB}-"]


# the disk -----------------------------------------------------------------------------------------------


class FullDisk:
    """A file that takes so many bytes and no more, as the system's unbuffered files do."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, block):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self.file.write(bytes(block)[: self.room])
        self.room -= taken
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_names_the_file_and_keeps_what_came(tmp_path):
    file = File("big.bin", SIZE, "http://…", sha256=sha256(BIG))
    with pytest.raises(OSError) as error, PartFile(file.part(tmp_path), file, Counted().add) as growing:
        growing._file = FullDisk(growing._file, MB + 100)
        growing.write(BIG[:MB])
        growing.write(BIG[MB : 2 * MB])
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(file.part(tmp_path))
    assert BIG.startswith(file.part(tmp_path).read_bytes()) and growing.size == MB
    with PartFile(file.part(tmp_path), file, Counted().add) as growing:
        assert growing.size == MB + 100
        growing.write(BIG[MB + 100 :])
        assert growing.verify() == sha256(BIG)


# which errors another attempt may better ----------------------------------------------------------------


def answer(status, history=(), **headers):
    error = Exception()
    error.response = SimpleNamespace(status_code=status, history=history, headers=headers)
    return error


@pytest.mark.parametrize(
    "error, again",
    [
        *((answer(status), True) for status in (408, 425, 429, 500, 502, 503, 504)),
        *((answer(status), False) for status in (400, 401, 403, 404, 410, 416)),
        (answer(403, history=["a redirect"]), True),  # the signed address is too old
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError("Consistency check failed"), True),  # how http_get says that an answer was too short
        (OfflineModeIsEnabled("HF_HUB_OFFLINE"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (Altered("…"), False),
        (ValueError(), False),
    ],
)
def test_what_is_tried_again(error, again):
    assert transfer.transient(error) is again


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({}, 0),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "99999"}, 3600),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": '"api";r=12;t=55'}, 0),  # sent with every answer; these are not used up
    ],
)
def test_how_long_the_server_asks_to_wait(headers, seconds):
    assert transfer.asked_wait(answer(429, **headers)) == seconds


@pytest.mark.parametrize(
    "errors, outcome, waits",
    [
        ([503], "at last", [0.01]),
        ([503, 503, 502], "at last", [0.01] * 3),
        ([503] * 4, 503, [0.01] * 3),
        ([404], 404, []),
        ([(429, {"Retry-After": "5"})], "at last", [5]),
    ],
)
def test_a_call_is_repeated_after_transient_errors(errors, outcome, waits, client):
    left = [answer(e) if isinstance(e, int) else answer(e[0], **e[1]) for e in errors]

    def call():
        if left:
            raise left.pop(0)
        return "at last"

    try:
        assert transfer.patiently(call, "things") == outcome
    except Exception as error:
        assert error.response.status_code == outcome
    assert client == waits


# many files ---------------------------------------------------------------------------------------------


def several(hub, number=6, size=300_000):
    content = {f"shard-{i}.parquet": random.Random(i).randbytes(size) for i in range(number)}
    hub.add("dataset", ID, content)
    return [published(hub, name, content) for name in content], content


@pytest.mark.parametrize("connections", [1, 4, 9])
def test_files_come_on_several_connections(connections, hub, client, tmp_path):
    files, content = several(hub)
    ticks = []
    one = Transfer("things", files, tmp_path, 1000, connections)
    digests = one.run(lambda *state: ticks.append(state))
    assert digests == {name: sha256(data) for name, data in content.items()}
    assert all((tmp_path / name).read_bytes() == data for name, data in content.items())
    assert one.fetched == 1_800_000 == hub.sent_total and one.there == one.total == 1_801_000
    assert one.state().startswith("1.8 of 1.8 MB") or one.state().startswith("1.8 MB of 1.8 MB")


def test_the_first_failure_ends_the_rest_and_is_named(hub, client, tmp_path):
    files, _ = several(hub)
    hub.fault("status", "shard-2.parquet", None, code=404, error_code="EntryNotFound", where="resolve")
    with pytest.raises(HfHubHTTPError) as error:
        Transfer("things", files, tmp_path, 0, 1).run(lambda *_: None)
    assert error.value.file == "shard-2.parquet"
    assert sorted(p.name for p in tmp_path.glob("shard-*")) == ["shard-0.parquet", "shard-1.parquet"]


def test_an_end_from_outside_stops_all_connections(hub, client, tmp_path):
    files, _ = several(hub, 4, 2_000_000)
    hub.rate = 2e6

    def tick(*_):
        raise cli.Interrupted("SIGTERM")

    before = threading.active_count()
    with pytest.raises(cli.Interrupted):
        Transfer("things", files, tmp_path, 0, 2).run(tick)
    hub.rate = None
    for thread in threading.enumerate():
        if thread.name == "transfer":
            thread.join(5)
            assert not thread.is_alive()
    assert threading.active_count() <= before + 4  # of the hub
    assert not list(tmp_path.glob("shard-*"))


# what a person sees -------------------------------------------------------------------------------------


def test_the_log_has_one_line_a_minute(hub, client, tmp_path, monkeypatch, capsys):
    """With sixty times shorter minutes."""
    monkeypatch.setattr(transfer, "Every", lambda seconds: cli.Every(seconds / 60))
    cli.start_logging(RunPaths("tiny", tmp_path, "tiny"), "test")
    file = published(hub)
    hub.rate = 1.5e6
    Transfer("things", [file], tmp_path, 0, 1).run(lambda *_: None)
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 3, lines
    for line in lines:
        assert re.fullmatch(r"things: \d\.\d MB of 4\.2 MB, \d\.\d MB/s, \d+ s left", line), line
