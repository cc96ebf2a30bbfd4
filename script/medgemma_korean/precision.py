"""Which precision a base is trained and scored in: a probe of what quantisation does to it, and the choice.

    choice = choose(folder, "auto", profile, paths, device, measured_on="base")   # before anything is scored
    store(choice, base)                                     # base/precision.json
    require_passing(base, chosen(base, profile), paths)     # what a train program asks

The probe runs the unquantised base and the quantised one on the same held-out Korean and English text. A precision
that was asked for by name is never replaced by another: when its probe fails, that is an error.

torch is imported inside functions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medgemma_korean import evaluation, memory, modeling, records
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.memory import GB, QUANTISED, UNQUANTISED
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.profiles import ModelProfile

FILE = "precision.json"
PRECISIONS = ("8bit", "nf4", "bf16", "fp32")
LANGUAGES = ("korean", "english")
TOKENS = 512  # of each language: what a probe reads, 1,024 together
STATES = 128  # multiplied by the head at a time: their logits are 140 MB of 272,192 rows
SHOWN = 5  # layers with the largest activations that a probe names
RAM_SHARE = 0.8  # of the free main memory, for weights that do not fit on the card


@dataclass(frozen=True)
class Limits:
    """What a quantised base must hold to. Starting values, not yet measured on a MedGemma."""

    # The int8 kernels take activations, and give their sums, in float16, whose largest value this is. nf4 never
    # leaves the compute type, so that there it bounds nothing.
    activation: float = 65_504.0
    warning: float = 32_000.0  # half of it: other text may have larger ones
    kl: float = 0.05  # nats a token, mean KL(unquantised || quantised)
    bits: float = 0.02  # relative difference of bits per character, in either language


@dataclass(frozen=True)
class Probe:
    """What a probe measured. A number that is not finite is None, so that all of it is JSON.

    largest_*: over all linear layers that would be quantised, taken in the unquantised model; layers: the largest
    few as {name: (input, output)}. bits: bits per character. reference_gradient_norm is None, too, where the
    unquantised model did not fit and ran layer by layer, forwards only (offloaded).
    """

    precision: str
    compute_dtype: str
    reference: str
    offloaded: bool
    tokens: dict[str, int]
    kl: float | None
    reference_bits: dict[str, float | None]
    bits: dict[str, float | None]
    bits_gap: float | None
    gradient_norm: float | None
    reference_gradient_norm: float | None
    largest_input: float | None
    largest_output: float | None
    layers: dict[str, tuple[float | None, float | None]]
    limits: Limits
    reasons: tuple[str, ...] = ()  # why it failed
    warnings: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.reasons

    @property
    def numbers(self) -> str:
        """One line of what was measured."""
        return (
            f"KL {_text(self.kl, '.2g')} nats a token (at most {self.limits.kl:g}), bits per character "
            f"{_text(self.bits_gap, '+.2%')} (at most {self.limits.bits:.0%}), largest activation "
            f"{_text(_most(self.largest_input, self.largest_output), ',.0f')}"
        )


@dataclass(frozen=True)
class Choice:
    """The precision of a base, and why. measured_on: the model that was probed. refused: the others, by reason."""

    precision: str
    compute_dtype: str
    asked: str
    reason: str
    measured_on: str
    refused: dict[str, str] = field(default_factory=dict)
    probes: tuple[Probe, ...] = ()
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As JSON; every probe says whether it passed."""
        probes = [dataclasses.asdict(probe) | {"passed": probe.passed} for probe in self.probes]
        return records.read_back(dataclasses.asdict(self) | {"probes": probes})


# measuring ----------------------------------------------------------------------------------------------


@dataclass
class Look:
    """What one model makes of the probe's text; log_probs on the CPU, float32 [at most STATES, rows] a tensor."""

    nats: dict[str, float]
    kl: float
    gradient_norm: float | None
    peaks: dict[str, tuple[float, float]]
    log_probs: list[Any]


def batch_of(tokenizer: Any, texts: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """{language: `<bos>` and the first TOKENS - 1 tokens of its documents}. Raises PipelineError without any text."""
    found = {}
    for language in LANGUAGES:
        ids = [tokenizer.bos_token_id]
        for text in texts[language]:
            ids += tokenizers.encode(tokenizer, text + "\n\n")
            if len(ids) >= TOKENS:
                break
        if len(ids) < 2:
            raise PipelineError(f"no held-out {language} text; a precision cannot be probed")
        found[language] = ids[:TOKENS]
    return found


def look_at(
    model: Any, batch: Mapping[str, list[int]], device: str, against: Sequence[Any] | None = None, train: bool = True
) -> Look:
    """Run one model over the batch, text by text. against: the log-probabilities of another model, for the KL.

    train: a backward pass, too. It comes last and leaves the model in training mode. No padding, no cache.
    """
    import torch
    from torch.nn.functional import kl_div

    head, peaks, kept = model.get_output_embeddings(), {}, []
    nats, kl, at = {}, 0.0, 0
    model.eval()
    # Not inference mode: what a quantised layer makes at its first pass must be of use to the backward pass.
    with contextlib.nullcontext() if against else _peaks(model, peaks), torch.no_grad():
        for language, tokens in batch.items():
            ids = torch.tensor([tokens], device=device)
            states = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
            nats[language] = 0.0
            for start in range(0, len(states), STATES):
                log_probs = head(states[start : start + STATES]).float().log_softmax(dim=-1)
                gold = ids[0, 1 + start : 1 + start + len(log_probs), None].to(log_probs.device)
                nats[language] -= log_probs.gather(1, gold).sum().item()
                if against is None:
                    kept.append(log_probs.cpu())
                else:
                    other = against[at].to(log_probs.device)
                    kl += kl_div(log_probs, other, reduction="sum", log_target=True).item()
                at += 1
    norm = _gradient_norm(model, batch, device) if train else None
    tokens = sum(len(ids) - 1 for ids in batch.values())
    largest = {name: (pair[0].item(), pair[1].item()) for name, pair in peaks.items()}
    return Look(nats, kl / tokens, norm, largest, kept)


@contextlib.contextmanager
def _peaks(model: Any, found: dict[str, list[Any]]) -> Iterator[None]:
    """Collect the largest |input| and |output| of every linear layer but the head; NaN stays NaN."""
    import torch

    def hook_of(name: str) -> Any:
        def hook(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            now = [inputs[0].abs().amax().float(), output.abs().amax().float()]
            found[name] = [torch.maximum(*pair) for pair in zip(now, found.get(name, now), strict=True)]

        return hook

    head = model.get_output_embeddings()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    hooks = [module.register_forward_hook(hook_of(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _gradient_norm(model: Any, batch: Mapping[str, list[int]], device: str) -> float:
    """The norm of the mean loss's gradient to the embedded inputs; not a number, or infinite, where one value is.

    Layers are computed again in the backward pass and the head takes STATES at a time: a probe must fit where a
    training does.
    """
    import torch
    from torch.nn.functional import cross_entropy

    head, total = model.get_output_embeddings(), 0.0
    tokens = sum(len(ids) - 1 for ids in batch.values())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for text in batch.values():
        ids = torch.tensor([text], device=device)
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        states = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        upper = states[0, :-1].detach().requires_grad_()
        for start in range(0, len(upper), STATES):
            logits = head(upper[start : start + STATES]).float()
            gold = ids[0, 1 + start : 1 + start + len(logits)]
            (cross_entropy(logits, gold, reduction="sum") / tokens).backward()
        states[0, :-1].backward(upper.grad)
        total += embedded.grad.double().square().sum().item()
    return math.sqrt(total)


@dataclass
class Reference:
    """The unquantised base's side of a probe, made once for every precision that is compared with it."""

    precision: str
    compute_dtype: str
    offloaded: bool
    batch: dict[str, list[int]]
    characters: dict[str, int]
    look: Look

    def broken(self) -> str | None:
        """Why the base itself is of no use in any precision; None where its numbers are finite."""
        bad = [name for name, (_, output) in self.look.peaks.items() if not math.isfinite(output)]
        if bad or not all(map(math.isfinite, self.look.nats.values())):
            where = f"; the first layer with such an output is {bad[0]}" if bad else ""
            return f"the logits of the unquantised base ({self.precision}) are not finite{where}"
        if self.look.gradient_norm is not None and not math.isfinite(self.look.gradient_norm):
            return f"the gradients of the unquantised base ({self.precision}) are not finite"
        return None


def reference_of(
    folder: Path, profile: ModelProfile, paths: RunPaths, device: str, available: float | None = None
) -> Reference:
    """Run the unquantised base, whole where it is predicted to fit into the available bytes, else with its weights in
    main memory and in its files. Raises PipelineError when there is no model or no text.
    """
    dtype = modeling.dtype_name(modeling.compute_dtype(profile, device))
    available = memory.available_bytes(device)[0] if available is None else available
    tokenizer = tokenizers.load(folder)
    batch = batch_of(tokenizer, evaluation.held_out_texts(paths, profile))
    case = memory.case(profile, paths, profile.plain_text, precision=UNQUANTISED[dtype], dtype=dtype)
    need = memory.probe_bytes(case, TOKENS, STATES)
    places = None
    if need > available:
        room = available - need + memory.predict(case)["base weights"]
        places = _places(device, max(room, 0.0), case.shape.rows * sum(map(len, batch.values())) * 4)
        log.info("the unquantised base needs %.1f GB, more than there is; its weights are offloaded", need / GB)
    model = modeling.load_base(folder, profile, device, case.precision, places)
    try:
        # Layer by layer there is no backward pass: a layer's weights are gone when its gradient is due.
        look = look_at(model, batch, device, train=places is None)
    finally:
        del model
        modeling.free_memory()
    characters = {language: len(tokenizer.decode(ids[1:])) for language, ids in batch.items()}
    return Reference(case.precision, dtype, places is not None, batch, characters, look)


def _places(device: str, room: float, log_probs: float) -> dict[int | str, int]:
    """Bytes of weights by place, for `modeling.load_base`; what is left stays in the checkpoint's files."""
    if device == "cpu":
        return {"cpu": int(room)}
    return {0: int(room), "cpu": int(max(memory.free_ram() * RAM_SHARE - log_probs, 0.0))}


def probe(
    folder: Path, precision: str, reference: Reference, profile: ModelProfile, device: str, limits: Limits | None = None
) -> Probe:
    """Compare a base in a quantised precision with its unquantised reference."""
    limits = limits or Limits()
    model = modeling.load_base(folder, profile, device, precision)
    try:
        look = look_at(model, reference.batch, device, against=reference.look.log_probs)
    finally:
        del model
        modeling.free_memory()
    unquantised = reference.look
    peaks = sorted(unquantised.peaks.items(), key=lambda item: -max(map(_size, item[1])))
    gaps = [look.nats[name] / unquantised.nats[name] - 1 for name in reference.batch]
    found = Probe(
        precision=precision,
        compute_dtype=reference.compute_dtype,
        reference=reference.precision,
        offloaded=reference.offloaded,
        tokens={language: len(ids) for language, ids in reference.batch.items()},
        kl=_number(look.kl),
        reference_bits=_bits(unquantised.nats, reference.characters),
        bits=_bits(look.nats, reference.characters),
        bits_gap=_number(max(gaps, key=_size)),
        gradient_norm=_number(look.gradient_norm),
        reference_gradient_norm=_number(unquantised.gradient_norm),
        largest_input=_number(max((pair[0] for pair in unquantised.peaks.values()), key=_size)),
        largest_output=_number(max((pair[1] for pair in unquantised.peaks.values()), key=_size)),
        layers={name: (_number(pair[0]), _number(pair[1])) for name, pair in peaks[:SHOWN]},
        limits=limits,
    )
    reasons, warnings = _judged(found, reference)
    return dataclasses.replace(found, reasons=tuple(reasons), warnings=tuple(warnings))


def _judged(found: Probe, reference: Reference) -> tuple[list[str], list[str]]:
    """(reasons to fail, warnings): everything that is wrong, not the first of it."""
    limits, reasons, warnings = found.limits, [], []
    if broken := reference.broken():
        reasons.append(broken)
    if found.kl is None or None in found.bits.values():
        reasons.append(f"logits in {found.precision} are not finite")
    if found.gradient_norm is None:
        reasons.append(f"gradients in {found.precision} are not finite")
    layer, pair = next(iter(found.layers.items()))
    if (peak := _most(*pair)) is not None and peak >= limits.warning:
        text = f"an activation of {layer} is as large as {peak:,.0f}"
        if peak >= limits.activation and found.precision == "8bit":
            reasons.append(f"{text}; the int8 kernels compute in float16, which ends at {limits.activation:,.0f}")
        else:
            warnings.append(f"{text} (float16 ends at {limits.activation:,.0f})")
    if found.kl is not None and found.kl > limits.kl:
        reasons.append(
            f"KL({found.reference} || {found.precision}) is {found.kl:.3g} nats a token, above {limits.kl:g}"
        )
    if found.bits_gap is not None and abs(found.bits_gap) > limits.bits:
        reasons.append(f"bits per character change by {found.bits_gap:+.1%}, more than {limits.bits:.0%}")
    return reasons, warnings


def _bits(nats: Mapping[str, float], characters: Mapping[str, int]) -> dict[str, float | None]:
    return {name: _number(value / math.log(2) / characters[name]) for name, value in nats.items()}


def _number(value: float | None) -> float | None:
    """The value, or None where it is not finite: JSON has no word for that."""
    return value if value is not None and math.isfinite(value) else None


def _size(value: float) -> float:
    """A key for the largest by size, where what is no number is the largest."""
    return abs(value) if math.isfinite(value) else math.inf


def _most(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else max(first, second)


def _text(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


# choosing -----------------------------------------------------------------------------------------------


def choose(
    folder: Path,
    asked: str,
    profile: ModelProfile,
    paths: RunPaths,
    device: str,
    *,
    measured_on: str,
    preferred: str | None = None,
    stages: Sequence[str] = tuple(memory.STAGES),
    limits: Limits | None = None,
) -> Choice:
    """The precision in which a base is to be trained and scored; logs it with the reason, in one line.

    asked: "auto", or a precision. auto takes the first that fits the stages (with forward passes of one row, which
    change no result) and, where it quantises, passes its probe: the preferred one (default: the profile's), 8bit, nf4,
    no quantisation in the compute type. A precision that is asked for by name is probed and taken, or refused. On a
    card without bfloat16 everything computes in float32, and only what then fits is taken. measured_on: what to call
    the model of the folder. Raises PipelineError, with the numbers, when nothing will do.
    """
    available, where = memory.available_bytes(device)
    dtype = modeling.dtype_name(modeling.compute_dtype(profile, device))
    lacking = dtype != profile.dtype
    whole = UNQUANTISED[dtype]
    if asked == "auto":
        order = [preferred or profile.precision, *QUANTISED, whole]
        order = list(dict.fromkeys(whole if lacking and precision == "bf16" else precision for precision in order))
    elif asked == "bf16" and lacking:
        raise PipelineError(f"--precision bf16: {where} has no bfloat16; use --precision {whole}, 8bit, nf4 or auto")
    else:
        order = [asked]
    refused: dict[str, str] = {}
    probes: list[Probe] = []
    reference, small = None, False
    for precision in order:
        cases = memory.cases(profile, paths, precision=precision, dtype=dtype, stages=stages)
        short = _too_large(cases, available, where)
        if short and asked != "auto" and not lacking:
            # Asked for by name: shorter rows may be planned. Only what cannot even be scored is refused.
            need = memory.probe_bytes(next(iter(cases.values())), TOKENS, STATES)
            warnings, short = [short], _too_small(need, available, where, device)
        else:
            warnings = _smaller_passes(cases, available)
        if short:
            refused[precision], small = short, True
            continue
        reason = "not quantised, so that no probe is needed"
        if precision in QUANTISED:
            reference = reference or reference_of(folder, profile, paths, device, available)
            if broken := reference.broken():
                raise PipelineError(f"{show(folder)}: {broken}; no precision can repair that, make the model anew")
            probes.append(probe(folder, precision, reference, profile, device, limits))
            if not probes[-1].passed:
                refused[precision] = f"its probe failed: {'; '.join(probes[-1].reasons)} ({probes[-1].numbers})"
                continue
            reason = f"its probe passed: {probes[-1].numbers}"
            warnings += probes[-1].warnings
        if lacking:
            reason += f"; computing in {dtype}, because {where} has no bfloat16"
        reason = "; ".join([reason, *(f"not {name}: {why}" for name, why in refused.items())])
        log.info("precision: %s, computing in %s: %s", precision, dtype, reason)
        for warning in warnings:
            log.warning("precision: %s", warning)
        return Choice(precision, dtype, asked, reason, measured_on, refused, tuple(probes), tuple(warnings))
    if asked == "auto":
        message = f"{show(folder)}: no precision will do\n  " + "\n  ".join(f"{k}: {v}" for k, v in refused.items())
    else:
        message = f"--precision {asked}: {refused[asked]}; to have another one chosen: --precision auto"
    if lacking and small:
        best = memory.cases(profile, paths, precision=order[0], dtype=profile.dtype, stages=stages)
        largest = max((memory.least(case) for case in best.values()), key=memory.total)
        message += (
            f"\n{where} has no bfloat16, so that everything is counted in {dtype}; with bfloat16 (Ampere and later) "
            f"{order[0]} needs {memory.hardware(largest)}"
        )
    raise PipelineError(message)


def _too_large(cases: Mapping[str, memory.Case], available: float, where: str) -> str | None:
    """The first stage that does not fit even a row at a time; None when all do."""
    for stage, case in cases.items():
        need = memory.total(memory.least(case))
        if need > available:
            return (
                f"stage {stage} needs about {need / GB:.1f} GB (predicted) even with forward passes of 1 row, "
                f"{available / GB:.1f} GB are there ({where}); {memory.hardware(memory.least(case))} would do"
            )
    return None


def _too_small(need: float, available: float, where: str, device: str) -> str | None:
    """Why a base cannot even be scored; None where it can."""
    if need <= available:
        return None
    other = "; --device cpu takes main memory" if device != "cpu" else ""
    return f"scoring needs about {need / GB:.1f} GB (predicted), {available / GB:.1f} GB are there ({where}){other}"


def _smaller_passes(cases: Mapping[str, memory.Case], available: float) -> list[str]:
    """Which stages fit only with fewer rows a forward pass than the profile has."""
    found = []
    for stage, case in cases.items():
        rows = memory.micro_batch(case, available)
        if rows != case.settings.micro_batch:
            found.append(f"stage {stage} is predicted to fit only with --micro-batch {rows}")
    return found


# what is kept -------------------------------------------------------------------------------------------


def store(choice: Choice, base: Path) -> None:
    """Write `precision.json` beside a base."""
    records.write_json(base / FILE, choice.as_dict())


def stored(base: Path) -> dict[str, Any] | None:
    """What `store` wrote beside a base; None where there is nothing. Raises PipelineError for what is no such file."""
    file = base / FILE
    if not file.is_file():
        return None
    found = records.read_json(file)
    if not isinstance(found, dict) or not {"precision", "compute_dtype", "reason", "probes"} <= found.keys():
        raise PipelineError(f"{show(file)}: not a choice of precision; make the base again with --force")
    return found


def chosen(base: Path, profile: ModelProfile) -> str:
    """The precision that was chosen when a base was made; the profile's where none was. Raises PipelineError."""
    found = stored(base)
    return found["precision"] if found else profile.precision


def of_run(asked: str, paths: RunPaths, profile: ModelProfile) -> str:
    """The precision to score a run's models in: the asked one, or for "auto" what was chosen for the run's base."""
    return chosen(paths.raw_lora_added / "base", profile) if asked == "auto" else asked


def require_passing(base: Path, precision: str, paths: RunPaths | None = None) -> None:
    """Raise PipelineError unless a quantised precision has a stored passing probe for this base.

    It names the command that makes one; with the run's options where `paths` are given.
    """
    if precision not in QUANTISED:
        return
    made = [entry for entry in (stored(base) or {}).get("probes", []) if entry["precision"] == precision]
    if not made:
        second = ("--second",) if base.parent.parent.name == "01_another_lora_added" else ()
        options = (*second, "--precision", precision, "--force")
        again = paths.command("model/add_lora", *options) if paths else f"add_lora.py {' '.join(options)}"
        raise PipelineError(f"{show(base)}: no probe of {precision} was made of this base; run: {again}")
    if not made[-1]["passed"]:
        raise PipelineError(f"{show(base)}: its probe of {precision} failed: {'; '.join(made[-1]['reasons'])}")
