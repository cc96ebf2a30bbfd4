"""The markup scanner: exact text for every construct, nothing left on real pages, linear time on hostile input."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from medgemma_korean.text.clean import clean_batch, clean_text
from medgemma_korean.text.namumark import MAX_DEPTH, strip_markup

REAL_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "real_data"
MARKUP = "{{{ }}} [[ ]] {{ || ''' [* [include [youtube #! [br] 파일: 분류:".split()


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("[[당뇨병]]은 흔하다", "당뇨병은 흔하다"),
        ("[[당뇨병|제2형 당뇨]]", "제2형 당뇨"),
        ("[[당뇨병#s-2.1]]", "당뇨병"),
        ("[[:분류:내과]]", ""),
        ("[[파일:심장.png|width=300]]심장", "심장"),
        ("[[분류:의학]][[분류:내과]]본문", "본문"),
        ("[[심장|[[파일:심장.png]]]]의 판막", "의 판막"),
        ("{{{#red 주의}}}", "주의"),
        ("{{{#fff,#191919 밤}}}", "밤"),
        ("{{{+2 크게}}}", "크게"),
        ("{{{#ff0000 {{{-1 '''겹침'''}}}}}}", "겹침"),
        ("{{{그대로}}}", "그대로"),
        ("{{{#해시태그}}}", "#해시태그"),
        ('{{{#!wiki style="margin: -5px"\n본문}}}', "본문"),
        ('{{{#!wiki style="a" dark-style="b"\n{{{#fff 안}}}}}}', "안"),
        ('{{{#!wiki style="color: red" 한 줄}}}', "한 줄"),
        ("{{{#!folding [ 펼치기 · 접기 ]\n숨은 글}}}", "숨은 글"),
        ("앞{{{#!syntax python\nprint(1)}}}뒤", "앞뒤"),
        ("앞{{{#!html <b>x</b>}}}뒤", "앞뒤"),
        # The old box is prose in NamuMark; in MediaWiki the same braces hold a template.
        ("{{|상자 글|}}", "상자 글"),
        ("단어[* 각주 [[링크|글]] 와 [괄호] 까지.] 다음", "단어 다음"),
        ("가[*A 이름 있는 각주]나[*A]다", "가나다"),
        ("[include(틀:의학, 이름=값)]본문", "본문"),
        ("[목차][각주]본문[clearfix]", "본문"),
        ("[youtube(abc, width=320)]", ""),
        ("윗줄[br]아랫줄[BR]끝", "윗줄\n아랫줄\n끝"),
        ("[ruby(漢字, ruby=한자)]", "漢字"),
        ("[math(a^2 + b[1])]", "a^2 + b[1]"),
        ("[대괄호]는 글이다", "[대괄호]는 글이다"),
        ("'''굵게''' ''기울임'' '''''둘 다'''''", "굵게 기울임 둘 다"),
        ("__밑줄__ ~~취소~~ --취소--끝", "밑줄  끝"),
        ("1~2일, 3~4일", "1~2일, 3~4일"),
        ("가 --> 나 --> 다", "가 --> 나 --> 다"),
        ("키 5'10''", "키 5'10''"),
        ("백혈구 10^^9^^/L, H,,2,,O, Ca^^2+^^", "백혈구 10⁹/L, H₂O, Ca²⁺"),
        ("재임^^(2008)^^, 상표^^TM^^, ^^2008^^", "재임(2008), 상표TM, 2008"),
        ("||<-2><tablewidth=100%><bgcolor=#fff> 혈압 ||<:>120/80||", "혈압  120/80 "),
        ("||<#fff><|3>칸||<웰컴 백>||", "칸 <웰컴 백> "),
        ("|표 제목| 칸 ||", "표 제목  칸  "),
        ("## 주석 {{{\n본문", "본문"),
        (" * 하나\n  * 둘\n 1. 셋\n> 인용", "하나\n둘\n셋\n인용"),
        ("----\n본문", "\n본문"),
        ("윤상([[파일:a.png]], 1968년)", "윤상(1968년)"),
        ("main()은 함수이다", "main()은 함수이다"),
    ],
)
def test_namumark_construct(raw: str, expected: str) -> None:
    assert strip_markup(raw, "namumark") == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("'''당뇨병'''은 {{lang|en|diabetes}} [[질병|병]]이다", "당뇨병은  병이다"),
        ("{{틀|{{안}}|b}}본문", "본문"),
        ("{|class=wikitable\n|-\n| 칸\n|}\n본문", "\n본문"),
        ("{{틀\n|a=1\n|}}본문", "본문"),
        ("[[파일:a.jpg|thumb|설명 [[링크]]]]본문", "본문"),
        ("[[en:Diabetes]]본문", "본문"),
        ("[https://example.org 예시 누리집]과 [https://example.org]", "예시 누리집과 "),
        ("* 하나\n** 둘\n: 셋\n# 넷", "하나\n둘\n셋\n넷"),
        ("#넘겨주기 [[당뇨병]]", "#넘겨주기 당뇨병"),
        ("''The Lancet''에 실렸다", "The Lancet에 실렸다"),
        ("He said ``no'' and ``yes''.", "He said ``no'' and ``yes''."),
    ],
)
def test_wikitext_construct(raw: str, expected: str) -> None:
    assert strip_markup(raw, "wikitext") == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("앞 {{{#red 열린 채", "앞 열린 채"),
        ('앞 {{{#!wiki style="a"\n열린 채', "앞 열린 채"),
        ("앞 }}} 뒤 ]] 끝", "앞  뒤  끝"),
        ("[[링크 {{{#red 글]] 뒤}}}", "링크 글 뒤"),
        ("{{{+1 [[가}}} 나]]", "가 나"),
        ("[* 닫히지 않은 각주\n\n다음 문단은 [남는다].", "닫히지 않은 각주\n\n다음 문단은 [남는다]."),
        ("[[열린 채\n긴 본문 | 막대\n]] 끝", "열린 채\n긴 본문 | 막대\n끝"),
        ("[include(", "[include("),
    ],
)
def test_unbalanced_markup_keeps_its_text(raw: str, expected: str) -> None:
    assert strip_markup(raw, "namumark") == expected


def test_depth_beyond_the_limit_keeps_the_text() -> None:
    depth = 3 * MAX_DEPTH
    assert strip_markup("[[" * depth + "글" + "]]" * depth, "namumark") == "글"


def test_unknown_dialect_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown markup dialect 'markdown'"):
        strip_markup("글", "markdown")


def test_real_namuwiki_pages_leave_no_markup() -> None:
    folder = REAL_DATA / "01_raw" / "00_korean" / "namu_wiki"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(next(folder.glob("*.parquet"))).to_pylist()
    cleaned = clean_batch([row["text"] for row in rows], "namumark")
    left = {mark: sum(mark in text for text in cleaned) for mark in MARKUP}
    assert left == dict.fromkeys(MARKUP, 0)
    # Markup is about two fifths of these table-rich pages; losing more would be losing prose.
    kept = sum(map(len, cleaned)) / sum(len(row["text"]) for row in rows)
    assert 0.55 < kept < 0.65
    prose = "한국 거대 조직에서 직장생활을 할 때, 조직 내 약자로서 직면하게 되는 조직문화 부조리를 다룬다."
    assert any(prose in text for text in cleaned)


REPEATS = 20_000
HOSTILE = {
    "open_triple": "{{{" * REPEATS,
    "open_triple_many": "{{{" * 10 * REPEATS,
    "open_link": "[[" * REPEATS,
    "nested_foreign": "{{[[" * REPEATS + "}}]]" * REPEATS,
    "triple_then_link_closer": "{{{" * REPEATS + "]]" * REPEATS,
    "link_then_triple_closer": "[[" * REPEATS + "}}}" * REPEATS,
    "nested_text": "{{{x[[" * REPEATS + "}}" * REPEATS,
    "nested_size": "{{{+1 " * REPEATS + "가" + "}}}" * REPEATS,
    "link_bar": "[[a|" * REPEATS,
    "nested_links": "[[a|" * REPEATS + "]]" * REPEATS,
    "table_open": "\n{|" * REPEATS,
    "table_mixed": "{|\n" * REPEATS + "||}}}" * REPEATS,
    "comment": "<!-- " * REPEATS,
    "ref": "<ref>가 " * REPEATS,
    "script": "<script>가 " * REPEATS,
    "ref_closer": "</ref>" * REPEATS,
    "tag": "<b " * REPEATS,
    "tag_equals": "<b a=" * REPEATS,
    "bracket": "[a]" * 10 * REPEATS,
    "footnote": "[* " * REPEATS,
    "footnote_inner": "[* [b] " * REPEATS,
    "bracket_nested": "[" * REPEATS + "]" * REPEATS,
    "bracket_nested_many": "[가" * 10 * REPEATS + "]" * 10 * REPEATS,
    "include": "[include(" * REPEATS,
    "ruby": "[ruby(a" * REPEATS,
    "tilde": "~~ " * REPEATS,
    "tilde_text": "~~a " * REPEATS,
    "dash": "- " * REPEATS,
    "dash_text": "--a " * REPEATS,
    "underline": "__ a" * REPEATS,
    "caret": "^^a" * REPEATS,
    "comma": ",,a" * REPEATS,
    "quote": "''a'" * REPEATS,
    "cell": "||<" * REPEATS,
    "cell_attributes": "||" + "<a>" * REPEATS,
    "cell_real_attributes": "||" + "<:>" * REPEATS,
    "caption": "|a" * REPEATS,
    "heading": "= " * REPEATS,
    "heading_spaces": "= " + " " * REPEATS,
    "heading_many_spaces": ("= " + " " * 100) * (REPEATS // 100),
    "heading_hash_spaces": "=#" + " " * REPEATS + "a ",
    "heading_hash_repeated": ("=#" + " " * 100 + "a ") * (REPEATS // 100),
    "quote_mark": ">" * REPEATS,
    "email_dots": "a." * REPEATS + "@",
    "email_at": "a@" * REPEATS,
    "email_domain": "a@" + "b." * REPEATS,
    "email_long_domain": "a@" + "b" * REPEATS,
    "www": "www." * REPEATS,
    "http": "http://" * REPEATS,
    "http_dots": "http://" + "." * REPEATS,
    "http_bracket": "(http://" * REPEATS,
    "newlines": "\n " * REPEATS,
    "spaces": " " * 10 * REPEATS,
    "entity": "&amp;" * REPEATS,
    "entity_open": "&#" * REPEATS,
    "digits": "0" * REPEATS,
    "telephone": "02-" * REPEATS,
    "telephone_cut": "010-1234-" * REPEATS,
    "resident": "800101-1" * REPEATS,
    "jamo": "\u1112\u1161\u11ab" * 5 * REPEATS,
    "combining": "a" + "\u0301\u0323" * 5 * REPEATS,
    "parentheses": "( " * REPEATS,
    "long_line": "환자는 두통과 발열로 내원하였다. " * (3_000_000 // 19),
}


@pytest.mark.parametrize("rules", ["namumark", "wikitext", "web"])
def test_hostile_input_ends_quickly(rules: str) -> None:
    # The bound is generous: what it excludes are the quadratic rules, which took 10 s to minutes on these inputs.
    slow = {}
    for name, text in HOSTILE.items():
        start = time.perf_counter()
        clean_text(text, rules)
        seconds = time.perf_counter() - start
        if seconds > 5:
            slow[name] = seconds
    assert slow == {}


@pytest.mark.parametrize("rules", ["namumark", "wikitext", "web"])
def test_hostile_input_is_linear(rules: str) -> None:
    # Doubling the input doubles the time when linear and quadruples it when quadratic. Inputs below 20 ms are noise.
    quadratic = {}
    for name, text in HOSTILE.items():
        half = text[: len(text) // 2]
        times = []
        for part in (half, text):
            start = time.process_time()
            clean_text(part, rules)
            times.append(time.process_time() - start)
        if times[1] > 0.5 and times[1] > 3.5 * times[0]:
            quadratic[name] = times
    assert quadratic == {}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("무산되었다.[[https://example.org/a|#]] 이후", "무산되었다. 이후"),
        ("공언했으나([[https://example.org/a|#1]]), 실제로", "공언했으나, 실제로"),
        ("[[https://example.org/a|2]]번", "번"),
        ("[[어메이징 스파이더맨|#129]]에서", "#129에서"),
        ("[[https://example.org/a|보도]]에서", "보도에서"),
        ("1992년 11월 15일 ([age(1992-11-15)]세)생", "1992년 11월 15일생"),
        ("[age(1992-11-15)]세", "세"),
    ],
)
def test_references_and_ages_leave_nothing(raw: str, expected: str) -> None:
    assert strip_markup(raw, "namumark") == expected


def test_prose_in_brackets_costs_little() -> None:
    # Macros among them, so that the brackets are looked at.
    text, begun = "[가]" * 200_000 + "[br][목차]", time.process_time()
    assert strip_markup(text, "namumark") == "[가]" * 200_000 + "\n"
    assert time.process_time() - begun < 1
    text, begun = "[a]" * 200_000, time.process_time()
    assert strip_markup(text, "namumark") == text
    assert time.process_time() - begun < 0.15


def test_commas_between_lost_references() -> None:
    assert strip_markup("효능,, , 부작용, 용법", "wikitext") == "효능, 부작용, 용법"
