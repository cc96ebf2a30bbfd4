"""How the trained links hang together: which base and adapter a stage starts from, found through stage records.

raw_lora_added -> 00_trained -> 01_trained -> 01_another_lora_added -> 02_trained
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medgemma_korean import base_model, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.stage import RECORD_NAME, Input, no_record, read_record, require_linked


@dataclass
class Link:
    """One link of the chain: a base folder, the adapter on it (None where only a fresh one exists)."""

    role: str
    folder: Path
    base: Path
    adapter: Path | None  # trained; None when nothing was trained on this base yet
    fresh: Path | None  # the untrained adapter beside the base; a plain base has none until training makes it
    fingerprint: str  # of its stage; "" for a plain base, whose files are compared one by one
    warnings: list[str] = field(default_factory=list)
    plain: bool = False  # the base is no stage's (`base_model`)

    @property
    def untouched(self) -> bool:
        """A plain base with nothing on it: no adapter, no score and no probe were made of it yet."""
        return self.plain and self.adapter is None

    def inputs(self, paths: RunPaths) -> list[Input]:
        """What a stage that starts here reads: this folder, and the one that holds its base."""
        if self.untouched:
            return base_model.inputs(self.base)
        found = [Input(self.role, self.folder, self.folder / RECORD_NAME, repair(paths, self.role))]
        if self.plain:
            return found + base_model.inputs(self.base)
        home = self.base.parent
        if home != self.folder:
            found.append(Input("base", home, home / RECORD_NAME, repair(paths, home.parent.name)))
        return found

    @property
    def start(self) -> Path | None:
        """The adapter that training continues: the trained one, else the fresh one."""
        return self.adapter or self.fresh


# Folder kind -> program that makes it; stage -> what it may start from, nearest first.
_MAKERS = {
    "raw_lora_added": ("model/add_lora",),
    "00_trained": ("train/train_00_plain_text",),
    "01_trained": ("train/train_01_medical_dict",),
    "01_another_lora_added": ("model/add_lora", "--second"),
}
_STARTS = {
    "train_00": ("raw_lora_added",),
    "train_01": ("00_trained", "raw_lora_added"),
    "add_lora_second": ("01_trained", "00_trained", "raw_lora_added"),
    "train_02": ("01_another_lora_added",),
    "loop": ("01_another_lora_added",),
}


def nearest(paths: RunPaths, stage: str) -> Link:
    """The nearest complete link that a stage can start from, with a warning for every link that was skipped.

    Raises PipelineError naming the command that makes the missing one.
    """
    kinds = _STARTS[stage]
    for i, kind in enumerate(kinds):
        require_linked(paths.model_folder(kind))  # a disk that is not mounted is no stage that was skipped
        if read_record(paths.model_folder(kind) / RECORD_NAME) is not None:
            link = of_folder(paths, paths.model_folder(kind), kind)
            for skipped in kinds[:i]:
                begun = paths.model_folder(skipped).with_name(f".{paths.name}.partial")
                if begun.exists():
                    raise PipelineError(
                        f"{show(begun)}: {skipped} was begun and is not finished; run: {repair(paths, skipped)}, "
                        "or remove that folder to do without it"
                    )
                link.warnings.append(f"{skipped} was skipped; {stage} starts from {kind}")
                log.warning(link.warnings[-1])
            return link
    missing = show(paths.model_folder(kinds[0]))
    raise PipelineError(f"{missing} does not exist or is incomplete; run: {repair(paths, kinds[0])}")


def repair(paths: RunPaths, kind: str) -> str:
    """The command that makes a link; "" for a folder that is none of the chain's."""
    return paths.command(*_MAKERS[kind]) if kind in _MAKERS else ""


TAKES = (
    "a folder that a train program made, a base (config.json, tokenizer.json and safetensors weights of a Gemma 3), "
    "or a hub id such as google/medgemma-4b-it"
)


def of_argument(paths: RunPaths, text: str) -> Link:
    """The link that `--base-model` names: a folder first, else a hub id, which is fetched where it is not here.

    Raises PipelineError for what is neither, and for a folder that nothing can be trained on.
    """
    folder = Path(os.path.expanduser(text)).resolve() if text else None
    if folder and folder.is_dir():
        # base/, adapter/ and final/ stand for the folder of the stage that made them.
        if folder.name in ("base", "adapter", "final") and read_record(folder.parent / RECORD_NAME) is not None:
            folder = folder.parent
        if (folder / "config.json").is_file():
            return _plain(folder)
        if not (folder / RECORD_NAME).is_file() and not (folder / "base").is_dir():
            if any(
                (folder / name).is_file() for name in ("adapter_config.json", "tokenizer.json", *base_model.WEIGHTS)
            ):
                base_model.require_folder(folder)  # says what it lacks
            if not (folder / "final").is_dir():
                raise PipelineError(f"--base-model {text}: no model there; it takes {TAKES}")
        return of_folder(paths, folder)
    if folder is None or folder.exists() or not base_model.is_hub_id(text):
        what = "that is a file" if folder and folder.exists() else "no such folder, and not a hub id"
        raise PipelineError(f"--base-model {text!r}: {what}; it takes {TAKES}")
    return _plain(base_model.of_hub(paths, text))


def _plain(base: Path) -> Link:
    base_model.require_folder(base)
    return Link(base_model.ROLE, base, base, None, None, "", plain=True)


def of_folder(paths: RunPaths, folder: Path, role: str | None = None) -> Link:
    """The link of a folder: one with base/ and adapter/, or a trained one, whose record names its base.

    Raises PipelineError when the folder is neither.
    """
    folder = folder.resolve()
    record = read_record(folder / RECORD_NAME)
    if record is None:
        raise PipelineError(f"{show(folder)}: no complete model there (stage.json is missing)")
    if "fingerprint" not in record:
        raise no_record(folder / RECORD_NAME)
    role = role or folder.parent.name
    if (folder / "base").is_dir():
        return Link(role, folder, folder / "base", None, folder / "adapter", record["fingerprint"])
    if "base_folder" in record and (folder / "final").is_dir():
        base = (folder / record["base_folder"]).resolve()
        check_base(folder, record, base)
        plain = "base_files" in record
        return Link(role, folder, base, folder / "final", None, record["fingerprint"], plain=plain)
    raise PipelineError(f"{show(folder)}: neither a base with a fresh adapter nor a trained adapter")


def check_base(folder: Path, record: dict[str, Any], base: Path, thorough: bool = False) -> None:
    """Refuse a trained adapter whose base was made anew since. Raises PipelineError.

    thorough: the files of a plain base are compared by content; others are compared as inputs of their stage.
    """
    if "base_files" in record:
        if not (base / "config.json").is_file():
            raise PipelineError(
                f"{show(folder)}: its base {show(base)} is gone; bring it back, or train again with --force"
            )
        if wrong := base_model.changed(base, record["base_files"], thorough):
            raise PipelineError(
                f"{show(folder)}: its base {show(base)} is another one now; bring the old one back, or train again "
                "with --force:\n  " + "\n  ".join(wrong)
            )
        return
    again = "bring it back, or train again with --force"
    maker = read_record(base.parent / RECORD_NAME)
    if maker is None:
        raise PipelineError(f"{show(folder)}: its base {show(base)} is gone or incomplete; {again}")
    if maker["fingerprint"] != record["base_fingerprint"]:
        raise PipelineError(f"{show(folder)}: its base {show(base)} is another one now; train again with --force")


def check_tokenizer(base: Path, adapter: Path | None = None) -> None:
    """Refuse a base whose tokenizer is not the one its rows were made for, and an adapter of another tokenizer.

    Raises PipelineError. A published base has no such record, and a checkpoint inside a run no tokenizer of its own.
    """
    info = base / "base_info.json"
    has = records.sha256_once(base / "tokenizer.json")
    if info.is_file() and records.read_object(info, "tokenizer_sha256")["tokenizer_sha256"] != has:
        raise PipelineError(f"{show(base)}: its tokenizer.json is not the one that its rows were made for")
    if adapter and (adapter / "tokenizer.json").is_file() and records.sha256_once(adapter / "tokenizer.json") != has:
        raise PipelineError(f"{show(adapter)}: was trained with another tokenizer than that of its base {show(base)}")


def held_out_inputs(paths: RunPaths) -> list[Input]:
    """What every stage that scores a model reads: the validation texts and the exam questions."""
    refine = paths.command("refine/refine_all")
    return [
        Input("plain text", paths.plain_text, paths.record("refine_00_plain_text"), refine),
        Input("exam questions", paths.mcq, paths.record("refine_02_kor_med_test"), refine),
    ]
