"""Whether a training step fits into memory: a prediction from the shape of the model, before anything is loaded.

    case = memory.case(profile, paths, settings, precision="8bit", dtype="bfloat16")
    available, where = memory.available_bytes(device)
    memory.require(case, available, where, "train_00_plain_text")     # raises PipelineError and says what would fit

Bytes; GB are 10^9 of them. Every number is a prediction from shapes, not a measurement. torch is imported only to ask a
card for its memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from medgemma_korean import checkpoints, cli, modeling, profiles
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import RunPaths
from medgemma_korean.profiles import ModelProfile, StageSettings
from medgemma_korean.shapes import (
    DTYPE_BYTES,
    TRAINED_BYTES,
    Shape,
    extended_rows,
    free_ram,
    linear_parameters,
    lora_parameters,
    read_shape,
    weight_bytes,
)

GB = 1e9
# The tile in which hidden states are multiplied by the head: TRL 1.16, kernels/chunked_logprob.py (TOKEN_CHUNK_SIZE)
# and trainer/utils.py (_CHUNKED_LOGPROB_CHUNK_SIZE).
TILE_TOKENS, TILE_ROWS = 4096, 32768
OVERHEAD = 1.0 * GB  # CUDA context, libraries, fragments of the allocator: usual size, an assumption
CARDS = (16, 24, 32, 40, 48, 80, 96, 141)  # GB of the cards that are sold
SHARDS = (2, 4, 8)  # cards that machines are sold with
STAGES = {"00": "plain_text", "01": "dictionary", "02": "mcq"}  # stage -> its settings in the profile
QUANTISED = ("8bit", "nf4")
# The precision of a base that is not quantised, by the type it computes in.
UNQUANTISED = {"bfloat16": "bf16", "float32": "fp32"}


# a training step ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One stage of one model: what `predict` needs. Raises PipelineError for quantised weights that are to be shared:
    FSDP does not divide them.
    """

    shape: Shape  # with the extended rows
    settings: StageSettings
    precision: str
    dtype: str  # compute type, of `modeling.compute_dtype`
    rank: int
    new_tokens: int  # rows that train
    checkpointing: bool
    shards: int = 1  # processes, one a card, that divide the frozen weights between them

    def __post_init__(self) -> None:
        if self.shards > 1 and self.precision in QUANTISED:
            raise PipelineError(
                f"{self.precision} weights cannot be shared between cards; "
                f"use --precision {UNQUANTISED[self.dtype]}, or one card"
            )

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return {"bf16": 2, "fp32": 4}.get(self.precision, DTYPE_BYTES[self.dtype])

    @property
    def tokens(self) -> int:
        """Tokens of a forward pass: its rows are laid end to end."""
        return self.settings.micro_batch * self.settings.max_length


def layer_activations(shape: Shape, element: int) -> float:
    """Bytes a token that the backward pass of one decoder layer with LoRA needs.

    Counted with `torch.autograd.graph.saved_tensors_hooks` on small Gemma 3 models of different widths, heads and
    FFN sizes (sdpa attention), in bfloat16 under autocast with fp32 LoRA and in float32; linear in each of them.
    """
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if element == 2:
        return 28 * shape.hidden + 9 * shape.ffn + 15 * q + 5 * kv
    return 24 * shape.hidden + 16 * shape.ffn + 20 * q + 4 * kv


def activations(shape: Shape, tokens: int, element: int, checkpointing: bool) -> float:
    """All layers' activations; with gradient checkpointing every layer's input and one layer in full.

    Source: T. Chen et al., Training deep nets with sublinear memory cost, 2016: a segment is computed again when
    its gradient is due, so only one is alive at a time.
    """
    one = tokens * layer_activations(shape, element)
    return tokens * shape.layers * shape.hidden * element + one if checkpointing else shape.layers * one


def head_bytes(shape: Shape, tokens: int, element: int) -> float:
    """One tile of logits [4,096 tokens, 32,768 rows] and the fp32 gradient of the hidden states.

    The whole logits are never there, and the frozen matrix has no gradient.
    """
    return min(tokens, TILE_TOKENS) * min(shape.rows, TILE_ROWS) * element + tokens * shape.hidden * 4


def new_row_bytes(shape: Shape, tokens: int, new_tokens: int, element: int) -> float:
    """What the backward pass of the trained rows needs beside them: one tile [4,096 tokens, new tokens] of their
    logits, and their gradient of one pass [new tokens, hidden] before it is added to the others, both in fp32; and
    of both the tile and the rows a copy in the compute type.

    They are a small matrix of their own whose values are written into the frozen one in place (`token_rows`).
    """
    return (4.0 + element) * new_tokens * (min(tokens, TILE_TOKENS) + shape.hidden)


def library_rows_bytes(shape: Shape, element: int) -> float:
    """The same in the library's way: a copy of the matrix for the head, a dense gradient, and a fp32 sum of it.

    PEFT's `trainable_token_indices` copies the matrix on the input side and on the head's, writes the trained rows
    into the copy, and the backward pass makes a dense gradient of each; TRL sums the head's in fp32. The input side's
    copy is gone when the head's gradient is made: 7.7 bytes an entry were measured in bfloat16 (tests/bench).
    """
    return shape.rows * shape.hidden * (2.0 * element + 4)


def predict(case: Case) -> dict[str, float]:
    """Bytes of a training step by part. Their sum is the peak if all parts were largest at once: an upper estimate.

    With shards, of one card: a share of the frozen weights, and those that are gathered for use: the matrix, one
    decoder layer, and the next one, which is fetched meanwhile (PyTorch, FSDP2). LoRA and rows are counted whole.
    """
    shape, tokens, element = case.shape, case.tokens, case.element
    weights = weight_bytes(shape, case.precision, case.dtype)
    parts = {
        "base weights": weights / case.shards,
        "LoRA, gradient, Adam": TRAINED_BYTES * lora_parameters(shape, case.rank),
        "trained rows, gradient, Adam": TRAINED_BYTES * case.new_tokens * shape.hidden,
        "their logits and their gradient": new_row_bytes(shape, tokens, case.new_tokens, element),
        "activations": activations(shape, tokens, element, case.checkpointing),
        "logits tile, gradient of states": head_bytes(shape, tokens, element),
        "a linear layer, dequantised": 0.0,
        "context, libraries, fragments": OVERHEAD,
    }
    if case.precision in QUANTISED:
        parts["a linear layer, dequantised"] = max(i * o for i, o in shape.linears) * element
    if case.shards > 1:
        matrix = shape.rows * shape.hidden * element
        parts["weights gathered for use"] = matrix + 2 * linear_parameters(shape) / shape.layers * element
    return parts


def total(case: Case) -> float:
    return sum(predict(case).values())


def probe_bytes(case: Case, tokens: int, states: int) -> float:
    """A forward and a backward pass, with checkpointing, of `tokens` tokens through the base alone, the head taking
    `states` at a time: their fp32 logits, log-probabilities, gradient, and the log-probabilities of another model.
    """
    settings = replace(case.settings, micro_batch=1, max_length=tokens)
    alone = replace(case, settings=settings, rank=0, new_tokens=0, checkpointing=True)
    return total(alone) + 4 * states * case.shape.rows * 4


def streaming_bytes(shape: Shape, dtype: str) -> float:
    """Main memory of add_lora and of merges, which pass a checkpoint through a file at a time: two copies of a file
    that is written, and the matrix before, after, and as it is written.
    """
    return 2 * checkpoints.SHARD_BYTES + 3 * shape.rows * shape.hidden * DTYPE_BYTES[dtype] + OVERHEAD


# the stages of a run ------------------------------------------------------------------------------------


def case(
    profile: ModelProfile,
    paths: RunPaths,
    settings: StageSettings,
    *,
    precision: str,
    dtype: str,
    second: bool = False,
    shards: int = 1,
) -> Case:
    """One stage's training. second: the second adapter, beside which no rows train. Raises PipelineError."""
    shape = read_shape(profile, paths)
    new_tokens, rows = extended_rows(profile, paths, shape)
    return Case(
        replace(shape, rows=rows),
        settings,
        precision,
        dtype,
        profile.second_rank if second else profile.lora_rank,
        new_tokens if settings.row_learning_rate and not second else 0,
        profile.gradient_checkpointing,
        shards,
    )


def cases(
    profile: ModelProfile,
    paths: RunPaths,
    *,
    precision: str,
    dtype: str,
    stages: Iterable[str] = tuple(STAGES),
    shards: int = 1,
    **changes: int | None,
) -> dict[str, Case]:
    """{stage: case} with the profile's settings, and with `changes` (micro_batch, max_length) that are not None."""
    found = {stage: profiles.with_overrides(getattr(profile, STAGES[stage]), **changes) for stage in stages}
    return {
        stage: case(
            profile, paths, settings, precision=precision, dtype=dtype, second=stage == "02", shards=shards
        )  # fmt: skip
        for stage, settings in found.items()
    }


def least(case: Case) -> Case:
    """The same training with one row a forward pass: accumulation makes up the rest, and the result is the same."""
    return replace(case, settings=replace(case.settings, micro_batch=1))


def micro_batch(case: Case, available: float) -> int | None:
    """The most rows a forward pass, a divisor of the batch and not above the setting, that fit; None when none does."""
    for rows in range(case.settings.micro_batch, 0, -1):
        smaller = replace(case, settings=replace(case.settings, micro_batch=rows))
        if case.settings.batch % rows == 0 and total(smaller) <= available:
            return rows
    return None


def remedies(case: Case, available: float) -> list[str]:
    """What would make a stage fit, the mildest first; each is predicted, none is guessed."""
    shorter = replace(case.settings, max_length=max(case.settings.max_length // 2, 1))
    four = replace(case, precision="nf4", shards=1)
    half = replace(four, settings=shorter)
    options = {
        "a forward pass of 1 row (--micro-batch 1)": least(case),
        f"rows of {shorter.max_length} tokens (--max-length {shorter.max_length})": replace(case, settings=shorter),
        "gradient checkpointing (in the profile)": replace(case, checkpointing=True),
        "4-bit weights (--precision nf4)": four,
        "4-bit weights and a forward pass of 1 row": least(four),
        f"4-bit weights and a forward pass of 1 row of {shorter.max_length} tokens": least(half),
    }
    if case.precision not in QUANTISED:
        options = {"8-bit weights (--precision 8bit)": replace(case, precision="8bit", shards=1), **options}
    fits: dict[Case, str] = {}
    for name, option in options.items():
        if option != case and total(option) <= available:
            fits.setdefault(option, f"{name}, {total(option) / GB:.1f} GB")
    return [*fits.values(), hardware(case)]


def hardware(case: Case) -> str:
    """The smallest card on which a stage fits, else the fewest cards that share its weights."""
    options = [case, *(replace(case, precision=UNQUANTISED[case.dtype], shards=cards) for cards in SHARDS)]
    for option in options:
        card = next((size for size in CARDS if size * GB >= total(option)), None)
        if card and option.shards > 1:
            return f"{option.precision} weights shared by {option.shards} cards of {card} GB"
        if card:
            return f"a card of {card} GB"
    return f"no card of up to {CARDS[-1]} GB, and not {SHARDS[-1]} of them"


def require(case: Case, available: float, where: str, program: str) -> None:
    """Raise PipelineError when a training is predicted not to fit, naming what is needed, what is there and what would
    fit. available, where: of `available_bytes`.
    """
    if total(case) > available:
        raise PipelineError(f"{program} does not fit: {gap(case, available, where)}")


def gap(case: Case, available: float, where: str) -> str:
    """What is needed, what is there and what would fit, in a line."""
    step = f"a step of {case.settings.micro_batch} x {case.settings.max_length} tokens on a base in {case.precision}"
    each = f" on each of {case.shards} cards" if case.shards > 1 else ""
    return (
        f"{step} needs about {total(case) / GB:.1f} GB{each} (predicted), "
        f"{available / GB:.1f} GB are there ({where}); would fit: " + "; ".join(remedies(case, available))
    )


def available_bytes(device: str | None) -> tuple[float, str]:
    """Free memory and where: of the CUDA device, else of the machine."""
    chosen = modeling.pick_device(device)
    if chosen.startswith("cuda"):
        import torch

        return float(torch.cuda.mem_get_info(chosen)[0]), f"{chosen}, {torch.cuda.get_device_name(chosen)}"
    return free_ram(), "main memory"


def table(parts: Mapping[str, Mapping[str, float]], available: float) -> str:
    """The parts of every stage, their sum, and what is there, in GB."""
    names = list(next(iter(parts.values())))
    lines = [[name, *(f"{part[name] / GB:.2f}" for part in parts.values())] for name in names]
    lines.append(["needed", *(f"{sum(part.values()) / GB:.2f}" for part in parts.values())])
    lines.append(["there", *(f"{available / GB:.2f}" for _ in parts)])
    return cli.table(lines, ["GB, predicted", *(f"stage {stage}" for stage in parts)])
