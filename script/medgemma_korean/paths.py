"""The folder contract: the only place that spells folder names.

Every program gets its folders from `RunPaths(model, data_dir, name)`. Stages meet only through these folders.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLE_DATA = REPOSITORY / "data" / "sample"

# The driver's stages, in order. A unique prefix of a name is accepted on the command line.
DRIVER_STAGES = (
    "download",
    "refine",
    "prepare_tokenizer",
    "add_lora",
    "train_00",
    "train_01",
    "add_lora_second",
    "train_02",
    "report",
)


def project_root() -> Path:
    """Where `data/`, `model/` and `logs/` live: the repository, or the folder named by MEDGEMMA_KOREAN_ROOT.

    The variable is for people whose models belong on another disk, and for tests.
    """
    return Path(os.environ.get("MEDGEMMA_KOREAN_ROOT") or REPOSITORY).resolve()


@dataclass(frozen=True)
class RunPaths:
    """All folders of one run.

    model: the profile's name; it names `model/raw/<model>`, which runs share.
    data: the folder that holds `01_raw` and receives `02_refined`.
    name: the run's name; it names every other folder under `model/`, and the logs.
    given: the options that chose this run, for the commands that messages show.
    """

    model: str
    data: Path
    name: str
    given: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: str, default_data: str, data_dir: str | None = None, name: str | None = None) -> RunPaths:
        """Resolve `--data-dir` and `--name`.

        Without `--name` the run is called `<model>`, or `<model>-<folder>` when `--data-dir` names another
        folder than the model's own, so that two data folders never share an output.
        """
        default = project_root() / default_data
        data = Path(data_dir).expanduser().resolve() if data_dir else default
        own = data == default.resolve()
        given = ("--model", model, *(("--data-dir", data_dir) if data_dir else ()), *(("--name", name) if name else ()))
        return cls(model, data, name or (model if own else f"{model}-{data.name}"), given)

    def command(self, program: str, *options: str) -> str:
        """The command line of a program below script/ for this run, to paste."""
        return shlex.join(["python", f"script/{program}.py", *self.given, *options])

    # data -----------------------------------------------------------------------------------------------
    @property
    def raw(self) -> Path:
        return self.data / "01_raw"

    @property
    def raw_korean(self) -> Path:
        return self.raw / "00_korean"

    @property
    def raw_english(self) -> Path:
        """The English replay of this data folder, or the sample's where the folder has none."""
        own = self.raw / "00_english_replay"
        return own if own.exists() else SAMPLE_DATA / "01_raw" / "00_english_replay"

    @property
    def raw_dictionary(self) -> Path:
        return self.raw / "01_medical_dict"

    @property
    def raw_pairs(self) -> Path:
        return self.raw / "03_korean_english"

    @property
    def raw_mcq(self) -> Path:
        return self.raw / "02_kor_med_test"

    @property
    def refined(self) -> Path:
        return self.data / "02_refined"

    @property
    def plain_text(self) -> Path:
        return self.refined / "00_plain_text"

    @property
    def english_replay(self) -> Path:
        return self.refined / "00_english_replay"

    @property
    def dictionary(self) -> Path:
        return self.refined / "01_medical_dict.json"

    @property
    def pairs(self) -> Path:
        return self.refined / "01_english_korean"

    @property
    def mcq(self) -> Path:
        return self.refined / "02_kor_med_test"

    @property
    def characters(self) -> Path:
        return self.refined / "02_char_dict.json"

    @property
    def pretrain(self) -> Path:
        return SAMPLE_DATA / "pretrain"

    # models ---------------------------------------------------------------------------------------------
    @property
    def models(self) -> Path:
        return project_root() / "model"

    @property
    def raw_model(self) -> Path:
        return self.models / "raw" / self.model

    def model_folder(self, kind: str) -> Path:
        """`model/<kind>/<name>`, for instance kind "00_trained"."""
        return self.models / kind / self.name

    @property
    def tokenizer(self) -> Path:
        return self.model_folder("tokenizer")

    @property
    def raw_lora_added(self) -> Path:
        return self.model_folder("raw_lora_added")

    @property
    def trained_00(self) -> Path:
        return self.model_folder("00_trained")

    @property
    def trained_01(self) -> Path:
        return self.model_folder("01_trained")

    @property
    def another_lora_added(self) -> Path:
        return self.model_folder("01_another_lora_added")

    @property
    def trained_02(self) -> Path:
        return self.model_folder("02_trained")

    @property
    def loop(self) -> Path:
        return self.model_folder("01_02_loop")

    @property
    def report(self) -> Path:
        return self.model_folder("report")

    def scores(self, which: str) -> Path:
        """Scores of a model that no training stage owns: which is "base", "extended" or "merged"."""
        return self.report / "scores" / f"{which}.json"

    # logs -----------------------------------------------------------------------------------------------
    @property
    def logs(self) -> Path:
        return project_root() / "logs"

    @property
    def log(self) -> Path:
        return self.logs / f"pipeline_{self.name}.log"

    @property
    def pid(self) -> Path:
        return self.logs / f"pipeline_{self.name}.pid"

    @property
    def holder(self) -> Path:
        """Who drives the run: pid, start time, boot, host, command."""
        return self.logs / f"pipeline_{self.name}.lock.json"

    @property
    def progress(self) -> Path:
        return self.logs / f"progress_{self.name}.txt"

    @property
    def progress_state(self) -> Path:
        return self.logs / f"progress_{self.name}.json"

    @property
    def progress_lock(self) -> Path:
        return self.logs / f".progress_{self.name}.lock"

    @property
    def metrics(self) -> Path:
        return self.logs / f"metrics_{self.name}.jsonl"

    # records --------------------------------------------------------------------------------------------
    def record(self, program: str) -> Path:
        """The stage record of a data program."""
        folder = self.raw if program.startswith("download_") else self.refined
        return folder / ".stages" / f"{program}.json"


def show(path: Path) -> str:
    """A path as a person would type it: relative to the current folder or the project where that is shorter."""
    path = Path(os.path.normpath(path))
    for base in (Path.cwd(), project_root()):
        try:
            return str(path.relative_to(base))
        except ValueError:
            continue
    return str(path)
