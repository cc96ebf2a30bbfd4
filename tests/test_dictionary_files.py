"""The five dictionary files: problems named with their line, encodings, every sense kept, StarDict converted."""

import gzip
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest

from medgemma_korean import dictionary_check, records, stardict
from medgemma_korean.cli import PipelineError
from medgemma_korean.dictionary_check import check_files, undo_misreading
from medgemma_korean.dictionary_files import BY_NAME, MANUAL_FILES, missing_files, quote, read_manual_file, read_pairs

REAL = Path(__file__).resolve().parents[1].parent / "shared" / "real_data"
KOREAN, ANIMAL = "korean_medical_dict.jsonl", "korean_animal_medical_dict.jsonl"
EN_KO, KO_EN, GROUPS = (
    "bilingual_medical_dict.json",
    "bilingual_medical_dict_ko_en.json",
    "bilingual_medical_dict_categorized.json",
)


def dictionary_of(root: Path) -> Path:
    return root / "data/sample/01_raw/01_medical_dict"


def record_of(root: Path, program: str) -> Path:
    stage = "01_raw" if program.startswith("download") else "02_refined"
    return root / "data/sample" / stage / ".stages" / f"{program}.json"


def refined(root: Path) -> dict[str, dict]:
    rows = json.loads((root / "data/sample/02_refined/01_medical_dict.json").read_text(encoding="utf-8"))
    return {row["term"]: row for row in rows}


def row(term: str, definition: object) -> str:
    return json.dumps({"term": term, "definition": definition}, ensure_ascii=False) + "\n"


def words(number: int) -> list[tuple[str, str]]:
    """(Korean, English) entries that nothing is wrong with."""
    return [(f"질환{'가나다라마바사아자차'[i % 10]}{i}", f"Disease {i}") for i in range(number)]


def flat(pairs: list[tuple[str, str]]) -> str:
    return (
        "{\n"
        + ",\n".join(f"{json.dumps(k, ensure_ascii=False)}: {json.dumps(v, ensure_ascii=False)}" for k, v in pairs)
        + "\n}\n"
    )


SOUND = "".join(row(*pair) for pair in words(20))
SWAPPED = [pair[::-1] for pair in words(20)]


# broken variants ----------------------------------------------------------------------------------------

# name -> (file, its content, what is said behind the file's name)
BROKEN = {
    "no definition": (
        KOREAN,
        SOUND + '{"term": "간"}\n',
        ', line 21: needs the texts "term" and "definition", found \'term\' (a text)',
    ),
    "row of a term": (ANIMAL, '{"term": "간"}', ', line 1: needs the texts "term" and "definition"'),
    "other columns": (
        KOREAN,
        '{"word": "간", "meaning": "Liver"}\n' * 2,
        ", line 1: needs the texts \"term\" and \"definition\", found 'word' (a text), 'meaning' (a text)",
    ),
    "null definition": (
        KOREAN,
        SOUND + row("간", None),
        ", line 21: needs the texts \"term\" and \"definition\", found 'term' (a text), 'definition' (null)",
    ),
    "line of a list": (ANIMAL, SOUND + "[1]\n", ", line 21: expected a JSON object, found a list"),
    "list in .jsonl": (
        KOREAN,
        '[\n{"term": "간", "definition": "Liver"}\n]',
        ", line 1: one JSON list, where this file is to hold one object a line",
    ),
    "cut list in .jsonl": (KOREAN, '[\n{"term": "간", "defin', ", line 1: one JSON list"),
    "object in .jsonl": (
        KOREAN,
        "\n" + flat(words(20)),
        ", line 2: one object of terms without categories: this looks like bilingual_medical_dict_ko_en.json",
    ),
    "row over several lines": (
        ANIMAL,
        '{\n"term": "간",\n"definition": "Liver"\n}\n',
        ", line 1: an object over several lines",
    ),
    "rows on one line": (
        KOREAN,
        row("간", "Liver").strip() * 2,
        ", line 1: not valid JSON (Extra data): several objects on one line",
    ),
    "comma behind a row": (
        KOREAN,
        SOUND + '{"term": "간", "definition": "Liver"},\n',
        ", line 21: not valid JSON (Extra data): a comma behind the object",
    ),
    "last line cut": (
        KOREAN,
        SOUND + '{"term": "간", "defin',
        ", line 21: not valid JSON (Unterminated string starting at): the last line is cut off",
    ),
    "raw tab": (
        KOREAN,
        '{"term": "간", "definition": "a\tb"}\n' + SOUND,
        r", line 1: not valid JSON (Invalid control character at): a raw line break or tab inside a text",
    ),
    "table": (KOREAN, "term,definition\n간,Liver\n", ", line 2: not valid JSON (Expecting value)"),
    "empty file": (ANIMAL, "", " is empty"),
    "blank file": (GROUPS, "\n \n", " is empty"),
    "no entries": (GROUPS, "{}", " has no entries"),
    "list in .json": (
        EN_KO,
        '[["Liver", "간"]]',
        ", line 1: one JSON list, where this file is to hold one JSON object",
    ),
    "rows in .json": (
        KO_EN,
        SOUND,
        ", line 1: one term and definition a line: this looks like korean_medical_dict.jsonl",
    ),
    "categories in the flat file": (
        EN_KO,
        '{"A": ' + flat(SWAPPED) + "}",
        ", line 1: objects of terms: this looks like the categorised file, " + GROUPS,
    ),
    "flat file as categories": (
        GROUPS,
        flat(SWAPPED),
        ", line 1: one object of terms without categories: this looks like bilingual_medical_dict.json",
    ),
    "swapped, English first": (
        KO_EN,
        flat(SWAPPED),
        ", line 2: 'Disease 0': '질환가0': the two languages are swapped; this looks like bilingual_medical_dict.json",
    ),
    "swapped, Korean first": (
        EN_KO,
        flat(words(20)),
        ", line 2: '질환가0': 'Disease 0': the two languages are swapped; this looks like bilingual_medical_dict_ko",
    ),
    "swapped in categories": (
        GROUPS,
        '{"A":\n' + flat(words(20)) + "}",
        ", line 3: '질환가0': 'Disease 0': the two languages are swapped; English must come first",
    ),
    "Korean on both sides": (
        KO_EN,
        flat([(k, "병") for k, _ in words(3)] + [(k, f"병 {k}") for k, _ in words(20)]),
        ", line 2: '질환가0': '병': Korean on both sides",
    ),
    "no Korean": (
        EN_KO,
        flat([(e, e.upper() + "!") for _, e in words(20)]),
        ", line 2: 'Disease 0': 'DISEASE 0!': no Korean in most entries",
    ),
    "English headwords": (
        KOREAN,
        "".join(row(*pair) for pair in SWAPPED),
        ", line 1: 'Disease 0': most terms are not Korean; this looks like bilingual_medical_dict.json",
    ),
    "value is a list": (
        EN_KO,
        flat(SWAPPED)[:-3] + ',\n"Liver": ["간"]}',
        ", line 22: 'Liver': expected a text, found a list; repeat the key for each meaning",
    ),
    "value is a number": (KO_EN, '{"간": 3}', ", line 1: '간': expected a text, found a number"),
    "category is a text": (
        GROUPS,
        '{"A": {"Liver": "간"}, "B": {"Lung": "폐"},\n"C": "간"}',
        ", line 2: category 'C': expected an object of terms, found a text",
    ),
    "trailing comma": (EN_KO, '{\n"Liver": "간",\n}', ", line 3: not valid JSON: a comma before the closing bracket"),
    "missing comma": (
        EN_KO,
        '{\n"Liver": "간"\n"Lung": "폐"}',
        ", line 3: not valid JSON: no comma behind the entry 'Liver'",
    ),
    "missing colon": (
        EN_KO,
        '{\n"Liver" "간",\n"Lung": "폐"}',
        ", line 2: not valid JSON: no colon behind the key 'Liver'",
    ),
    "quotation mark": (
        KO_EN,
        '{"폐": "Lung",\n"간": "so-called "Liver""}',
        ", line 2: not valid JSON: more behind the value of '간', or a quotation mark in it",
    ),
    "backslash": (
        KO_EN,
        '{"폐": "Lung",\n"간": "C:\\Liver"}',
        r", line 2: not valid JSON (Invalid \escape): a lone backslash",
    ),
    "cut between entries": (
        KO_EN,
        flat(words(20))[:-4],
        ", line 21: not valid JSON: the file ends inside the object; it was cut off",
    ),
    "cut inside a text": (
        GROUPS,
        '{"A": {\n"Liver": "간",\n"Lung": "폐',
        ", line 3: not valid JSON: the file ends inside the object; it was cut off",
    ),
    "second object": (
        EN_KO,
        flat(SWAPPED) + '{"Liver": "간"}',
        ", line 23: not valid JSON: a second value begins here",
    ),
    "no JSON": (EN_KO, "Liver\t간\n", ", line 1: expected one JSON object, the file must begin with {"),
    "UTF-16": (KOREAN, SOUND.encode("utf-16"), " is UTF-16: save it as UTF-8"),
    "UTF-16 without its mark": (
        KOREAN,
        SOUND.encode("utf-16-le"),
        " looks like UTF-16 without its mark: save it as UTF-8",
    ),
    "Latin-1": (
        KO_EN,
        '{\n"폐": "Lung",\n"간": "Foie gras à la française"}'.encode().replace("ç".encode(), b"\xe7"),
        ", line 3: neither UTF-8 nor CP949 (byte 29 of the line is 0xe7)",
    ),
    "NUL": (KOREAN, SOUND + row("간", "Li\x00ver").replace("\\u0000", "\0"), ", line 21: a NUL byte"),
    "web page": (
        EN_KO,
        "<!DOCTYPE html>\n<html><head><title>로그인</title></head></html>",
        " is a web page ('로그인'), perhaps of a login or an error",
    ),
    "XML": (EN_KO, "<?xml version='1.0'?><xdxf></xdxf>", " is XML"),
    "LFS pointer": (
        EN_KO,
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
        " is a Git LFS pointer",
    ),
    "spreadsheet": (KOREAN, b"PK\x03\x04\x14\x00", " is a zip archive or an Office document (.xlsx, .docx)"),
    ".dict.dz": (KOREAN, gzip.compress(b"x"), " is a gzip archive"),
    ".ifo": (KOREAN, "StarDict's dict ifo file\nversion=2.4.2\n", " is the .ifo of a StarDict dictionary"),
    "lost letter": (
        KOREAN,
        SOUND + row("간", "Li\ufffder"),
        ", line 21: 'Li\ufffder': a letter was lost in a conversion (U+FFFD)",
    ),
    "UTF-8 as Latin-1": (
        KOREAN,
        SOUND + row("간염".encode().decode("latin-1"), "Hepatitis"),
        ", line 21: {mojibake} was read in a wrong encoding, it is '간염'",
    ),
    "placeholder": (
        KOREAN,
        SOUND + "".join(row(f"{k}증", "준비 중") for k, _ in words(9)),
        ", line 21: '준비 중' stands in 9 of 29 entries: a placeholder or a wrong column",
    ),
    "same key": (
        EN_KO,
        flat(SWAPPED + [("code", k) for k, _ in words(9)]),
        ", line 22: 'code' stands in 9 of 29 entries",
    ),
    "terms repeated": (
        KOREAN,
        row("폐", "Lung") + "".join(row(k, k) for k, _ in words(20)),
        ", line 2: '질환가0' and 19 other entries of 21 only repeat their term",
    ),
    "empty definitions": (
        KOREAN,
        SOUND + "".join(row(f"{k}증", " ") for k, _ in words(5)),
        ", line 21: '질환가0증': empty definition",
    ),
    "empty terms": (EN_KO, flat([("", "간"), ("Lung", "폐")]), ", line 2: '': empty term"),
}


def put(folder: Path, name: str, content: str | bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_with_its_problem_and_line(case, root, load_program):
    name, content, said = BROKEN[case]
    folder = dictionary_of(root)
    put(folder, name, content)
    before = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(PipelineError) as error:
        load_program("download_01_medical_dict").main([])
    mojibake = quote("간염".encode().decode("latin-1"))
    assert f"01_medical_dict/{name}{said.replace('{mojibake}', mojibake)}" in str(error.value)
    assert error.value.exit_code == 2 and "--skip-01" in str(error.value)
    assert {line.split("01_medical_dict/")[1].split(",")[0].split(" ")[0].rstrip(":")
            for line in str(error.value).split("\n")[1:-1] if "(a warning)" not in line} == {name}  # fmt: skip
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    assert not record_of(root, "download_01_medical_dict").exists()


@pytest.mark.parametrize(
    "case", ["comma behind a row", "missing comma", "UTF-16", "web page", "swapped, English first"]
)
def test_a_broken_file_as_a_user_sees_it(case, root, run_program):
    name, content, said = BROKEN[case]
    put(dictionary_of(root), name, content)
    outcome = run_program("download_01_medical_dict")
    assert outcome.code == 2 and outcome.text.startswith("error: the medical dictionary is not ready:\n")
    assert f"01_medical_dict/{name}{said}" in outcome.text and "Traceback" not in outcome.text
    assert not record_of(root, "download_01_medical_dict").exists()


def test_everything_wrong_with_the_dictionary_is_said_at_once(root, run_program):
    folder = dictionary_of(root)
    (folder / EN_KO).rename(folder / "bilingual_medical_dict (1).json")
    (folder / ANIMAL).unlink()
    put(folder, KO_EN, '{"간": 3,\n"폐" "Lung",\n"뇌": "Brain", \n"위": null}')
    put(folder, KOREAN, row("간", "Liver") + "{\n" + row("폐", 3))
    put(folder, GROUPS, "<html><body>404 Not Found</body></html>")
    outcome = run_program("download_01_medical_dict")
    assert outcome.code == 2 and "Traceback" not in outcome.text and outcome.text.startswith("error: ")
    for part in (
        "bilingual_medical_dict.json is missing: English term to Korean term; is it 'bilingual_medical_dict (1).json'",
        "korean_animal_medical_dict.jsonl is missing: veterinary terms with a definition\n",
        "bilingual_medical_dict_ko_en.json, line 1: '간': expected a text, found a number",
        "bilingual_medical_dict_ko_en.json, line 2: not valid JSON: no colon behind the key '폐'",
        "bilingual_medical_dict_ko_en.json, line 4: '위': expected a text, found null",
        "korean_medical_dict.jsonl, line 2: not valid JSON",
        "korean_medical_dict.jsonl, line 3: needs the texts",
        "bilingual_medical_dict_categorized.json is a web page",
        "MANUAL_DATA.md",
        "--skip-01",
    ):
        assert part in outcome.text, part
    assert not record_of(root, "download_01_medical_dict").exists()


def test_problems_of_one_kind_are_capped(root):
    folder = dictionary_of(root)
    put(folder, KOREAN, SOUND + '{"term": "간"}\n' * 42 + "{\n" * 3)
    errors = check_files(folder).errors
    assert len(errors) == 5 + 1 + 3 and errors[5].endswith("korean_medical_dict.jsonl: and 37 more like it")
    assert "line 25" in errors[4] and "line 63" in errors[6]


def test_the_refiner_says_the_same_of_a_file_it_cannot_read(root, run_program):
    put(dictionary_of(root), EN_KO, '{\n"Liver" "간",\n"Lung": ["폐"]}')
    outcome = run_program("refine_01_medical_dict")
    assert outcome.code == 2 and "Traceback" not in outcome.text
    assert f"{EN_KO}, line 2: not valid JSON: no colon" in outcome.text
    assert f"{EN_KO}, line 3: 'Lung': expected a text, found a list" in outcome.text


# what passes --------------------------------------------------------------------------------------------

# name -> (file, its content, the warning)
TOLERATED = {
    "few": (ANIMAL, row("광견병", "Rabies"), " holds a single entry; is it complete?"),
    "some empty": (KOREAN, SOUND + row("간", ""), ", line 21: '간': empty definition"),
    "N/A": (KOREAN, SOUND + row("간", "N/A"), ", line 21: '간': 'N/A' is no definition"),
    "tag": (KOREAN, SOUND + row("간", "<b>Liver</b>"), ", line 21: '간': mark-up ('<b>')"),
    "entity": (EN_KO, flat([*SWAPPED, ("Liver", "간&nbsp;")]), ", line 22: 'Liver': mark-up ('&nbsp;')"),
    "control character": (
        KOREAN,
        SOUND + row("간", "Li\x07ver"),
        r", line 21: 'Li\x07ver': a control character (U+0007)",
    ),
    "whole page": (
        KOREAN,
        SOUND + row("간", "Liver " * 600),
        ", line 21: 'Liver Liver Liver Liver Liver Liver Liv…': 3,600 characters",
    ),
    "cut Hanja": (KOREAN, SOUND + row("열결(缺)", "LU7"), ", line 21: '열결(缺)': its Hanja were lost or cut"),
    "lost Hanja": (EN_KO, flat([*SWAPPED, ("Rib", "갈비()")]), ", line 22: '갈비()': its Hanja were lost or cut"),
    "twice": (KOREAN, SOUND * 3, " holds 40 entries twice or more often, of 60; they are merged"),
    "the same file": (ANIMAL, None, " holds the same entries as korean_medical_dict.jsonl"),
}


@pytest.mark.parametrize("case", TOLERATED)
def test_what_the_refiner_repairs_is_a_warning_in_the_record(case, root, load_program, capsys):
    name, content, said = TOLERATED[case]
    folder = dictionary_of(root)
    put(folder, name, (folder / KOREAN).read_bytes() if content is None else content)
    assert load_program("download_01_medical_dict").main([]) == 0
    warnings = records.read_json(record_of(root, "download_01_medical_dict"))["warnings"]
    (warning,) = [w for w in warnings if f"{name}{said}" in w]
    assert f"warning: {warning}" in capsys.readouterr().out
    assert load_program("refine_01_medical_dict").main([]) == 0


SOUND_TEXTS = (
    "감염성계<닭>기관지염", "p < 0.05", "α1-항트립신 결핍증", "Ménière's disease", "Sjögren 증후군", "± 2.5 ····",
    "“‘…’”", "각(脚) 경(莖) 병(柄)", "10² ³ ¹", "Guérin & Crohn; R&D", "똠방각하 뷁", "①②③",
    "한글 — 영문", "\u00a0\u00a0\u00a0 A",
)  # fmt: skip


def test_sound_text_is_not_taken_for_damage(tmp_path):
    assert [text for text in SOUND_TEXTS if undo_misreading(text)] == []
    pairs = words(20) + [(f"{text} 가", f"x {text}") for text in SOUND_TEXTS]
    for name, content in ((KOREAN, "".join(row(*p) for p in pairs)), (KO_EN, flat(pairs))):
        _, problems = dictionary_check.check(content.encode(), BY_NAME[name])
        assert problems == []


@pytest.mark.parametrize(
    "wrong, right", [("latin-1", "utf-8"), ("cp874", "utf-8"), ("cp949", "utf-8"), ("latin-1", "cp949")]
)
def test_misread_text_is_recognised(wrong, right):
    misread = "간염과 간경변".encode(right).decode(wrong, "replace")
    assert "간" in undo_misreading(misread) or "경" in undo_misreading(misread)


def test_real_misread_text_is_recognised():
    file = REAL / "mojibake_cp874_kormedmcqa_dev.csv"
    if not file.is_file():
        pytest.skip("the misread file is not here")
    header, *lines = file.read_text(encoding="utf-8").splitlines()
    assert undo_misreading(header) is None
    assert "대학병원에" in undo_misreading(lines[0]) and len(lines) == sum(bool(undo_misreading(x)) for x in lines)


def test_the_sample_and_real_files_pass(root, tmp_path, load_program):
    program = load_program("download_01_medical_dict")
    assert program.main([]) == 0
    assert records.read_json(record_of(root, "download_01_medical_dict"))["warnings"] == [
        "data/sample/01_raw/01_medical_dict/korean_medical_dict.jsonl, line 42: '도뇨': empty definition"
    ]
    if not (REAL / "01_raw/01_medical_dict").is_dir():
        pytest.skip("the real files are not here")
    shutil.copytree(REAL / "01_raw/01_medical_dict", tmp_path / "real/01_raw/01_medical_dict")
    assert program.main(["--data-dir", str(tmp_path / "real")]) == 0
    record = records.read_json(tmp_path / "real/01_raw/.stages/download_01_medical_dict.json")
    hanja = [warning for warning in record["warnings"] if "Hanja were lost or cut" in warning]
    assert len(hanja) == 5 and record["warnings"][5].endswith(f"{ANIMAL}: and 18 more like it")
    assert len(record["warnings"]) == 6 and record["counts"] == {
        KOREAN: 666, KO_EN: 119, EN_KO: 227, GROUPS: 227, ANIMAL: 416,
    }  # fmt: skip


@pytest.mark.parametrize("name", BY_NAME)
def test_cp949_and_a_byte_order_mark_are_read_as_their_utf_8_twin(name, root):
    manual, file = BY_NAME[name], dictionary_of(root) / name
    plain, none = read_pairs(file.read_bytes(), manual)
    marked, nothing = read_pairs(b"\xef\xbb\xbf" + file.read_bytes(), manual)
    old, (warning,) = read_pairs(file.read_text(encoding="utf-8").encode("cp949"), manual)
    assert plain == marked == old and none == nothing == []
    assert not warning.error and warning.text.startswith("is CP949, not UTF-8")
    windows, _ = read_pairs(file.read_bytes().replace(b"\n", b"\r\n"), manual)
    assert windows == plain


def test_a_cp949_file_passes_and_refines_to_the_same_terms(root, run_program, load_program):
    refine = load_program("refine_01_medical_dict").main
    assert refine([]) == 0
    before = refined(root)
    for name in (KOREAN, GROUPS):
        put(dictionary_of(root), name, (dictionary_of(root) / name).read_text(encoding="utf-8").encode("cp949"))
    outcome = run_program("download_01_medical_dict")
    assert outcome.code == 0 and outcome.text.count("is CP949, not UTF-8") == 2
    assert refine(["--force"]) == 0 and refined(root) == before


def test_no_sense_of_a_repeated_key_is_lost(root, load_program):
    folder = dictionary_of(root)
    put(folder, KO_EN, flat([*words(10), ("경련", "Spasm"), ("경련", "Convulsion"), ("경련", "Cramp")]))
    put(folder, GROUPS, '{"A": {"Test word": "시험말"}, "A": {"Test term": "시험말"}, "B": {"Test term": "시험어"}}')
    put(folder, ANIMAL, '{"term": "구제역", "definition": "FMD", "definition": "Foot and mouth", "id": 3}\n')
    assert load_program("download_01_medical_dict").main([]) == 0
    assert load_program("refine_01_medical_dict").main([]) == 0
    terms = refined(root)
    for sense in ("Spasm", "Convulsion", "Cramp"):
        assert sense in terms["경련"]["definition"]
    assert terms["시험말"]["definition"] == "1. Test word 2. Test term" and terms["시험어"]["definition"] == "Test term"
    assert terms["구제역"]["definition"] == "1. FMD 2. Foot and mouth"


def test_every_line_is_the_keys_own():
    text = '\n{"A":\n{"Liver": "간", "Lung":\n"폐",\n\n"Brain": "뇌\\n\\n"},\n"B": {\n}, "C": {"Skin"\n: "피부"}}'
    pairs, problems = read_pairs(text.encode(), BY_NAME[GROUPS])
    assert problems == [] and [pair.line for pair in pairs] == [3, 3, 6, 8]


@pytest.mark.parametrize("name", [KOREAN, EN_KO])
def test_a_file_that_is_no_json_at_all_ends(name):
    for content in ("[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 10_000 + "}", '{"a"\n' * 5000, "{", '"', "{}{}"):
        pairs, problems = dictionary_check.check(content.encode(), BY_NAME[name])
        assert pairs == [] and any(problem.error for problem in problems)


# reading ------------------------------------------------------------------------------------------------


def test_reading_the_five_files(root):
    folder = dictionary_of(root)
    assert missing_files(folder) == []
    read = {m.name: list(read_manual_file(folder, m)) for m in MANUAL_FILES}
    assert {k: len(v) for k, v in read.items()} == {KOREAN: 100, KO_EN: 40, EN_KO: 50, GROUPS: 40, ANIMAL: 30}
    for name, (term, definition) in {
        EN_KO: ("고혈압", "Hypertension"),  # {english: korean}
        KO_EN: ("고혈압", "Hypertension"),  # {korean: english}
        GROUPS: ("넙다리뼈", "Femur"),
    }.items():
        assert (read[name][0].term, read[name][0].definition) == (term, definition)
    assert read[EN_KO][0].where.endswith("bilingual_medical_dict.json, line 2")
    assert {e.category for e in read[ANIMAL]} == {"veterinary"}
    (folder / EN_KO).unlink()
    assert missing_files(folder) == [EN_KO]
    with pytest.raises(PipelineError, match=f"{EN_KO}: no such file"):
        list(read_manual_file(folder, BY_NAME[EN_KO]))


# StarDict -----------------------------------------------------------------------------------------------


def star(folder: Path, stem: str, entries: list[tuple[str, str]], *, kind: str = "m", dz: bool = False, **more) -> Path:
    """A StarDict set of our own making; more: lines of its .ifo, and `synonyms` {word: number of its entry}."""
    synonyms = more.pop("synonyms", {})
    index, texts = b"", b""
    for word, text in sorted(entries, key=lambda entry: entry[0].encode()):
        index += word.encode() + b"\0" + struct.pack(">II", len(texts), len(text.encode()))
        texts += text.encode()
    folder.mkdir(parents=True, exist_ok=True)
    info = {"version": "2.4.2", "bookname": "시험 사전", "wordcount": len(entries), "idxfilesize": len(index)}
    info |= {"sametypesequence": kind, **more}
    ifo = folder / f"{stem}.ifo"
    ifo.write_text("StarDict's dict ifo file\n" + "".join(f"{k}={v}\n" for k, v in info.items()), encoding="utf-8")
    (folder / f"{stem}.idx{'.gz' if dz else ''}").write_bytes(gzip.compress(index) if dz else index)
    (folder / f"{stem}.dict{'.dz' if dz else ''}").write_bytes(gzip.compress(texts) if dz else texts)
    if synonyms:
        packed = b"".join(word.encode() + b"\0" + struct.pack(">I", number) for word, number in synonyms.items())
        (folder / f"{stem}.syn").write_bytes(packed)
    return ifo


KOREAN_ENTRIES = [(f"{k}병", f"{k}의 병을 말한다.") for k, _ in words(30)]


@pytest.fixture
def library():
    pytest.importorskip("pyglossary", reason="reads StarDict; optional")


@pytest.mark.parametrize("dz", [False, True], ids=["dict", "dict.dz"])
def test_a_stardict_set_is_converted_once_and_refined(dz, root, run_program, load_program, library):
    folder = dictionary_of(root)
    (folder / KOREAN).unlink()
    entries = [*KOREAN_ENTRIES, ("두근", "가슴이 두근거림"), ("두근", "Palpitation"), ("시험어", "한 줄\n두 줄")]
    star(folder, "korean_medical_dict", entries, dz=dz, synonyms={"두근거림증": 0})
    outcome = run_program("download_01_medical_dict")
    assert outcome.code == 0, outcome.text
    assert f"{KOREAN}: 34 entries converted from korean_medical_dict.ifo" in outcome.text
    record = records.read_json(record_of(root, "download_01_medical_dict"))
    assert record["counts"][KOREAN] == 34 and record["converted"] == {KOREAN: "korean_medical_dict.ifo"}
    assert (
        {Path(name).name for name in record["raw_files"]} == set(BY_NAME) == {Path(n).name for n in record["outputs"]}
    )
    made = (folder / KOREAN).stat().st_mtime_ns
    again = run_program("download_01_medical_dict")
    assert again.code == 0 and "already complete" in again.text and (folder / KOREAN).stat().st_mtime_ns == made
    assert load_program("refine_01_medical_dict").main([]) == 0
    terms = refined(root)
    assert terms["두근"]["definition"] == "1. 가슴이 두근거림 2. Palpitation"
    assert terms["시험어"]["definition"] == "한 줄 두 줄" and "두근거림증" in terms
    assert "질환가0병" in terms and not list(folder.glob(".*.part"))


def test_a_newer_set_is_converted_again_but_never_over_a_persons_own_file(root, load_program, library):
    folder, main = dictionary_of(root), load_program("download_01_medical_dict").main
    (folder / KOREAN).unlink()
    star(folder, "korean_medical_dict", KOREAN_ENTRIES)
    assert main([]) == 0
    ifo = star(folder, "korean_medical_dict", [*KOREAN_ENTRIES, ("새말", "새로 온 말")])
    os.utime(ifo, ns=(0, (folder / KOREAN).stat().st_mtime_ns + 10**9))
    assert main(["--force"]) == 0 and "새말" in (folder / KOREAN).read_text(encoding="utf-8")
    put(folder, KOREAN, SOUND)
    os.utime(folder / KOREAN, ns=(0, ifo.stat().st_mtime_ns - 10**9))
    with pytest.raises(
        PipelineError, match="is newer than korean_medical_dict.jsonl, which was not made from it or was"
    ):
        main(["--force"])
    assert (folder / KOREAN).read_text(encoding="utf-8") == SOUND
    os.utime(folder / KOREAN, ns=(0, ifo.stat().st_mtime_ns + 10**9))
    assert main(["--force"]) == 0 and (folder / KOREAN).read_text(encoding="utf-8") == SOUND


@pytest.mark.parametrize(
    "entries, name",
    [
        (KOREAN_ENTRIES, KOREAN),
        ([(english, korean) for korean, english in words(20)], EN_KO),
        (words(20), KO_EN),
    ],
    ids=["Korean", "English-Korean", "Korean-English"],
)
def test_another_name_becomes_what_its_languages_say(entries, name, root, load_program, library):
    folder, main = dictionary_of(root), load_program("download_01_medical_dict").main
    star(folder / "unpacked", "my.own", entries)
    with pytest.raises(
        PipelineError, match=rf"my\.own\.ifo would become {name} by its languages, but that file is there"
    ):
        main([])
    (folder / name).unlink()
    assert main([]) == 0
    assert len(list(read_manual_file(folder, BY_NAME[name]))) == len(entries)
    assert main([]) == 0  # what it became is known from .stardict.json
    assert not record_of(root, "x").exists() and missing_files(folder) == []


def test_a_set_for_the_categorised_file_has_its_title_as_the_category(root, library):
    folder = dictionary_of(root)
    (folder / GROUPS).unlink()
    star(folder, "bilingual_medical_dict_categorized", [(english, korean) for korean, english in words(20)])
    (conversion,), problems = stardict.convert(folder)
    assert problems == [] and list(json.loads(conversion.data)) == ["시험 사전"] and conversion.entries == 20
    assert not (folder / GROUPS).exists() and check_files(folder, {GROUPS: conversion.data}).errors == []


@pytest.mark.parametrize(
    "kind, definition, text",
    [
        ("m", "p < 0.05 & <닭>", "p < 0.05 & <닭>"),
        ("h", "<div><b>간</b>의 병<br>10<sup>6</sup>개 &amp; 더</div>", "간의 병\n10⁶개 & 더"),
        ("g", '<span color="blue">간</span>의 <i>병</i>', "간의 병"),
        ("x", "<k>간염</k><tr>hepa</tr><def>간의 <kref>병</kref></def><ex>예문</ex>", "간의 병\n예문"),
    ],
)
def test_mark_up_becomes_text(kind, definition, text, tmp_path, library):
    pairs, title = stardict.read(star(tmp_path, "a", [("간염", definition)], kind=kind))
    assert [(k, v.replace("\n\n", "\n")) for k, v in pairs] == [("간염", text)] and title == "시험 사전"


def test_definitions_of_two_kinds_are_joined(tmp_path, library):
    ifo = star(tmp_path, "a", [("간염", "m간의 병\nx\0h<b>Hepatitis</b>\0")], kind="")
    ifo.write_text(ifo.read_text(encoding="utf-8").replace("sametypesequence=\n", ""), encoding="utf-8")
    ((_, text),), _ = stardict.read(ifo)
    assert text.split() == ["간의", "병", "x", "Hepatitis"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


# what happens to a set -> what is said
DAMAGE = {
    "cut .dict.dz": (lambda f: cut(f / "a.dict.dz"), "a.dict.dz: damaged or cut gzip file"),
    "no gzip": (lambda f: (f / "a.dict.dz").write_bytes(b"x"), "a.dict.dz: damaged or cut gzip file"),
    "missing .dict": (lambda f: (f / "a.dict.dz").unlink(), "a.dict or a.dict.dz is missing beside it"),
    "missing .idx": (lambda f: (f / "a.idx.gz").unlink(), "a.idx or a.idx.gz or a.idx.dz is missing beside it"),
    "cut .dict": (
        lambda f: (f / "a.dict.dz").write_bytes(gzip.compress(b"x" * 50)),
        "a.ifo: the set cannot be read whole (Unable to read definition for word",
    ),
    "other .idx": (
        lambda f: (f / "a.idx.gz").write_bytes(gzip.compress(b"x\0" + bytes(8))),
        "a.ifo: its .idx has 10 bytes, but idxfilesize=",
    ),
    "wrong count": (
        lambda f: edit(f, "wordcount=30", "wordcount=31"),
        "a.ifo: its .idx has 30 headwords, but wordcount=31",
    ),
    "no count": (lambda f: edit(f, "wordcount=30\n", ""), "a.ifo: its .idx has 30 headwords, but wordcount=;"),
    "no .ifo": (lambda f: (f / "a.ifo").write_text("hello"), "a.ifo: no StarDict set, for it does not begin with"),
    "several parts": (
        lambda f: edit(f, "sequence=m", "sequence=tm"),
        "definitions in several parts (sametypesequence=tm)",
    ),
    "pictures": (
        lambda f: edit(f, "sequence=m", "sequence=w"),
        "a.ifo: the set cannot be read whole (Definition type 'w' is not supported",
    ),
    "offsets": (
        lambda f: edit(f, "sequence=m", "sequence=m\nidxoffsetbits=16"),
        "a.ifo: damaged (invalid idxoffsetbits",
    ),
    "not UTF-8": (
        lambda f: (f / "a.dict.dz").write_bytes(gzip.compress(b"\xff" * 5000)),
        "a.ifo: a text of the set is not UTF-8",
    ),
}


def edit(folder: Path, old: str, new: str) -> None:
    text = (folder / "a.ifo").read_text(encoding="utf-8")
    (folder / "a.ifo").write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_set_is_refused_in_words(case, root, load_program, library, capfd):
    folder = dictionary_of(root)
    (folder / KOREAN).unlink()
    star(folder, "a", KOREAN_ENTRIES, dz=True)
    damage, said = DAMAGE[case]
    damage(folder)
    before = sorted(folder.iterdir())
    with pytest.raises(PipelineError) as error:
        load_program("download_01_medical_dict").main([])
    assert said in str(error.value) and f"{KOREAN} is missing" in str(error.value)
    assert sorted(folder.iterdir()) == before and capfd.readouterr().err == ""


def test_two_sets_for_one_file_and_a_set_without_korean(root, library):
    folder = dictionary_of(root)
    (folder / KOREAN).unlink()
    star(folder, "a", KOREAN_ENTRIES)
    star(folder, "b", KOREAN_ENTRIES)
    star(folder, "c", [(f"word {i}", f"meaning {i}") for i in range(20)])
    conversions, (two, none) = stardict.convert(folder)
    assert [c.source for c in conversions] == ["a.ifo"]
    assert "b.ifo and a.ifo both become korean_medical_dict.jsonl" in two
    assert "c.ifo: neither its headwords nor its definitions are Korean" in none


def test_a_converted_file_is_checked_and_nothing_is_written_while_another_is_broken(root, run_program, library):
    folder = dictionary_of(root)
    (folder / KOREAN).unlink()
    star(folder, "korean_medical_dict", [(k, "준비 중") for k, _ in words(20)])
    put(folder, EN_KO, "{}")
    outcome = run_program("download_01_medical_dict")
    assert outcome.code == 2 and "'준비 중' stands in 20 of 20 entries" in outcome.text
    assert f"{EN_KO} has no entries" in outcome.text and "is missing" not in outcome.text
    assert not (folder / KOREAN).exists() and not (folder / ".stardict.json").exists()


def test_without_the_library_its_installation_is_named(root, monkeypatch):
    folder = dictionary_of(root)
    (folder / KOREAN).unlink()
    star(folder, "a", KOREAN_ENTRIES)
    monkeypatch.setitem(sys.modules, "pyglossary.plugins.stardict.reader", None)
    conversions, (problem,) = stardict.convert(folder)
    assert conversions == [] and "pip install 'pyglossary>=5.1,<5.2'" in problem


def test_the_library_leaves_the_process_as_it_was(tmp_path, run_program, library):
    import logging

    before = sys.excepthook, logging.getLoggerClass()
    stardict.read(star(tmp_path, "a", KOREAN_ENTRIES))
    assert (sys.excepthook, logging.getLoggerClass()) == before


def test_the_range_that_the_message_names_is_the_one_of_the_requirements():
    requirements = (Path(__file__).resolve().parents[1] / "requirements.txt").read_text(encoding="utf-8")
    assert [line for line in requirements.splitlines() if line.split("#")[0].strip() == stardict.LIBRARY]


def test_the_plan_does_not_miss_what_will_be_converted(root, load_program, library, capsys):
    folder = dictionary_of(root)
    (folder / KOREAN).unlink()
    plan = load_program("plan").main
    plan([])
    assert f"{KOREAN} is missing" in capsys.readouterr().out
    star(folder, "any", KOREAN_ENTRIES)
    plan([])
    assert "is missing" not in capsys.readouterr().out and not (folder / KOREAN).exists()
