"""The form of a response: written, checked, and taken apart."""

import pytest

from mmrecoder_jax.env.response import (
    answer_code,
    begun_code,
    extract_code,
    extract_thought,
    has_format,
    response_text,
    think_text,
)

GOOD = "<think>bars</think>\n```python\nx = 1\n```"


def test_what_is_written_has_the_format_and_can_be_read_back():
    response = response_text("bars", "x = 1")
    assert response == GOOD and has_format(response)
    assert extract_thought(response) == "bars" and extract_code(response) == "x = 1\n"


CODE = "import matplotlib.pyplot as plt\nplt.bar([1, 2], [3, 4])\n"
STEP = "import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\n"


def fenced(code: str, opening: str = "```python", end: str = "```") -> str:
    return f"{opening}\n{code}{end}"


SPELLINGS = {
    "crlf": fenced(CODE).replace("\n", "\r\n"),
    "cr": fenced(CODE).replace("\n", "\r"),
    "capital": fenced(CODE, "```Python"),
    "upper": fenced(CODE, "```PYTHON"),
    "py": fenced(CODE, "```py"),
    "python3": fenced(CODE, "```python3"),
    "python 3.11": fenced(CODE, "```python3.11"),
    "space": fenced(CODE, "``` python "),
    "attributes": fenced(CODE, '```python title="a.py" linenums="1"'),
    "pandoc": fenced(CODE, "```{.python .numberLines}"),
    "tilde": fenced(CODE, "~~~python", "~~~"),
    "four": fenced(CODE, "````python", "````"),
    "behind the thought": "<think>a</think>" + fenced(CODE),
    "in a list": "1. Run\n" + "".join(f"   {line}\n" for line in fenced(CODE).split("\n")),
    "after bash": fenced("pip install matplotlib\n", "```bash") + "\nthen\n" + fenced(CODE),
    "after bash in python3": fenced("python3 a.py\n", "```sh") + "\n" + fenced(CODE, "```python3"),
    "inline fence before": "Use ```plt``` here.\n" + fenced(CODE),
    "before output": fenced(CODE) + "\n" + fenced("3 4\n", "```text"),
    "in steps": f"A\n{fenced(STEP)}\nB\n{fenced('x = [1]')}\nWhole:\n{fenced(CODE)}\nDone.",
    "steps after it": f"{fenced(STEP)}\n{fenced(CODE)}\nTo save:\n{fenced('plt.show()')}",
}


@pytest.mark.parametrize("answer", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings_of_a_block(answer):
    assert (extract_code(answer) or "").rstrip() == CODE.rstrip()
    assert answer_code(answer).rstrip() == CODE.rstrip()


LOOSE = {
    "no fence": CODE,
    "mark": "\ufeff" + CODE,
    "bare": fenced(CODE, "```"),
    "bare with tildes": fenced(CODE, "~~~", "~~~"),
    "no end": fenced(CODE, end=""),
}


@pytest.mark.parametrize("answer", LOOSE.values(), ids=LOOSE)
def test_data_may_be_written_more_loosely(answer):
    assert extract_code(answer) is None
    assert answer_code(answer) == CODE


def test_code_that_is_being_written_is_seen_from_its_first_line():
    begun = [begun_code(GOOD[:length]) for length in range(len(GOOD) + 1)]
    assert begun[0] == "" and begun[-1] == extract_code(GOOD)
    # a fence that is not written to its end counts as code for a moment
    assert [code.rstrip("`") for code in begun] == sorted(code.rstrip("`") for code in begun)
    assert len(set(begun)) > 3
    assert begun_code(GOOD + "\n```bash\nls") == extract_code(GOOD)
    assert begun_code(GOOD + "\n```python\nnew") == "new"


@pytest.mark.parametrize("language", ["bash", "pycon", "python-repl", "pyx", "cpp", "json"])
def test_other_languages_are_no_code(language):
    answer = fenced(CODE, f"```{language}")
    assert extract_code(answer) is None and answer_code(answer) == ""


def test_code_is_the_first_python_block_where_none_is_a_whole_script():
    assert extract_code(GOOD) == "x = 1\n"
    assert extract_code("a\n```python\nx\n```\nb\n```python\ny\n```") == "x\n"
    assert extract_code("```python\nx = 1") is None
    assert extract_code("```\nx = 1\n```") is None
    assert extract_code("") is None


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (GOOD, True),
        ("\n " + GOOD + "\n", True),
        (GOOD + " Done.", False),
        ("Sure. " + GOOD, False),
        (GOOD + "\n" + GOOD, False),
        (GOOD + "\n```python\ny\n```", False),
        ("```python\nx = 1\n```", False),
        ("<think>a<think>b</think>\n```python\nx\n```", False),
        ("<think>a ```python\ny\n``` </think>\n```python\nx\n```", False),
        ("<think>bars</think>\n```\nx = 1\n```", False),
        ("<think>bars</think>\n```python\nx = 1", False),
        (GOOD.replace("\n", "\r\n"), True),
        (GOOD.replace("python", "Python"), True),
        (GOOD.replace("python", " py"), True),
        (GOOD.replace("python", "python3 "), True),
        (GOOD.replace("python", "bash"), False),
        (GOOD.replace("python", "python title='a.py'"), False),
        (GOOD.replace("```", "~~~"), False),
        (GOOD.replace("think", "Think"), False),
    ],
)
def test_format(response, expected):
    assert has_format(response) is expected


@pytest.mark.parametrize(
    ("response", "thought"),
    [
        ("Sure.\n```python\nx\n```\nDone.", "Sure."),
        ("<think>no end\n```python\nx = 1", "no end"),
        ("no code at all", "no code at all"),
        ("```python\nx\n```", ""),
    ],
)
def test_the_thought_is_what_precedes_the_code(response, thought):
    assert extract_thought(response) == thought


def test_a_first_turn_thinks_of_calls_series_and_points():
    assert think_text("x = ['a','b']\nax.bar(x, [1,2], color='red')") == "bar, 1 series, 2 points"
    assert think_text("ax.plot(t, s)\nax.plot(t, c)\nax2.hist(s)") == "plot, hist, 3 series"
    assert think_text("print('plot')") == "0 series"
