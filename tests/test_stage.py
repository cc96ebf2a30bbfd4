"""The stage record: complete, again, differs, force, interrupted, resumed, altered upstream, gate."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from medgemma_korean import chain, records, stage
from medgemma_korean.cli import GateError, Interrupted, PipelineError
from medgemma_korean.paths import REPOSITORY, RunPaths
from medgemma_korean.stage import Input, Stage, read_record

REPAIR = "python script/refine/refine_00_plain_text.py --model tiny"
TRAIN = "python script/train/train_00_plain_text.py --model tiny"


@pytest.fixture
def paths():
    p = RunPaths.of("tiny", "data/sample")
    p.raw_korean.mkdir(parents=True)
    (p.raw_korean / "a.jsonl").write_text('{"text": "가"}\n')
    return p


def refine(paths, **changes):
    """A data stage: raw Korean text -> plain text."""
    values = {
        "outputs": [paths.plain_text],
        "inputs": [Input("Korean text", paths.raw_korean, repair="python download.py")],
        "settings": {"seed": 17, "ratio": (0.1, 0.5)},
        **changes,
    }
    return Stage("refine_00_plain_text", paths, **values)


def run_refine(paths, text="refined\n", **changes):
    s = refine(paths, **changes)
    if (code := s.already_complete()) is not None:
        return code
    with s.work() as folder:
        (folder / paths.plain_text.name).mkdir()
        (folder / paths.plain_text.name / "train.jsonl").write_text(text)
        s.complete(counts={"kept": 1})
    return None


def train(paths, **changes):
    """A model stage on top of it."""
    values = {
        "outputs": [paths.trained_00],
        "inputs": [Input("plain text", paths.plain_text, paths.record("refine_00_plain_text"), REPAIR)],
        "settings": {"epochs": 1},
        "record_inside": True,
        **changes,
    }
    return Stage("train_00_plain_text", paths, **values)


def run_train(paths, gate=None, weights="w", **changes):
    s = train(paths, **changes)
    if (code := s.already_complete()) is not None:
        return code
    with s.work(resumable=True) as folder:
        (folder / "final").mkdir(exist_ok=True)
        (folder / "final" / "adapter.bin").write_text(weights)
        s.complete(steps=3, gate=gate)
    return None


def score(paths, **changes):
    """What builds on the trained model."""
    return Stage(
        "add_lora",
        paths,
        outputs=[paths.another_lora_added],
        inputs=[Input("00_trained", paths.trained_00, paths.trained_00 / "stage.json", TRAIN)],
        settings={},
        record_inside=True,
        **changes,
    )


def touch(file, seconds=100):
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + seconds * 10**9))


def rewrite_silently(file, text):
    """Other bytes of the same size under the same time, as a bad disk or a hurried hand leaves them."""
    stat = file.stat()
    assert len(text.encode()) == stat.st_size
    file.write_text(text)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


# complete and again -------------------------------------------------------------------------------------


def test_the_record_says_what_was_read_made_and_found(paths):
    assert run_refine(paths) is None
    record = read_record(paths.record("refine_00_plain_text"))
    assert record["program"] == "refine_00_plain_text" and record["counts"] == {"kept": 1}
    assert record["settings"] == {"seed": 17, "ratio": [0.1, 0.5]}
    assert list(record["raw_files"]) == ["01_raw/00_korean/a.jsonl"]
    assert list(record["outputs"]) == ["02_refined/00_plain_text/train.jsonl"]
    assert set(record["outputs"]["02_refined/00_plain_text/train.jsonl"]) == {"size", "mtime_ns", "sha256"}
    assert record["versions"]["python"] and record["seconds"] >= 0 and "gate" in record and "scores" in record
    assert not list(paths.refined.glob(".stages/*.partial"))
    assert str(paths.data) not in json.dumps(record)  # the folder can be moved


def test_again_is_complete_and_changes_nothing(paths):
    run_refine(paths)
    before = {f: f.read_bytes() for f in paths.refined.rglob("*") if f.is_file()}
    assert run_refine(paths, text="other\n") == 0
    assert {f: f.read_bytes() for f in paths.refined.rglob("*") if f.is_file()} == before


def test_a_moved_root_is_still_complete(paths, tmp_path, monkeypatch):
    run_refine(paths), run_train(paths)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("data", "model", "logs"):
        (tmp_path / name).rename(moved / name)
    monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(moved))
    there = RunPaths.of("tiny", "data/sample")
    assert (run_refine(there), run_train(there)) == (0, 0)


def test_a_touched_file_is_the_same_file(paths):
    run_refine(paths)
    touch(paths.raw_korean / "a.jsonl")
    touch(paths.plain_text / "train.jsonl")
    assert run_refine(paths) == 0


def test_hidden_files_and_records_are_no_input(paths):
    run_refine(paths)
    (paths.raw_korean / ".DS_Store").write_text("x")
    assert run_refine(paths) == 0


# something differs --------------------------------------------------------------------------------------


def test_a_changed_setting_is_named_and_stops(paths):
    run_refine(paths)
    with pytest.raises(PipelineError) as error:
        run_refine(paths, settings={"seed": 18, "ratio": (0.1, 0.5)})
    assert "settings.seed: 17 -> 18" in str(error.value) and "--force" in str(error.value)
    assert "ratio" not in str(error.value)
    with pytest.raises(PipelineError, match="settings.new: None -> 1"):
        run_refine(paths, settings={"seed": 17, "ratio": (0.1, 0.5), "new": 1})
    with pytest.raises(PipelineError, match="format of refine_00_plain_text: 1 -> 2"):
        run_refine(paths, format=2)


@pytest.mark.parametrize("text", ['{"text": "나"}\n', '{"text": "가나"}\n'])
def test_changed_input_content(paths, text):
    run_refine(paths)
    (paths.raw_korean / "a.jsonl").write_text(text)
    touch(paths.raw_korean / "a.jsonl")
    with pytest.raises(PipelineError, match="input changed: Korean text"):
        run_refine(paths)


def test_an_added_and_a_removed_input_file(paths):
    run_refine(paths)
    (paths.raw_korean / "b.jsonl").write_text("{}\n")
    with pytest.raises(PipelineError, match="input changed: Korean text"):
        run_refine(paths)
    (paths.raw_korean / "b.jsonl").unlink()
    assert run_refine(paths) == 0


def test_force_redoes_and_keeps_the_old(paths):
    run_refine(paths, text="first\n")
    for text, seed in (("second\n", 18), ("third\n", 19)):
        assert run_refine(paths, text=text, force=True, settings={"seed": seed}) is None
    folder = paths.refined
    read = {p.name: (p / "train.jsonl").read_text() for p in folder.glob("00_plain_text*")}
    assert read == {
        "00_plain_text": "third\n",
        "00_plain_text.previous": "first\n",
        "00_plain_text.previous.2": "second\n",
    }
    assert len(list(folder.glob(".stages/refine_00_plain_text.json.previous*"))) == 2
    assert run_refine(paths, settings={"seed": 19}) == 0


def test_force_on_an_unchanged_stage_does_nothing(paths):
    run_refine(paths)
    assert run_refine(paths, force=True) == 0
    assert not list(paths.refined.glob("*.previous"))


def test_force_keeps_an_old_model(paths):
    run_refine(paths), run_train(paths, weights="old")
    assert run_train(paths, weights="new", settings={"epochs": 2}, force=True) is None
    assert (paths.trained_00 / "final/adapter.bin").read_text() == "new"
    assert (paths.trained_00.with_name("tiny.previous") / "final/adapter.bin").read_text() == "old"


def test_a_missing_and_an_altered_output_are_seen(paths):
    run_refine(paths)
    file = paths.plain_text / "train.jsonl"
    file.write_text("refines\n")
    touch(file)
    with pytest.raises(PipelineError, match=r"train\.jsonl has other content"):
        run_refine(paths)
    file.write_text("cut")
    with pytest.raises(PipelineError, match="has 3 bytes, not 8"):
        run_refine(paths)
    file.unlink()
    with pytest.raises(PipelineError, match=r"train\.jsonl is missing"):
        run_refine(paths)
    assert run_refine(paths, force=True) is None and file.read_text() == "refined\n"


# links, names, and files that change ------------------------------------------------------------------


def test_a_folder_behind_a_link_is_read_and_compared(paths, tmp_path):
    """A source on another disk; links further down are not followed, as in the reader of documents."""
    disk = tmp_path / "disk"
    (disk / "sub").mkdir(parents=True)
    (disk / "sub/b.jsonl").write_text("b\n")
    (paths.raw_korean / "linked").symlink_to(disk)
    (disk / "loop").symlink_to(disk)
    assert stage.files_under(paths.raw_korean) == [
        paths.raw_korean / "a.jsonl",
        paths.raw_korean / "linked/sub/b.jsonl",
    ]
    assert run_refine(paths) is None and run_refine(paths) == 0
    (disk / "sub/b.jsonl").write_text("c\n")
    with pytest.raises(PipelineError, match="input changed: Korean text"):
        run_refine(paths)
    # All of 01_raw may be a link, too.
    paths.raw.rename(tmp_path / "raw")
    paths.raw.symlink_to(tmp_path / "raw")
    assert run_refine(paths, force=True) is None and run_refine(paths) == 0


@pytest.mark.parametrize("change", ["other bytes", "one more file", "gone"])
def test_a_raw_file_that_changes_meanwhile_is_not_vouched_for(paths, change):
    s = refine(paths)
    assert s.already_complete() is None
    with pytest.raises(PipelineError, match="Korean text: .*\nwhile refine_00_plain_text was at work; run the same"):
        with s.work() as folder:
            (folder / paths.plain_text.name).mkdir()
            if change == "gone":
                (paths.raw_korean / "a.jsonl").unlink()
            else:
                (paths.raw_korean / ("a.jsonl" if change == "other bytes" else "b.jsonl")).write_text("x\n")
            s.complete()
    assert not paths.plain_text.exists() and not paths.record("refine_00_plain_text").exists()


def test_a_raw_file_that_is_only_touched_meanwhile_is_the_same(paths):
    s = refine(paths)
    with s.work() as folder:
        (folder / paths.plain_text.name).mkdir()
        touch(paths.raw_korean / "a.jsonl")
        s.complete()
    assert run_refine(paths) == 0


@pytest.mark.parametrize("name, shown", [("의료".encode("cp949"), "의료"), (b"\xff\xfe", r"\xff\xfe")])
def test_a_name_that_is_no_utf8_is_refused(paths, name, shown):
    os.mkdir(os.fsencode(paths.raw_korean) + b"/" + name)
    with open(os.fsencode(paths.raw_korean) + b"/" + name + b"/x.jsonl", "wb") as file:
        file.write(b"{}\n")
    with pytest.raises(PipelineError) as error:
        run_refine(paths)
    assert "Korean text: " in str(error.value) and "convmv -f cp949" in str(error.value)
    assert f"{shown}/x.jsonl: the name is not UTF-8" in str(error.value)


@pytest.mark.parametrize("way", ["a file", "a link to nothing"])
def test_something_in_the_way_of_the_output_is_named(paths, way):
    paths.refined.write_text("") if way == "a file" else paths.refined.symlink_to("/nowhere/else")
    said = "a file where a folder" if way == "a file" else "a link to a folder that does not exist where a folder"
    with pytest.raises(PipelineError, match=f"02_refined: {said} is needed; move it away"):
        run_refine(paths)


def link_away(folder, disk):
    """The folder lies on another disk, and a link leads to it."""
    folder.rename(disk)
    folder.symlink_to(disk)


@pytest.mark.parametrize("force", [False, True])
def test_a_model_folder_that_is_a_link_to_nothing_is_refused_before_the_work(paths, tmp_path, force):
    run_refine(paths)
    paths.trained_00.parent.mkdir(parents=True)
    paths.trained_00.symlink_to(tmp_path / "disk")
    said = f"model/00_trained/tiny: a link to {tmp_path}/disk, which is not there; mount that disk, or remove the link"
    with pytest.raises(PipelineError, match=f"{re.escape(said)}$"):
        train(paths, force=force).already_complete()
    assert list(paths.trained_00.parent.iterdir()) == [paths.trained_00]
    paths.trained_00.unlink()
    assert run_train(paths) is None


def test_a_model_folder_behind_a_link_is_complete_and_kept(paths, tmp_path):
    run_refine(paths), run_train(paths)
    link_away(paths.trained_00, tmp_path / "disk")
    assert run_train(paths) == 0
    with pytest.raises(PipelineError, match="settings.epochs: 1 -> 2"):
        run_train(paths, settings={"epochs": 2})
    assert run_train(paths, settings={"epochs": 2}, weights="new", force=True) is None
    kept = paths.trained_00.with_name("tiny.previous")
    assert kept.is_symlink() and (tmp_path / "disk/final/adapter.bin").read_text() == "w"
    assert not paths.trained_00.is_symlink() and (paths.trained_00 / "final/adapter.bin").read_text() == "new"


def test_a_model_on_a_disk_that_is_not_mounted_is_not_passed_over(paths, tmp_path):
    """Without it the next stage would train on an earlier model."""
    run_refine(paths), run_train(paths)
    (paths.raw_lora_added / "base").mkdir(parents=True)
    records.write_sealed(paths.raw_lora_added / "stage.json", {"fingerprint": "a"})
    link_away(paths.trained_00, tmp_path / "disk")
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    with pytest.raises(PipelineError, match="00_trained/tiny: a link to .*/disk, which is not there; mount that disk"):
        chain.nearest(paths, "train_01")
    paths.trained_00.unlink()
    assert chain.nearest(paths, "train_01").folder == paths.raw_lora_added


@pytest.mark.parametrize("text", ["{}", "[]", '{"fingerprint": "a"}', '"a"'])
def test_what_is_no_record_is_named(paths, text):
    run_refine(paths)
    paths.record("refine_00_plain_text").write_text(text)
    for run in (run_refine, run_train):
        with pytest.raises(PipelineError, match=r"refine_00_plain_text\.json: not a stage record, or a damaged one"):
            run(paths)


@pytest.mark.parametrize("text", ["{", "[]", '{"fingerprint": "a"}', "a digit"])
def test_a_damaged_record_is_named_and_made_anew_by_force(paths, text):
    run_refine(paths)
    file = paths.record("refine_00_plain_text")
    whole = file.read_text()
    file.write_text(text if text != "a digit" else whole.replace('"kept": 1', '"kept": 2'))
    for run in (run_refine, run_train):
        with pytest.raises(PipelineError, match=r"refine_00_plain_text\.json: not a .*the same command with --force"):
            run(paths)
    assert run_refine(paths, force=True) is None
    assert read_record(file)["counts"] == {"kept": 1} and run_train(paths) is None
    assert paths.plain_text.with_name("00_plain_text.previous").is_dir()


def test_force_finds_what_a_disk_has_altered_behind_the_back_of_the_clock(paths):
    run_refine(paths)
    file = paths.plain_text / "train.jsonl"
    rewrite_silently(file, "rotten!\n")
    assert run_refine(paths) == 0, "a quick look sees size and time alone"
    with pytest.raises(PipelineError, match=r"train\.jsonl has other content .*\n.*--force"):
        run_train(paths)
    assert run_refine(paths, force=True) is None and file.read_text() == "refined\n"
    assert run_train(paths) is None and run_refine(paths, force=True) == 0


def test_the_message_tells_the_command_that_made_the_damaged_input(paths, monkeypatch):
    program = REPOSITORY / "script" / "refine" / "refine_all.py"
    monkeypatch.setattr("sys.argv", [str(program), "--model", "tiny", "--force", "--name", "a b"])
    run_refine(paths)
    rewrite_silently(paths.plain_text / "train.jsonl", "rotten!\n")
    again = r"Make it again: python script/refine/refine_all\.py --model tiny --name 'a b' --force$"
    with pytest.raises(PipelineError, match=again):
        run_train(paths)


def test_the_record_vouches_for_files_beside_its_folder(paths):
    run_refine(paths)
    scores = paths.scores("base")
    scores.parent.mkdir(parents=True)
    scores.write_text("0.5")
    beside = [scores, paths.scores("never made")]
    assert run_train(paths, beside=beside) is None and run_train(paths, beside=beside) == 0
    rewrite_silently(scores, "0.6")
    with pytest.raises(PipelineError, match=r"base\.json has other content"), score(paths).work():
        pass
    scores.unlink()
    with pytest.raises(PipelineError, match=r"base\.json is missing"):
        run_train(paths, beside=beside)


def test_what_was_begun_is_kept_where_nothing_says_with_what(paths):
    run_refine(paths)
    with pytest.raises(RuntimeError), train(paths).work(resumable=True) as folder:
        (folder / "checkpoint").write_text("of days")
        raise RuntimeError
    identity = folder / ".identity.json"
    identity.write_text(identity.read_text().replace('"epochs": 1', '"epochs": 9'))
    with train(paths).work(resumable=True) as folder:
        assert not (folder / "checkpoint").exists()
    assert (folder.with_name(f"{folder.name}.previous") / "checkpoint").read_text() == "of days"


def test_a_full_disk_without_a_name_is_that_of_the_outputs(paths):
    run_refine(paths)
    with pytest.raises(OSError) as error, train(paths).work():
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == "model/00_trained"


# one process at a time ----------------------------------------------------------------------------------

HOLDER = """
import sys, time
from medgemma_korean.paths import RunPaths
from medgemma_korean.stage import Input, Stage
paths = RunPaths.of("tiny", "data/sample")
stage = Stage("refine_00_plain_text", paths, [paths.plain_text], [Input("Korean text", paths.raw_korean)], {})
with stage.work() as folder:
    (folder / "begun").write_text("x")
    print("at work", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_and_a_kill_frees_the_stage(paths):
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "at work\n"
    with pytest.raises(PipelineError) as error:
        run_refine(paths)
    assert f"/refine_00_plain_text.lock: another process is at work on refine_00_plain_text (pid {process.pid})" in str(
        error.value
    )
    assert (paths.refined / ".stages/refine_00_plain_text.partial/begun").exists()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert run_refine(paths) is None and not list(paths.refined.glob(".stages/*.lock"))
    assert run_train(paths) is None and not list(paths.trained_00.parent.glob(".*"))


def test_a_lock_that_a_kill_left_beside_a_complete_stage_goes_away_unless_it_is_held(paths):
    run_refine(paths)
    lock = paths.refined / ".stages/refine_00_plain_text.lock"
    lock.write_text("1\n")
    with open(lock) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run_refine(paths) == 0 and lock.read_text() == "1\n"
    assert run_refine(paths) == 0 and not lock.exists()


def test_a_stage_that_another_process_finished_meanwhile_is_not_done_again(paths):
    late = refine(paths)
    assert late.already_complete() is None
    run_refine(paths)
    with pytest.raises(PipelineError, match="another process has just finished refine_00_plain_text; run the same"):
        with late.work():
            raise AssertionError("not reached")
    assert run_refine(paths) == 0 and not list(paths.refined.glob("*.previous"))


def test_a_disk_that_knows_no_locks_is_no_obstacle(paths, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(stage.fcntl, "flock", flock)
    assert run_refine(paths) is None and not list(paths.refined.glob(".stages/*.lock"))


def test_a_lock_whose_file_was_deleted_is_taken_anew(paths, tmp_path, monkeypatch):
    """Who held it deletes the file; who waited at the old one must not believe to have it."""
    path, real = tmp_path / "x.lock", stage.fcntl.flock

    def flock(file, operation):
        real(file, operation)
        if path.exists() and not seen:
            seen.append(path.stat().st_ino)
            path.rename(tmp_path / "kept")  # so that its number is not given again

    seen: list[int] = []
    monkeypatch.setattr(stage.fcntl, "flock", flock)
    file = stage._locked(path)
    assert os.fstat(file).st_ino == path.stat().st_ino != seen[0]
    os.close(file)


# upstream -----------------------------------------------------------------------------------------------


def test_an_absent_input_names_path_and_repair(paths):
    for gone in (paths.raw_korean / "a.jsonl", paths.raw_korean):
        gone.unlink() if gone.is_file() else gone.rmdir()
        with pytest.raises(
            PipelineError, match=r"Korean text: .*00_korean (holds no files|does not exist); run: python"
        ):
            run_refine(paths)


def test_all_missing_inputs_are_listed_at_once(paths):
    more = [Input("x", paths.raw_mcq, repair="get x"), Input("y", paths.dictionary, paths.record("refine_01"), "get y")]
    with pytest.raises(PipelineError) as error:
        refine(paths, inputs=more).already_complete() or refine(paths, inputs=more).identity()
    assert "run: get x" in str(error.value) and "run: get y" in str(error.value)


def test_incomplete_upstream_is_refused(paths):
    with pytest.raises(PipelineError, match=r"plain text: .* does not exist; run: python script/refine"):
        run_train(paths)
    paths.plain_text.mkdir(parents=True)  # files without a record, as a killed program would leave them
    with pytest.raises(PipelineError, match=r"plain text: .*is incomplete \(no stage record\); run: " + REPAIR):
        run_train(paths)
    assert not paths.trained_00.exists()


def test_silently_altered_upstream_is_refused(paths):
    run_refine(paths)
    rewrite_silently(paths.plain_text / "train.jsonl", "Refined\n")
    assert run_refine(paths) == 0  # size and time only: quick
    with pytest.raises(PipelineError) as error:
        run_train(paths)
    assert "plain text is not what refine_00_plain_text made" in str(error.value)
    assert "has other content" in str(error.value) and f"{REPAIR} --force" in str(error.value)
    assert not paths.trained_00.exists()


def test_a_redone_upstream_makes_the_next_stage_differ(paths):
    run_refine(paths), run_train(paths)
    run_refine(paths, settings={"seed": 1}, force=True)
    with pytest.raises(PipelineError, match="input changed: plain text"):
        run_train(paths)


def test_an_optional_input_is_part_of_the_fingerprint(paths):
    dictionary = Input("dictionary", paths.dictionary, paths.record("refine_01_medical_dict"), optional=True)
    inputs = [Input("Korean text", paths.raw_korean), dictionary]
    assert run_refine(paths, inputs=inputs) is None and run_refine(paths, inputs=inputs) == 0
    records.write_json(paths.record("refine_01_medical_dict"), {"fingerprint": "abc"})
    with pytest.raises(PipelineError, match="input changed: dictionary"):
        run_refine(paths, inputs=inputs)


# interrupted --------------------------------------------------------------------------------------------


def test_an_error_leaves_no_result_and_the_next_run_starts_clean(paths):
    s = refine(paths)
    with pytest.raises(ZeroDivisionError), s.work() as folder:
        (folder / "rubbish").write_text("x")
        1 / 0  # noqa: B018
    assert not paths.plain_text.exists() and not paths.record("refine_00_plain_text").exists()
    s = refine(paths)
    assert s.already_complete() is None
    with s.work() as folder:
        assert not (folder / "rubbish").exists() and not s.resumed


def test_a_kill_between_publishing_and_record_reads_as_incomplete(paths, monkeypatch):
    real = stage.describe
    monkeypatch.setattr(stage, "describe", lambda found, *a, **k: _interrupt(found, paths) or real(found, *a, **k))
    with pytest.raises(Interrupted):
        run_refine(paths, text="cut short\n")
    monkeypatch.setattr(stage, "describe", real)
    assert paths.plain_text.exists() and read_record(paths.record("refine_00_plain_text")) is None
    assert run_refine(paths) is None
    assert (paths.plain_text / "train.jsonl").read_text() == "refined\n"


def _interrupt(found, paths):
    if paths.plain_text in found:
        raise Interrupted("SIGTERM")


def begin_training(paths, **changes):
    s = train(paths, **changes)
    with pytest.raises(Interrupted), s.work(resumable=True) as folder:
        (folder / "checkpoint-1").mkdir()
        raise Interrupted("SIGTERM")


def test_resumable_work_continues_with_the_same_identity(paths):
    run_refine(paths), begin_training(paths)
    assert not paths.trained_00.exists()
    s = train(paths)
    assert s.already_complete() is None
    with s.work(resumable=True) as folder:
        assert s.resumed and (folder / "checkpoint-1").is_dir()
        s.complete(steps=1)
    assert read_record(paths.trained_00 / "stage.json")["steps"] == 1
    assert not list(paths.trained_00.glob(".identity*")) and not list(paths.trained_00.parent.glob(".*"))


def test_resumable_work_refuses_another_identity(paths):
    run_refine(paths), begin_training(paths)
    with pytest.raises(PipelineError) as error:
        run_train(paths, settings={"epochs": 2})
    assert "was begun with something else" in str(error.value) and "settings.epochs: 1 -> 2" in str(error.value)
    s = train(paths, settings={"epochs": 2}, force=True)
    with s.work(resumable=True) as folder:
        assert not s.resumed and not (folder / "checkpoint-1").exists()
    assert (paths.trained_00.with_name(".tiny.partial.previous") / "checkpoint-1").is_dir()


def test_a_kill_while_publishing_loses_no_training(paths, monkeypatch):
    """Hashing a large model takes a while; a signal in that time must leave the work resumable."""
    run_refine(paths)
    real = stage.describe

    def killed(found, *args, **kwargs):
        if any(p.name.endswith(".partial") for p in found):
            raise Interrupted("SIGTERM")
        return real(found, *args, **kwargs)

    monkeypatch.setattr(stage, "describe", killed)
    with pytest.raises(Interrupted):
        run_train(paths)
    monkeypatch.setattr(stage, "describe", real)
    s = train(paths)
    with s.work(resumable=True) as folder:
        assert s.resumed and (folder / "final/adapter.bin").read_text() == "w"
        s.complete()


def test_what_was_made_is_on_the_disk_before_its_record_vouches_for_it(paths, synced):
    """A power cut that takes the weights takes the record too."""
    run_refine(paths)
    text, record = "data/sample/02_refined/00_plain_text", "data/sample/02_refined/.stages/.refine_00_plain_text.json"
    made = [f"{text}/train.jsonl", text, "data/sample/02_refined", f"{record}.part"]
    assert [path for path in synced if path in made] == made
    synced.clear()
    scores = paths.scores("base")
    scores.parent.mkdir(parents=True)
    scores.write_text("{}")
    run_train(paths, beside=[scores])
    work = "model/00_trained/.tiny.partial"
    made = [f"{work}/final/adapter.bin", f"{work}/final", work, os.path.relpath(scores, paths.models.parent)]
    made.append(f"{work}/.stage.json.part")
    assert [path for path in synced if path in made] == made


def test_files_that_no_stage_publishes_are_on_the_disk_before_their_record(tmp_path, synced):
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("x")
    stage.vouch("report", [tmp_path / "page" / "index.html"], 1.0)
    assert synced == ["page/index.html", "page", "page/.stages/.index.json.part"]


def test_an_output_that_was_not_made_is_a_bug(paths):
    s = refine(paths)
    with pytest.raises(AssertionError, match="did not make"), s.work():
        s.complete()
    assert read_record(paths.record("refine_00_plain_text")) is None


def test_a_stage_that_checks_in_place_leaves_the_files_alone(paths):
    def check():
        s = Stage("download_00_plain_text", paths, [paths.raw_korean], [Input("text", paths.raw_korean)], {})
        if (code := s.already_complete()) is not None:
            return code
        with s.work():
            s.complete()

    before = (paths.raw_korean / "a.jsonl").stat()
    assert (check(), check()) == (None, 0)
    after = (paths.raw_korean / "a.jsonl").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


# gate ---------------------------------------------------------------------------------------------------

FAILED = {"passed": False, "reasons": ["dev 20 % < 31 % (p = 0.001)"]}


def state_of(paths, name="train_00"):
    return json.loads(paths.progress_state.read_text())["stages"][name]["state"]


def test_a_failed_gate_is_published_and_stays_failed(paths):
    run_refine(paths)
    with pytest.raises(GateError, match=r"dev 20 % < 31 %.*\n.*--allow-regression") as error:
        run_train(paths, gate=FAILED)
    assert error.value.exit_code == 3
    assert read_record(paths.trained_00 / "stage.json")["gate"] == FAILED
    assert state_of(paths) == "gate"
    assert run_train(paths) == 3 and state_of(paths) == "gate"
    assert run_train(paths, allow_regression=True) == 0


def test_a_failed_gate_is_not_built_on(paths):
    run_refine(paths)
    with pytest.raises(GateError):
        run_train(paths, gate=FAILED)
    with pytest.raises(GateError, match="the gate of train_00_plain_text failed.*--allow-regression"):
        with score(paths).work():
            raise AssertionError("not reached")
    assert not paths.another_lora_added.exists()
    s = score(paths, allow_regression=True)
    with s.work() as folder:
        (folder / "base").mkdir()
        s.complete()
    assert paths.another_lora_added.is_dir()


def test_allowing_a_regression_goes_on_and_says_so(paths, capsys):
    run_refine(paths)
    assert run_train(paths, gate=FAILED, allow_regression=True) is None
    assert run_train(paths, allow_regression=True) == 0
    assert run_train(paths) == 3


def test_a_passed_gate(paths):
    run_refine(paths)
    assert run_train(paths, gate={"passed": True, "reasons": []}) is None
    assert run_train(paths) == 0 and state_of(paths) == "complete"


@pytest.mark.parametrize(
    "error, state", [(Interrupted("SIGTERM"), "interrupted"), (PipelineError("why\nmore"), "failed")]
)
def test_the_progress_file_follows(paths, error, state):
    run_refine(paths)
    assert state_of(paths, "refine") == "complete"
    s = train(paths)
    with pytest.raises(type(error)), s.work():
        s.tick(1, 4, "loss 2")
        assert state_of(paths) == "running"
        raise error
    assert state_of(paths) == state
    if state == "failed":
        assert "train_00_plain_text: why" in paths.progress.read_text()


# wrong input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [PipelineError("no text"), OSError(errno.ENOSPC, "full")])
def test_a_wrong_input_leaves_nothing_that_no_run_would_continue(paths, error):
    run_refine(paths)
    for made, resumable in ((refine(paths, settings={"seed": 18}, force=True), False), (train(paths), True)):
        with pytest.raises(type(error)), made.work(resumable) as folder:
            raise error
        assert not folder.exists()
    with pytest.raises(type(error)), train(paths).work(resumable=True) as folder:
        (folder / "checkpoint-1").mkdir()
        raise error
    assert (folder / "checkpoint-1").is_dir() and (folder / ".identity.json").is_file()  # to be continued
    with pytest.raises(ZeroDivisionError), refine(paths, settings={"seed": 18}, force=True).work() as folder:
        raise ZeroDivisionError
    assert folder.is_dir()  # a bug is looked at


HOSTILE = [[], 7, "x", {"identity": 1}, {"outputs": []}, {"outputs": {"a": 1}}, {"outputs": {"a": {}}}, {"home": 2}]


@pytest.mark.parametrize("change", HOSTILE)
def test_what_is_no_record_is_refused_in_words(paths, change):
    run_refine(paths)
    file = paths.record("refine_00_plain_text")
    records.write_json(file, records.read_json(file) | change if isinstance(change, dict) else change)
    for read in (lambda: read_record(file), lambda: refine(paths).already_complete(), lambda: train(paths).identity()):
        with pytest.raises(PipelineError, match="not a stage record.*or move it away"):
            read()


def test_the_record_of_another_program_is_one_difference(paths):
    run_refine(paths)
    other = refine(paths, settings={"something": "else"})
    other.program = "refine_01_medical_dict"
    records.write_json(paths.record(other.program), records.read_json(paths.record("refine_00_plain_text")))
    other.record_path = paths.record(other.program)
    with pytest.raises(
        PipelineError, match="differs:\n  it is of refine_00_plain_text, not of refine_01_medical_dict\n"
    ):
        other.already_complete()
