"""Models and stage settings: every number of the pipeline, with its reason beside it.

A model is a row of values. No program branches on a model's name. Small is a set of values, not a mode.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class TinyShape:
    """The Gemma-3 that `build_tiny_model` makes: its shape and its short pre-training."""

    base_vocab: int = 7680  # pieces of the base tokenizer: 0.69 tokens a character of real medical text
    hidden: int = 128  # with 4 layers 2 M weights, the embeddings among them: minutes on two cores
    intermediate: int = 768
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    sliding_window: int = 128  # shorter than the context, so that both of Gemma's attention kinds are used
    context: int = 2048
    steps: int = 290  # fixed, never a time budget: the same seed gives the same bytes
    batch: int = 16  # packed sequences a step
    length: int = 128  # tokens a sequence
    learning_rate: float = 3e-3  # from scratch; far above what a trained model bears
    seed: int = 17


@dataclass(frozen=True)
class StageSettings:
    """One training stage. `batch` is the effective batch: rows (packed sequences in stage 00) per optimizer step."""

    epochs: int
    max_length: int  # tokens of a row; nothing is cut silently at it
    batch: int
    micro_batch: int  # rows a forward pass; accumulation makes up the rest
    learning_rate: float  # of LoRA; multiply by the LoRA scale (alpha / r = 2) to compare recipes
    row_learning_rate: float = 0.0  # of the new token rows; 0 means the stage trains none
    rows_only_steps: float = 0.0  # share of the steps in which only new rows train, so that LoRA does not
    # learn around untrained rows
    replay: float = 0.0  # share of replayed text in the mix, against forgetting
    replay_rows_only: float = 0.0  # the same while only rows train; rows alone drift towards Korean faster
    warmup: float = 0.03  # share of the steps
    max_grad_norm: float = 1.0
    evaluations: int = 4  # dev or held-out looks during the stage; the best one becomes `final`
    max_rows: int | None = None  # most rows (stage 02: questions) an epoch, drawn anew by seed each epoch
    look_every: int | None = None  # --show-samples-every: steps between looks, instead of `evaluations`
    monitor_every: int | None = None  # steps between looks at held-out text alone; beside those of every look
    max_forgetting: float = 0.05  # more bits per character than before the stage, as a share; the gate's measure
    max_steps: int | None = None  # --max-steps, for trials


@dataclass(frozen=True)
class ModelProfile:
    """One model: where it comes from, how it is loaded, how each stage trains it."""

    name: str
    source: str  # "build" makes it on the spot; else a hub id
    data: str  # data folder below the project root
    hardware: str  # for README and --plan
    tiny: TinyShape | None = None

    # precision
    precision: str = "8bit"  # of the frozen base while training and scoring; merges are always unquantised
    dtype: str = "bfloat16"  # compute type; never float16 with Gemma 3 (activations overflow)
    gradient_checkpointing: bool = True

    # tokenizer
    new_tokens: int = 10_000  # upper bound; 300 MB of Korean and more support it
    min_count: int = 100  # expected occurrences of a new token in the planned stage 00
    min_updates: int = 100  # the same, for the verdict: of 95 % of the rows; a part of longer pieces is met less often
    medical_weight: int = 5  # dictionary terms count this often against plain text when merges are chosen
    counted_megabytes: int = 100  # of plain text, a seeded share of a larger file: 10,000 tokens need no more

    # adapters
    lora_rank: int = 64  # first adapter: continued pre-training changes much
    second_rank: int = 16  # second adapter: answering exam questions changes little
    lora_scale: float = 2.0  # alpha = scale x rank without rsLoRA: fix the scale, tune the rate alone
    second_dropout: float = 0.05
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )  # MLP layers matter as much as attention

    # stages
    plain_text: StageSettings = field(
        default_factory=lambda: StageSettings(
            epochs=1,
            max_length=2048,
            max_rows=50_000,  # 100 M tokens, the size of a pilot; more is a matter of --epochs and of memory
            batch=32,  # 32 x 2,048 = 64k tokens a step
            micro_batch=2,
            learning_rate=1e-4,
            row_learning_rate=5e-5,  # a tenth of usual LoRA rates is public advice for embeddings
            rows_only_steps=0.1,
            replay=0.25,
            replay_rows_only=0.40,
            evaluations=10,
        )
    )
    dictionary: StageSettings = field(
        default_factory=lambda: StageSettings(
            epochs=3,
            max_length=512,
            batch=32,
            micro_batch=4,
            learning_rate=1e-4,
            row_learning_rate=5e-5,
            replay=0.20,
            look_every=50,
        )
    )
    mcq: StageSettings = field(
        default_factory=lambda: StageSettings(
            epochs=3,
            max_length=1024,  # about the 99th percentile of KorMedMCQA
            batch=32,
            micro_batch=2,
            learning_rate=2e-4,
            replay=0.05,
            look_every=50,  # 1,600 questions: six to seven looks in three epochs of KorMedMCQA
        )
    )

    # evaluation
    score_batch: int = 8
    score_window: int = 1024  # tokens of context for bits per character
    score_characters: int = 200_000  # held-out characters a language, whole documents; the same ones every time
    validation_share: float = 0.01  # of documents, by hash
    validation_documents: int = 2_000  # at most, a language
    gate_p: float = 0.01  # McNemar against the base on dev; below it a worse stage stops the pipeline
    gate_english: float = 1.05  # English bits per character against the base

    def __post_init__(self) -> None:
        if self.dtype == "float16":
            raise ValueError(f"{self.name}: float16 overflows on Gemma 3; use bfloat16 or float32")
        if self.precision not in ("8bit", "nf4", "bf16", "fp32"):
            raise ValueError(f"{self.name}: unknown precision {self.precision!r}")
        for stage in (self.plain_text, self.dictionary, self.mcq):
            if stage.batch % stage.micro_batch:
                raise ValueError(f"{self.name}: batch {stage.batch} is not a multiple of {stage.micro_batch}")
        if (self.source == "build") != (self.tiny is not None):
            raise ValueError(f"{self.name}: a built model, and no other, has a shape")


MODELS: dict[str, ModelProfile] = {
    profile.name: profile
    for profile in (
        ModelProfile(
            name="tiny",
            source="build",
            data="data/sample",
            hardware="CPU, 2 cores",
            tiny=TinyShape(),
            dtype="float32",  # two cores without bf16 units are faster and exact in float32
            gradient_checkpointing=False,  # it saves memory that a tiny model does not need
            new_tokens=2048,  # old rows are frozen, and what LoRA alone learns of 200 kB ends at -9.5 % Korean bits
            min_count=4,  # the sample is 200 kB, not 1 GB
            min_updates=5,
            lora_rank=16,
            second_rank=8,
            second_dropout=0.0,
            plain_text=StageSettings(
                epochs=3,
                max_length=256,
                batch=4,  # twice the steps from the same text: -9.0 % against -8.6 % Korean bits
                max_rows=260,  # about what the sample holds; other data folders stay a matter of minutes
                micro_batch=2,  # packed rows are one long sequence to the attention; on a CPU shorter is faster
                learning_rate=4e-3,  # tiny weights need larger steps than a 4B
                row_learning_rate=3e-3,  # 1e-2 over-fits the rows, 1e-3 leaves them behind
                rows_only_steps=0.1,
                replay=0.15,  # English ends below the base even so
                replay_rows_only=0.40,
                evaluations=3,
            ),
            dictionary=StageSettings(
                epochs=1,
                max_length=192,
                max_rows=1000,
                batch=16,
                micro_batch=8,
                learning_rate=5e-4,  # more, and its few answers forget the letters of the exam
                row_learning_rate=5e-4,
                replay=0.25,
                evaluations=2,
            ),
            mcq=StageSettings(
                epochs=3,
                max_length=640,  # a reasoned row is about twice as long as a direct one
                max_rows=120,
                batch=16,
                micro_batch=4,
                learning_rate=1.5e-3,
                replay=0.10,
                evaluations=3,
            ),
            score_batch=16,
            score_window=256,
            score_characters=20_000,
            validation_share=0.2,  # the sample has 150 documents
        ),
        ModelProfile(
            name="medgemma-4b",
            source="google/medgemma-4b-it",
            data="data",
            hardware="one GPU with 16 GB (predicted)",
        ),
        ModelProfile(
            name="medgemma-27b",
            source="google/medgemma-27b-text-it",
            data="data",
            hardware="one GPU with 48 GB (predicted)",
            lora_rank=32,
            score_batch=4,
            mcq=StageSettings(
                epochs=3,
                max_length=1024,
                batch=32,
                micro_batch=1,
                learning_rate=1e-4,  # larger models take smaller rates
                replay=0.05,
                look_every=50,
            ),
        ),
    )
}


def get(name: str) -> ModelProfile:
    """The profile of that name. Raises PipelineError naming the known ones."""
    if name not in MODELS:
        from medgemma_korean.cli import PipelineError

        raise PipelineError(f"--model {name}: unknown; known are {', '.join(MODELS)}")
    return MODELS[name]


def with_overrides(settings: StageSettings, **values: object) -> StageSettings:
    """The stage settings with every value that is not None put in: None inherits."""
    return replace(settings, **{key: value for key, value in values.items() if value is not None})
