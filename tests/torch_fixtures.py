"""A tokenizer of 700 pieces and a Gemma-3 of some 50,000 weights, built once a session from the texts below.

Real classes throughout: what is small here is the numbers. The functions are cached and return read-only folders
below one temporary folder; a test that changes something copies it first.
"""

from __future__ import annotations

import atexit
import json
import logging
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from medgemma_korean import batches, bpe, checkpoints, modeling, prompts
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import QUIET_LOGGERS
from medgemma_korean.paths import RunPaths
from medgemma_korean.profiles import ModelProfile, StageSettings, TinyShape

# Matrices this small gain nothing from a second thread, and lose much to it on a busy machine.
modeling.CPU_THREADS = 1
for name in QUIET_LOGGERS:
    logging.getLogger(name).setLevel(logging.ERROR)

KOREAN = (
    "고혈압은 혈압이 정상보다 높은 상태이며 뇌졸중과 심근경색의 위험을 높인다.",
    "당뇨병 환자는 혈당을 조절하기 위해 식사와 운동을 함께 관리해야 한다.",
    "폐렴은 폐에 염증이 생기는 병으로 기침과 발열과 호흡곤란이 나타난다.",
    "심근경색은 심장 근육에 혈액이 공급되지 않아 생기는 응급 질환이다.",
    "의사는 환자의 병력을 듣고 진찰한 다음 필요한 검사를 처방한다.",
    "간호사는 환자의 활력징후를 재고 기록하며 상태가 변하면 의사에게 알린다.",
    "약사는 처방전을 확인하고 약물의 상호작용과 부작용을 설명한다.",
    "치과의사는 충치와 치주염을 치료하고 구강 위생을 가르친다.",
    "만성 신부전 환자는 나트륨과 칼륨의 섭취를 제한하고 투석을 받는다.",
    "항생제는 세균 감염을 치료하지만 바이러스 감염에는 효과가 없다.",
    "급성 충수염의 통증은 배꼽 주위에서 시작하여 오른쪽 아랫배로 옮겨 간다.",
    "빈혈은 혈액 속의 혈색소가 부족하여 어지럽고 숨이 차는 상태이다.",
    "임신부는 정기적으로 산부인과에서 태아의 성장과 혈압을 확인한다.",
    "결핵은 결핵균에 의한 만성 감염병이며 여섯 달 이상 약을 먹어야 한다.",
    "수술 후 환자는 감염과 출혈을 막기 위해 상처를 깨끗하게 관리한다.",
    "서울의 봄에는 벚꽃이 피고 사람들은 강가를 천천히 걷는다.",
)
ENGLISH = (
    "Hypertension is blood pressure above normal and raises the risk of stroke.",
    "Patients with diabetes manage their blood glucose with diet and exercise.",
    "Pneumonia is an inflammation of the lung with cough, fever and dyspnea.",
    "The physician takes the history, examines the patient and orders tests.",
    "Antibiotics treat bacterial infection but do not work against viruses.",
    "The pain of acute appendicitis starts around the navel and moves to the right.",
    "Anemia is a lack of hemoglobin in the blood; the patient feels dizzy.",
    "Choose one of the options A, B, C, D or E and give the letter only: A B C D E.",
    "The river was wide and slow, and the boat moved quietly under the bridge.",
)


@cache
def home() -> Path:
    """The session's folder."""
    folder = Path(tempfile.mkdtemp(prefix="medgemma-korean-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def texts(number: int, seed: int = 1, sources: tuple[str, ...] = KOREAN + ENGLISH) -> list[str]:
    """Documents of one to three sentences."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(sources, k=rng.randint(1, 3))) for _ in range(number)]


def random_korean(number: int, seed: int) -> list[str]:
    """Nonsense of the syllables and words above, in new combinations: what a tokenizer has not seen."""
    rng = random.Random(seed)
    words = " ".join(KOREAN).split()
    syllables = sorted({s for word in words for s in word if "가" <= s <= "힣"})
    made = []
    for _ in range(number):
        parts = [rng.choice(words) if rng.random() < 0.4 else "".join(rng.choices(syllables, k=3)) for _ in range(12)]
        made.append("".join(part + rng.choice(("", " ", " ")) for part in parts).strip())
    return made


# tokenizers ---------------------------------------------------------------------------------------------


@cache
def tokenizer_folder() -> Path:
    """The base tokenizer, in both forms."""
    folder = home() / "tokenizer"
    tokenizers.build_base(folder, [*KOREAN, *ENGLISH], 700)
    return folder


@cache
def base_tokenizer() -> Any:
    return tokenizers.load(tokenizer_folder())


def segment(word: str) -> list[str]:
    """The base tokenizer's pieces of a word that `count_words` found."""
    tokenizer = base_tokenizer()
    return tokenizer.convert_ids_to_tokens(tokenizers.encode(tokenizer, word.replace("▁", " ")))


@cache
def extension() -> tokenizers.Extension:
    """Pieces from the Korean text and from one drug name whose syllables the base lacks: fewer than 64 in all."""
    words = bpe.count_words([*texts(200, 3, KOREAN), *["뮤코쉴드는 약이다."] * 9])
    return bpe.continue_bpe(words, segment, set(base_tokenizer().get_vocab()), 40, 5)


@cache
def extended_folder() -> Path:
    folder = home() / "extended"
    tokenizers.write_extended(tokenizer_folder(), folder, extension())
    return folder


@cache
def tokenizer() -> Any:
    """The extended tokenizer: what the models below have rows for."""
    return tokenizers.load(extended_folder())


def new_ids() -> list[int]:
    return list(range(len(base_tokenizer()), len(tokenizer())))


# rows -------------------------------------------------------------------------------------------------


def exchange(prompt: str, completion: str, max_length: int = 512) -> batches.Row | None:
    return batches.exchange_row(tokenizer(), prompt, completion, max_length)


def exchanges(number: int, seed: int = 1) -> list[batches.Row]:
    """Dictionary-like rows with new tokens in them."""
    rng = random.Random(seed)
    words = " ".join(KOREAN).split()
    return [exchange(prompts.dictionary(rng.choice(words)), rng.choice(KOREAN)[:30]) for _ in range(number)]


def documents(number: int, max_length: int = 48, seed: int = 2) -> list[batches.Row]:
    """Rows of plain text."""
    return list(batches.text_rows(tokenizer(), texts(number, seed), max_length))


def numbered(number: int, length: int = 10, first: int = 0) -> list[batches.Row]:
    """Rows of one repeated token each, told apart by it."""
    return [{"input_ids": [first + i] * length, "labels": []} for i in range(number)]


# models -------------------------------------------------------------------------------------------------


def shape(rows: int) -> dict[str, Any]:
    """Two layers of width 32, one with each of Gemma's attention kinds; weights large enough to make a difference."""
    return {
        "vocab_size": rows,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "max_position_embeddings": 1024,
        "layer_types": ["sliding_attention", "full_attention"],
        "initializer_range": 0.15,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


@cache
def raw_folder() -> Path:
    """A text-only checkpoint with the base tokenizer: what `model/raw` holds."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    folder = home() / "raw"
    modeling.set_up_torch(5)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**shape(tokenizers.rows_for(len(base_tokenizer())))))
    modeling.save_model(model, folder)
    base_tokenizer().save_pretrained(folder)
    return folder


def text_model(folder: Path) -> Any:
    """The unquantised text model of a checkpoint, float32."""
    return modeling.load_base(folder, profile(), "cpu", "fp32")


def parts() -> list[list[int]]:
    """The base encodings of the new pieces."""
    return [tokenizers.encode(base_tokenizer(), piece.replace("▁", " ")) for piece in extension().pieces]


def make_base(raw: Path, folder: Path) -> Path:
    """The base to train on, as `add_lora` leaves it: text-only, rows extended, tokenizer beside it."""
    source = checkpoints.Checkpoint(raw)
    old = source.tensor(checkpoints.MATRIX)
    rows = tokenizers.rows_for(len(tokenizer()), at_least=len(old))
    matrix = checkpoints.grown(old, len(base_tokenizer()), rows, checkpoints.mean_rows(old, parts()))
    checkpoints.extend(source, folder, "float32", matrix)
    tokenizers.copy(extended_folder(), folder)
    modeling.generation_config(tokenizer(), rows).save_pretrained(folder)
    made_for = tokenizers.fingerprint(folder)
    modeling.write_base_info(folder, deltas=[], new_ids=new_ids(), tokenizer_sha256=made_for)
    return folder


@cache
def base_folder() -> Path:
    return make_base(raw_folder(), home() / "base")


@cache
def adapter_folder() -> Path:
    """A fresh first adapter for the base."""
    folder = home() / "adapter"
    checkpoints.fresh_adapter(base_folder(), folder, profile(), second=False, new_ids=new_ids(), seed=17)
    return folder


@cache
def moved_adapter_folder() -> Path:
    """The adapter with every one of its weights moved at random: as if it had been trained."""
    from safetensors.torch import load_file, save_file

    folder = home() / "moved"
    shutil.copytree(adapter_folder(), folder)
    save_file(
        {k: v + randn(v, i) for i, (k, v) in enumerate(sorted(load_file(folder / ADAPTER).items()))}, folder / ADAPTER
    )
    return folder


ADAPTER = "adapter_model.safetensors"


def randn(like: Any, seed: int, scale: float = 0.05) -> Any:
    import torch

    return scale * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


def stage_settings(**changes: Any) -> StageSettings:
    values = {"epochs": 1, "max_length": 64, "batch": 4, "micro_batch": 2}
    return StageSettings(**values | {"learning_rate": 5e-3, "row_learning_rate": 5e-3, "evaluations": 2} | changes)


def profile(**changes: Any) -> ModelProfile:
    """A profile whose numbers suit the model above."""
    settings = StageSettings(
        epochs=1, max_length=64, batch=4, micro_batch=2, learning_rate=5e-3, row_learning_rate=5e-3
    )
    values = {
        "name": "tiny",
        "source": "build",
        "data": "data/sample",
        "hardware": "CPU",
        "tiny": TinyShape(),
        "dtype": "float32",
        "gradient_checkpointing": False,
        "lora_rank": 4,
        "second_rank": 2,
        "second_dropout": 0.0,
        "plain_text": settings,
        "dictionary": settings,
        "mcq": settings,
        "score_batch": 4,
        "score_window": 32,
        "score_characters": 300,
    }
    return ModelProfile(**values | changes)


def paths() -> RunPaths:
    """The folders of a run below the test's own project root."""
    return RunPaths.of("tiny", "data/sample")


def trainable_model(precision: str = "8bit", adapter: Path | None = None, **changes: Any) -> Any:
    """The base with the adapter on it, ready to train."""
    modeling.set_up_torch(17)
    base = modeling.load_base(base_folder(), profile(**changes), "cpu", precision)
    model = modeling.load_adapter(base, adapter or adapter_folder(), trainable=True)
    model.peft_config["default"].base_model_name_or_path = str(base_folder())
    return model


def logits(model: Any, ids: list[int]) -> Any:
    """Logits of one sequence, without a gradient and without a cache."""
    import torch

    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


ITEMS = [
    {
        "id": f"doctor-2020-1-{number}",
        "exam": "doctor" if number % 2 else "nurse",
        "question": question,
        "A": "항생제를 투여한다",
        "B": "수술",
        "C": "혈압을 확인한다",
        "D": "투석을 받는다",
        **({"E": "경과를 관찰한다"} if number % 3 else {}),
        "answer": "ABCD"[number % 4],
    }
    for number, question in enumerate(
        (*KOREAN[:8], KOREAN[8] + " " + KOREAN[9], "가장 알맞은 처치는?", "What is the diagnosis?", "다음은?")
    )
]


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


@cache
def multimodal_folder() -> Path:
    """A multimodal checkpoint under the names that Gemma's own files have (`language_model.model...`)."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    folder = home() / "multimodal"
    modeling.set_up_torch(6)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=shape(tokenizers.rows_for(len(base_tokenizer()))), vision_config=vision, mm_tokens_per_image=4
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    base_tokenizer().save_pretrained(folder)
    return folder
