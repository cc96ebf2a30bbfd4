"""What data, archives and hubs can name stays in its folder, reaches no shell and is never unpickled."""

from __future__ import annotations

import ast
import io
import os
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import hub_repositories as repositories
import pytest

from medgemma_korean import base_model, checkpoints, cli, hub, records, stardict, transfer
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import RunPaths
from medgemma_korean.stage import Input, Stage

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = sorted((REPOSITORY / "script").rglob("*.py"))
EVIL = "../../../evil"
WIKI = "wikimedia/wikipedia"


def tree(folder):
    """Every path below a folder, links as they are."""
    return {str(p.relative_to(folder)): p.is_symlink() for p in folder.rglob("*")}


# names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../x", "a/../x", "a/..", "./x", "/etc/passwd", "//x", "a//x", "a/", "a\\..\\x", "a\0b",
        "x" * 300, "가" * 100, f"a/{'x' * 300}/b",
    ],
)  # fmt: skip
def test_names_that_leave_their_folder_are_refused(name):
    with pytest.raises(PipelineError, match="nothing of it is used"):
        records.require_inside(name, "a list")


@pytest.mark.parametrize("name", ["x", "a/b.parquet", "a..b", "..a/b", ".hidden", "가" * 60, "a b/c$(d).json"])
def test_other_names_are_taken_as_they_are(name):
    assert records.require_inside(name, "a list") == name


# archives -----------------------------------------------------------------------------------------------

PAIRS = {"Tatoeba.en-ko.en": b"A fever.\n", "Tatoeba.en-ko.ko": "열.\n".encode()}


def zip_of(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)


def tar_of(path, members, links=()):
    with tarfile.open(path, "w:gz") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
        for name, kind, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            file.addfile(member)


@pytest.mark.parametrize("make", [zip_of, tar_of])
@pytest.mark.parametrize(
    "names",
    [
        (f"{EVIL}.en", f"{EVIL}.ko"),
        ("/tmp/evil.en", "/tmp/evil.ko"),
        ("x" * 400 + ".en", "y" * 400 + ".ko"),
        ("$(touch evil).en", "; touch evil;.ko"),
    ],
)
def test_members_are_read_whatever_they_are_called_and_written_nowhere_else(make, names, tmp_path, load_program):
    program, home = load_program("download_01_english_korean"), tmp_path / "a" / "b" / "c"
    home.mkdir(parents=True)
    make(home / "pairs", dict(zip(names, PAIRS.values(), strict=True)))
    before = tree(tmp_path)
    assert program.unpack(home / "pairs", home / "out") == 1
    assert tree(tmp_path).keys() - before.keys() == {"a/b/c/out", "a/b/c/out/train.jsonl"}
    assert list(records.read_jsonl(home / "out" / "train.jsonl")) == [{"en": "A fever.", "ko": "열."}]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_a_link_or_a_device_in_an_archive_is_no_member(kind, tmp_path, load_program):
    (tmp_path / "secret.ko").write_text("비밀\n")
    tar_of(tmp_path / "pairs", {"a.en": b"A fever.\n"}, [("a.ko", kind, str(tmp_path / "secret.ko"))])
    program = load_program("download_01_english_korean")
    with pytest.raises(PipelineError, match="needs a file ending in .en and one in .ko"):
        program.unpack(tmp_path / "pairs", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_an_archive_that_would_fill_the_memory_is_refused(make, tmp_path, load_program, monkeypatch):
    program = load_program("download_01_english_korean")
    monkeypatch.setattr(program, "MOST", 1000)
    make(tmp_path / "pairs", {**PAIRS, "bomb.en": b"0" * 1001})
    with pytest.raises(PipelineError, match="'bomb.en' unpacks to 1.0 kB, more than 1.0 kB"):
        program.unpack(tmp_path / "pairs", tmp_path / "out")


def test_an_encrypted_archive_is_told_in_words(tmp_path, load_program):
    zip_of(tmp_path / "pairs", PAIRS)
    content = bytearray((tmp_path / "pairs").read_bytes())
    for mark in (b"PK\x03\x04", b"PK\x01\x02"):  # the flag of encryption, in both headers of each member
        at = -1
        while (at := content.find(mark, at + 1)) >= 0:
            content[at + (6 if mark[2] == 3 else 8)] |= 1
    (tmp_path / "pairs").write_bytes(content)
    with pytest.raises(PipelineError, match="damaged archive .*encrypted"):
        load_program("download_01_english_korean").unpack(tmp_path / "pairs", tmp_path / "out")


# hubs, pins, notes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["20231101.ko/../../../../evil.parquet", "20231101.ko//etc/evil.parquet"])
def test_a_hub_that_lists_a_file_outside_its_folder(name, hub, get_here, tmp_path, monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    page = repositories.parquet([{"id": "1", "text": "글"}])
    hub.add("dataset", WIKI, {"20231101.ko/train-0.parquet": page})
    listed = RepoFile(path=name, size=len(page), oid="0" * 40)
    monkeypatch.setattr(HfApi, "list_repo_tree", lambda *_, **__: [listed])
    monkeypatch.setattr("medgemma_korean.sources.matches", lambda *_: True)  # whatever a source asks for
    before = tree(tmp_path)
    outcome = get_here("download_00_plain_text", "--source", "wikipedia-korean")
    assert outcome.code == 2 and "is no name of a file below its folder" in outcome.text, outcome.text
    made = tree(tmp_path).keys() - before.keys()
    assert not [name for name in made if name.endswith((".parquet", ".part"))]


def test_a_pin_that_came_with_the_data_names_a_file_outside(tmp_path):
    paths = RunPaths.of("medgemma-4b", "data")
    want = hub.want(paths, hub.sources.BY_KEY["wikipedia-korean"], paths.raw_korean / "x", "download_00_plain_text")
    entry = {"size": 3, "sha256": "0" * 64}
    records.write_json(want.pin, {"revision": "main", "gated": False, "max_gb": 3, "files": {EVIL: entry}})
    with pytest.raises(PipelineError, match="is no name of a file below its folder"):
        hub._plan(want, None)


def test_an_index_of_weights_names_a_file_outside(tmp_path):
    records.write_json(tmp_path / checkpoints.INDEX, {"weight_map": {"a": "../secret.safetensors"}})
    for read in (checkpoints.weight_map, base_model.weights):
        with pytest.raises(PipelineError, match="is no name of a file below its folder"):
            read(tmp_path)


def test_a_note_that_came_with_a_dictionary_names_no_other_file(tmp_path):
    folder = tmp_path / "01_medical_dict"
    mark = {"file": f"{EVIL}.jsonl", "sha256": "0" * 64}
    for note in ({"a.ifo": mark}, ["a.ifo"], {"a.ifo": "x"}, {"a.ifo": {"file": "korean_medical_dict.jsonl"}}):
        records.write_json(folder / stardict.MADE, note)
        assert stardict.made_before(folder) == {}
    mark["file"] = "korean_medical_dict.jsonl"
    records.write_json(folder / stardict.MADE, {"a.ifo": mark})
    assert stardict.made_before(folder) == {"a.ifo": mark}


def test_a_password_of_a_mirror_is_used_and_kept_nowhere(monkeypatch):
    address = "https://somebody:pa55word@mirror.example/sub/OPUS/en-ko.zip"
    kept = hub._without_login(address)
    assert kept == "https://mirror.example/sub/OPUS/en-ko.zip"
    monkeypatch.setenv(hub.MIRROR_VARIABLE, "https://somebody:pa55word@mirror.example/sub")
    assert hub._with_login(kept) == address
    assert hub._with_login("https://elsewhere.example/x") == "https://elsewhere.example/x"
    monkeypatch.delenv(hub.MIRROR_VARIABLE)
    assert hub._with_login(kept) == kept


def test_secrets_reach_neither_record_nor_progress(tmp_path):
    paths = RunPaths.of("tiny", "data/sample")
    secret = "hf_AbCdEfGhIjKlMnOp"
    warning = f"https://x:pa55word@hub.example refused {secret}"
    stage = Stage("refine_01_english_korean", paths, [paths.pairs], [], {}, warnings=[warning])
    with stage.work() as folder:
        records.write_jsonl(folder / paths.pairs.name / "x.jsonl", [{"a": 1}])
        stage.complete(metric=f"with {secret}")
    second = Stage("refine_02_kor_med_test", paths, [paths.mcq], [], {})
    with pytest.raises(RuntimeError), second.work():
        raise RuntimeError(f"403 with {secret}")
    written = [p.read_text() for p in tmp_path.rglob("*") if p.is_file()]
    assert len(written) > 4 and not any(secret in text or "pa55word" in text for text in written)
    assert any("https://***@hub.example refused ***" in text for text in written)


# links --------------------------------------------------------------------------------------------------


def test_what_is_written_over_a_link_leaves_alone_what_it_points_to(tmp_path):
    """A data folder may come with links where results go."""
    other = tmp_path / "other.json"
    other.write_text("mine")
    for write, content in ((records.write_json, {}), (records.write_text, "x"), (records.write_bytes, b"x")):
        link = tmp_path / "link.json"
        link.symlink_to(other)
        write(link, content)
        assert not link.is_symlink() and other.read_text() == "mine"
        link.unlink()
    file = transfer.File("x.bin", 4, "")
    file.part(tmp_path).symlink_to(other)
    with transfer.PartFile(file.part(tmp_path), file, lambda *_: None) as part:
        part.write(b"data")
    assert other.read_text() == "mine" and file.part(tmp_path).read_bytes() == b"data"


def test_an_old_result_that_is_a_link_is_moved_and_not_emptied(tmp_path):
    """--force keeps the old result by renaming; what a link points to is nobody's to delete."""
    paths = RunPaths.of("tiny", "data/sample")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "keep.jsonl").write_text("{}\n")
    raw = paths.raw_pairs / "set" / "train.jsonl"
    records.write_jsonl(raw, [{"en": "a", "ko": "가"}])
    paths.refined.mkdir(parents=True)
    paths.pairs.symlink_to(elsewhere)
    for version in (1, 2):
        inputs = [Input("sentence pairs", paths.raw_pairs)]
        stage = Stage("refine_01_english_korean", paths, [paths.pairs], inputs, {}, format=version, force=True)
        stage.already_complete()
        with stage.work() as folder:
            records.write_jsonl(folder / paths.pairs.name / "en_to_ko.jsonl", [{"v": version}])
            stage.complete()
    assert (elsewhere / "keep.jsonl").read_text() == "{}\n" and not paths.pairs.is_symlink()


def test_links_in_the_place_of_locks_and_work_folders(tmp_path, capsys):
    paths = RunPaths.of("tiny", "data/sample")
    other, elsewhere = tmp_path / "other.txt", tmp_path / "elsewhere"
    other.write_text("mine")
    elsewhere.mkdir()
    (elsewhere / "keep.txt").write_text("mine")
    stages = paths.refined / ".stages"
    stages.mkdir(parents=True)
    (stages / "refine_01_english_korean.partial").symlink_to(elsewhere)
    (stages / "refine_01_english_korean.lock").symlink_to(other)

    def run():
        stage = Stage("refine_01_english_korean", paths, [paths.pairs], [], {})
        with stage.work() as folder:
            records.write_jsonl(folder / paths.pairs.name / "x.jsonl", [{"a": 1}])
            stage.complete()

    assert cli.run(run) == 2 and "refine_01_english_korean.lock" in "".join(capsys.readouterr())
    (stages / "refine_01_english_korean.lock").unlink()
    assert cli.run(run) == 0
    assert other.read_text() == (elsewhere / "keep.txt").read_text() == "mine"
    assert [p.name for p in elsewhere.iterdir()] == ["keep.txt"]


# shell and pickles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--name", "--data-dir", "--model"])
def test_no_option_reaches_a_shell(option, tmp_path, monkeypatch):
    (tmp_path / "data" / "sample").mkdir(parents=True)
    value = "$(touch evil);touch evil`touch evil`"
    if option == "--data-dir":
        (tmp_path / value / "01_raw").mkdir(parents=True)
    for mode in ("--plan", "--status", "--background"):
        done = subprocess.run(
            [REPOSITORY / "run_full_pipeline.sh", mode, option, value], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr, done
        assert not list(tmp_path.rglob("evil")) and not (REPOSITORY / "evil").exists()


def calls():
    """(file, line, dotted name, call) of every call in script/."""
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield file.name, node.lineno, ast.unparse(node.func), node


def option(call, name):
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def test_no_program_has_a_shell_or_an_interpreter_of_data():
    forbidden = {
        "eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "yaml.load",
        "pickle.load", "pickle.loads", "shelve.open", "marshal.load", "marshal.loads", "joblib.load", "np.load",
        "numpy.load", "pandas.read_pickle", "pd.read_pickle", "shutil.unpack_archive",
    }  # fmt: skip
    found = [(file, line, name) for file, line, name, _ in calls() if name in forbidden or name.endswith(".extractall")]
    assert not found
    for file, line, name, call in calls():
        assert option(call, "shell") is None, (file, line)
        if name in ("subprocess.run", "subprocess.call", "subprocess.Popen", "subprocess.check_output"):
            assert not isinstance(call.args[0], (ast.Constant, ast.JoinedStr)), (file, line)
        if name == "torch.load":
            assert option(call, "weights_only") == "True", (file, line)
        if name.endswith(".from_pretrained") and "ForCausalLM" in name:
            assert option(call, "use_safetensors") == "True", (file, line)
        assert option(call, "trust_remote_code") in (None, "False"), (file, line)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_in_the_place_of_weights_or_states_is_not_run(tmp_path, monkeypatch):
    """A base with a pickle alone is none; a shard's array is not parsed; a checkpoint's states hold tensors alone."""
    import pickle

    import numpy as np
    import torch

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PipelineError, match="no safetensors weights"):
        base_model.require_folder(tmp_path)
    torch.save(Bomb(), tmp_path / "optimizer.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "optimizer.pt", weights_only=True)  # as processes and the Trainer load it

    from medgemma_korean.text.shards import Job

    np.save(tmp_path / "one.keys.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    job = Job.__new__(Job)
    values = {"folder": tmp_path, "name": "one"}
    values["about"] = lambda: {"checksums": {"keys.npy": ""}, "kept": 1}
    job.__dict__.update(values)
    with pytest.raises((ValueError, PipelineError)):
        job.array("keys.npy")
    assert not (tmp_path / "exploded").exists()


# modes --------------------------------------------------------------------------------------------------


def test_files_have_the_mode_that_the_umask_asks_for(tmp_path):
    """Also those that a library wrote for its owner alone, and a file may stay executable."""
    code = """
import os
import torch
from safetensors.torch import save_file
from transformers import Gemma3TextConfig
from medgemma_korean import checkpoints, progress, records
from medgemma_korean.paths import RunPaths
from medgemma_korean.stage import Stage
for umask in (0o022, 0o027):
    os.umask(umask)
    os.environ["MEDGEMMA_KOREAN_ROOT"] = f"{umask:03o}"
    paths = RunPaths.of("tiny", "data/sample")
    stage = Stage("train_00_plain_text", paths, [paths.trained_00], [], {}, record_inside=True)
    with stage.work() as folder:
        (folder / "final").mkdir()
        save_file({"a": torch.zeros(2)}, folder / "final" / "adapter_model.safetensors")
        with open(os.open(folder / "tokenizer.json", os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            file.write("{}")
        records.write_json(folder / "evaluation.json", {})
        checkpoints.write(folder / "base", Gemma3TextConfig(), iter([("a", torch.zeros(2))]), "float32")
        stage.complete()
    progress.event(paths, "x", a=1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for umask, mode in (("022", 0o644), ("027", 0o640)):
        files = [p for p in (tmp_path / umask).rglob("*") if p.is_file()]
        names = {"adapter_model.safetensors", "model.safetensors", "stage.json", "config.json", "metrics_tiny.jsonl"}
        assert {p.name for p in files} >= names
        assert {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in files} == {p.name: oct(mode) for p in files}
    script = tmp_path / "run.sh"
    script.write_text("")
    script.chmod(0o700)
    records.share(script)
    assert script.stat().st_mode & 0o100
