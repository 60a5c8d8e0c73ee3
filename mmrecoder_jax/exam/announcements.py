"""Thoughts that announce what the code does not contain (a failure that arXiv 2604.01600 names).

Only what a thought names literally is looked for, so this counts too few rather than too many.

The package's own short thoughts are read whole:

    bar, 2 series, 3 points      these kinds of calls, so many calls, so many points on x
    Fix text, color.             these parts of the code differ from those of the turn before:
                                 text: other strings; color: other colours; type: other drawing
                                 calls; layout: other calls that make axes
    Fix error: ValueError.       the code differs from that of the turn before
    Fix columns 36+1=37 14.      it differs by just these moves, and by what else is named
                                 (`data.panels`); "Fix columns +1 0." says the same

Of any other thought, sentence by sentence, what stands behind a word that announces:

    add, use, draw, show, include, put, insert       the rest of the sentence
    set, change, make, replace, switch, turn,        what follows the last to, with, into or as;
    rename, correct, fix, update                     without one nothing is announced
    quoted text ("Rain", `loc=2`)     contained where the code has it, blanks, case and quotes apart
    a colour (a CSS name, #rrggbb)    where the code has that name, or a hex colour at least
                                      `_ALIKE` similar by ChartMimic's measure
    a part (legend, grid, ...)        where the code calls what makes it (`_PARTS`)

Sentences that deny, doubt or compare (`_NOT`) announce nothing.
"""

import ast
import re
import warnings
from collections import Counter

from PIL import ImageColor

from mmrecoder_jax.data import panels
from mmrecoder_jax.env.chartmimic import matched_similarity
from mmrecoder_jax.env.response import think_text

_ALIKE = 0.7
_LONGEST = 20_000  # characters of a thought or a code that are looked at
_SHORT = re.compile(
    r"(?P<kinds>(?:[a-z_0-9]+, )*)(?P<series>\d+) series(?:, (?P<points>\d+) points)?"
)
_FIX = re.compile(r"Fix (?P<parts>(?:text|layout|type|color)(?:, (?:text|layout|type|color))*)\.?")
_FIX_ERROR = re.compile(r"Fix error: [\w.]+\.?")
_FIX_PANELS = re.compile(
    r"Fix columns (?P<ends>{end} {end})(?P<rest>(?:, [a-z\d]+(?: [a-z\d+-]+)*)*)\.".replace(
        "{end}", r"(?:\d{1,6}[+-]\d{1,6}=\d{1,6}|[+-]?\d{1,6})"
    )
)
_SENTENCE = re.compile(r"[.;!?]\s+|\n+|[.;!?]$")
_NOT = re.compile(
    r"\b(?:no|not|never|without|remov\w+|drop\w*|delet\w+|avoid\w*|instead|rather|may|might|could"
    r"|would|maybe|perhaps|if|whether|than)\b|n't\b",
    re.IGNORECASE,
)
_ADDS = re.compile(
    r"\b(?:(?:add|draw|show|includ|put|insert)(?:e|s|es|ing|ting)?|us(?:e|es|ing))\b", re.IGNORECASE
)
_CHANGES = re.compile(
    r"\b(?:set|chang|mak|replac|switch|turn|renam|correct|fix|updat)(?:e|s|es|ing|ting)?\b",
    re.IGNORECASE,
)
_TARGET = re.compile(r"\b(?:to|with|into|as)\b", re.IGNORECASE)
_QUOTED = re.compile(r'"([^"\n]+)"|`([^`\n]+)`|“([^”\n]+)”|(?<!\w)\'([^\'\n]+)\'(?!\w)')
_HEX = re.compile(r"#[0-9a-fA-F]{6}\b")
_BASE = {  # letters that matplotlib takes for colours
    **{"r": "red", "g": "green", "b": "blue", "c": "cyan"},
    **{"m": "magenta", "y": "yellow", "k": "black", "w": "white"},
}
_FORMAT = re.compile(r"[-.:,ox^v<>sp*hH+Dd|_1234]*([rgbcmykw])[-.:,ox^v<>sp*hH+Dd|_1234]*")
_NAMES = re.compile(rf"\b(?:{'|'.join(sorted(ImageColor.colormap, key=len, reverse=True))})\b")
_PARTS = (  # how a thought names a part; what of the code makes it
    (r"\blegend\b", r"legend\s*\("),
    (r"\bgrid(?: ?lines)?\b", r"grid\s*\(|axes\.grid"),
    (r"\bcolou?r ?bar\b", r"colorbar\s*\("),
    (r"\berror ?bars?\b", r"errorbar\s*\(|[xy]err\s*="),
    (r"\bannotations?\b", r"annotate\s*\(|\.text\s*\(|bar_label\s*\("),
    (r"\bx[- ]?(?:axis )?label\b", r"xlabel"),
    (r"\by[- ]?(?:axis )?label\b", r"ylabel"),
    (r"\btitle\b", r"title"),
    (r"\bpie(?: chart)?\b", r"\.pie\s*\(|\bpie\s*\("),
    (r"\bscatter(?: plot)?\b", r"scatter"),
    (r"\bbar ?plot\b|\bbar chart\b", r"\.barh?\s*\(|barplot|\.hist\s*\("),
    (r"\bhistogram\b", r"hist"),
    (r"\bheat ?map\b", r"heatmap|imshow|pcolor"),
)


def announced_and_missing(thought: str, code: str, before: str | None) -> tuple[int, list[str]]:
    """(how many things a thought announces, those of them that the code does not contain).

    Args:
      before: the code of the turn before; None in a first turn.
    """
    thought, code = thought.strip()[:_LONGEST], code[:_LONGEST]
    if short := _SHORT.fullmatch(thought):
        return _missing_of_plan(short, code)
    if fix := _FIX.fullmatch(thought):
        return _missing_fixes(fix["parts"].split(", "), code, before)
    if _FIX_ERROR.fullmatch(thought):
        if before is None:
            return 0, []
        return 1, ["error"] if before.strip() == code.strip() else []
    if fix := _FIX_PANELS.fullmatch(thought):
        moves = [f"columns {' '.join(map(_move, fix['ends'].split(' ')))}"]
        return _missing_moves(moves + fix["rest"].split(", ")[1:], code, before)
    things = [thing for sentence in _SENTENCE.split(thought) for thing in _announced(sentence)]
    missing = [words for kind, words in things if not _contains(code, kind, words)]
    return len(things), missing


def _missing_of_plan(plan: re.Match[str], code: str) -> tuple[int, list[str]]:
    found = _SHORT.fullmatch(think_text(code))
    assert found is not None  # it writes that form
    wanted = [kind for kind in plan["kinds"].split(", ") if kind]
    missing = [kind for kind in wanted if kind not in found["kinds"].split(", ")]
    if plan["series"] != found["series"]:
        missing.append(f"{plan['series']} series")
    # Where the code has no list `x`, nothing can be said of points.
    counted = plan["points"] and found["points"]
    if counted and plan["points"] != found["points"]:
        missing.append(f"{plan['points']} points")
    return len(wanted) + 1 + bool(counted), missing


def _missing_fixes(parts: list[str], code: str, before: str | None) -> tuple[int, list[str]]:
    if before is None:
        return 0, []
    now, then = _parts(code), _parts(before)
    return len(parts), [part for part in parts if now[part] == then[part]]


def _move(end: str) -> str:
    """By how much an end of a panel moves: "+1" of "36+1=37" and of "+1", "0" of "36"."""
    before, _, after = end.partition("=")
    if after:
        move = int(after) - int(re.split("[+-]", before)[0])
        return f"{move:+}" if move else "0"
    return end if end[0] in "+-" else "0"


def _missing_moves(moves: list[str], code: str, before: str | None) -> tuple[int, list[str]]:
    if before is None:
        return 0, []
    announced = [move for move in moves if move != panels.UNMOVED]
    made = panels.differences(before, code) or []
    return len(announced), [move for move in announced if move not in made]


def _announced(sentence: str) -> list[tuple[str, str]]:
    """(kind, words) of what a sentence announces; kinds are quote, color and part."""
    words = _QUOTED.sub(lambda match: " " * len(match[0]), sentence)  # as long as before
    if _NOT.search(words):
        return []
    adds, changes = _ADDS.search(words), _CHANGES.search(words)
    if changes and not (adds and adds.start() < changes.start()):
        targets = [match.end() for match in _TARGET.finditer(words, changes.end())]
        if not targets:
            return []
        start = targets[-1]
    elif adds:
        start = adds.end()
    else:
        return []
    rest, plain = sentence[start:], words[start:].lower()
    quotes = [("quote", next(filter(None, match))) for match in _QUOTED.findall(rest)]
    colors = [("color", name) for name in (*_NAMES.findall(plain), *_HEX.findall(plain))]
    parts = [("part", match[0]) for named, _ in _PARTS if (match := re.search(named, plain))]
    return quotes + colors + parts


def _contains(code: str, kind: str, words: str) -> bool:
    if kind == "part":
        (makes,) = (code for named, code in _PARTS if re.fullmatch(named, words))
        return re.search(makes, code, re.IGNORECASE) is not None
    if kind == "quote":
        return _plain(words) in _plain(code)
    names = _colors(code)
    wanted = _hex(words)
    return words in names or any(
        _HEX.fullmatch(name) and matched_similarity([f"--{name}"], [f"--{wanted}"]) >= _ALIKE
        for name in names
    )


def _plain(text: str) -> str:
    return re.sub(r"\s+", "", text).casefold().replace("'", '"')


def _hex(name: str) -> str:
    return "#{:02X}{:02X}{:02X}".format(*ImageColor.getrgb(name)[:3])


def _strings(code: str) -> list[str]:
    """The strings in a script; found by their quotes where it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that the script has
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return [a or b for a, b in re.findall(r'"([^"\n]*)"|\'([^\'\n]*)\'', code)]
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def _color(text: str) -> str | None:
    """The colour that a string of a script says: a CSS name or #RRGGBB; None for other strings."""
    name = text.lower().removeprefix("tab:").removeprefix("xkcd:")
    if name in ImageColor.colormap:
        return name
    if _HEX.fullmatch(text):
        return text.upper()
    letter = _FORMAT.fullmatch(text)
    return _BASE[letter[1]] if letter else None


def _colors(code: str) -> set[str]:
    return {color for text in _strings(code) if (color := _color(text)) is not None}


def _parts(code: str) -> dict[str, Counter[str]]:
    """What of a script says each part of ChartMimic's score."""
    strings = _strings(code)
    return {
        "text": Counter(text for text in strings if _color(text) is None),
        "color": Counter(color for text in strings if (color := _color(text)) is not None),
        "type": Counter(re.findall(r"\.(\w+)\(", code)),
        "layout": Counter(
            re.findall(r"(?:subplots?|add_subplot|add_axes|GridSpec|subplot2grid)\([^()]*\)", code)
        ),
    }
