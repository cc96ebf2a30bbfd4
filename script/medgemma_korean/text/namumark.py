"""Strip NamuMark and MediaWiki markup in linear time, whatever the input.

A regular expression cannot match nested markup, and backtracking on unclosed markup takes minutes on a hostile page.
So one flat stack scanner resolves `{{{ }}}`, `[[ ]]` and `{{ }}`, a second one resolves `[ ]`, and what remains is
removed by expressions that are bounded or cannot backtrack.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# Deeper openers are dropped: real pages nest below 20, hostile ones 100,000 deep.
MAX_DEPTH = 256
# A link target is a page title (at most 255 bytes in both wikis); anything longer is text between stray brackets.
MAX_TARGET = 300
# A macro is short and on one line; longer text in brackets is prose that happens to start like one.
MAX_MACRO = 300
# Enough of a bracket to tell its name, of at most 15 characters.
MAX_NAME = 16

# "{{{" is listed before "{{" so that the longest delimiter wins.
_NAMU_DELIMITER = re.compile(r"(\{\{\{|\}\}\}|\[\[|\]\]|\{\{|\}\})")
# A run of braces, because only what is open tells how "}}}}" divides: "{{a|{{b}}}}" are two templates. "|}}" closes a
# template that ends in an empty argument, so the table closer must not be followed by "}".
_WIKI_DELIMITER = re.compile(r"(\{{2,}|\}{2,}|\[\[|\]\]|^\{\||^\|\}(?!\}))", re.MULTILINE)
_OPENER_OF = {"}}}": "{{{", "]]": "[[", "}}": "{{", "|}": "{|"}
_RUN = "{"  # the kind of MediaWiki's brace spans, whatever their width

_DROPPED_LINK = re.compile(r":?\s*(?:파일|분류|그림|틀|미디어|file|image|category|media)\s*:", re.IGNORECASE)
_LANGUAGE_LINK = re.compile(r"[a-z]{2,3}(?:-[a-z]{2,8})?:")
# "[[https://example.org/|#]]" and "|1]]" are a writer's references, of which a reader keeps nothing.
_REFERENCE_MARK = re.compile(r"#?[0-9]{0,2}")
_SECTION_ANCHOR = re.compile(r"#s-[0-9.]*[0-9]")
_STYLE_ATTRIBUTE = r'(?:[ \t]*[a-z-]{1,20}[ \t]*=[ \t]*"[^"\n]{0,2000}")'
# Removed before the scan, so that a group that is never closed leaves no header behind either.
_BRACE_HEADER = re.compile(
    r"\{\{\{(?:"
    rf"#!wiki(?:{_STYLE_ATTRIBUTE}+[ \t]*\n?|[^\n]*\n?)"
    r"|#!(?:folding|if)[^\n]*\n?"
    r"|#!(?!syntax|html|style)[a-z]+[ \t]*\n?"
    # A colour or size is followed by a space; some pages forget it before bold text or another group.
    r"|(?:#[A-Za-z0-9]{3,20}(?:,[ ]?#[A-Za-z0-9]{3,20})?|[+-][1-5])(?:[ \n]|(?=''|\[\[|\{\{\{)))"
)

_COMMENT_LINE = re.compile(r"##(?<![^\n]##)[^\n]*\n?")
_BRACKET = re.compile(r"(\[|\]|\n[ \t]*\n)")
_ALONE = "목차|tableofcontents|각주|footnote|clearfix|date|datetime|pagecount"
_CALLED = "include|youtube|kakaotv|tvpot|nicovideo|navertv|vimeo|age|dday|anchor"
_EMPTY_MACRO = re.compile(rf"(?:{_ALONE})(?:\([^\n]*\))?|(?:{_CALLED})\([^\n]*\)", re.IGNORECASE)
# Nearly all brackets are prose, which the name after them tells much faster than the expressions.
_MACRO_NAMES = frozenset(f"{_ALONE}|{_CALLED}|ruby|math|br".split("|"))
_MARKUP_BRACKET = re.compile(rf"\[(?:\*|(?:{'|'.join(sorted(_MACRO_NAMES))})[\[\](])", re.IGNORECASE)
# "1992년 11월 15일 ([age(1992-11-15)]세)": an age that only the wiki's server knows.
_AGE = re.compile(r"[ ]?\((?:만 ?)?\[age\([^\]\n]{0,20}\)\][ ]?세\)")
_RUBY = re.compile(r"ruby\(([^,\n]*)(?:,[^\n]*)?\)", re.IGNORECASE)
_MATH = re.compile(r"math\(([^\n]*)\)", re.IGNORECASE)

# One inner "~" or "-" is allowed (1~2, X-ray). A space after the opening mark means that it is no strike mark: "~~ " is
# a drawn-out vowel. Patterns start with a literal, which the engine finds fast, so look-behinds follow it.
_TILDE_STRIKE = re.compile(r"~~(?![~\s])(?:[^~\n]|~(?!~)){1,200}~~")
_DASH_STRIKE = re.compile(r"---?(?![-\s>])(?:[^-\n]|-(?!-)){1,200}(?:---(?!-)|--(?![->])|--(?=--[^-\s]))")
_ITALIC = re.compile(r"''([^'\n]{1,500}(?:'[^'\n]{1,500}){0,3})''")
# What is left of italic marks, but not the inches of 5'10''.
_STRAY_ITALIC = re.compile(r"''(?<![0-9]'')")
_UNDERLINE = re.compile(r"__([^_\n]{1,200}(?:_[^_\n]{1,200}){0,3})__")
_SUPERSCRIPT = re.compile(r"\^\^([^\s^](?:[^^\n]{0,60}[^\s^])?)\^\^")
_SUBSCRIPT = re.compile(r",,([^\s,](?:[^,\n]{0,60}[^\s,])?),,")
_CELL = re.compile(
    r"\|\|(?:[ ]?<(?:[:()]|-[0-9]{1,3}|[\^v]?\|[0-9]{1,3}|#[^<>\n]{1,40}|nopad|(?:row|col)?keepall"
    r"|(?:table|row|col)?[ ]?(?:align|width|height|bgcolor|bordercolor|color|style|class)[^<>\n]{0,120})>){0,20}",
    re.IGNORECASE,
)
# A line is found by the break before it, a literal, and not by "^": see `_each_line`.
_CAPTION = re.compile(r"\n[ ]*\|([^|\n]{1,200})\|(?=[^|\n])")
_RULE_LINE = re.compile(r"\n-{4,}[ ]*$", re.MULTILINE)
_NAMU_LINE_MARK = re.compile(
    # A list, a quotation, a list in a quotation, or a quotation in a list.
    r"\n(?:[ \t]*>[> \t]*(?:\*+[ \t]*)?|\*[ \t]+"
    r"|[ \t]+(?:(?:\*[ \t]*|(?:1|[aAiI])\.(?:#[0-9]{1,6})?[ \t]+)(?:>[> \t]*(?:\*+[ \t]*)?)?)?)"
)
_WIKI_LINE_MARK = re.compile(r"\n(?!#(?:redirect|넘겨주기))[*#:;]{1,20}[ \t]*", re.IGNORECASE)
_WIKI_EXTERNAL = re.compile(
    r"\[(?:(?:https?:|ftps?:)?//|mailto:)[^\s\[\]]{1,2000}(?:[ ]([^\[\]\n]{0,500}))?\]", re.IGNORECASE
)
_MAGIC_WORD = re.compile(r"__(?:NOTOC|TOC|NOEDITSECTION|FORCETOC|목차|목차숨김|목차강제)__")
# What a dropped template or file leaves behind: "윤상(, 1968년 …)" and "퍼니셔( )". A call such as main() stays.
_ORPHAN_COMMA = re.compile(r"\([ ]?[,;·][ ]?")
# Between references that were cut.
_LONE_COMMAS = re.compile(r",(?:[ ]?,){1,20}")
_EMPTY_PARENTHESES = re.compile(r"\((?<![A-Za-z0-9_]\()[ ]{0,3}\)")

_RAISED = str.maketrans("0123456789+-−n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻ⁿ")
_LOWERED = str.maketrans("0123456789+-−n", "₀₁₂₃₄₅₆₇₈₉₊₋₋ₙ")
# An exponent, an index or a charge; longer numbers, such as years, are small print and stay readable.
_SMALL_NUMBER = re.compile(r"[+−-]?[0-9]{1,3}[+−-]?|[+−-]|n")


def raised(content: str) -> str:
    """Return an exponent or charge as Unicode superscript, other content unchanged: 10^^6^^ must not become 106."""
    return content.translate(_RAISED) if _SMALL_NUMBER.fullmatch(content) else content


def lowered(content: str) -> str:
    """Return an index as Unicode subscript, other content unchanged: H,,2,,O becomes H₂O."""
    return content.translate(_LOWERED) if _SMALL_NUMBER.fullmatch(content) else content


def strip_markup(text: str, dialect: str) -> str:
    """Return the readable text of one page; `dialect` is "namumark" or "wikitext".

    Headings, tags, addresses and spacing are left to `clean`, which handles them for every source.
    Raises ValueError for another dialect.
    """
    if dialect == "namumark":
        return _strip_namumark(text)
    if dialect == "wikitext":
        return _strip_wikitext(text)
    raise ValueError(f"unknown markup dialect {dialect!r}: expected 'namumark' or 'wikitext'")


def _strip_namumark(text: str) -> str:
    if "##" in text:
        text = _COMMENT_LINE.sub("", text)
    if "[[" in text or "{{" in text or "}}" in text or "]]" in text:
        text = _BRACE_HEADER.sub("{{{", text)
        text = _resolve_spans(text, _NAMU_DELIMITER, _close_namu)
    if "[age(" in text:
        text = _AGE.sub("", text)
    if "[" in text:
        text = _resolve_brackets(text)
    if "~~" in text:
        text = _TILDE_STRIKE.sub("", text)
    if "--" in text:
        text = _DASH_STRIKE.sub("", _each_line(_RULE_LINE, "\n", text) if "----" in text else text)
    if "''" in text:
        text = _STRAY_ITALIC.sub("", _ITALIC.sub(r"\1", text.replace("'''", "")))
    if "__" in text:
        text = _UNDERLINE.sub(r"\1", text)
    if "^^" in text:
        text = _SUPERSCRIPT.sub(lambda match: raised(match[1]), text)
    if ",," in text:
        text = _SUBSCRIPT.sub(lambda match: lowered(match[1]), text)
    if "||" in text:
        text = _CELL.sub(" ", _each_line(_CAPTION, r"\n\1||", text))
    text = _each_line(_NAMU_LINE_MARK, "\n", text)
    return _drop_leftovers(text)


def _strip_wikitext(text: str) -> str:
    if "[[" in text or "{" in text or "}}" in text or "]]" in text or "|}" in text:
        text = _resolve_spans(text, _WIKI_DELIMITER, _close_wiki)
    if "//" in text or "mailto:" in text:
        text = _WIKI_EXTERNAL.sub(lambda match: match[1] or "", text)
    # English news quotes ``like this'', where the marks are no italics.
    if "''" in text and "``" not in text:
        text = _ITALIC.sub(r"\1", text.replace("'''", ""))
    if "__" in text:
        text = _MAGIC_WORD.sub("", text)
    if "----" in text:
        text = _each_line(_RULE_LINE, "\n", text)
    if ",," in text or ", ," in text:
        text = _LONE_COMMAS.sub(",", text)
    text = _each_line(_WIKI_LINE_MARK, "\n", text)
    return _drop_leftovers(text)


def _each_line(line: re.Pattern[str], replacement: str, text: str) -> str:
    """Replace what `line`, which begins with a line break, finds in every line, the first one too.

    The engine finds a literal fast, while "^" makes it try every character.
    """
    return line.sub(replacement, f"\n{text}")[1:]


def _drop_leftovers(text: str) -> str:
    return _EMPTY_PARENTHESES.sub("", _ORPHAN_COMMA.sub("(", text)) if "(" in text else text


def _resolve_spans(text: str, delimiter: re.Pattern[str], close: Callable[[str, list[str]], str]) -> str:
    """Replace each matched span by what `close(closer, pieces)` returns; unmatched delimiters vanish, their text stays.

    One flat output list with a start mark per open span: dissolving an opener costs nothing, because its text already
    stands in the list. A buffer per level would be copied on every dissolve, which is quadratic.
    """
    pieces = delimiter.split(text)
    output: list[str] = [pieces[0]]
    opened: list[tuple[str, int, int]] = []  # kind, where it starts in the output, how wide it is
    open_count = dict.fromkeys([*_OPENER_OF.values(), _RUN], 0)
    runs = delimiter is _WIKI_DELIMITER
    for position in range(1, len(pieces), 2):
        token, following = pieces[position], pieces[position + 1]
        run = runs and token[0] in "{}" and token != "{|"
        opener = (_RUN if token[0] == "}" else None) if run else _OPENER_OF.get(token)
        if opener is None:
            if len(opened) < MAX_DEPTH:
                kind = _RUN if run else token
                opened.append((kind, len(output), len(token)))
                open_count[kind] += 1
        width = len(token)
        # The counter answers "is one open?" at once; searching the stack for every foreign closer is quadratic.
        while opener and width > 1 and open_count[opener]:
            while True:
                kind, start, wide = opened.pop()
                open_count[kind] -= 1
                if kind == opener:
                    break
            # Three braces are a parameter, two a template; what is left of a wider opener stays open.
            taken = min(wide, width, 3) if run else width
            output[start:] = [close(token[:taken], output[start:])]
            width -= taken
            if run and wide - taken > 1:
                opened.append((kind, start, wide - taken))
                open_count[kind] += 1
        if following:
            output.append(following)
    return "".join(output)


def _close_namu(closer: str, pieces: list[str]) -> str:
    if not pieces:
        return ""
    if closer == "]]":
        return _link_text("".join(pieces))
    if closer == "}}}":
        return "" if pieces[0].startswith(("#!syntax", "#!html", "#!style")) else "".join(pieces)
    # NamuMark has no templates in braces: "{{|boxed text|}}" is prose.
    return "".join(pieces).strip("|")


def _close_wiki(closer: str, pieces: list[str]) -> str:
    if closer == "]]":
        content = "".join(pieces)
        return "" if _LANGUAGE_LINK.match(content) else _link_text(content)
    if closer == "}}}":
        return "".join(pieces)
    return ""


def _link_text(content: str) -> str:
    """Return what a reader sees of `[[content]]`."""
    target, bar, label = content.partition("|")
    if ":" in target and _DROPPED_LINK.match(target[:40]):
        # With a colon before it, it is no file or category but a link to one, which shows its label.
        return label if target.startswith(":") else ""
    # Stray brackets far apart are no link, and the text between them is prose.
    if "\n" in target or len(target) > MAX_TARGET:
        return content
    if bar:
        return "" if len(label) <= 3 and "://" in target and _REFERENCE_MARK.fullmatch(label) else label
    target = _SECTION_ANCHOR.sub("", target)
    return target.lstrip(":/").removeprefix("wiki:").removeprefix("위키백과:")


def _resolve_brackets(text: str) -> str:
    """Resolve NamuMark macros and footnotes, which are `[ ]` spans; other brackets are prose and stay."""
    if not _MARKUP_BRACKET.search(text):
        return text
    pieces = _BRACKET.split(text)
    output: list[str] = [pieces[0]]
    opened: list[int] = []
    for position in range(1, len(pieces), 2):
        token, following = pieces[position], pieces[position + 1]
        if token == "[":
            opened.append(len(output))
            # The opener stays in the output until its span turns out to be markup; a footnote mark never stays.
            if following.startswith("*"):
                output += ["[*", following[1:]]
            else:
                output += ["[", following]
            continue
        if token == "]" and opened:
            start = opened.pop()
            if output[start] == "[*":
                del output[start:]
            elif (
                output[start + 1][:MAX_NAME].partition("(")[0].lower() in _MACRO_NAMES
                and (shown := _macro_text(output[start + 1 : start + 33])) is not None
            ):
                output[start:] = [shown]
            else:
                output.append("]")
        elif token == "]":
            output.append("]")
        else:
            # A blank line ends every open bracket: an unclosed footnote must not swallow the next paragraph.
            for start in opened:
                if output[start] == "[*":
                    output[start] = ""
            opened.clear()
            output.append(token)
        output.append(following)
    for start in opened:
        if output[start] == "[*":
            output[start] = ""
    return "".join(output)


def _macro_text(pieces: list[str]) -> str | None:
    """Return what a reader sees of the macro in `pieces`, or None when it is no macro."""
    # Joining a long span at every level of nesting would be quadratic; a macro is a few pieces.
    if len(pieces) > 30 or sum(map(len, pieces)) > MAX_MACRO:
        return None
    content = "".join(pieces)
    if content.lower() == "br":
        return "\n"
    if _EMPTY_MACRO.fullmatch(content):
        return ""
    named = _RUBY.fullmatch(content) or _MATH.fullmatch(content)
    return named[1] if named else None
