"""The hub of our own answers the real huggingface_hub as the real hub does, breaks as ordered, and counts truly."""

import gzip
import hashlib
import http.client
import io
import json
import logging
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import get_hf_file_metadata, http_get
from huggingface_hub.utils import close_session, disable_progress_bars
from loopback_hub import LFS_SIZE, Hub

BIG = random.Random(1).randbytes(1_500_000)
SMALL = "작은 파일\n".encode()
FILES = {"README.md": SMALL, "data/train.parquet": BIG, "data/많은 글.txt": b"x" * 10, "model/config.json": b'{"a": 1}'}
ID = "someone/things"
GOOD, OTHER = "hf_good", "hf_other"


@pytest.fixture(autouse=True)
def a_client_of_this_test(monkeypatch):
    """No proxy, token or offline mode of whoever runs the tests; no connection kept from the test before."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "level", logging.ERROR)
    disable_progress_bars()
    close_session()
    yield
    close_session()


@pytest.fixture
def hub():
    with Hub() as hub:
        hub.tokens = {GOOD: {ID}, OTHER: set()}
        hub.commit = hub.add("dataset", ID, FILES)
        yield hub


def api(hub, token=False):
    return HfApi(endpoint=hub.url, token=token)


def fetch(url, *, method="GET", headers=None):
    """(status, headers, body) of one request on a connection of its own; what huggingface_hub does not interpret."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=5)
    try:
        connection.request(method, f"{parts.path}?{parts.query}", headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def resolve_url(hub, name, revision="main", repo_type="dataset"):
    return hf_hub_url(ID, name, repo_type=repo_type, revision=revision, endpoint=hub.url)


def big_url(hub, name="data/train.parquet", repo_type="dataset"):
    """The address on the CDN that a large file is redirected to."""
    headers = {"Authorization": f"Bearer {GOOD}"} if hub.tokens else {}
    return fetch(resolve_url(hub, name, repo_type=repo_type), method="HEAD", headers=headers)[1]["Location"]


def paths(hub, **wanted):
    return [r["path"] for r in hub.requests if wanted.items() <= r.items()]


# the API ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dataset", "model"])
def test_repo_info(kind, hub):
    commit = hub.add(kind, ID, FILES)
    info = api(hub).repo_info(ID, repo_type=kind, files_metadata=True)
    assert (info.id, info.sha, info.gated, info.private) == (ID, commit, False, False) and len(commit) == 40
    files = {s.rfilename: s for s in info.siblings}
    assert {name: s.size for name, s in files.items()} == {name: len(data) for name, data in FILES.items()}
    assert files["data/train.parquet"].lfs.sha256 == hashlib.sha256(BIG).hexdigest()
    assert files["data/train.parquet"].lfs.size == len(BIG) and files["README.md"].lfs is None
    assert files["README.md"].blob_id == hashlib.sha1(b"blob %d\0" % len(SMALL) + SMALL).hexdigest()
    plain = api(hub).repo_info(ID, repo_type=kind, revision=commit)
    assert plain.sha == commit and {s.size for s in plain.siblings} == {None}
    assert api(hub).repo_info(ID, repo_type=kind, expand=["gated"]).siblings is None


def test_what_is_stored_as_lfs():
    with Hub() as hub:
        hub.add("model", ID, {"a.model": b"1", "b.safetensors": b"1", "c.zip": b"1", "at": bytes(LFS_SIZE), "d": b"1"})
        hub.add("model", "another/one", {"above": bytes(LFS_SIZE + 1)})
        lfs = {s.rfilename for s in api(hub).model_info(ID, files_metadata=True).siblings if s.lfs}
        assert lfs == {"a.model", "b.safetensors", "c.zip"}
        assert api(hub).model_info("another/one", files_metadata=True).siblings[0].lfs


def test_the_tree_comes_in_pages(hub):
    everything = [f"{name}.txt" for name in "abcdefg"]
    hub.add("dataset", ID, {**FILES, **dict.fromkeys(everything, b"t")})
    whole = list(api(hub).list_repo_tree(ID, repo_type="dataset", recursive=True))
    assert {e.path for e in whole} == {*FILES, *everything, "data", "model"}
    hub.page_size = 3
    hub.reset_counts()
    paged = list(api(hub).list_repo_tree(ID, repo_type="dataset", recursive=True))
    assert paged == whole and len(hub.requests) == -(-len(whole) // 3)
    assert {e.path for e in api(hub).list_repo_tree(ID, repo_type="dataset")} == {
        "README.md",
        "data",
        "model",
        *everything,
    }
    below = list(api(hub).list_repo_tree(ID, "data", repo_type="dataset", expand=True))
    assert {e.path: e.size for e in below} == {n: len(d) for n, d in FILES.items() if n.startswith("data/")}
    assert all(e.last_commit.title and e.security.safe for e in below)
    with pytest.raises(EntryNotFoundError):
        list(api(hub).list_repo_tree(ID, "no/folder", repo_type="dataset"))


def test_paths_info(hub):
    found = api(hub).get_paths_info(ID, ["data", "data/train.parquet", "nothing"], repo_type="dataset", expand=True)
    assert [e.path for e in found] == ["data", "data/train.parquet"]
    assert found[1].lfs.sha256 == hashlib.sha256(BIG).hexdigest() and found[1].last_commit.oid == hub.commit
    assert not api(hub).get_paths_info(ID, "nothing", repo_type="dataset")


def test_a_commit_follows_from_its_contents_and_old_ones_stay(hub, tmp_path):
    newer = hub.add("dataset", ID, {"README.md": b"newer"})
    assert newer != hub.commit and api(hub).dataset_info(ID).sha == newer
    options = {"repo_type": "dataset", "endpoint": hub.url, "cache_dir": tmp_path, "token": False}
    assert Path(hf_hub_download(ID, "README.md", **options)).read_bytes() == b"newer"
    old = hf_hub_download(ID, "README.md", revision=hub.commit, **options)
    assert Path(old).read_bytes() == SMALL and hub.commit in old
    assert Path(hf_hub_download(ID, "data/train.parquet", revision=hub.commit, **options)).read_bytes() == BIG
    assert hub.add("dataset", ID, FILES) == hub.commit == api(hub).dataset_info(ID).sha


# who may what -------------------------------------------------------------------------------------------


def test_unknown_things_are_refused_as_on_the_real_hub(hub, tmp_path):
    options = {"repo_type": "dataset", "endpoint": hub.url, "cache_dir": tmp_path, "token": False}
    for token, status in ((False, 401), (GOOD, 404)):
        for call in (api(hub, token).dataset_info, api(hub, token).auth_check):
            with pytest.raises(RepositoryNotFoundError) as caught:
                call("no/body")
            assert caught.value.response.status_code == status and not isinstance(caught.value, GatedRepoError)
    with pytest.raises(RepositoryNotFoundError):
        api(hub).model_info(ID)  # there is a dataset of this name, no model
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("no/body", "README.md", **options)
    with pytest.raises(RevisionNotFoundError):
        api(hub).dataset_info(ID, revision="gone")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(ID, "README.md", revision="0" * 40, **options)
    with pytest.raises(EntryNotFoundError) as caught:
        hf_hub_download(ID, "none.txt", **options)
    assert caught.value.response.headers["X-Repo-Commit"] == hub.commit


def test_a_gated_repository(hub, tmp_path):
    hub.add("model", ID, FILES, gated="auto")
    options = {"endpoint": hub.url, "cache_dir": tmp_path}
    for token, status in ((False, 401), (OTHER, 403)):
        assert api(hub, token).model_info(ID).gated == "auto"
        assert list(api(hub, token).list_repo_tree(ID)) and api(hub, token).get_paths_info(ID, "README.md")
        for call in (
            api(hub, token).auth_check,
            lambda i, t=token: hf_hub_download(i, "README.md", token=t, **options),
        ):
            with pytest.raises(GatedRepoError) as caught:
                call(ID)
            assert caught.value.response.status_code == status and "restricted" in str(caught.value)
    api(hub, GOOD).auth_check(ID)
    api(hub).auth_check(ID, repo_type="dataset")
    assert Path(hf_hub_download(ID, "data/train.parquet", token=GOOD, **options)).read_bytes() == BIG


def test_tokens(hub):
    assert api(hub, GOOD).whoami()["name"]
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api(hub, "hf_wrong").whoami()
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:  # even for what is open to everyone
        api(hub, "hf_wrong").dataset_info(ID)
    assert caught.value.response.status_code == 401 and not isinstance(caught.value, RepositoryNotFoundError)
    assert GOOD not in repr(hub.requests) and [r["authorized"] for r in hub.requests] == [True] * 3


# files --------------------------------------------------------------------------------------------------


def test_head_and_redirect_carry_what_a_download_needs(hub):
    status, headers, body = fetch(resolve_url(hub, "data/train.parquet"))
    assert status == 302 and headers["Location"].startswith(hub.cdn_url) and not hub.url.startswith(hub.cdn_url)
    assert headers["X-Linked-Etag"] == f'"{hashlib.sha256(BIG).hexdigest()}"'
    assert int(headers["X-Linked-Size"]) == len(BIG) != int(headers["Content-Length"]) == len(body)
    large = get_hf_file_metadata(resolve_url(hub, "data/train.parquet"), token=False)
    assert (large.size, large.commit_hash, large.xet_file_data) == (len(BIG), hub.commit, None)
    small = get_hf_file_metadata(resolve_url(hub, "README.md"), token=False)
    assert (small.size, small.commit_hash, small.location) == (len(SMALL), hub.commit, resolve_url(hub, "README.md"))
    assert small.etag == hashlib.sha1(b"blob %d\0" % len(SMALL) + SMALL).hexdigest()
    assert hub.sent_total == 0  # HEAD and redirects are no files


@pytest.mark.parametrize("where", ["resolve", "cdn", "static"])
def test_ranges(where, hub):
    hub.serve("/OPUS/v1/en-ko.txt.zip", BIG)
    url = {"resolve": resolve_url(hub, "README.md"), "cdn": big_url(hub), "static": f"{hub.url}/OPUS/v1/en-ko.txt.zip"}
    url, data = url[where], SMALL if where == "resolve" else BIG
    size = len(data)
    for asked, (start, stop) in {
        "0-": (0, size),
        "3-6": (3, 7),
        "5-": (5, size),
        f"{size - 1}-{size + 9}": (size - 1, size),
        "-4": (size - 4, size),
    }.items():
        for method in ("GET", "HEAD"):
            status, headers, body = fetch(url, method=method, headers={"Range": f"bytes={asked}"})
            assert status == 206 and headers["Content-Range"] == f"bytes {start}-{stop - 1}/{size}"
            assert int(headers["Content-Length"]) == stop - start and body == (
                data[start:stop] if method == "GET" else b""
            )
    status, headers, _ = fetch(url, headers={"Range": f"bytes={size}-"})
    assert status == 416 and headers["Content-Range"] == f"bytes */{size}"
    status, headers, body = fetch(url)
    assert status == 200 and body == data and headers["Accept-Ranges"] == "bytes" and headers["ETag"]
    same = {"Range": "bytes=5-", "If-Range": headers["ETag"]}
    assert fetch(url, headers=same)[0] == 206 and fetch(url, headers={**same, "If-Range": '"older"'})[0] == 200


def test_a_static_file_is_open_and_can_be_replaced(hub, tmp_path):
    (tmp_path / "file").write_bytes(BIG)
    hub.serve("/a/b.zip", tmp_path / "file")
    status, before, body = fetch(f"{hub.url}/a/b.zip", headers={"Authorization": "Bearer hf_of_another_site"})
    assert status == 200 and body == BIG and before["Last-Modified"].endswith("GMT")
    hub.serve("/a/b.zip", SMALL)
    status, after, body = fetch(f"{hub.url}/a/b.zip")
    assert body == SMALL and after["ETag"] != before["ETag"] and after["Last-Modified"] != before["Last-Modified"]
    assert hub.sent == {"/a/b.zip": len(BIG) + len(SMALL)} and fetch(f"{hub.url}/a/c.zip")[0] == 404


def test_snapshot_download_and_its_accounts(hub, tmp_path):
    hub.add("dataset", ID, FILES, gated="auto")
    folder = snapshot_download(ID, repo_type="dataset", endpoint=hub.url, cache_dir=tmp_path, token=GOOD)
    assert {n: (Path(folder) / n).read_bytes() for n in FILES} == FILES
    assert hub.sent == {name: len(data) for name, data in FILES.items()} and hub.sent_total == sum(hub.sent.values())
    assert len(paths(hub, where="cdn", method="GET", status=200)) == 1 and "train.parquet" in paths(hub, where="cdn")[0]
    assert {r["authorized"] for r in hub.requests if r["where"] != "cdn"} == {True}
    assert not hub.cdn_saw_authorization
    hub.reset_counts()
    assert (hub.sent_total, hub.requests, hub.proxied) == (0, [], 0)
    fetch(big_url(hub), headers={"Authorization": "Bearer x"})
    assert hub.cdn_saw_authorization and hub.sent == {"data/train.parquet": len(BIG)}


def test_a_path_is_served_and_must_not_change(tmp_path):
    file = tmp_path / "big.bin"
    file.write_bytes(BIG)
    with pytest.raises(RuntimeError, match="inside the loopback hub") as caught, Hub() as hub:
        hub.add("model", ID, {"big.bin": file})
        assert fetch(big_url(hub, "big.bin", "model"))[2] == BIG
        file.write_bytes(BIG[:-1])
        with pytest.raises(http.client.IncompleteRead):
            fetch(big_url(hub, "big.bin", "model"))
    assert "changed after it was added" in str(caught.value.__cause__)


def test_small_text_may_come_compressed(hub, tmp_path):
    hub.compress = True
    text = b'{"a": 1}' * 1000
    hub.add("dataset", ID, {"config.json": text})
    status, headers, body = fetch(
        resolve_url(hub, "config.json"), headers={"Accept-Encoding": "gzip", "Range": "bytes=9-"}
    )
    assert status == 200 and headers["Content-Encoding"] == "gzip" and gzip.decompress(body) == text
    assert int(headers["Content-Length"]) == len(body) < len(text)
    options = {"repo_type": "dataset", "endpoint": hub.url, "token": False}
    assert Path(hf_hub_download(ID, "config.json", cache_dir=tmp_path, **options)).read_bytes() == text
    rest = io.BytesIO(b"")
    rest.write(text[:9])
    http_get(resolve_url(hub, "config.json"), rest, resume_size=9, expected_size=len(text))
    assert rest.getvalue() == text


# faults -------------------------------------------------------------------------------------------------


def test_http_get_resumes_to_the_same_bytes(hub):
    for url, data in ((big_url(hub), BIG), (resolve_url(hub, "README.md"), SMALL)):
        begun = io.BytesIO()
        begun.write(data[:7])
        http_get(url, begun, resume_size=7, expected_size=len(data))
        assert begun.getvalue() == data
    assert hub.sent == {"data/train.parquet": len(BIG) - 7, "README.md": len(SMALL) - 7}


def test_cut(hub):
    larger = BIG * 8  # http_get hands bytes on in blocks of 10 MiB and forgets what it had of the next one
    hub.add("dataset", ID, {"data/train.parquet": larger})
    cut = hub.fault("cut", match="train.parquet", after=11_000_000)
    url = big_url(hub)
    assert cut.used == 0  # HEAD has no body to cut
    whole = io.BytesIO()
    http_get(url, whole, expected_size=len(larger))
    assert whole.getvalue() == larger and cut.used == 1
    assert [r["range"] for r in hub.requests if r["where"] == "cdn"] == [None, f"bytes={10 * 2**20}-"]
    assert hub.sent == {"data/train.parquet": 11_000_000 + len(larger) - 10 * 2**20}


def test_cut_with_a_reset_and_in_the_api(hub):
    url = big_url(hub)
    hub.fault("cut", where="cdn", after=100_000, times=None, reset=True)
    with pytest.raises((ConnectionResetError, http.client.IncompleteRead)) as caught:
        fetch(url)
    assert isinstance(caught.value, ConnectionResetError) and hub.sent["data/train.parquet"] == 100_000
    hub.fault("cut", where="api", after=5)
    with pytest.raises(http.client.IncompleteRead) as caught:
        fetch(f"{hub.url}/api/datasets/{ID}")
    assert len(caught.value.partial) == 5
    assert json.loads(fetch(f"{hub.url}/api/datasets/{ID}")[2])["sha"] == hub.commit


def test_status(hub):
    first = hub.fault("status", code=429, retry_after=7, match="README.md", times=2)
    second = hub.fault("status", code=503, where="api", method="GET", ratelimit=3, error_code="E", message="나중에")
    for _ in range(2):
        status, headers, body = fetch(resolve_url(hub, "README.md"))
        assert status == 429 and headers["Retry-After"] == "7" and json.loads(body)["error"]
    assert fetch(resolve_url(hub, "README.md"))[0] == 200 and fetch(resolve_url(hub, "data/많은 글.txt"))[0] == 200
    status, headers, _ = fetch(f"{hub.url}/api/datasets/{ID}")
    assert status == 503 and headers["RateLimit"] == '"api";r=0;t=3' and headers["X-Error-Code"] == "E"
    assert (first.used, second.used) == (2, 1)
    hub.fault("status", code=500, times=None)
    assert fetch(f"{hub.url}/api/datasets/{ID}")[0] == fetch(f"{hub.cdn_url}/x")[0] == 500
    hub.clear_faults()
    assert fetch(f"{hub.url}/api/datasets/{ID}")[0] == 200


def test_http_get_waits_out_a_429(hub):
    url = big_url(hub)
    fault = hub.fault("status", code=429, retry_after=0, where="cdn")
    whole = io.BytesIO()
    http_get(url, whole)
    assert whole.getvalue() == BIG and fault.used == 1
    assert [r["status"] for r in hub.requests if r["where"] == "cdn"] == [429, 200]


def test_delay_and_stall(hub):
    url = big_url(hub)
    hub.fault("delay", seconds=0.3, where="cdn")
    before = time.monotonic()
    assert fetch(url)[2] == BIG and time.monotonic() - before >= 0.3
    stall = hub.fault("stall", after=10, seconds=0.3, where="cdn")
    before = time.monotonic()
    with pytest.raises(http.client.IncompleteRead) as caught:
        fetch(url)
    assert len(caught.value.partial) == 10 and time.monotonic() - before >= 0.3 and stall.used == 1
    hub.fault("stall", seconds=60)
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(hub.url).port, timeout=0.2)
    connection.request("GET", f"/api/datasets/{ID}")
    with pytest.raises(TimeoutError):
        connection.getresponse().read()
    connection.close()


def test_the_end_does_not_wait_for_a_stalled_client():
    connection = None
    before = time.monotonic()
    with Hub() as hub:
        hub.serve("/file", BIG)
        hub.fault("stall", after=10, seconds=60)
        connection = http.client.HTTPConnection("127.0.0.1", urlsplit(hub.url).port, timeout=5)
        connection.request("GET", "/file")
        assert connection.getresponse().read(10) == BIG[:10]
    assert time.monotonic() - before < 2
    connection.close()


def test_short_and_altered(hub):
    url = big_url(hub)
    hub.fault("short", where="cdn", missing=100)
    hub.fault("short", where="cdn")
    assert fetch(url)[2] == BIG[:-100] and fetch(url)[2] == BIG[: len(BIG) - len(BIG) // 2]
    hub.fault("short", where="cdn", missing=1)
    with pytest.raises(OSError, match="Consistency check failed"):
        http_get(url, io.BytesIO(), expected_size=len(BIG))
    hub.fault("altered", match="train.parquet", at=70)
    beginning = fetch(url, headers={"Range": "bytes=0-69"})[2]  # the byte is not in it: the fault waits
    other = fetch(url)[2]
    assert (
        beginning == BIG[:70] and [i for i in range(len(BIG)) if other[i] != BIG[i]] == [70] and len(other) == len(BIG)
    )
    hub.fault("altered", match="README.md")
    other = fetch(resolve_url(hub, "README.md"))[2]
    assert other != SMALL and len(other) == len(SMALL)
    assert hub.sent["data/train.parquet"] == sum(
        r for r in (len(BIG) - 100, len(BIG) - len(BIG) // 2, len(BIG) - 1, 70, len(BIG))
    )


def test_no_range(hub):
    url = big_url(hub)
    fault = hub.fault("no_range", times=None, where="cdn")
    assert fetch(url)[0] == 200 and fault.used == 0
    status, headers, body = fetch(url, headers={"Range": "bytes=100-"})
    assert status == 200 and body == BIG and "Content-Range" not in headers and fault.used == 1
    begun = io.BytesIO()
    begun.write(BIG[:100])
    http_get(url, begun, resume_size=100, expected_size=len(BIG))
    assert begun.getvalue() == BIG


def test_an_order_that_makes_no_sense_is_refused(hub):
    for kind, options in (("cutt", {}), ("cut", {"code": 500}), ("delay", {"seconds": 1, "where": "nowhere"})):
        with pytest.raises(ValueError):
            hub.fault(kind, **options)
    with pytest.raises(ValueError):
        hub.add("dataset", "no_owner", {})


# speed --------------------------------------------------------------------------------------------------


def test_a_rate_is_kept_and_sent_is_close_to_what_the_client_has(hub):
    url = big_url(hub)
    hub.rate = 3_000_000
    before = time.monotonic()
    assert fetch(url)[2] == BIG
    assert 0.4 <= time.monotonic() - before <= 3  # 0.5 by the rate; more is a busy machine
    hub.reset_counts()
    hub.rate = 1_000_000
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(url).port, timeout=5)
    connection.request("GET", urlsplit(url).path)
    answer = connection.getresponse()
    got = len(answer.read(300_000))
    answer.close()
    connection.close()
    time.sleep(0.1)  # until the server notices
    assert got == 300_000 <= hub.sent["data/train.parquet"] <= got + 400_000


# as a proxy and by hand ---------------------------------------------------------------------------------


def program(*args, **env):
    clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return subprocess.run([sys.executable, *args], env=clean | env, capture_output=True, text=True, timeout=60)


def test_as_a_proxy(hub, tmp_path):
    hub.page_size = 2
    code = f"import huggingface_hub as h; print(h.snapshot_download({ID!r}, repo_type='dataset'))"
    env = {"HF_ENDPOINT": "http://hub.invalid", "HF_HOME": str(tmp_path), "HF_TOKEN": GOOD, "HF_HUB_DISABLE_XET": "1"}
    done = program("-c", code, HTTP_PROXY=hub.url, **env)
    assert done.returncode == 0, done.stderr
    assert {n: (Path(done.stdout.strip()) / n).read_bytes() for n in FILES} == FILES
    assert hub.proxied == len(hub.requests) > 5 and not hub.cdn_saw_authorization
    assert len([p for p in paths(hub) if "cursor" in p]) == 2 and len(paths(hub, where="cdn")) == 1


def test_by_hand(tmp_path):
    for name in ("datasets/a/b/README.md", "models/c/d/sub/x.bin", "models/c/d/.cache/no", "static/OPUS/x.zip"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(SMALL)
    script = Path(__file__).with_name("loopback_hub.py")
    served = subprocess.Popen(
        [sys.executable, str(script), "--serve", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        url = served.stdout.readline().strip()
        for path in ("datasets/a/b/resolve/main/README.md", "c/d/resolve/main/sub/x.bin", "OPUS/x.zip"):
            assert fetch(f"{url}/{path}")[2] == SMALL
        assert fetch(f"{url}/c/d/resolve/main/.cache/no")[0] == 404
    finally:
        served.kill()
        served.wait()
    assert program(str(script), "--serve", str(tmp_path / "models")).returncode == 2
