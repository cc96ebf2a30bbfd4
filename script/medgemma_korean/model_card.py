"""The model card of a trained folder: README.md with metadata in the Hugging Face form, and code that loads it.

Jinja2 and yaml are imported inside functions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medgemma_korean import mcq, modeling, records, report
from medgemma_korean.page import NOT_A_DEVICE, TEMPLATES
from medgemma_korean.paths import RunPaths
from medgemma_korean.profiles import ModelProfile
from medgemma_korean.sources import BY_KEY, HAI_DEF
from medgemma_korean.stage import RECORD_NAME, read_record

HAI_DEF_LINK = "https://developers.google.com/health-ai-developer-foundations/terms"
TAGS = ["medical", "korean", "medgemma", "lora", "kormedmcqa"]
HELD_OUT = {"korean": "held-out Korean text", "medical": "dev questions as text", "english": "held-out English text"}


def _loading(base: Path, dtype: str) -> tuple[str, str]:
    """(code that loads a base, what it imports). Of a multimodal one the text model, which the adapter is for."""
    file = base / "config.json"
    if not file.is_file() or "text_config" not in records.read_json(file):
        code = f"model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.{dtype})"
        return code, "AutoModelForCausalLM, AutoTokenizer"
    mapping = f"key_mapping = {json.dumps(modeling.TEXT_OF_MULTIMODAL)}  # the names of its text model's weights"
    code = f"""{mapping}
config = AutoConfig.from_pretrained(base).text_config
model = Gemma3ForCausalLM.from_pretrained(base, config=config, key_mapping=key_mapping, dtype=torch.{dtype})"""
    return code, "AutoConfig, AutoTokenizer, Gemma3ForCausalLM"


def _hub_id(profile: ModelProfile, base: Path, upstream: str | None) -> str | None:
    """The published model that the base was made from; None for one that was built here or brought."""
    if upstream is None:
        return None if profile.source == "build" else profile.source
    origins = (read_record(base / RECORD_NAME) or {}).get("origins", {})
    return next((origin["id"] for origin in origins.values()), None)


def is_non_commercial(terms: list[tuple[str, str]]) -> bool:
    """True when one of (source, licence) forbids commercial use."""
    return any("-nc" in licence.lower() for _, licence in terms)


def _licence(hub_id: str | None, terms: list[tuple[str, str]]) -> dict[str, str]:
    """The licence fields: that of the weights follows from the base and from the data."""
    if hub_id is None and all(licence == "Apache-2.0" for _, licence in terms):
        return {"license": "apache-2.0"}
    name = "-".join(
        [*(["hai-def"] if hub_id else ["mixed"]), *(["non-commercial"] if is_non_commercial(terms) else [])]
    )
    link = {"license_link": HAI_DEF_LINK} if hub_id and "medgemma" in hub_id else {}
    return {"license": "other", "license_name": name, **link}


def _results(terms: list[tuple[str, str]], evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`results` of the model index: accuracy over all and by exam with intervals, bits per character."""
    published = BY_KEY["kor_med_test"].id if "kor_med_test" in dict(terms) else "sample"
    name = "KorMedMCQA" if published != "sample" else "sample questions of the project"
    split = evaluation.get("split", "dev")

    def accuracy(score: Mapping[str, Any], exam: str | None) -> dict[str, Any]:
        interval = {key: score[key] for key in ("lower", "upper", "correct", "n")}
        metric = {
            "type": "accuracy",
            "value": score["accuracy"],
            "name": "accuracy by option letters, 95 % Wilson interval in args",
            "args": {**interval, "level": 0.95, "majority_accuracy": score["majority_accuracy"]},
        }
        data = {"name": f"{name}, {exam}" if exam else name, "type": published, "split": split}
        return {
            "task": {"type": "multiple-choice", "name": "Korean medical exam questions"},
            "dataset": {**data, **({"config": exam} if exam else {})},
            "metrics": [metric],
        }

    found = [accuracy(evaluation["mcq"], None)]
    found += [accuracy(score, exam) for exam, score in evaluation["mcq"].get("exams", {}).items() if exam]
    for language, text in HELD_OUT.items():
        value = evaluation["bits_per_character"][language]
        found.append(
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": text, "type": f"held-out-{language}", "split": "validation"},
                "metrics": [{"type": "bits_per_character", "value": value, "name": "bits per character"}],
            }
        )
    return found


def metadata(
    paths: RunPaths, profile: ModelProfile, program: str, evaluation: Mapping[str, Any], hub_id: str | None
) -> dict[str, Any]:
    """The front matter of the card."""
    terms = report.licences(paths, profile)
    datasets = [BY_KEY[key].id for key, _ in terms if key in BY_KEY and BY_KEY[key].place == "hub"]
    return {
        "language": ["ko", "en"],
        **_licence(hub_id, terms),
        **({"base_model": hub_id, "base_model_relation": "adapter"} if hub_id else {}),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": TAGS,
        **({"datasets": list(dict.fromkeys(datasets))} if datasets else {}),
        "model-index": [{"name": f"{paths.name}-{program}", "results": _results(terms, evaluation)}],
    }


def model_card(
    paths: RunPaths,
    profile: ModelProfile,
    program: str,
    info: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    base: Path,
    folder: Path,
    upstream: str | None = None,
    first: Mapping[str, Any] | None = None,
) -> str:
    """README.md of a trained folder.

    upstream: what the base is and its terms, where it is not the run's own raw model. first: the evaluation of the
    untouched base, which the results stand beside.
    """
    import jinja2
    import yaml

    hub_id = _hub_id(profile, base, upstream)
    terms = report.licences(paths, profile)
    if upstream is None and profile.source != "build":
        upstream = f"The base model is {profile.source} under the {HAI_DEF} ({HAI_DEF_LINK}); they pass on."
    load, names = _loading(base, profile.dtype)
    front = yaml.safe_dump(
        metadata(paths, profile, program, evaluation, hub_id), allow_unicode=True, sort_keys=False, width=1000
    )
    models = {**({"base": first} if first else {}), "this model": evaluation}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("model_card.md").render(
        front=front,
        name=paths.name,
        program=program,
        not_a_device=NOT_A_DEVICE,
        imports=names,
        load=load,
        relative=os.path.relpath(base, folder),
        hub_id=hub_id,
        score=evaluation["mcq"],
        models=models,
        evaluation=evaluation,
        split=evaluation.get("split", "dev"),
        within_chance=mcq.within_chance(evaluation["mcq"]),
        info=info,
        parameters=sum(info["trainable_parameters"].values()),
        terms=terms,
        non_commercial=is_non_commercial(terms),
        upstream=upstream,
    )
