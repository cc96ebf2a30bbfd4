"""Cases of two real parsers, read from their own test files: what they mean as plain text is what cleaning gives.

The files stay outside of the project. What is not to pass is listed with the reason; a case that begins to pass is
to be taken off its list.
"""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from medgemma_korean.text.clean import clean_text

FIXTURES = Path(__file__).resolve().parents[2].parent / "shared" / "real_data" / "markup_fixtures"
pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the fixtures of the parsers are not here")
DEBRIS = "{{{ }}} [[ ]] {{ || ''' [* [include [youtube #! [br] 파일: 분류:".split()


def listed(reasons: dict[str, str]) -> dict[str, str]:
    """{case: reason} of {reason: cases}"""
    return {case: reason for reason, cases in reasons.items() for case in cases.split()}


# MediaWiki: mwparserfromhell's tokens say what each character is ----------------------------------------

Token = tuple[str, dict]

NOT_MEDIAWIKI = listed(
    {
        "a title that no page can have: braces and what stands in them vanish, here as everywhere": """
            arguments/invalid_braces templates/newlines_mid templates/newlines_start_mid templates/newlines_mid_end
            templates/newlines_start_mid_end templates/newlines_within_template_name_unnamed_param
            templates/newlines_within_template_name_named_param_value
            templates/newlines_within_template_name_named_param_name
            templates/newlines_within_template_name_named_param_name_param_value
            templates/newlines_wildcard_redux_invalid templates/invalid_blank_pipe
            templates/invalid_blank_whitespace_pipe templates/invalid_name_left_brace_middle
            templates/invalid_name_right_brace_middle templates/invalid_name_left_braces
            templates/invalid_name_left_bracket_middle templates/invalid_name_right_bracket_middle
            templates/invalid_name_left_bracket_start templates/invalid_name_right_bracket_start
            templates/invalid_param_name_double_left_braces templates/invalid_param_name_double_braces
            templates/invalid_left_angle_bracket templates/invalid_right_angle_bracket""",
        "mark-up that is shown as it is written is no prose: it is cleaned like any other": """
            tags/unparsable tags/unparsable_complex tags/unparsable_attributed tags/unparsable_incomplete
            tags/unparsable_entity tags/unparsable_entity_incomplete_2 tags/capitalization
            tags/unparsable_incomplete_close tags/unparsable_with_intermediates
            tags/unparsable_with_intermediates_normalize""",
        "no name of HTML: in prose such brackets hold the titles of books": """
            tags/backslash_premature_before tags/backslash_premature_after tags/backslash_premature_middle
            tags/backslash_adjacent tags/backslash_endquote tags/backslash_double tags/backslash_triple
            tags/backslash_unaffecting tags/non_ascii_full""",
        "a tag inside of a tag, which only parsers are tested with": """
            tags/nested_tag tags/nested_tag_quoted tags/nested_troll_tag_quoted tags/nested_tag_selfclosing
            tags/single_nested_selfclosing""",
        "a known tag without its partner vanishes too, and ends its line": """
            tags/incomplete_open_text_wrong_close tags/single_close""",
        "an address is removed wherever it stands, in a title too": """
            external_links/brackets_title_like_url external_links/brackets_recursive
            external_links/brackets_recursive_2""",
        "an address ends before brackets and quotation marks: Korean sentences go on behind them": """
            external_links/close_paren_after_excluded external_links/close_paren_after_included
            external_links/brackets_open_bracket_inside external_links/url_not_terminated_by_single_quote""",
        "mark-up is resolved before addresses are removed, so that none of it is taken for a part of one": """
            external_links/wikilink_in_url external_links/external_link_in_url
            external_links/url_terminated_by_two_single_quotes""",
        "between brackets, all up to a space is the address": """
            external_links/brackets_terminated_by_double_quote
            external_links/brackets_terminated_by_two_single_quotes
            external_links/brackets_terminated_by_left_angle external_links/brackets_terminated_by_right_angle""",
        "the beginning of an address is no text either": """
            external_links/unclosed_scheme_colon_slashes external_links/incomplete_scheme_colon_slashes
            external_links/brackets_scheme_slashes_but_no_url external_links/brackets_scheme_title_but_no_url""",
        "a scheme that no text names": """
            external_links/slashes_optional external_links/short external_links/url_preceded_by_non_word_character""",
        "an e-mail address, with a wrong scheme before it": """
            external_links/slashes_missing external_links/slashes_missing_brackets""",
        "no heading in MediaWiki: text follows on its line": "headings/text_after",
        "no character has this number": """
            html_entities/invalid_numeric_out_of_range_1 html_entities/invalid_numeric_out_of_range_2
            html_entities/invalid_numeric_out_of_range_3 html_entities/invalid_numeric_out_of_range_4""",
        "control characters go first, and the comment is whole": "comments/incomplete_partial_close",
    }
)


def mediawiki_cases() -> Iterator[tuple[str, str, list[Token]]]:
    """(file/name, input, tokens) of all `.mwtest` files."""
    for file in sorted((FIXTURES / "mwparserfromhell").glob("*.mwtest")):
        for block in re.split(r"\n+---\n+", file.read_text(encoding="utf-8")):
            fields = dict(line.split(":", 1) for line in block.strip().split("\n"))
            # As their reader does: the escapes of Python, and every other character as it is.
            text = fields["input"].strip()[1:-1].encode("raw_unicode_escape").decode("unicode_escape")
            calls = ast.parse(fields["output"].strip(), mode="eval").body.elts
            tokens = [(call.func.id, {k.arg: ast.literal_eval(k.value) for k in call.keywords}) for call in calls]
            yield f"{file.stem}/{fields['name'].strip()}", text, tokens


def meaning(tokens: list[Token]) -> str:
    """The plain text of tokens: templates, comments, references and addresses are none."""
    open_spans: list[list[str]] = [["", ""]]  # kind, text
    tags: list[str] = []

    def begin(kind: str) -> None:
        open_spans.append([kind, ""])

    def end(shown: bool = True) -> None:
        text = open_spans.pop()[1]
        open_spans[-1][1] += text if shown else ""

    def end_tag_part() -> None:
        kind, text = open_spans.pop()
        if kind == "name":
            tags[-1] = text.strip().lower()

    for name, values in tokens:
        match name:
            case "Text":
                open_spans[-1][1] += values["text"]
            case "ArgumentOpen" | "TemplateOpen" | "CommentStart" | "HeadingStart" | "WikilinkOpen":
                begin("")
            case "ArgumentSeparator":
                open_spans[-1][1] += "|"
            case "WikilinkSeparator":
                open_spans[-1][1] = ""
            case "ExternalLinkOpen":
                begin("address")
            case "ExternalLinkSeparator":
                open_spans[-1] = ["title", ""]
            case "ExternalLinkClose":
                end(shown=open_spans[-1][0] == "title")
            case "ArgumentClose" | "HeadingEnd" | "WikilinkClose":
                open_spans[-1][1] = open_spans[-1][1].strip() if name == "HeadingEnd" else open_spans[-1][1]
                end()
            case "TemplateClose" | "CommentEnd":
                end(shown=False)
            case "HTMLEntityStart":
                begin("")
            case "HTMLEntityNumeric" | "HTMLEntityHex":
                open_spans[-1][1] += "#" if name == "HTMLEntityNumeric" else "x"
            case "HTMLEntityEnd":
                open_spans[-1][1] = html.unescape(f"&{open_spans[-1][1]};")
                end()
            case "TagOpenOpen":
                tags.append("")
                begin("tag")
                begin("name")
            case "TagAttrStart":
                end_tag_part()
                begin("attribute")
            case "TagCloseOpen":
                end_tag_part()
            case "TagCloseSelfclose":
                end_tag_part()
                open_spans.pop()
                open_spans[-1][1] += "\n" if tags.pop() in ("br", "li") else ""
            case "TagOpenClose":
                begin("closing name")
            case "TagCloseClose":
                open_spans.pop()
                tag = tags.pop()
                open_spans[-1][1] = f"\n{open_spans[-1][1]}\n" if tag in ("br", "li") else open_spans[-1][1]
                end(shown=tag != "ref")
            case "TemplateParamSeparator" | "TemplateParamEquals" | "TagAttrEquals" | "TagAttrQuote":
                pass
            case _:
                raise AssertionError(name)
    ((_, text),) = open_spans
    return text


def words(text: str) -> str:
    """Lines with letters, spaces and the braces and brackets of mark-up that nothing closes left out."""
    lines = [" ".join(line.split()) for line in re.sub(r"\{{2,}|\}{2,}|\[\[|\]\]", "", text).split("\n")]
    return "\n".join(line for line in lines if re.search(r"\w", line))


def test_mediawiki_cases_mean_what_the_parser_says() -> None:
    found, wrong = {}, {}
    for case, text, tokens in mediawiki_cases():
        expected, got = words(meaning(tokens)), words(clean_text(text, "wikitext"))
        found[case] = expected == got
        if expected != got and case not in NOT_MEDIAWIKI:
            wrong[case] = (text, expected, got)
    assert wrong == {}
    assert len(found) > 350 and sum(found.values()) >= 270
    assert [case for case in NOT_MEDIAWIKI if found[case]] == []
    assert sum(case.startswith("templates/") and found[case] for case in found) >= 70


def test_mediawiki_cases_leave_no_braces() -> None:
    """Whatever a case is, none of its templates, links and parameters leaves a brace or bracket behind."""
    marks = re.compile(r"\{\{|\}\}|\[\[|\]\]")
    left = {case for case, text, _ in mediawiki_cases() if marks.search(clean_text(text, "wikitext"))}
    # Two single brackets, of which an address stood between.
    assert left == {"external_links/brackets_open_bracket_inside"}


def test_the_parser_s_own_plain_text() -> None:
    source = (FIXTURES / "mwparserfromhell/test_wikicode.py").read_text(encoding="utf-8")
    body = source.split("def test_strip_code():")[1]
    text, expected = (
        ast.literal_eval(re.search(pattern, body)[1]) for pattern in (r'parse\((".*")\)', r'assert (".*") ==')
    )
    assert clean_text(text, "wikitext") == expected


# NamuMark: what a renderer shows is kept, and no mark-up is -------------------------------------------------

NOT_NAMUMARK = listed(
    {
        "an example of the syntax, on a page about it: what it shows is mark-up": """
            TableCellAdjacentLiteralCodeSpansRemainSeparate SyntaxAdvancedRendersPreCodeWithoutParsingBody
            TableCellsRenderMultilineLiteralAndNestedWikiTables RubyMacroRendersRubyElement
            EscapedFootnoteMarkupInWikiBlockRendersAsExampleText
            CommentLinesDoNotSplitTablesButArePreservedInLiteralExamples TheadSortableTableStaysInsideListItem""",
        "the caption of a folded part, mostly an invitation to unfold it": """
            EmbeddedBlockWikiAfterParagraphTextCollectsNestedTable FoldingAdvancedRendersDetailsInTables
            TableCellWikiKeepsBlankSeparatedInnerTablesAndFollowingClearfix""",
        "footnotes are removed with their marks": """
            FootnotesRenderReferencesAndMacroList FootnotesContainNestedLinksAndMacros""",
        "struck-out text is removed": "UnknownBracketMacrosRenderAsLiteralText",
        "HTML in a page is removed": "InlineAdvancedHtmlRendersRawTagsAndNamedEntities",
        "the name of a file or an inclusion, not what it shows": """
            NestedFileLinkLabelRendersWithoutBrokenAnchor FootnoteMacroDoesNotNestBlockInParagraph""",
        "a style sheet": """
            StyleAdvancedAndWikiAttributesRender WikiTagAAndOnclickRenderTabUiMarkup
            FootnoteIncludeAndTrailingStyleRenderInOrder TableClassRowClassAndCellClassRender
            WikiOnclickAttributeRendersDataOnclick TableCellAdjacentStyleAndWikiBlocksRenderOnclickToggles""",
    }
)
SPOKEN_OF = {
    "StyleAdvancedAndWikiAttributesRender": ["분류:"],  # the word before a list of links, no link itself
    "WikiBlockTableListDocumentationCases": ["#!"],  # a sentence about "#!wiki 문법"
}


def c_string(source: str) -> str:
    """The value of C string literals that stand one after the other."""
    literals = re.findall(r'"((?:[^"\\]|\\.)*)"', source)
    return "".join(re.sub(r'\\(["\\n])', lambda match: "\n" if match[1] == "n" else match[1], s) for s in literals)


LITERALS = r'((?:\s*"(?:[^"\\]|\\.)*")+)'


def namumark_cases() -> Iterator[tuple[str, str, list[str]]]:
    """(name, page, words that its rendering is to show)"""
    source = (FIXTURES / "namumark/ShapeLayer_renderer_test.cc").read_text(encoding="utf-8")
    for test in re.split(r"^TEST\(", source, flags=re.MULTILINE)[1:]:
        page = c_string(re.search(rf"const char \*input =\s*{LITERALS}\s*;", test)[1])
        shown = []
        for fragment in map(c_string, re.findall(rf"EXPECT_NE\(\s*html\.find\(\s*{LITERALS}", test)):
            # What stands between tags; a fragment may begin or end in the middle of one.
            text = re.sub(r"<[^<>]*$", "", re.sub(r"^[^<]*>", "", fragment)) if "<" in fragment else ""
            shown += re.findall(r"[가-힣A-Za-z0-9]{2,}", html.unescape(re.sub(r"<[^<>]*>", " ", text)))
        yield re.match(r"\w+, (\w+)\)", test)[1], page, shown


def test_namumark_cases_keep_what_a_reader_sees() -> None:
    cases = list(namumark_cases())
    lost, left = {}, {}
    for name, page, shown in cases:
        got = clean_text(page, "namumark")
        lost[name] = [word for word in shown if word not in got]
        left[name] = [mark for mark in DEBRIS if mark in got]
    assert {name: gone for name, gone in lost.items() if gone and name not in NOT_NAMUMARK} == {}
    assert {name: marks for name, marks in left.items() if marks} == SPOKEN_OF
    assert [name for name in NOT_NAMUMARK if not lost[name]] == []
    assert len(cases) >= 75 and sum(len(shown) for _, _, shown in cases) > 400


@pytest.mark.parametrize("at", range(4))
def test_lists_in_quotes_and_headings_in_literals(at: int) -> None:
    source = (FIXTURES / "namumark/jhk1090_index.test.ts").read_text(encoding="utf-8")
    pages = re.findall(r"const text = `([^`]*)`", source)
    assert len(pages) == 4
    assert clean_text(pages[at], "namumark") == ("list" if "list" in pages[at] else "asdf")


# real pages ---------------------------------------------------------------------------------------------


def test_real_pages_lose_no_prose_after_a_bar() -> None:
    """Every label of a link and every cell of a table is left, but for those in footnotes and struck-out text."""
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = FIXTURES.parent / "01_raw" / "00_korean" / "namu_wiki"
    pages = [page for file in folder.glob("*.parquet") for page in parquet.read_table(file)["text"].to_pylist()]
    label = re.compile(r"\[\[[^\[\]|\n:]{1,80}\|([가-힣A-Za-z0-9 ]{2,60})\]\]")
    cell = re.compile(r"\|\|(?:<[^<>\n]*>)*[ ]*([가-힣][가-힣A-Za-z0-9 ,.()]{5,80}?)[ ]*\|\|")
    removed = re.compile(r"\[\*[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]|~~[^~\n]*~~|--[^\n]*?--|^##.*$", re.MULTILINE)
    number, lost = 0, []
    for page in pages:
        got = " ".join(clean_text(page, "namumark").split())
        for found in (*label.findall(removed.sub("", page)), *cell.findall(removed.sub("", page))):
            number += 1
            lost += [found] if " ".join(found.split()) not in got else []
    assert len(pages) == 15 and number > 3000 and lost == []
