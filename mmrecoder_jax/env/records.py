"""What a script drew, as plain data: one type per recorder.

    Record             `child.recorder`               what ChartMimic's metric compares
    OfficialRecord     `child.chartmimic_recorder`    one run of ChartMimic's own evaluators
    Plot2CodeRecord    `child.plot2code_recorder`     what Plot2Code's evaluator sees
    Chart2CodeRecord   `child.chart2code_recorder`    what Chart2Code's evaluators see

A recorder runs in the process of an untrusted script, so its JSON is a claim. `from_json` parses it
where the trainer is: it takes plain, bounded data, and raises ValueError on anything else.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any, Self

from mmrecoder_jax.env.wire import RecordKind

Cell = tuple[int, int, int, int, int, int]
_MAX_ENTRIES = 5_000  # of each list in a record
_MAX_TEXT = 2_000  # characters of one recorded text
_MAX_KINDS = 20  # of texts, and of the parameters of an element
_MAX_COUNT = 1 << 31
_MAX_NUMBER = sys.float_info.max  # JSON's integers have no bound; floats cannot hold larger ones


@dataclasses.dataclass(frozen=True)
class Record:
    """What the script drew, as ChartMimic's low-level metrics see it.

    Attributes:
      texts: every text drawn, one entry per line, with repeats.
      layout: one (nrows, ncols, row_start, row_end, col_start, col_end) for each axes on a grid,
        zero-based and inclusive: the left panel of `plt.subplots(1, 2)` is (1, 2, 0, 0, 0, 0).
      types: calls of each hooked drawing function.
      colors: sorted distinct strings "<function>--<color>".
    """

    texts: tuple[str, ...] = ()
    layout: tuple[Cell, ...] = ()
    types: Mapping[str, int] = dataclasses.field(default_factory=dict)
    colors: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "texts": list(self.texts),
            "layout": [list(cell) for cell in self.layout],
            "types": dict(self.types),
            "colors": list(self.colors),
        }

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Validates and builds a record; raises ValueError on what is none."""
        fields = _fields(data, "texts", "layout", "types", "colors")
        return cls(
            texts=_texts(fields["texts"], "texts"),
            layout=tuple(map(_cell, _list(fields["layout"], "layout"))),
            types=_counts(fields["types"], "types"),
            colors=tuple(sorted(set(_texts(fields["colors"], "colors")))),
        )


@dataclasses.dataclass(frozen=True)
class OfficialRecord:
    """What ChartMimic's evaluators record in one run; the parts that were not asked for are empty.

    Attributes:
      texts: the strings that reached the PDF renderer, with repeats.
      layout: one entry per axes of the current figure when the script has ended; None for an axes
        without a grid position, which counts where a pair is scored by the rule for graphs.
      types: calls by "<file>-<function>", over all figures of the script.
      colors: sorted distinct strings "<file>/<function>--<color>".
    """

    texts: tuple[str, ...] = ()
    layout: tuple[Cell | None, ...] = ()
    types: Mapping[str, int] = dataclasses.field(default_factory=dict)
    colors: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "texts": list(self.texts),
            "layout": [None if cell is None else list(cell) for cell in self.layout],
            "types": dict(self.types),
            "colors": list(self.colors),
        }

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Validates and builds a record; raises ValueError on what is none."""
        fields = _fields(data, "texts", "layout", "types", "colors")
        cells = _list(fields["layout"], "layout")
        return cls(
            texts=_texts(fields["texts"], "texts"),
            layout=tuple(None if cell is None else _cell(cell) for cell in cells),
            types=_counts(fields["types"], "types"),
            colors=tuple(sorted(set(_texts(fields["colors"], "colors")))),
        )


PlacedText = tuple[str, float | None, float | None]


@dataclasses.dataclass(frozen=True)
class Plot2CodeRecord:
    """What Plot2Code's evaluator sees of one figure.

    Attributes:
      texts: (text, x, y) of every visible text, in lower case; a position is None where it is no
        number.
      size: of the figure, (width, height) in inches.
      white: nothing but white was drawn.
      fig1: the figure that the script calls `fig1`, as the evaluator calls that of the reference.
    """

    texts: tuple[PlacedText, ...] = ()
    size: tuple[float, float] = (6.4, 4.8)
    white: bool = False
    fig1: "Plot2CodeRecord | None" = None

    def to_json(self) -> dict[str, Any]:
        return {
            "texts": [list(text) for text in self.texts],
            "size": list(self.size),
            "white": self.white,
            "fig1": None if self.fig1 is None else self.fig1.to_json(),
        }

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Validates and builds a record; raises ValueError on what is none."""
        fields = _fields(data, "texts", "size", "white", "fig1")
        inner = fields["fig1"]
        if isinstance(inner, dict) and inner.get("fig1") is not None:
            raise ValueError("a record's fig1 has no fig1 of its own")
        if type(fields["white"]) is not bool:
            raise ValueError("a record's white is true or false")
        return cls(
            texts=tuple(map(_placed_text, _list(fields["texts"], "texts"))),
            size=_size(fields["size"]),
            white=fields["white"],
            fig1=None if inner is None else Plot2CodeRecord.from_json(inner),
        )


# None; (number,); (text,); or a list: (its distinct numbers or None, its distinct entries as texts,
# whether it has entries). Infinite numbers and NaN are floats again.
Value = tuple[Any, ...] | None


@dataclasses.dataclass(frozen=True)
class Chart2CodeRecord:
    """What Chart2Code's code-level evaluators see of one figure.

    Attributes:
      colors: #RRGGBB by class and key, such as colors["line_color"]["Rain"].
      layout: as `Record.layout`.
      grids: whether (x, y) grid lines are visible, of each axes that has any.
      legends: (text, x0, y0, x1, y1) of each entry, with the box of its legend.
      elements: (kind, parameters by name) of lines, rectangles, polygons and collections.
      texts: by class, such as texts["title"].
      types: names of chart types.
    """

    colors: Mapping[str, Mapping[str, str]]
    layout: tuple[Cell, ...]
    grids: tuple[tuple[bool, bool], ...]
    legends: tuple[tuple[str, float, float, float, float], ...]
    elements: tuple[tuple[str, Mapping[str, Value]], ...]
    texts: Mapping[str, tuple[str, ...]]
    types: frozenset[str]

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Validates and builds a record; raises ValueError on what is none."""
        fields = _fields(data, "colors", "layout", "grids", "legends", "elements", "texts", "types")
        colors: dict[str, dict[str, str]] = {}
        for kind, key, color in map(_triple, _list(fields["colors"], "colors")):
            colors.setdefault(kind, {})[key] = color
        texts = fields["texts"]
        if not isinstance(texts, dict) or len(texts) > _MAX_KINDS:
            raise ValueError("a record's texts are lists by class")
        return cls(
            colors=colors,
            layout=tuple(map(_cell, _list(fields["layout"], "layout"))),
            grids=tuple(map(_grid, _list(fields["grids"], "grids"))),
            legends=tuple(map(_legend, _list(fields["legends"], "legends"))),
            elements=tuple(map(_element, _list(fields["elements"], "elements"))),
            texts={_text(kind, "texts"): _texts(own, "texts") for kind, own in texts.items()},
            types=frozenset(_texts(fields["types"], "types")),
        )


AnyRecord = Record | OfficialRecord | Plot2CodeRecord | Chart2CodeRecord
_PARSERS: dict[RecordKind, Callable[[Any], AnyRecord]] = {
    RecordKind.TRAINING: Record.from_json,
    RecordKind.OFFICIAL_RUN: OfficialRecord.from_json,
    RecordKind.OFFICIAL_TEXT: OfficialRecord.from_json,
    RecordKind.OFFICIAL_LAYOUT: OfficialRecord.from_json,
    RecordKind.OFFICIAL_TYPE: OfficialRecord.from_json,
    RecordKind.OFFICIAL_COLOR: OfficialRecord.from_json,
    RecordKind.OFFICIAL_CALLS: OfficialRecord.from_json,
    RecordKind.PLOT2CODE: Plot2CodeRecord.from_json,
    RecordKind.PLOT2CODE_TARGET: Plot2CodeRecord.from_json,
    RecordKind.CHART2CODE: Chart2CodeRecord.from_json,
}


def parse(kind: RecordKind, data: Any) -> AnyRecord:
    """The record of a request of this kind. `data` may be hostile: raises ValueError."""
    return _PARSERS[kind](data)


def is_count(value: Any) -> bool:
    """Whether a value from JSON is a whole number that nothing large is made of."""
    return type(value) is int and 0 <= value < _MAX_COUNT


def _fields(data: Any, *names: str) -> dict[str, Any]:
    if not isinstance(data, dict) or set(data) != set(names):
        raise ValueError(f"a record is an object with exactly the fields {', '.join(names)}")
    return data


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > _MAX_ENTRIES:
        raise ValueError(f"record field {name} is not a list of at most {_MAX_ENTRIES} entries")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise ValueError(f"record field {name} has an entry that is no text of {_MAX_TEXT} at most")
    return value


def _texts(value: Any, name: str) -> tuple[str, ...]:
    return tuple(_text(each, name) for each in _list(value, name))


def _counts(value: Any, name: str) -> dict[str, int]:
    if not isinstance(value, dict) or len(value) > _MAX_ENTRIES:
        raise ValueError(f"record field {name} is not an object of at most {_MAX_ENTRIES} entries")
    if not all(map(is_count, value.values())):
        raise ValueError(f"a record's {name} are counts")
    return {_text(key, name): count for key, count in value.items()}


def _cell(value: Any) -> Cell:
    if not isinstance(value, list) or len(value) != 6 or not all(map(is_count, value)):
        raise ValueError(f"a layout entry is six counts, not {str(value)[:80]}")
    rows, columns, top, bottom, left, right = value
    return rows, columns, top, bottom, left, right


def _placed_text(value: Any) -> PlacedText:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f"a record's text is [text, x, y], not {str(value)[:80]}")
    text, x, y = value
    if not all(each is None or _is_number(each) for each in (x, y)):
        raise ValueError(f"a record's text has two finite numbers, not {str(value)[:80]}")
    return _text(text, "texts"), x, y


def _size(value: Any) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2 or not all(map(_is_number, value)):
        raise ValueError(f"a record's size is two numbers, not {str(value)[:80]}")
    width, height = value
    if not (width > 0 and height > 0):
        raise ValueError(f"a record's figure is {width} x {height} inches")
    return float(width), float(height)


def _is_number(value: Any) -> bool:
    # NaN and infinity fail the comparison
    return type(value) in (int, float) and abs(value) <= _MAX_NUMBER


def _triple(value: Any) -> tuple[str, str, str]:
    texts = _texts(value, "colors")
    if len(texts) != 3:
        raise ValueError(f"a colour is [class, key, colour], not {str(value)[:80]}")
    return texts[0], texts[1], texts[2]


def _grid(value: Any) -> tuple[bool, bool]:
    if not isinstance(value, list) or len(value) != 2 or {type(x) for x in value} != {bool}:
        raise ValueError(f"a grid is two of true and false, not {str(value)[:80]}")
    return value[0], value[1]


def _legend(value: Any) -> tuple[str, float, float, float, float]:
    if not isinstance(value, list) or len(value) != 5:
        raise ValueError(f"a legend entry is a text and four numbers, not {str(value)[:80]}")
    x0, y0, x1, y1 = map(_any_number, value[1:])
    return _text(value[0], "legends"), x0, y0, x1, y1


def _element(value: Any) -> tuple[str, dict[str, Value]]:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], dict):
        raise ValueError(f"an element is [kind, parameters], not {str(value)[:80]}")
    kind, parameters = value
    if len(parameters) > _MAX_KINDS:
        raise ValueError("an element has too many parameters")
    return _text(kind, "elements"), {
        _text(name, "elements"): _value(own) for name, own in parameters.items()
    }


def _value(value: Any) -> Value:
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise ValueError(f"a parameter is null or a list, not {str(value)[:80]}")
    match value:
        case ["number", number]:
            return (_any_number(number),)
        case ["text", text]:
            return (_text(text, "elements"),)
        case ["other"]:
            return ()
        case ["list", numbers, texts, bool(filled)]:
            known = None
            if numbers is not None:
                known = frozenset(map(_any_number, _list(numbers, "elements")))
            return known, frozenset(_texts(texts, "elements")), filled
    raise ValueError(f"a parameter is of no known kind: {str(value)[:80]}")


def _any_number(value: Any) -> float:
    """A number, also one that JSON has no form for."""
    if value in ("nan", "inf", "-inf") and isinstance(value, str):
        return float(value)
    if not _is_number(value):
        raise ValueError(f"a parameter has a number, not {str(value)[:80]}")
    return float(value)
