"""Scoring: option letters, bits per character, and the gate. One harness for every model of a run.

torch is imported inside functions.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgemma_korean import base_model, chain, mcq, modeling, prompts, records, statistics
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.profiles import ModelProfile
from medgemma_korean.stage import RECORD_NAME, check_outputs, read_record, vouched

# What is held out, by the name under which its bits per character are reported.
LANGUAGES = ("korean", "medical", "english")
SAMPLES = ("고혈압", "어디가 아프세요?")  # a term to explain and a sentence to translate, the same for every model


def dev_items(paths: RunPaths, limit: int | None = None) -> list[dict[str, Any]]:
    """The dev items in their fixed order. Raises PipelineError when there is none."""
    items = mcq.read_items(paths.mcq / "dev.jsonl", also=("id",))
    if not items:
        raise PipelineError(f"{paths.mcq / 'dev.jsonl'}: no dev questions; nothing could be scored. Refine them again")
    return items[:limit] if limit else items


def sample_prompts(paths: RunPaths) -> list[str]:
    """What every model of a run is asked, for people to read: a term, a sentence, and the first dev question."""
    term, sentence = SAMPLES
    return [prompts.dictionary(term), prompts.to_english(sentence), prompts.mcq_direct(dev_items(paths, 1)[0])]


def held_out_texts(paths: RunPaths, profile: ModelProfile) -> dict[str, list[str]]:
    """The held-out texts: Korean and English validation documents and the dev questions, whole documents each.

    The first documents up to `score_characters` characters of each, so that every model sees the same text.
    """
    medical = [f"{item['question']}\n{prompts.options(item)}" for item in dev_items(paths)]
    found = {
        "korean": _texts(paths.plain_text / "validation.jsonl"),
        "medical": medical,
        "english": _texts(paths.english_replay / "validation.jsonl"),
    }
    for name, texts in found.items():
        if not texts:
            raise PipelineError(f"no held-out {name} text; bits per character cannot be measured. Refine more text")
        found[name] = _first_characters(texts, profile.score_characters)
    return found


def _texts(file: Path) -> list[str]:
    return [row["text"] for row in records.read_jsonl(file, needs=("text",))]


def _first_characters(texts: list[str], limit: int) -> list[str]:
    kept, total = [], 0
    for text in texts:
        kept.append(text)
        total += len(text)
        if total >= limit:
            break
    return kept


def items_digest(items: Sequence[Mapping[str, Any]]) -> str:
    """What tells whether two models were asked the same: ids, questions, options and keys, in their order."""
    return records.digest_of([[item["id"], item["question"], prompts.options(item), item["answer"]] for item in items])


def text_digests(texts: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """What tells whether two models read the same held-out texts, by their names."""
    return {name: records.digest_of(list(texts[name])) for name in LANGUAGES}


def require_held_out(paths: RunPaths) -> None:
    """Raise PipelineError unless the held-out texts and exam questions are there as refining left them."""
    problems = []
    for item in chain.held_out_inputs(paths):
        if read_record(item.record) is None:
            problems.append(f"{item.role}: {show(item.path)} is absent or incomplete; run: {item.repair}")
        else:
            problems += [f"{wrong}; run: {item.repair} --force" for wrong in check_outputs(item.record)]
    if problems:
        raise PipelineError("\n".join(problems))


def test_looks(paths: RunPaths) -> list[dict[str, Any]]:
    """Every look at the test split of a run, the first one first. Raises PipelineError for a file that was altered."""
    file = paths.report / "test_looks.json"
    looks = records.read_json(file) if file.is_file() else []
    if not isinstance(looks, list) or looks and not vouched(file):
        raise PipelineError(f"{show(file)}: not as it was written; bring it back, or move it away to count anew")
    return looks


# the models of a run ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A model to score: its base, and the adapter on it (None for a base alone)."""

    name: str
    base: Path
    adapter: Path | None

    def weights(self) -> str:
        """Digest of what is scored, so that scores from before a model was trained anew are known as such.

        An adapter counts by its content; a base, which may be 54 GB, by its record and the sizes of its files.
        """
        files = {file.name: file.stat().st_size for file in sorted(self.base.glob("*.safetensors"))}
        record = read_record(self.base.parent / RECORD_NAME) or read_record(self.base / RECORD_NAME) or {}
        adapter = records.sha256(self.adapter / _ADAPTER) if self.adapter else None
        return records.digest_of([files, record.get("fingerprint"), adapter])[:16]


def run_folders(paths: RunPaths) -> dict[str, Path]:
    """Where each model of a run lies, whether it is there or not, in the order of the chain."""
    return {
        "base": paths.raw_model,
        "extended": paths.raw_lora_added,
        "00": paths.trained_00,
        "01": paths.trained_01,
        "merged": paths.another_lora_added,
        "02": paths.trained_02,
        "loop": paths.loop,
    }


def candidates(paths: RunPaths, wanted: Sequence[str] | None = None) -> list[Candidate]:
    """The models of those names (base extended 00 01 merged 02 loop), folders or hub ids; by default all of the run's.

    A folder is a trained one, an adapter inside one, one with base/ and adapter/, or a base. A hub id is fetched where
    it is not here. Raises PipelineError naming every model that is not there, or has another one's name.
    """
    named = run_folders(paths)
    found: dict[str, Candidate] = {}
    problems = []
    for name in wanted or named:
        folder = named.get(name, Path(name).expanduser().resolve())
        if wanted is None and read_record(folder / RECORD_NAME) is None:
            continue
        try:
            if name not in named and not folder.exists():
                if not base_model.is_hub_id(name):
                    raise PipelineError(f"no such model; give {' '.join(named)}, a folder, or a hub id")
                folder = base_model.of_hub(paths, name)
            candidate = _candidate(paths, name if name in named else _name_of(paths, folder), folder)
            other = found.setdefault(candidate.name, candidate)
            if other != candidate:  # answers and scores lie under the name
                raise PipelineError(
                    f"both it and {show(other.adapter or other.base)} would be called {other.name}; rename a folder"
                )
        except PipelineError as error:
            problems.append(f"--models {name}: {error}")
    if problems:
        raise PipelineError("\n".join(problems))
    if not found:
        raise PipelineError(f"run {paths.name} has no models yet; run: ./run_full_pipeline.sh --model {paths.model}")
    return list(found.values())


def _candidate(paths: RunPaths, name: str, folder: Path) -> Candidate:
    if (folder / "config.json").is_file():
        base_model.require_folder(folder)
        return Candidate(name, folder, None)
    if (folder / "adapter_config.json").is_file():
        if read_record(folder.parent / RECORD_NAME) is None:
            raise PipelineError(
                f"{show(folder)}: an adapter without its base: the record of the folder that it was trained in "
                f"({show(folder.parent / RECORD_NAME)}), which names the base, is missing"
            )
        return Candidate(name, chain.of_folder(paths, folder.parent).base, folder)
    link = chain.of_folder(paths, folder)
    return Candidate(name, link.base, link.adapter)


def _name_of(paths: RunPaths, folder: Path) -> str:
    """What a folder is called beside the run's own models: never a name of theirs, nor one that a label ends in."""
    inside = folder.relative_to(paths.models).parts if folder.is_relative_to(paths.models) else ()
    return "-".join(inside) if len(inside) > 1 else f"{folder.parent.name}--{folder.name}"


def checkpoints_of(paths: RunPaths, wanted: str | None = None) -> dict[str, tuple[Candidate, int]]:
    """Every adapter that a training has kept, with its step, in the order of the steps; of the last one by default.

    wanted: a trained folder, or the name of the run's (00, 01, 02, loop). Adapters are `checkpoint-N` and `final`,
    which is the best of them. Raises PipelineError where there is none.
    """
    trained = {"02": paths.trained_02, "loop": paths.loop, "01": paths.trained_01, "00": paths.trained_00}
    present = [name for name, folder in trained.items() if read_record(folder / RECORD_NAME) is not None]
    if not wanted and not present:
        raise PipelineError(
            f"run {paths.name} has trained nothing yet; run: ./run_full_pipeline.sh --model {paths.model}"
        )
    name = wanted or present[0]
    folder = trained.get(name, Path(name).expanduser().resolve())
    if not (folder / "training_info.json").is_file():
        raise PipelineError(f"--models {name}: not the folder of a training, which has checkpoints")
    base, label = chain.of_folder(paths, folder).base, name if name in trained else _name_of(paths, folder)
    # A person's copy beside them (checkpoint-backup, checkpoint-30-old) is none of the training's.
    numbered = [
        (p.name.removeprefix("checkpoint-"), p) for p in folder.glob("checkpoint-*") if (p / _ADAPTER).is_file()
    ]
    steps = {int(number): p for number, p in numbered if number.isdecimal()}
    steps.setdefault(records.read_object(folder / "training_info.json", "best_step")["best_step"], folder / "final")
    return {f"{label}-step{n}": (Candidate(f"{label}-step{n}", base, steps[n]), n) for n in sorted(steps)}


_ADAPTER = "adapter_model.safetensors"


def loaded(
    found: Sequence[Candidate], profile: ModelProfile, device: str, precision: str
) -> Iterator[tuple[Candidate, Any, Any]]:
    """(candidate, model, tokenizer) one after another, all in the same precision.

    Whoever takes a model drops it (`del model`) before asking for the next, or both are in memory.
    """
    for candidate in found:
        model, tokenizer = _load(candidate, profile, device, precision)
        yield candidate, model, tokenizer
        del model
        gc.collect()


def _load(candidate: Candidate, profile: ModelProfile, device: str, precision: str) -> tuple[Any, Any]:
    tokenizer = tokenizers.load(candidate.base)
    chain.check_tokenizer(candidate.base, candidate.adapter)
    model = modeling.load_base(candidate.base, profile, device, precision)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise PipelineError(f"{show(candidate.base)}: {len(tokenizer)} token ids, but {rows} rows")
    if candidate.adapter:
        model = modeling.load_adapter(model, candidate.adapter, trainable=False)
    return model.eval(), tokenizer


# batches ------------------------------------------------------------------------------------------------

# Tokens of a forward pass. A processor is busy with a few hundred, and more leave its cache; a card is with some
# thousand, and what a layer holds of more is soon more than a small model's weights.
PASS_TOKENS = {"cpu": 512, "cuda": 4096}


def _passes(rows: Sequence[Sequence[int]], most: int, device: Any) -> Iterator[list[int]]:
    """Indices of rows of token ids, shortest rows first: at most `most` rows and PASS_TOKENS tokens a forward pass."""
    chosen: list[int] = []
    tokens = PASS_TOKENS.get(device.type, PASS_TOKENS["cuda"])
    for i in sorted(range(len(rows)), key=lambda i: (len(rows[i]), i)):
        if chosen and (len(chosen) == most or (len(chosen) + 1) * len(rows[i]) > tokens):
            yield chosen
            chosen = []
        chosen.append(i)
    if chosen:
        yield chosen


# letters ------------------------------------------------------------------------------------------------


def letter_ids(tokenizer: Any) -> dict[str, int]:
    """The token id of each bare answer letter right after the generation prompt.

    Raises AssertionError when a letter is not one token there: option scores would compare different things.
    """
    item = {"question": "?", **{letter: letter.lower() for letter in prompts.LETTERS}}
    found = {}
    for letter in prompts.LETTERS:
        ids, start = prompts.render(tokenizer, prompts.mcq_direct(item), letter)
        found[letter] = ids[start]
        assert ids[start + 1] == tokenizer.convert_tokens_to_ids(tokenizers.END_OF_TURN), f"{letter} is not one token"
    return found


def score_letters(
    model: Any,
    tokenizer: Any,
    items: Sequence[Mapping[str, Any]],
    batch: int,
    tick: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Predict each item's letter as the option with the highest log-probability after the evaluation prompt.

    Left padding, one forward pass a batch, logits of the last position only. Items are batched by length and
    returned in their order as {"id", "exam", "gold", "predicted", "reason", "log_probs"}; log_probs are natural
    logarithms over the whole vocabulary.
    """
    import torch

    ids = letter_ids(tokenizer)
    base = _unwrapped(model)
    encoded = [prompts.render(tokenizer, prompts.mcq_direct(item))[0] for item in items]
    device = next(model.parameters()).device
    results: dict[int, dict[str, Any]] = {}
    model.eval()
    with torch.inference_mode():
        for chosen in _passes(encoded, batch, device):
            inputs = _left_padded([encoded[i] for i in chosen], tokenizer.pad_token_id, device)
            logits = base(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
            log_probs = torch.log_softmax(logits.float(), dim=-1).cpu()
            for row, i in enumerate(chosen):
                letters = prompts.letters_of(items[i])
                scores = {letter: log_probs[row, ids[letter]].item() for letter in letters}
                finite = all(math.isfinite(v) for v in scores.values())
                results[i] = {
                    "id": items[i]["id"],
                    "exam": items[i].get("exam", ""),
                    "gold": items[i]["answer"],
                    "predicted": max(letters, key=lambda letter: scores[letter]) if finite else None,
                    "reason": "highest log-probability" if finite else "log-probabilities are not finite",
                    "log_probs": {k: round(v, 6) for k, v in scores.items()} if finite else {},
                }
            if tick:
                tick(len(results), len(items))
    return [results[i] for i in range(len(items))]


def _left_padded(rows: Sequence[list[int]], pad: int, device: Any) -> dict[str, Any]:
    """`input_ids` and `attention_mask` of rows that all end at the last position."""
    import torch

    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        input_ids[number, width - len(row) :] = torch.tensor(row)
        mask[number, width - len(row) :] = 1
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}


def generate_letters(
    model: Any,
    tokenizer: Any,
    items: Sequence[Mapping[str, Any]],
    batch: int,
    most: int,
    tick: Callable[[int, int], None] | None = None,
    reasoning: bool = False,
) -> list[dict[str, Any]]:
    """Let the model answer each item greedily, at most `most` tokens, and extract the letter (`mcq.extract_answer`).

    The same batches and order as `score_letters`, and without `reasoning` the same prompts; rows hold "output" (special
    tokens kept, so that the extractor sees where the turn ends) and "ended" (whether it did, within `most` tokens) in
    place of "log_probs". reasoning: the prompt asks for it; rows also hold "format" and "combined" (`mcq`).
    """
    import torch

    ask = prompts.mcq_reasoning if reasoning else prompts.mcq_direct
    encoded = [prompts.render(tokenizer, ask(item))[0] for item in items]
    device = next(model.parameters()).device
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(tokenizers.END_OF_TURN)]
    results: dict[int, dict[str, Any]] = {}
    model.eval()
    with torch.inference_mode():
        for chosen in _passes(encoded, batch, device):
            inputs = _left_padded([encoded[i] for i in chosen], tokenizer.pad_token_id, device)
            whole = model.generate(
                **inputs,
                max_new_tokens=most,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
            )
            for row, i in enumerate(chosen):
                answer = [t for t in whole[row, inputs["input_ids"].shape[1] :].tolist() if t != tokenizer.pad_token_id]
                output = tokenizer.decode(answer)
                extraction = mcq.extract_answer(output, items[i])
                results[i] = {
                    "id": items[i]["id"],
                    "exam": items[i].get("exam", ""),
                    "gold": items[i]["answer"],
                    "predicted": extraction.letter,
                    "reason": extraction.reason,
                    "output": output,
                    "ended": bool(answer) and answer[-1] in ends,
                }
                if reasoning:
                    results[i]["format"] = mcq.format_score(output)
                    results[i]["combined"] = mcq.combined_score(output, items[i]["answer"], items[i])
            if tick:
                tick(len(results), len(items))
    return [results[i] for i in range(len(items))]


Answers = Callable[[Sequence[Mapping[str, Any]]], list[dict[str, Any]]]


def rotate(answer: Answers, items: Sequence[Mapping[str, Any]], number: int) -> tuple[list[dict[str, Any]], dict]:
    """Answer the items in `number` rotations of their options; one of four options in its four, where more are asked.

    answer: `score_letters` or `generate_letters` of a model, as a function of the items. Returns the rows of the
    unrotated items, each with "rotations" (the option chosen at each of its shifts, under its own letter), and the
    scores (`mcq.rotation_scores`) with "shown": how often each position was chosen over all rotations.
    """
    rows = answer(items)
    chosen = [[row["predicted"]] for row in rows]
    shown = Counter(row["predicted"] for row in rows)
    for shift in range(1, number):
        asked = [i for i, item in enumerate(items) if shift < len(prompts.letters_of(item))]
        if not asked:
            break
        for i, row in zip(asked, answer([mcq.rotated(items[i], shift) for i in asked]), strict=True):
            shown[row["predicted"]] += 1
            chosen[i].append(mcq.chosen_option(items[i], row["predicted"], shift))
    scores = mcq.rotation_scores([item["answer"] for item in items], chosen)
    scores["shown"] = {letter: shown[letter] for letter in prompts.LETTERS}
    return [{**row, "rotations": options} for row, options in zip(rows, chosen, strict=True)], scores


# bits per character -------------------------------------------------------------------------------------


def _unwrapped(model: Any) -> Any:
    """The model under PEFT's wrapper, adapter included: a trainer leaves its autocast on the wrapper's forward."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


Piece = tuple[list[int], int]  # ids of a window, and the position of the first token to score


def bits_per_character(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    window: int,
    batch: int,
    tick: Callable[[int, int], None] | None = None,
) -> float:
    """Negative log2-likelihood of the texts over their number of characters; comparable across tokenizers.

    A text longer than `window` tokens is scored by a sliding window with half a window of context; every token is
    scored once. Each window starts with `<bos>`, which is not counted.
    """
    nats = sum(_window_losses(model, tokenizer, _windows(tokenizer, texts, window), batch, tick))
    return nats / math.log(2) / sum(map(len, texts))


def _windows(tokenizer: Any, texts: Sequence[str], window: int) -> list[Piece]:
    pieces: list[Piece] = []
    for text in texts:
        ids = tokenizers.encode(tokenizer, text)
        stride = max(window // 2, 1)
        start = 0
        while start < len(ids):
            begin = max(0, start - (window - 1 - stride)) if start else 0
            end = min(len(ids), begin + window - 1)
            pieces.append(([tokenizer.bos_token_id, *ids[begin:end]], 1 + start - begin))
            start = end
    return pieces


def _scored_states(model: Any, tokenizer: Any, pieces: list[Piece], batch: int) -> Iterator[tuple[int, Any, Any]]:
    """(piece, final hidden states [n, hidden], the tokens [n] that follow them), pieces of a length together.

    Whoever multiplies by the head does so a few states at a time: the logits of a batch may be 10 GB.
    """
    import torch

    device = next(model.parameters()).device
    base = _unwrapped(model)
    model.eval()
    with torch.inference_mode():
        for chosen in _passes([ids for ids, _ in pieces], batch, device):
            width = max(len(pieces[i][0]) for i in chosen)
            ids = torch.full((len(chosen), width), tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, : len(pieces[i][0])] = torch.tensor(pieces[i][0])
                mask[row, : len(pieces[i][0])] = 1
            ids = ids.to(device)
            hidden = base.model(input_ids=ids, attention_mask=mask.to(device), use_cache=False).last_hidden_state
            for row, i in enumerate(chosen):
                length, first = len(pieces[i][0]), pieces[i][1]
                yield i, hidden[row, first - 1 : length - 1], ids[row, first:length]


def _logits(model: Any, states: Any) -> Iterator[tuple[int, Any]]:
    """(position of the first state, logits float32 [at most 256, rows])"""
    head = _unwrapped(model).get_output_embeddings()
    for at in range(0, len(states), 256):
        yield at, head(states[at : at + 256]).float()


def _window_losses(
    model: Any,
    tokenizer: Any,
    pieces: list[Piece],
    batch: int,
    tick: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Summed negative log-likelihood (nats) of each window's scored part."""
    from torch.nn.functional import cross_entropy

    losses = [0.0] * len(pieces)
    for done, (i, states, gold) in enumerate(_scored_states(model, tokenizer, pieces, batch), 1):
        for at, logits in _logits(model, states):
            losses[i] += cross_entropy(logits, gold[at : at + 256], reduction="sum").item()
        if tick:
            tick(done, len(pieces))
    return losses


def token_mass(model: Any, tokenizer: Any, texts: Sequence[str], ids: Sequence[int], window: int, batch: int) -> float:
    """The probability that some tokens take together, averaged over all positions of the texts."""
    total, count = 0.0, 0
    for _, states, gold in _scored_states(model, tokenizer, _windows(tokenizer, texts, window), batch):
        for _, logits in _logits(model, states):
            total += logits.softmax(dim=-1)[:, list(ids)].sum().item()
        count += len(gold)
    return total / count


def mean_state(model: Any, tokenizer: Any, texts: Sequence[str], window: int, batch: int) -> Any:
    """The mean final hidden state over all positions of the texts, float32 [hidden] on the CPU."""
    total, count = 0.0, 0
    for _, states, gold in _scored_states(model, tokenizer, _windows(tokenizer, texts, window), batch):
        total = total + states.double().sum(dim=0).cpu()
        count += len(gold)
    return (total / count).float()


# everything that a run reports of one model -------------------------------------------------------------


def evaluate(
    model: Any,
    tokenizer: Any,
    paths: RunPaths,
    profile: ModelProfile,
    *,
    which: str,
    precision: str,
    eval_samples: int | None = None,
    tick: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score one model on the held-out texts and the dev items, and let it answer the samples.

    Raises PipelineError when a score is not finite.
    """
    items = dev_items(paths, eval_samples)
    predictions = score_letters(model, tokenizer, items, profile.score_batch, tick)
    texts = held_out_texts(paths, profile)
    bits = {
        name: bits_per_character(model, tokenizer, texts[name], profile.score_window, profile.score_batch)
        for name in LANGUAGES
    }
    if not all(math.isfinite(value) for value in bits.values()):
        raise PipelineError(f"{which}: bits per character are not finite ({bits}); the model is broken")
    return {
        "which": which,
        "precision": precision,
        "protocol": "letter",
        "split": "dev",
        "items": items_digest(items),
        "texts": text_digests(texts),
        "mcq": mcq.score(predictions),
        "bits_per_character": bits,
        "tokens_per_character": {name: tokenizers.tokens_per_character(tokenizer, texts[name]) for name in LANGUAGES},
        "samples": [{"prompt": p, "answer": generate(model, tokenizer, p)} for p in sample_prompts(paths)],
        "predictions": predictions,
    }


def other_items(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether two evaluations are known to be of different items.

    One without "texts" is older, and its digest is of fewer parts of an item: ids and keys are compared then.
    """
    if ("texts" in before) == ("texts" in after):
        return before.get("items") != after.get("items")
    keys = [{row["id"]: row["gold"] for row in side.get("predictions", [])} for side in (before, after)]
    return all(keys) and keys[0] != keys[1]


def other_texts(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The held-out texts, by name, that two evaluations are known not to share; nothing is known of older ones."""
    texts = before.get("texts", {}), after.get("texts", {})
    return [n for n in LANGUAGES if all(n in side for side in texts) and texts[0][n] != texts[1][n]]


def require_paired(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raise PipelineError when the items, the precision or the protocol differ: such answers are no pairs."""
    wrong = [
        ("other items", other_items(before, after)),
        ("another precision", before["precision"] != after["precision"]),
        ("another protocol", before["protocol"] != after["protocol"]),
    ]
    for what, differs in wrong:
        if differs:
            raise PipelineError(f"{before['which']} and {after['which']} were scored with {what}; score both again")


def require_same_texts(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raise PipelineError when bits per character are known to be of different texts."""
    if names := other_texts(before, after):
        raise PipelineError(
            f"{before['which']} and {after['which']} were scored on other held-out texts ({', '.join(names)}), "
            "so that their bits per character compare nothing; score both again, on one refined data and profile"
        )


def require_current(scores: Mapping[str, Any], paths: RunPaths, profile: ModelProfile, repair: str) -> None:
    """Raise PipelineError for scores of other texts or items than there are now: found before hours of training."""
    texts = text_digests(held_out_texts(paths, profile))
    wrong = [f"held-out texts ({name})" for name in other_texts(scores, {"texts": texts})]
    if "texts" in scores and scores["items"] != items_digest(dev_items(paths)):
        wrong.append("dev questions")
    if wrong:
        raise PipelineError(
            f"{scores['which']} was scored on other {', '.join(wrong)} than there are now, and what is trained could "
            f"not be compared with it; bring the old data back, or {repair}"
        )


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Exact McNemar test of two evaluations on identical items.

    Raises PipelineError when the items, the precision or the held-out texts differ: such numbers must not be compared.
    """
    require_paired(before, after)
    require_same_texts(before, after)
    return compare_rows(before, after)


def compare_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """`compare` without its questions, for answers whose items and precision were compared one by one."""
    b, c = statistics.discordant(_correct(before), _correct(after))
    return {
        "before": before["which"],
        "wrong_to_right": b,
        "right_to_wrong": c,
        "p": statistics.mcnemar(b, c),
        "accuracy_change": after["mcq"]["accuracy"] - before["mcq"]["accuracy"],
    }


def _correct(evaluation: Mapping[str, Any]) -> dict[str, bool]:
    return {row["id"]: row["predicted"] == row["gold"] for row in evaluation["predictions"]}


def gate(base: Mapping[str, Any], after: Mapping[str, Any], profile: ModelProfile) -> dict[str, Any]:
    """Whether a stage may hand on its model: not significantly worse than the base on dev, English kept.

    Returns {"passed", "reasons", "p", "english_ratio"}. Raises PipelineError as `compare` does.
    """
    change = compare(base, after)
    ratio = after["bits_per_character"]["english"] / base["bits_per_character"]["english"]
    reasons = []
    if change["accuracy_change"] < 0 and change["p"] < profile.gate_p:
        reasons.append(
            f"dev accuracy fell from {base['mcq']['accuracy']:.1%} (base) to {after['mcq']['accuracy']:.1%}, "
            f"McNemar p = {change['p']:.2g}"
        )
    if not ratio <= profile.gate_english:  # a ratio that is not a number must not pass
        reasons.append(
            f"English bits per character rose by {ratio - 1:.1%} over the base, "
            f"more than {profile.gate_english - 1:.0%}"
        )
    return {"passed": not reasons, "reasons": reasons, "p": change["p"], "english_ratio": ratio}


def summary(evaluation: Mapping[str, Any]) -> str:
    """One line: accuracy with its interval, and bits per character."""
    score, bits = evaluation["mcq"], evaluation["bits_per_character"]
    return (
        f"dev {score['accuracy']:.1%} ({score['lower']:.1%} to {score['upper']:.1%}, "
        f"majority letter {score['majority_accuracy']:.1%}), bits per character Korean {bits['korean']:.3f}, "
        f"medical {bits['medical']:.3f}, English {bits['english']:.3f}"
    )


# while training -----------------------------------------------------------------------------------------


def completion_loss(model: Any, rows: Sequence[Mapping[str, list[int]]], tokenizer: Any, batch: int) -> float:
    """Mean negative log-likelihood (nats a supervised token) of unpacked rows whose prompt is masked."""
    pieces = []
    for row in rows:
        start = next(i for i, label in enumerate(row["labels"]) if label != -100)
        pieces.append((row["input_ids"], max(start, 1)))
    tokens = sum(len(ids) - start for ids, start in pieces)
    return sum(_window_losses(model, tokenizer, pieces, batch)) / tokens


def text_look(
    model: Any, tokenizer: Any, texts: Mapping[str, Sequence[str]], profile: ModelProfile
) -> dict[str, float]:
    """One look at the held-out text while training: {"korean_bits", "english_bits"}, bits per character."""
    return {
        f"{name}_bits": bits_per_character(model, tokenizer, texts[name], profile.score_window, profile.score_batch)
        for name in ("korean", "english")
    }


def dev_look(
    model: Any, tokenizer: Any, items: Sequence[Mapping[str, Any]], batch: int, histogram: bool = False
) -> dict[str, Any]:
    """One look at dev while training: {"accuracy", "correct", "total", "lower", "upper", "loss", "wrong"}.

    loss is the mean negative log-probability of the right letter, wrong the letter predicted for each item that
    failed, by its id. histogram adds "predicted": counts by letter.
    """
    predictions = score_letters(model, tokenizer, items, batch)
    score = mcq.score(predictions)
    losses = [-row["log_probs"][row["gold"]] for row in predictions if row["log_probs"]]
    return {
        "accuracy": score["accuracy"],
        "correct": score["correct"],
        "total": score["n"],
        "lower": score["lower"],
        "upper": score["upper"],
        "loss": sum(losses) / len(losses) if losses else math.inf,
        "wrong": mcq.wrong(predictions),
        **({"predicted": score["predicted"]} if histogram else {}),
    }


def generate(model: Any, tokenizer: Any, prompt: str, most: int = 48) -> str:
    """Greedy answer to one prompt, rendered as in evaluation, special tokens kept."""
    import torch

    ids, _ = prompts.render(tokenizer, prompt)
    device = next(model.parameters()).device
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(tokenizers.END_OF_TURN)]
    model.eval()
    with torch.inference_mode():
        whole = model.generate(
            input_ids=torch.tensor([ids], device=device),
            attention_mask=torch.ones((1, len(ids)), dtype=torch.long, device=device),
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
        )
    return tokenizer.decode(whole[0, len(ids) :])
