"""script/setup_env.sh with stand-ins for Python, df and the installers: decisions and messages, no network."""

import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
TOOLS = (
    "bash cat sort head sha256sum cut readlink dirname awk df flock rm mv touch mkdir grep cp chmod env sleep"
).split()

# A Python that knows its version, makes environments that hold a copy of itself, and writes down installations.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
  "-c import sys"*) echo "$FAKE_VERSION" ;;
  "-c import ensurepip"*) ;;
  "-m venv")
    target="${@: -1}"
    echo "venv" >> "$FAKE_CALLS"
    rm -rf "$target"; mkdir -p "$target/bin" "$target/lib/python${FAKE_VERSION%.*}"
    cp "$0" "$target/bin/python" ;;
  "-m uv") [[ -z $FAKE_NO_UV ]] || exit 1; [[ $3 == --version ]] || echo "uv ${@:3}" >> "$FAKE_CALLS" ;;
  "-m pip") [[ $3 == --version ]] || { echo "pip ${@:3}" >> "$FAKE_CALLS"; exit "${FAKE_PIP_CODE:-0}"; } ;;
esac
"""


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def project(tmp_path):
    """A project folder, with a space in its name, whose PATH holds the needed tools and one stand-in Python."""
    folder = tmp_path / "a project"
    (folder / "script").mkdir(parents=True)
    shutil.copy(REPOSITORY / "script" / "setup_env.sh", folder / "script")
    (folder / "requirements.txt").write_text("torch>=2.11,<2.16\n# nothing more\n")
    (folder / "pyproject.toml").write_text("")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in TOOLS:
        (tools / tool).symlink_to(shutil.which(tool))
    executable(tools / "python3", FAKE_PYTHON)
    return folder


def set_up(project: Path, *arguments: str, version: str = "3.11.7", **variables: str) -> subprocess.CompletedProcess:
    calls = project.parent / "calls"
    calls.write_text("")
    environment = {"PATH": str(project.parent / "bin"), "FAKE_VERSION": version, "FAKE_CALLS": str(calls), **variables}
    return subprocess.run(
        [str(project / "script" / "setup_env.sh"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        cwd="/",
    )


def calls(project: Path) -> list[str]:
    return (project.parent / "calls").read_text().splitlines()


def test_first_set_up_then_nothing(project):
    done = set_up(project)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in calls(project)] == ["venv", "uv"]
    assert "-r requirements.txt" in calls(project)[-1]
    started = time.monotonic()
    again = set_up(project)
    assert time.monotonic() - started < 1
    assert (again.returncode, calls(project)) == (0, [])
    assert "up to date" in again.stderr
    assert set_up(project, "--quiet").stderr == ""


def test_content_decides_not_time(project):
    set_up(project)
    os.utime(project / "requirements.txt", (1, 1))
    set_up(project)
    assert calls(project) == []
    for change in ("requirements.txt", "pyproject.toml", "requirements-dev.txt"):
        with open(project / change, "a") as file:
            file.write("# more\n")
        set_up(project)
        assert [line.split()[0] for line in calls(project)] == ["uv"], change
    assert "requirements-dev.txt" in calls(project)[0]


def test_another_python_makes_it_anew(project):
    set_up(project)
    set_up(project, version="3.12.1")
    assert calls(project)[0] == "venv"


def test_old_python_is_named(project):
    done = set_up(project, version="3.9.18")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "3.10" in done.stderr and "python3 is 3.9.18" in done.stderr
    assert not (project / ".venv").exists()


def test_a_newer_python_beside_an_old_one(project):
    tools = project.parent / "bin"
    executable(tools / "python3.11", FAKE_PYTHON)
    executable(tools / "python3", "#!/usr/bin/env bash\n[[ $1 == -c ]] && echo 3.8.2\n")
    assert set_up(project).returncode == 0
    assert (project / ".venv" / "bin" / "python").is_file()


def test_no_python(project):
    (project.parent / "bin" / "python3").unlink()
    done = set_up(project)
    assert done.returncode == 2
    assert "no python3 was found" in done.stderr


def test_little_disk_matters_only_when_something_must_be_installed(project):
    set_up(project)
    df = project.parent / "bin" / "df"
    df.unlink()
    executable(df, "#!/usr/bin/env bash\nprintf 'h\\nd 9 9 5000000 9%% /\\n'\n")
    assert set_up(project).returncode == 0
    (project / "requirements.txt").write_text("torch>=2.12\n")
    done = set_up(project)
    assert done.returncode == 2
    assert "5 GB are free" in done.stderr and "12 GB" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_interrupted_set_up_is_made_anew(project):
    set_up(project)
    (project / ".venv" / ".requirements.sha256").unlink()
    (project / ".venv" / ".unfinished").touch()
    assert set_up(project).returncode == 0
    assert calls(project)[0] == "venv"
    assert not (project / ".venv" / ".unfinished").exists()


def test_pip_where_uv_cannot_be_had(project):
    assert set_up(project, FAKE_NO_UV="1").returncode == 0
    assert calls(project)[-1].startswith("pip install") and "-r requirements.txt" in calls(project)[-1]


def test_a_failed_installation_is_tried_again(project):
    done = set_up(project, FAKE_NO_UV="1", FAKE_PIP_CODE="1")
    assert done.returncode == 2
    assert "could not be installed" in done.stderr
    assert set_up(project).returncode == 0
    assert [line.split()[0] for line in calls(project)] == ["uv"]  # nothing is half unpacked: no new .venv


def test_torch_index_comes_first(project):
    assert set_up(project, TORCH_INDEX_URL="file:///wheels").returncode == 0
    first, second = (line for line in calls(project) if line.startswith("uv"))
    assert "--index-url file:///wheels torch>=2.11,<2.16" in first
    assert "--index-url" not in second
    set_up(project)
    assert calls(project)  # without the variable it is another environment
