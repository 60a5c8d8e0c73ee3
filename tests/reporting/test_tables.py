from mmrecoder_jax.reporting.tables import column_names, format_table, table_html, table_markdown
from tests.reporting.tags import Tags

ROWS = [
    {"after": "cold start", "turn": 1, "exec": "97.0 [95.1, 98.8]"},
    {"after": "stage 1", "turn": 12, "exec": "100.0", "improved": "8.1"},
]


def test_columns_are_those_of_all_rows():
    assert column_names(ROWS) == ["after", "turn", "exec", "improved"]


def test_text_is_aligned_numbers_to_the_right_and_missing_cells_are_dashes():
    assert format_table(ROWS).splitlines() == [
        "after       turn  exec               improved",
        "cold start     1  97.0 [95.1, 98.8]  -",
        "stage 1       12  100.0              8.1",
    ]


def test_html_has_a_heading_per_column_and_escapes():
    table = table_html([{"after": "<b>", "turn": 1}, {"after": "x", "turn": 2, "repeat": "9.0"}])
    tags = [tag for tag, _ in Tags(table).tags]
    assert tags.count("tr") == 3 and tags.count("th") == 3 + 2 and tags.count("td") == 4
    assert "&lt;b&gt;" in table and "<b>" not in table and "<td>-</td>" in table


def test_markdown_leaves_missing_cells_empty():
    assert table_markdown(ROWS).splitlines() == [
        "| after | turn | exec | improved |",
        "| --- | --- | --- | --- |",
        "| cold start | 1 | 97.0 [95.1, 98.8] |  |",
        "| stage 1 | 12 | 100.0 | 8.1 |",
    ]
