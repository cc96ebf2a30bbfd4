"""The download programs against a hub of our own: what is fetched, what is not, and every failure in words.

Every run here also asserts that no token and no signed address is printed or written (`get` in conftest.py).
"""

import base64
import gzip
import json
import random
import re
import shutil
import signal
import subprocess
import time
from functools import cache
from types import SimpleNamespace

import hub_repositories as repositories
import pytest

from medgemma_korean import hub as downloads
from medgemma_korean import records

TEXT = "download_00_plain_text"
EXAM = "download_02_kor_med_test"
NAMU, WIKI, MODEL = "heegyu/namuwiki", "wikimedia/wikipedia", "google/medgemma-4b-it"
NAMU_FILE = "namuwiki_20210301.parquet"
MB = 1 << 20  # a multiple of transfer.BLOCK: what of it has come is kept


@cache
def big_text(seed=1):
    """A Parquet file of about 4 MB in namu_wiki's columns, which no compression makes smaller."""
    noise = random.Random(seed)
    rows = [{"title": f"{i}", "text": base64.b64encode(noise.randbytes(7000)).decode()} for i in range(440)]
    return repositories.parquet([row | {"namespace": "0", "contributors": ""} for row in rows])


@pytest.fixture
def everything(hub):
    repositories.publish_all(hub)
    return hub


@pytest.fixture
def namu(hub):
    hub.add("dataset", NAMU, {NAMU_FILE: big_text()})
    return hub


@pytest.fixture
def wiki(hub):
    """Two shards of Korean Wikipedia."""
    hub.add("dataset", WIKI, shards())
    return hub


def shards(second="둘째", readme=b"# Wikipedia\n"):
    def shard(name):
        return repositories.parquet([{"id": f"{i}", "text": f"{name} 문서 {i}번의 글" * 20} for i in range(40)])

    return {
        "20231101.ko/train-00000-of-00002.parquet": shard("첫째"),
        "20231101.ko/train-00001-of-00002.parquet": shard(second),
        "README.md": readme,
    }


FIRST, SECOND = (f"20231101.ko/train-0000{i}-of-00002.parquet" for i in (0, 1))
KO = "wikipedia-korean"


def visible(root):
    """The files that later stages could take for data or a model; dictionary files aside."""
    found = [p.relative_to(root) for folder in ("data/01_raw", "model") for p in (root / folder).rglob("*")]
    shown = [p for p in found if (root / p).is_file() and not any(part.startswith(".") for part in p.parts)]
    return sorted(str(p) for p in shown if "01_medical_dict" not in p.parts)


def stage_records(root):
    return sorted(p.stem for p in (root / "data/01_raw/.stages").glob("*.json"))


def refused(outcome, *parts, again, lines=1):
    """Exit code 2 and one message, with all parts and the command to repeat, which is the last that is said."""
    assert outcome.code == 2 and "Traceback" not in outcome.text, outcome.text
    assert outcome.text.count("error:") == 1 and "is a bug" not in outcome.text
    message = outcome.text[outcome.text.index("error:") :].strip()
    for part in parts:
        assert part in message, message
    assert re.search(again, message.splitlines()[-1]), message
    assert len(message.splitlines()) == lines, message


def command(program, *options):
    """The end of a message: this command and nothing after it."""
    return re.escape(" ".join(["python", f"script/download/{program}.py", "--model", "medgemma-4b", *options])) + "$"


NAMU_AGAIN = command(TEXT, "--source", "namu_wiki")
KO_AGAIN = command(TEXT, "--source", "wikipedia-korean")


# everything, once ---------------------------------------------------------------------------------------


def test_everything_is_fetched_once_and_only_what_is_wanted(everything, get, tmp_path):
    hub = everything
    shutil.copytree(repositories.SAMPLE_RAW / "01_medical_dict", tmp_path / "data/01_raw/01_medical_dict")
    outcome = get("download_all")
    assert outcome.code == 0, outcome.text
    counts = {
        program: records.read_json(tmp_path / f"data/01_raw/.stages/{program}.json")["counts"]
        for program in (TEXT, "download_01_english_korean", EXAM)
    }
    assert counts[TEXT].items() >= {"c4_korean": 2, "namu_wiki": 1, "wikipedia-korean": 2}.items()
    assert counts["download_01_english_korean"] == {"opus_tatoeba_ko_en": 1}
    assert counts[EXAM] == {"train": 3401, "dev": 1059, "test": 3009, "fewshot": 20}
    model = {p.name for p in (tmp_path / "model/raw/medgemma-4b").iterdir()}
    assert model == {"stage.json", *(n for n in repositories.small_model_files() if n not in UNWANTED)}
    asked = [r["path"] for r in hub.requests if r["where"] != "api"]
    for name in (*UNWANTED, "20231101.kok", "train-00001-of-00041", "c4-ko-validation", "c4-sr"):
        assert not any(name in path for path in asked), name
    assert not any(r["authorized"] for r in hub.requests if r["where"] in ("cdn", "static"))
    assert any(r["authorized"] for r in hub.requests if r["where"] == "api")
    total = hub.sent_total
    assert f"fetched {total / 1e3:.0f} kB" in outcome.stdout and outcome.stderr == ""

    hub.reset_counts()
    again = get("download_all")
    assert again.code == 0 and hub.requests == [] and "fetched 0 bytes: everything was there already" in again.stdout
    offline = get("download_all", HF_HUB_OFFLINE="1")
    assert offline.code == 0 and hub.requests == []


UNWANTED = ("pytorch_model.bin", "README.md")


def test_what_will_be_fetched_is_said_before(everything, get_here):
    lines = get_here(EXAM).stdout.splitlines()
    assert lines[0].split() == ["to", "fetch", "files", "size", "here", "needed", "gated", "licence", "revision"]
    assert re.fullmatch(r"kor_med_test +16 +\d+ kB +\d+ kB +cc-by-nc-2\.0 +[0-9a-f]{12}", lines[2])
    assert re.search(r"^\d+ kB to fetch, [\d,.]+ GB free at data/01_raw$", lines[3])


def c4(hub, number, size):
    """Shards of C4 that no compression makes smaller; their names and sizes."""
    noise, files = random.Random(3), {}
    for i in range(number):
        text = json.dumps({"text": base64.b64encode(noise.randbytes(size)).decode()})
        files[f"multilingual/c4-ko.tfrecord-{i:05d}-of-01024.json.gz"] = gzip.compress(text.encode(), mtime=0)
    hub.add("dataset", "allenai/c4", files)
    return list(files), [len(data) for data in files.values()]


def test_a_terminal_shows_a_bar_for_the_whole_and_one_for_each_file(hub, get):
    names, sizes = c4(hub, 3, 500_000)
    hub.rate = 1.3e6
    text, code = get.in_terminal(TEXT, "--source", "c4_korean", "--connections", 2)
    assert code == 0, text
    assert re.search(r"c4_korean: +\d+%\|", text) and f"/{sum(sizes) / 1e6:.2f}M" in text
    for name in names:
        assert re.search(rf"{re.escape(name[-35:])}: +\d+%\|", text), name
    assert "\x1b[A" in text  # bars above bars
    assert "\nc4_korean: 3 files, 1.5 MB in " in text.replace("\r", "\n")


def test_an_output_for_no_terminal_has_no_bars(everything, get):
    outcome = get(TEXT)
    assert outcome.code == 0 and outcome.stderr == ""
    assert "\r" not in outcome.stdout and "\x1b" not in outcome.stdout and "%" not in outcome.stdout


# who may what -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["download_model", "download_all"])
@pytest.mark.parametrize(
    "token, parts",
    [
        ("", ["needs its terms accepted: open {url}/google/medgemma-4b-it", "`hf auth login`"]),
        ("hf_ofSomebodyWithoutAccess", ["needs its terms accepted: open {url}/google/medgemma-4b-it"]),
        ("hf_madeUpOrExpired", ["refuses your token (401)", "`hf auth login`", "HF_TOKEN"]),
    ],
)
def test_a_gated_model_is_refused_before_anything_is_fetched(token, parts, program, everything, request, tmp_path):
    hub = everything
    hub.tokens["hf_ofSomebodyWithoutAccess"] = set()
    shutil.copytree(repositories.SAMPLE_RAW / "01_medical_dict", tmp_path / "data/01_raw/01_medical_dict")
    get = request.getfixturevalue("get" if program == "download_model" else "get_here")
    outcome = get(program, HF_TOKEN=token)
    last = EXAM if program == "download_all" and "Expired" in token else "download_model"  # a bad token is met at once
    refused(outcome, *(p.format(url=hub.url) for p in parts), again=command(last))
    assert hub.sent_total == 0 and visible(tmp_path) == []
    assert stage_records(tmp_path) == (["download_01_medical_dict"] if program == "download_all" else [])
    assert not token or token not in outcome.text


def test_no_login_is_needed_for_what_is_open(everything, get_here):
    assert get_here(EXAM, HF_TOKEN="").code == 0


@pytest.mark.parametrize("token", ["", repositories.TOKEN])
def test_a_renamed_repository_is_not_found(token, hub, get, tmp_path):
    hub.tokens = {repositories.TOKEN: set()}
    outcome = get(EXAM, HF_TOKEN=token)
    page = f"{hub.url}/datasets/sean0042/KorMedMCQA"
    refused(outcome, "sean0042/KorMedMCQA: not found; renamed", page, again=command(EXAM))
    assert visible(tmp_path) == [] and stage_records(tmp_path) == []


def test_a_folder_that_is_gone_is_missed_with_what_is_there(hub, get, tmp_path):
    hub.add("dataset", WIKI, {"20260101.ko/train-00000-of-00001.parquet": b"newer", "README.md": b"#"})
    outcome = get(TEXT, "--source", KO)
    there = "nothing in it is called 20231101.ko/*.parquet; it holds 20260101.ko/, README.md"
    refused(outcome, there, again=f"see {re.escape(hub.url)}/datasets/{WIKI}")
    assert hub.sent_total == 0 and visible(tmp_path) == []


def test_all_problems_are_said_at_once(everything, get_here):
    hub = everything
    del hub._repositories["dataset", NAMU]
    outcome = get_here("download_all", "--skip-01", HF_TOKEN="")
    refused(
        outcome, f"{NAMU}: not found", f"{MODEL} needs its terms accepted", again=command("download_model"), lines=2
    )
    assert hub.sent_total == 0


# what was pinned is gone --------------------------------------------------------------------------------


def half_of_wiki(hub, get):
    """One of two shards is fetched, then the other is missing."""
    gone = hub.fault("status", SECOND, None, code=404, error_code="EntryNotFound", where="resolve")
    outcome = get(TEXT, "--source", KO, "--connections", 1)
    hub.faults.remove(gone)
    hub.reset_counts()
    return outcome


def test_a_file_that_is_listed_and_not_there(wiki, get, tmp_path):
    outcome = half_of_wiki(wiki, get)
    again = command(TEXT, "--source", KO, "--update")
    refused(outcome, f"{SECOND} is listed but not found (404)", f"{wiki.url}/datasets/{WIKI}", again=again)
    assert visible(tmp_path) == [] and stage_records(tmp_path) == []
    assert get(TEXT, "--source", KO).code == 0 and dict(wiki.sent) == {SECOND: len(shards()[SECOND])}


def test_a_pinned_revision_that_is_gone_is_left_with_update(wiki, get, tmp_path):
    half_of_wiki(wiki, get)
    wiki._repositories["dataset", WIKI].commits.clear()
    wiki.add("dataset", WIKI, shards(second="바뀐"))
    outcome = get(TEXT, "--source", KO)
    again = command(TEXT, "--source", KO, "--update")
    refused(outcome, "the pinned revision is no longer published", again=again)
    assert visible(tmp_path) == []
    assert get(TEXT, "--source", KO, "--update").code == 0
    assert dict(wiki.sent) == {SECOND: len(shards("바뀐")[SECOND])}  # the first is the same in both


# connections that break ---------------------------------------------------------------------------------


def test_a_hub_that_asks_to_wait_is_waited_for(namu, get):
    busy = namu.fault("status", NAMU_FILE, code=429, retry_after=1)
    begun = time.monotonic()
    outcome = get(TEXT, "--source", "namu_wiki")
    assert outcome.code == 0 and busy.used == 1 and time.monotonic() - begun >= 2
    assert "the hub asks to wait: Rate limited. Waiting 2.0s" in outcome.stdout


@pytest.mark.parametrize("where", ["api", "resolve", "cdn"])
@pytest.mark.parametrize(
    "fault, words",
    [
        ({"code": 429}, "the hub asks for patience (429)"),
        ({"code": 429, "retry_after": 200}, "the hub asks for patience (429)"),
        ({"code": 503}, "is in trouble (HTTP 503)"),
    ],
)
def test_trouble_without_end_is_given_up_in_words(fault, words, where, namu, get_here, client, tmp_path):
    ordered = namu.fault("status", "namuwiki", None, where=where, **fault)
    outcome = get_here(TEXT, "--source", "namu_wiki")
    refused(outcome, words, "what has come is kept", again=NAMU_AGAIN)
    assert ordered.used >= 4 and sum(client) < 3600 and outcome.stderr == ""
    assert visible(tmp_path) == [] and stage_records(tmp_path) == []
    namu.clear_faults()
    assert get_here(TEXT, "--source", "namu_wiki").code == 0


def test_trouble_that_passes_is_waited_for(namu, get_here):
    asked, fetched = namu.fault("status", "api", 3), namu.fault("status", NAMU_FILE, 3, code=502)
    outcome = get_here(TEXT, "--source", "namu_wiki")
    assert outcome.code == 0 and asked.used == fetched.used == 3
    assert "HTTP 502 at 0 B; trying again in" in outcome.stdout


def test_a_cut_connection_goes_on_where_it_broke(namu, get):
    namu.fault("cut", NAMU_FILE, where="cdn", after=2 * MB + 100)
    outcome = get(TEXT, "--source", "namu_wiki")
    assert outcome.code == 0 and namu.sent[NAMU_FILE] == len(big_text()) + 100
    assert [r["range"] for r in namu.requests if r["where"] == "cdn"] == [None, f"bytes={2 * MB}-"]


def test_a_silent_connection_is_left_after_the_time_of_the_hub_variable(namu, get):
    stall = namu.fault("stall", NAMU_FILE, where="cdn", after=2 * MB + 100, seconds=60)
    begun = time.monotonic()
    outcome = get(TEXT, "--source", "namu_wiki", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert outcome.code == 0 and stall.used == 1 and time.monotonic() - begun < 10
    assert [r["range"] for r in namu.requests if r["where"] == "cdn"] == [None, f"bytes={2 * MB}-"]


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_trouble_of_another_server_is_not_blamed_on_the_hub(method, hub, get_here):
    hub.serve(repositories.OPUS, repositories.pairs_zip())
    hub.fault("status", "en-ko.txt.zip", None, code=502, method=method)
    outcome = get_here("download_01_english_korean")
    where = hub.url.removeprefix("http://")
    refused(outcome, f"{where} is in trouble (HTTP 502)", again=command("download_01_english_korean"))
    assert "the hub" not in outcome.text


@pytest.mark.parametrize("match", ["/api/datasets/heegyu/namuwiki", "/paths-info/"])
def test_a_hub_that_does_not_answer_is_left(match, namu, get_here, monkeypatch, tmp_path):
    monkeypatch.setattr(downloads, "API_TIMEOUT", 0.2)
    silent = namu.fault("delay", match, None, seconds=60)
    outcome = get_here(TEXT, "--source", "namu_wiki")
    refused(outcome, "the hub cannot be reached", again=NAMU_AGAIN)
    assert silent.used == 4 and visible(tmp_path) == []


def test_a_folder_listing_that_does_not_come_is_left(wiki, get_here, monkeypatch):
    monkeypatch.setattr(downloads, "API_TIMEOUT", 0.2)
    silent = wiki.fault("delay", "/tree/", None, seconds=60)
    outcome = get_here(TEXT, "--source", KO)
    refused(outcome, "the hub cannot be reached", again=KO_AGAIN)
    assert silent.used >= 4 and outcome.stderr == ""


# content that is not the announced ----------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["altered", "short"])
def test_wrong_content_once_is_fetched_again(fault, namu, get_here):
    ordered = namu.fault(fault, NAMU_FILE, where="cdn")
    outcome = get_here(TEXT, "--source", "namu_wiki")
    assert outcome.code == 0 and ordered.used == 1


@pytest.mark.parametrize("fault", ["altered", "short"])
def test_wrong_content_always_is_never_used(fault, namu, get_here, tmp_path):
    namu.fault(fault, NAMU_FILE, None, where="cdn")
    outcome = get_here(TEXT, "--source", "namu_wiki")
    words = f"{NAMU_FILE} came with other content than announced"
    refused(outcome, words, "nothing of it is used", again=command(TEXT, "--source", "namu_wiki", "--update"))
    assert visible(tmp_path) == [] and stage_records(tmp_path) == []
    assert not list(tmp_path.rglob("*.part"))


# the disk -----------------------------------------------------------------------------------------------


def test_too_little_space_is_said_before_anything_is_fetched(everything, get_here, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=200_400_000))
    outcome = get_here("download_all", "--skip-01")
    assert outcome.code == 2 and everything.sent_total == 0 and visible(tmp_path) == []
    assert re.search(
        r"error: \d+ kB are to be fetched, and 200 MB are free on the disk of data/01_raw: free some", outcome.text
    )
    assert "--data-dir" in outcome.text and "--max-gb" in outcome.text


def test_space_that_is_kept_free_is_not_asked_for_when_nothing_is_to_be_fetched(everything, get_here, monkeypatch):
    assert get_here(EXAM).code == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert get_here(EXAM).code == 0


def in_a_namespace(get, mount, *args, **options):
    """A program in mounts of its own, its answer and the data files there; skips where that is not permitted."""
    script = (
        "mkdir -p data && " + mount + " || exit 99\n"
        '"$@"; code=$?; echo "=== $code"; cd data && find . -type f -printf "%P %s\\n"'
    )
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /mnt"]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("mounts of its own are not permitted here")
    process = get.begin(*args, within=["unshare", "-rm", "sh", "-c", script, "sh"], **options)
    text, _ = process.communicate(timeout=60)
    said, _, after = text.rpartition("=== ")
    code, *files = after.splitlines()
    return SimpleNamespace(code=int(code), text=said, files=dict(line.rsplit(" ", 1) for line in files))


def test_a_disk_that_fills_up_keeps_what_has_come(namu, get, tmp_path):
    outcome = in_a_namespace(get, "mount -t tmpfs -o size=3m none data", TEXT, "--source", "namu_wiki", reserve=-1e12)
    refused(outcome, "no space left on the disk of data/01_raw/00_korean/namu_wiki", again=NAMU_AGAIN)
    shown = [name for name in outcome.files if not any(part.startswith(".") for part in name.split("/"))]
    assert shown == []
    (part,) = (int(size) for name, size in outcome.files.items() if name.endswith(".part"))
    assert 2 * MB <= part <= 3 * MB


def test_a_folder_that_cannot_be_written_is_named(namu, get, tmp_path):
    outcome = in_a_namespace(
        get, "mount --bind data data && mount -o remount,ro,bind data", TEXT, "--source", "namu_wiki"
    )
    refused(outcome, "no permission for ", "/data/01_raw", "Read-only file system", "--data-dir", again=NAMU_AGAIN)
    assert namu.sent_total == 0 and outcome.files == {}


# without a network --------------------------------------------------------------------------------------


def test_offline_with_everything_there(wiki, get):
    assert get(TEXT, "--source", KO).code == 0
    wiki.reset_counts()
    outcome = get(TEXT, "--source", KO, HF_HUB_OFFLINE="1")
    assert outcome.code == 0 and "already complete" in outcome.stdout and wiki.requests == []


def test_offline_with_nothing_there(wiki, get, tmp_path):
    begun = time.monotonic()
    outcome = get(TEXT, "--source", KO, HF_HUB_OFFLINE="1")
    refused(outcome, WIKI, "HF_HUB_OFFLINE is set", "unset it", again=KO_AGAIN)
    assert time.monotonic() - begun < 5 and visible(tmp_path) == [] and len(outcome.text.splitlines()) == 1


def test_offline_in_the_middle_of_a_source(wiki, get, tmp_path):
    half_of_wiki(wiki, get)
    outcome = get(TEXT, "--source", KO, HF_HUB_OFFLINE="1")
    refused(outcome, WIKI, "HF_HUB_OFFLINE is set", again=KO_AGAIN)
    assert visible(tmp_path) == [] and wiki.requests == []
    assert get(TEXT, "--source", KO).code == 0 and list(wiki.sent) == [SECOND]


def test_proxy_settings_are_honoured(everything, get, tmp_path):
    """Two hosts that do not exist: only the proxy can reach them."""
    proxy = {"HTTP_PROXY": everything.url, "HF_ENDPOINT": "http://hub.invalid", "no_proxy": "", "NO_PROXY": ""}
    proxy["MEDGEMMA_KOREAN_URL_MIRROR"] = "http://files.invalid"
    for program in (EXAM, "download_01_english_korean"):
        outcome = get(program, **proxy)
        assert outcome.code == 0, outcome.text
    assert everything.proxied == len(everything.requests) > 16


def test_a_proxy_that_is_away_is_said(hub, get_here, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy")
    outcome = get_here(TEXT, "--source", "namu_wiki")
    refused(outcome, "the hub cannot be reached (ConnectError)", again=NAMU_AGAIN)
    assert hub.requests == []


# ends from outside --------------------------------------------------------------------------------------


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def size_of(file):
    try:
        return file.stat().st_size
    except FileNotFoundError:  # the progress file's own part, which was renamed meanwhile
        return 0


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_is_continued_by_the_same_command(ending, namu, get, tmp_path):
    namu.rate = 2e6
    process = get.begin(TEXT, "--source", "namu_wiki")
    until(lambda: [p for p in tmp_path.rglob(".*.part") if size_of(p) >= 2 * MB])
    process.send_signal(ending)
    text, _ = process.communicate(timeout=20)
    if ending != signal.SIGKILL:
        assert process.returncode == 130 and "run the same command again to continue" in text
        state = records.read_json(tmp_path / "logs/progress_medgemma-4b.json")["stages"]["download"]["state"]
        assert state == "interrupted"
    assert visible(tmp_path) == [] and stage_records(tmp_path) == []
    namu.rate = None
    namu.reset_counts()
    assert get(TEXT, "--source", "namu_wiki").code == 0
    (asked,) = (r["range"] for r in namu.requests if r["where"] == "cdn")
    start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
    assert start >= 2 * MB and namu.sent[NAMU_FILE] == len(big_text()) - start


def test_a_newer_archive_of_the_same_size_does_not_continue_the_older(hub, get, tmp_path):
    """Nobody announces a hash of it: its ETag alone tells that what is there is a piece of something else."""
    old, new = (repositories.pairs_zip(README=random.Random(i).randbytes(2_500_000)) for i in (1, 2))
    assert len(old) == len(new)
    hub.serve(repositories.OPUS, old)
    hub.rate = 2e6
    process = get.begin("download_01_english_korean")
    until(lambda: [p for p in tmp_path.rglob(".*.part") if size_of(p) >= MB])
    process.kill()
    process.wait()
    hub.rate = None
    hub.serve(repositories.OPUS, new)
    assert get("download_01_english_korean", "--update").code == 0
    assert (tmp_path / "data/01_raw/.published/opus_tatoeba_ko_en/en-ko.txt.zip").read_bytes() == new
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((TEXT, "--source", "namu_wiki"), "is being fetched by another program"),
        (("download_model",), "another process is at work on download_model"),
    ],
)
def test_two_programs_do_not_fetch_one_source_at_once(args, message, everything, get, tmp_path):
    hub = everything
    hub.add("dataset", NAMU, {NAMU_FILE: big_text()})
    if args[0] == "download_model":
        hub.add("model", MODEL, repositories.small_model_files() | {"model-1.safetensors": big_text()}, gated="auto")
    hub.rate = 2e6
    first = get.begin(*args)
    until(lambda: [p for p in tmp_path.rglob(".*.part") if size_of(p)])
    second = get(*args)
    assert second.code == 2 and message in second.text, second.text
    hub.rate = None
    text, _ = first.communicate(timeout=20)
    if args[0] == TEXT:
        assert first.returncode == 0, text
        assert get(*args).code == 0 and hub.sent[NAMU_FILE] == len(big_text())


# a newer revision ---------------------------------------------------------------------------------------


def folder_of(tmp_path, name=KO):
    return tmp_path / "data/01_raw/00_korean" / name


def pin_of(tmp_path, key=KO):
    return records.read_json(tmp_path / f"data/01_raw/.stages/origins/{key}.json")


def test_the_pinned_revision_is_kept_until_update(wiki, get_here, tmp_path):
    assert get_here(TEXT, "--source", KO).code == 0
    old = pin_of(tmp_path)["revision"]
    new = wiki.add("dataset", WIKI, shards(second="바뀐"))
    wiki.reset_counts()
    assert get_here(TEXT, "--source", KO).code == 0 and wiki.requests == [] and pin_of(tmp_path)["revision"] == old

    inode = (folder_of(tmp_path) / FIRST).stat().st_ino
    wiki.reset_counts()
    outcome = get_here(TEXT, "--source", KO, "--update")
    assert outcome.code == 0 and dict(wiki.sent) == {SECOND: len(shards("바뀐")[SECOND])}
    assert pin_of(tmp_path)["revision"] == new and "pending" not in pin_of(tmp_path)
    assert (folder_of(tmp_path) / SECOND).read_bytes() == shards("바뀐")[SECOND]
    assert (folder_of(tmp_path) / FIRST).stat().st_ino == inode  # a link, not a copy
    kept = folder_of(tmp_path, f".{KO}.previous")
    assert (kept / SECOND).read_bytes() == shards()[SECOND] and f".{KO}.previous" in outcome.stdout
    record = records.read_json(tmp_path / f"data/01_raw/.stages/{TEXT}.json")
    assert record["origins"][KO]["revision"] == new
    assert not [name for name in record["outputs"] if "previous" in name]

    wiki.reset_counts()
    assert get_here(TEXT, "--source", KO).code == 0 and wiki.requests == []


def test_a_revision_that_changes_another_file_changes_nothing(wiki, get_here, tmp_path):
    assert get_here(TEXT, "--source", KO).code == 0
    new = wiki.add("dataset", WIKI, shards(readme=b"# A better page\n"))
    wiki.reset_counts()
    outcome = get_here(TEXT, "--source", KO, "--update")
    assert outcome.code == 0 and wiki.sent_total == 0 and "already complete" in outcome.stdout
    assert pin_of(tmp_path)["revision"] == new and not folder_of(tmp_path, f".{KO}.previous").exists()


def test_an_update_that_was_killed_before_it_was_noted_is_not_brought_about_again(
    wiki, get_here, monkeypatch, tmp_path
):
    assert get_here(TEXT, "--source", KO).code == 0
    wiki.add("dataset", WIKI, shards(second="바뀐"))

    def killed(plan):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "settle", killed)
        assert get_here(TEXT, "--source", KO, "--update").code == 130
    wiki.reset_counts()
    assert get_here(TEXT, "--source", KO).code == 0 and wiki.requests == []
    assert [p.name for p in folder_of(tmp_path, "").glob(".*")] == [f".{KO}.previous"]
    assert "pending" not in pin_of(tmp_path) and get_here(TEXT, "--source", KO).code == 0


def test_old_files_are_kept_as_often_as_there_are_newer_ones(wiki, get_here, tmp_path):
    assert get_here(TEXT, "--source", KO).code == 0
    for second in ("바뀐", "또"):
        wiki.add("dataset", WIKI, shards(second=second))
        assert get_here(TEXT, "--source", KO, "--update").code == 0
    kept = {p.name: (p / SECOND).read_bytes() for p in folder_of(tmp_path, "").glob(".*")}
    assert kept == {f".{KO}.previous": shards()[SECOND], f".{KO}.previous.2": shards("바뀐")[SECOND]}


def test_an_update_that_changes_nothing_keeps_the_hashes_that_nobody_announced(everything, get_here, tmp_path):
    assert get_here("download_01_english_korean").code == 0
    before = pin_of(tmp_path, "opus_tatoeba_ko_en")["files"]
    assert re.fullmatch("[0-9a-f]{64}", before["en-ko.txt.zip"]["sha256"])
    assert get_here("download_01_english_korean", "--update").code == 0
    assert pin_of(tmp_path, "opus_tatoeba_ko_en")["files"] == before


def test_an_interrupted_update_continues_without_saying_update(wiki, get_here, tmp_path):
    assert get_here(TEXT, "--source", KO).code == 0
    wiki.add("dataset", WIKI, newer := shards(second="바뀐") | {FIRST: shards(second="새")[SECOND]})
    gone = wiki.fault("status", SECOND, None, code=404, error_code="EntryNotFound", where="resolve")
    assert get_here(TEXT, "--source", KO, "--update", "--connections", 1).code == 2
    assert {p.name: p.read_bytes() for p in folder_of(tmp_path).rglob("*.parquet")} == {
        name.split("/")[1]: data for name, data in shards().items() if "/" in name
    }
    wiki.faults.remove(gone)
    wiki.reset_counts()
    assert get_here(TEXT, "--source", KO).code == 0 and list(wiki.sent) == [SECOND]
    assert all((folder_of(tmp_path) / name).read_bytes() == newer[name] for name in (FIRST, SECOND))
    assert get_here(TEXT, "--source", KO).code == 0


def test_an_update_during_an_update_takes_the_newest(wiki, get_here, tmp_path):
    """A fetched file of the revision in between has the size of the newest one, and must not pass for it."""
    assert get_here(TEXT, "--source", KO).code == 0
    between = {FIRST: shards(second="가")[SECOND], SECOND: shards(second="나")[SECOND]}
    wiki.add("dataset", WIKI, between)
    gone = wiki.fault("status", SECOND, None, code=404, error_code="EntryNotFound", where="resolve")
    assert get_here(TEXT, "--source", KO, "--update", "--connections", 1).code == 2
    wiki.faults.remove(gone)
    newest = {FIRST: shards(second="다")[SECOND], SECOND: shards(second="라")[SECOND]}
    wiki.add("dataset", WIKI, newest)
    assert [len(data) for data in newest.values()] == [len(data) for data in between.values()]
    assert get_here(TEXT, "--source", KO, "--update").code == 0
    assert all((folder_of(tmp_path) / name).read_bytes() == newest[name] for name in newest)


def test_a_pin_that_somebody_removed_does_not_let_old_files_pass_for_new_ones(wiki, get_here, tmp_path):
    newest = {FIRST: shards(second="다른")[SECOND], SECOND: shards()[SECOND]}
    assert len(newest[FIRST]) == len(shards()[FIRST])
    half_of_wiki(wiki, get_here)
    wiki.add("dataset", WIKI, newest)
    (tmp_path / f"data/01_raw/.stages/origins/{KO}.json").unlink()
    assert half_of_wiki(wiki, get_here).code == 2  # and a new pin is written
    assert get_here(TEXT, "--source", KO).code == 0
    assert all((folder_of(tmp_path) / name).read_bytes() == newest[name] for name in newest)


# files that changed here --------------------------------------------------------------------------------


def test_a_deleted_file_is_fetched_again_and_nothing_else(wiki, get_here, tmp_path):
    assert get_here(TEXT, "--source", KO).code == 0
    (folder_of(tmp_path) / SECOND).unlink()
    wiki.reset_counts()
    outcome = get_here(TEXT, "--source", KO)
    assert outcome.code == 0 and dict(wiki.sent) == {SECOND: len(shards()[SECOND])}, outcome.text
    assert not [r for r in wiki.requests if "/api/datasets/" in r["path"]]  # the pin says what to fetch


def test_a_deleted_file_comes_from_the_pinned_revision(wiki, get_here, tmp_path):
    assert get_here(TEXT, "--source", KO).code == 0
    wiki.add("dataset", WIKI, shards(second="바뀐"))
    (folder_of(tmp_path) / SECOND).unlink()
    assert get_here(TEXT, "--source", KO).code == 0 and (folder_of(tmp_path) / SECOND).read_bytes() == shards()[SECOND]


def test_pieces_of_an_older_revision_are_removed(wiki, get_here, tmp_path):
    old = folder_of(tmp_path, f".{KO}.partial") / "20231101.ko" / ".train-00000-of-00002.parquet.0123456789abcdef.part"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"a piece of something else")
    assert get_here(TEXT, "--source", KO).code == 0 and not list(tmp_path.rglob("*.part"))


def test_an_altered_file_is_fetched_again_with_force(wiki, get_here, tmp_path):
    assert get_here(TEXT, "--source", KO).code == 0
    file = folder_of(tmp_path) / SECOND
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    wiki.reset_counts()
    outcome = get_here(TEXT, "--source", KO)
    assert outcome.code == 2 and "input changed: Korean text" in outcome.text and "--force" in outcome.text
    assert wiki.requests == []
    assert get_here(TEXT, "--source", KO, "--force").code == 0 and dict(wiki.sent) == {SECOND: len(shards()[SECOND])}
    assert file.read_bytes() == shards()[SECOND] and get_here(TEXT, "--source", KO).code == 0


def test_more_gigabytes_fetch_further_shards_only(hub, get_here, tmp_path):
    names, sizes = c4(hub, 4, 30_000)
    assert get_here(TEXT, "--source", "c4_korean", "--max-gb", sum(sizes[:2]) / 1e9).code == 0
    assert set(hub.sent) == set(names[:2])
    hub.reset_counts()
    outcome = get_here(TEXT, "--source", "c4_korean", "--max-gb", sum(sizes[:3]) / 1e9)
    assert outcome.code == 0 and dict(hub.sent) == {names[2]: sizes[2]}, outcome.text
    assert records.read_json(tmp_path / f"data/01_raw/.stages/{TEXT}.json")["counts"]["c4_korean"] == 3
    hub.reset_counts()
    assert get_here(TEXT, "--source", "c4_korean").code == 0 and hub.requests == []  # the choice is remembered


# text of a person's own ---------------------------------------------------------------------------------


def test_text_that_somebody_put_there_is_left_alone_and_source_adds_to_it(wiki, get_here, tmp_path):
    own = folder_of(tmp_path, "my_hospital") / "notes.jsonl"
    records.write_jsonl(own, [{"text": "환자는 열이 났다."}])
    before = own.stat()
    outcome = get_here(TEXT)
    assert outcome.code == 0 and wiki.requests == [], outcome.text
    assert records.read_json(tmp_path / f"data/01_raw/.stages/{TEXT}.json")["counts"]["my_hospital"] == 1
    outcome = get_here(TEXT, "--source", KO, "--force")
    assert outcome.code == 0 and set(wiki.sent) == {FIRST, SECOND}, outcome.text
    record = records.read_json(tmp_path / f"data/01_raw/.stages/{TEXT}.json")
    assert record["counts"].items() >= {"my_hospital": 1, KO: 2}.items()
    assert record["origins"]["my_hospital"]["origin"] == "brought by hand"
    assert (own.stat().st_ino, own.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
