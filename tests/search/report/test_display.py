"""What is shown on a terminal and in a notebook."""

import base64
import os
import re
import subprocess
import sys

import pytest

from search.report.display import BASE_WIDTH, broken_name, draw_front, front_html, print_front
from search.report.progress import Bars


def _in_terminal(code, columns, rows=24, **environment):
    """Run Python on a terminal of a size; return what it shows, without control sequences."""
    import fcntl
    import pty
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    variables = {**{k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}, "TERM": "xterm", **environment}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=slave, stderr=slave, env=variables)
    os.close(slave)
    said = b""
    while True:
        try:
            found = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not found:
            break
        said += found
    assert process.wait(timeout=60) == 0, said.decode(errors="replace")
    os.close(master)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("grad_ascent", ["grad_ascent"]),
        ("grad_diff-lr-0.001-seed-2", ["grad_diff-lr-", "0.001-seed-2"]),
        ("npo, checkpoint 120", ["npo,", "checkpoint 120"]),
        ("averyverylongnamewithoutseparators", ["averyverylongnamewithoutseparators"]),
        ("", [""]),
    ],
)
def test_names_break_behind_their_separators(name, lines):
    assert broken_name(name, BASE_WIDTH) == lines


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_the_front_breaks_no_cell_whatever_the_width(result, capsys, width):
    print_front(result, width)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= width
    table = said[: said.index("base run: one training")]
    for row in result.front.to_dict("records"):
        line = next(line for line in table.splitlines() if line.split()[:1] == [str(row["trial"])])
        assert f"{row['alpha']:.3f}" in line.split() and f"{row['model_utility']:.4f}" in line.split()
        assert any(part in line for part in broken_name(row["base"], BASE_WIDTH))


def test_sentences_wrap_between_words_on_a_terminal():
    code = "from search.cli.tables import say; say('- ' + 'considerable words ' * 9, hang='  ')"
    lines = _in_terminal(code, 80).splitlines()
    assert len(lines) == 3 and all(len(line) <= 80 for line in lines)
    assert lines[1].startswith("  considerable") or lines[1].startswith("  words")
    assert set(" ".join(lines).split()) == {"-", "considerable", "words"}


@pytest.mark.parametrize("rows", [24, 0])
def test_bars_are_drawn_on_a_terminal_even_of_unknown_size(rows):
    code = (
        "from search.report.progress import Bars\n"
        "with Bars() as bars:\n"
        "    bars.show('searching', 0, 4); bars.say('a line'); bars.show('searching', 4, 4)"
    )
    said = _in_terminal(code, 80 if rows else 0, rows)
    assert "a line" in said and "4/4" in said and "searching" in said


def test_elsewhere_a_line_says_when_a_bar_is_full(capfd):
    with Bars() as bars:
        for done in (0, 1, 2, 2):
            bars.show("scoring: \x1b[31mmodel", done, 2)
    assert capfd.readouterr().err.splitlines() == ["scoring: model ...", "scoring: model: 2 of 2"]


def test_a_notebook_gets_the_front_as_table_and_picture(result):
    html = front_html(result)
    assert html.count("<tr") == len(result.front) + 1 and html.count("<th>") >= 6
    picture = base64.b64decode(re.search(r"base64,([^\"]+)", html).group(1))
    assert picture.startswith(b"\x89PNG")
    assert result._repr_html_() == html and len(repr(result)) < 300
    assert draw_front(result).axes


@pytest.mark.slow
def test_a_notebook_shows_the_study_and_its_picture(finished):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cells = (f"import search\nresult = search.open_study({str(finished.out)!r})\nresult", "result.plot()")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120).execute()
    shown, drawn = (cell.outputs[-1]["data"] for cell in notebook.cells)
    assert "<table" in shown["text/html"] and shown["text/plain"].startswith("StudyResult(")
    assert base64.b64decode(drawn["image/png"]).startswith(b"\x89PNG")
