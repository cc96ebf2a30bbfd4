"""Cleaning: exact text per rule set, personal data removed, lab values, dates, doses and codes untouched."""

from __future__ import annotations

import time
import unicodedata

import pytest

from medgemma_korean.text.clean import (
    clean_batch,
    clean_text,
    limit_marks,
    normalise_block,
    normalise_line,
    remove_personal,
    rules_for,
)


def test_rules_follow_the_raw_folder() -> None:
    assert rules_for("namu_wiki") == "namumark"
    assert rules_for("wikipedia-korean") == "wikitext"
    assert rules_for("00_english_replay") == "wikitext"
    assert rules_for("c4_korean") == rules_for("anything else") == "web"


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown cleaning rules 'html'"):
        clean_text("글", "html")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (unicodedata.normalize("NFD", "혈압"), "혈압"),
        ("가\u200b나\u202e다\ufeff라\u00ad마\ufffd\ue000", "가나다라마"),
        ("가\x00\x07나\ud800다", "가나다"),
        ("가\u034f나\u115f다\u1160라\u17b4마\u180b바\u180f사", "가나다라마바사"),
        ("가\U000e0100나\U000e0020다\U000e01ef라\U000f0000마\U0010ffff😀", "가나다라마😀"),
        # NFC again, after what stood between the parts of a syllable is gone.
        ("\u1112\u200b\u1161\u034f\u11ab", "한"),
        ("가\u00a0\u3000나\t다", "가 나 다"),
        ("가\r\n나\u2028다", "가 나 다"),
        ("  여러   칸  ", "여러 칸"),
        # NFC, not NFKC: units, circled numbers and full-width forms stay as they are.
        ("５㎎ ① Ⅱ", "５㎎ ① Ⅱ"),
        ("", ""),
    ],
)
def test_normalise_line(raw: str, expected: str) -> None:
    assert normalise_line(raw) == expected


def test_normalise_block_keeps_lines_and_one_blank() -> None:
    assert normalise_block("  가 \n\n\n \n 나\r\n다\n") == "가\n\n나\n다"


def test_combining_marks_are_limited_before_normalising() -> None:
    assert limit_marks("a" + "\u0301" * 100 + "b") == "a" + "\u0301" * 30 + "b"
    assert limit_marks("가" + "\u0301" * 30) == "가" + "\u0301" * 30
    # Marks above the first plane, and signs that become marks in NFKC; cuneiform is no mark, whatever its plane.
    assert limit_marks("a" + "\U0001e8d0\U0001d165" * 50) == "a" + "\U0001e8d0\U0001d165" * 15
    assert limit_marks("か" + "\uff9e\u0301" * 50) == "か" + "\uff9e\u0301" * 15
    assert limit_marks("\U00012000" * 100) == "\U00012000" * 100
    assert limit_marks("\U00012000\u0301" * 100) == "\U00012000\u0301" * 100


def test_marks_above_the_first_plane_end_quickly() -> None:
    text, begun = "가나다 " * 50 + "\U0001e8d0\U0001d165" * 60_000, time.process_time()
    assert clean_text(text, "web") == "가나다 " * 50 + "\U0001d165" * 15 + "\U0001e8d0" * 15
    assert time.process_time() - begun < 1


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("자세한 내용은 https://example.org/a?b=1&c=%EA 참고", "자세한 내용은 참고"),
        ("누리집(https://example.org)에서 본다", "누리집에서 본다"),
        ("누리집https://example.org/경로에서", "누리집경로에서"),
        ("www.example.org에서 본다.", "본다."),
        ("보도 <http://example.org/x>이다", "보도이다"),
        ("끝이다(출처: http://a.bc/d).", "끝이다."),
        ("주소는 http://a.bc/d.", "주소는."),
        ("메일은 hong.gil-dong@mail.example.co.kr로 보낸다", "메일은 보낸다"),
        ("메일(a_b@c.kr)로", "메일로"),
        ("골뱅이 @사용자 그리고 a@b 는 남는다", "골뱅이 @사용자 그리고 a@b 는 남는다"),
        ("전화 010-1234-5678로", "전화로"),
        ("자료는 www.cdc.example.gov에서 본다.", "자료는 본다."),
        ("문의: hong@example.com으로", "문의:"),
        ("경찰 1577-1389에 알린다", "경찰에 알린다"),
        ("링크는bit.ly/3abcD입니다", "링크는입니다"),
        ("열린 방 open.kakao.com/o/gAbc 로", "열린 방 로"),
        (
            "Amazon.com 이사회, 농도 3.5/2.1, pH 7.4/7.2, e.g. 1.5 mg/mL",
            "Amazon.com 이사회, 농도 3.5/2.1, pH 7.4/7.2, e.g. 1.5 mg/mL",
        ),
        ("자료 ftp://example.org/a 와 hxxp://example.org/b", "자료 와"),
        ("표 ( https://example.org/a )를", "표를"),
        ("☎ 1544 1234, 상담전화 15881234", "☎, 상담전화"),
        ("열량 1588 1234와 1600 2000", "열량 1588 1234와 1600 2000"),
        ("전화 01023456789 끝", "전화 끝"),
        ("전화 010 1234 5678, 011-234-5678", "전화,"),
        ("전화: 010.1234.5678", "전화:"),
        ("전화 02-123-4567 / 031-1234-5678", "전화 /"),
        ("전화 (02) 123-4567", "전화"),
        ("전화 02)123-4567 끝", "전화 끝"),
        ("전화 070-1234-5678, 0505-123-4567, 080-123-4567", "전화,,"),
        ("국제 +82-10-1234-5678 번", "국제 번"),
        ("국제 +82 2 1234 5678 번", "국제 번"),
        ("상담 전화 1588-1234 연중무휴", "상담 전화 연중무휴"),
        ("고객센터: 1600-2000", "고객센터:"),
        ("대표번호 1899-0000", "대표번호"),
        ("공단(1644-8000)과 경찰 1577-1389에", "공단과 경찰에"),
        ("주민번호 800101-1234567 이다", "주민번호 이다"),
        ("주민번호 800101-1****** 이다", "주민번호 이다"),
        ("외국인 991231 - 7654321 끝", "외국인 끝"),
        # A sign before the number.
        ("연락처:010-2345-6789", "연락처:"),
        ("TEL:02-345-6789", "TEL:"),
        ("FAX:031-234-5678", "FAX:"),
        ("(Tel.02-345-6789)", "(Tel.)"),
        ("T.010-2345-6789", "T."),
        ("홍길동/010-2345-6789", "홍길동/"),
        ("연락처:01023456789", "연락처:"),
        ("연락처-010-2345-6789", "연락처-"),
        ("콜센터:1588-1234", "콜센터:"),
        # Lists and ranges.
        ("02-345-6789~90", ""),
        ("010-2345-6789,010-3456-7890", ""),
        ("010-2345-6789/010-3456-7890", ""),
        ("01023456789,01034567890", ""),
        ("(02)345-6789/345-6780,1588-1234 끝", "끝"),
        ("02-345-6789,3층", ",3층"),
        # Spaces, brackets and spaces without hyphens.
        ("HP 010 - 2345 - 6789", "HP"),
        ("번호 010-23456789", "번호"),
        ("(010) 2345-6789", ""),
        ("(010)2345-6789, (02) 345 6789", ","),
        ("전화 02 1234 5678", "전화"),
        # Hyphens, and full-width forms.
        ("010‐2345‐6789 와 010−2345−6789 와 010—2345—6789", "와 와"),
        ("０１０－２３４５－６７８９ 끝", "끝"),
        ("전화：０２）３４５－６７８９", "전화："),
        ("hong＠example.com 으로", "으로"),
        ("+82‐10‐1234‐5678", ""),
        ("900101–1234567 이다", "이다"),
        ("900101 1234567 이다", "이다"),
        ("900101-1234567,910101-2234567/911231-1******", ",/"),
        ("９１１２３１－１２３４５６０", ""),
        # Entities come before what they spell.
        ("user&#64;example.com", ""),
        ("010&nbsp;1234&nbsp;5678", ""),
        ("010&#45;1234&#45;5678", ""),
        ("&lt;http://a.bc/d&gt; 끝", "끝"),
        ("&lt;b&gt;굵게&lt;/b&gt;", "<b>굵게</b>"),
    ],
)
def test_personal_data_is_removed(raw: str, expected: str) -> None:
    assert clean_text(raw, "web") == expected


@pytest.mark.parametrize(
    "text",
    [
        "혈압 120/80 mmHg, 맥박 72회/분, 체온 36.5℃, 호흡 20회/분",
        "Na-K-Cl 140-4.0-102 mEq/L, BUN/Cr 15/0.9 mg/dL",
        "백혈구 12,500/mm³, 혈색소 10.2 g/dL, 혈소판 250,000/mm³",
        "2021-03-02부터 2021.03.09까지, 2021/03/10 추적",
        "02-12-2020에 시행한 검사와 05-06-2021 결과",
        "amoxicillin 500-1000 mg을 8시간마다 7-10일",
        "0.5-1 mg/kg, 0.01-0.02%, 010 mg",
        "하루 1600-1800 kcal, 1800-2400 kcal의 식사, 면역글로불린 1600-5200, 범위 1544-2310",
        "1588-1599년의 전쟁, 1592-1598, 1600-1650",
        "KCD A00-B99, I10, E11.9, C50.9, ICD-10 F32.1, ICD-11 6A70",
        "CAS 50-78-2(아스피린), ATC N02BA01, EC 3.4.21.5",
        "N Engl J Med 2011;365:1599-1604, doi 10.1056/NEJMoa1101234",
        "ISBN 978-89-01-12345-6, NCT01012345678, PMID 01012345",
        "환자번호 12345678, 검체번호 2021-0302-1234",
        "GRCh38 chr7:117559590-117559593, rs1801133",
        "전자우편 없이 3@5 와 비율 1:2, 시야 20/20",
        "1800-1500=300 mL가 남았다",
        "성분 비율 2-3-4, 염색체 46,XY, HLA-B*15:02, CD4+/CD8+",
        "120800-1234567 은 생년월일이 아니다",
        "응급 전화는 119와 1339이다",
        "바코드 8801234567890, 이진수 01011010110과 0110011001",
        "산소 02-03 L/min, 0.25-0.5-1-2 단계 희석",
        # Values without a leading zero, ratios, ranges, codes and dates beside the signs that numbers may follow.
        "β=.010 .234 .5678, p=.02, OR .010 .2345 .6789, CI:.031-.234",
        "비율:02-345, 희석 1:010-2345-6789, 1,010-2345-6789, 농도~0.02-345-6789",
        "p.1599-1604, Lancet:1599-1604, pp.1600-1650, Lancet 2020;395:1054-1062",
        "검사/02-12-2020, 일자:02.12.2020, 시각:02:30~03:45, 내원일:2021.03.02",
        "값 02 1234 5678과 051 234 5678, 결과 02) 250 1000 mg, 031 1000 2000",
        "ICD-10:F32.1/E11.9, KCD:C50.9, CAS:50-78-2, CAS:7732-18-5, ATC/N02BA01, EC:3.4.21.5",
        "Na/K/Cl:140/4.0/102, BP:120/80, BUN/Cr:15/0.9, AST/ALT:30/25, 농도:0.5~1.0 mg/dL",
        "용량:500~1000 mg, 0.05~0.1 mg/kg/min, 투여:08-12-18시, 5-10-15 mg",
        "혈압 ５０ mmHg, ０.５～１.０ mg, 체온 ３６.５℃, 나트륨 １４０ mEq/L ＠",
        "120101 5 mL, 101231 0.5, 등록 101332 1234567, 개수 900101 1,234,567, 900101-12",
        "GSE120101 1234567, A900101-1234567, 2900101-1234567, 대상 120101 1234567.5",
        "0.900101-1234567, 물질 010-1-2345678, 염색체 02-345-67890, 바코드 0801-2345-67890",
    ],
)
def test_medical_numbers_survive(text: str) -> None:
    assert remove_personal(text) == text
    for rules in ("web", "wikitext", "namumark"):
        assert clean_text(text, rules) == text


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("앞<!-- 주석\n두 줄 -->뒤", "앞뒤"),
        ("앞<script>var a = 1;</script>뒤<STYLE>p {}</STYLE>끝", "앞뒤끝"),
        ('앞<ref name="a">출처</ref>가<ref name="b"/>나', "앞가나"),
        ("앞<!-- 열린 주석", "앞<!-- 열린 주석"),
        ("앞<ref>열린 각주", "앞<ref>열린 각주"),
        ("<p>문단</p><p class='x'>둘<br/>셋</p>", "문단\n\n둘\n셋"),
        ("<b>굵게</b> <span style='a'>글</span>", "굵게 글"),
        ("10<sup>6</sup>개, H<sub>2</sub>O, x<sup>abc</sup>", "10⁶개, H₂O, xabc"),
        # Not tags: a title, a name in angle brackets, and comparisons.
        ("<웰컴 백>과 <The Lancet>을 읽었다", "<웰컴 백>과 <The Lancet>을 읽었다"),
        ("p <0.05, a<b이고 c>d, Hb < 7 g/dL > 5", "p <0.05, a<b이고 c>d, Hb < 7 g/dL > 5"),
        ("A &amp; B &lt;C&gt; &nbsp;D&#8203; &#x41; &unknown; R&D", "A & B <C> D A &unknown; R&D"),
        ("가&amp;lt;나", "가&lt;나"),
        ("== 원인 ==\n본문", "원인\n본문"),
        ("==# 접힌 제목 #==\n=== 치료===\n======\n본문", "접힌 제목\n치료\n\n본문"),
        ("= 개요 =\n=5+3=\nBMI = 체중/키² = 24", "개요\n=5+3=\nBMI = 체중/키² = 24"),
    ],
)
def test_tags_entities_and_headings(raw: str, expected: str) -> None:
    assert clean_text(raw, "web") == expected


def test_web_text_keeps_what_is_markup_elsewhere() -> None:
    text = "정말~~ 좋아요~~ '''강조''' [[링크]] * 별표 #해시 -- 말줄임 --"
    assert clean_text(text, "web") == text


def test_web_separator_lines_go() -> None:
    assert clean_text("가\n-----\n나\n=====\n...\n다", "web") == "가\n\n나\n\n...\n다"


def test_namumark_page() -> None:
    raw = (
        "[[분류:질병]][include(틀:상위 문서, top1=질병)]\n[목차]\n== 개요 ==\n"
        "'''당뇨병'''([[영어|English]]: Diabetes[* [[라틴어]]에서 왔다.])은 [[혈당]]이 높은 [[질병|병]]이다.\n"
        "||<-2><bgcolor=#fff> {{{#red '''진단 기준'''}}} ||\n|| 공복 혈당 || 126 mg/dL 이상 ||\n\n"
        " * 자세한 것은 [[https://example.org|누리집]] 참고 ~~어렵다~~\n## 주석\n"
    )
    assert clean_text(raw, "namumark") == (
        "개요\n당뇨병(English: Diabetes)은 혈당이 높은 병이다.\n진단 기준\n공복 혈당 126 mg/dL 이상\n\n"
        "자세한 것은 누리집 참고"
    )


def test_clean_text_is_stable() -> None:
    raw = "== 제목 ==\n\n\n 가  나 <b>다</b> https://a.bc 010-1234-5678 \u200b\n 라"
    for rules in ("web", "wikitext", "namumark"):
        once = clean_text(raw, rules)
        assert clean_text(once, rules) == once


def test_batch_keeps_order_and_length() -> None:
    assert clean_batch(["가 ", "", " 나"], "web") == ["가", "", "나"]


def test_platform_templates_are_removed_from_web_text_alone() -> None:
    kept = "청원합니다.\n의료진의 처우를 개선해 주세요."
    raw = (
        "청원합니다.\n클린봇이 부적절한 표현을 감지한 댓글입니다.\nnan\n의료진의 처우를 개선해 주세요."
        "[본 게시물의 일부 내용이 국민 청원 요건에 위배되어 관리자에 의해 수정되었습니다]"
    )
    assert clean_text(raw, "web") == kept
    assert "클린봇" in clean_text(raw, "wikitext")
    assert clean_text("nan은 숫자가 아니다.\nnan", "web") == "nan은 숫자가 아니다."
