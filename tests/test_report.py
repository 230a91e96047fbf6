"""Tables, intervals and pages: nothing without provenance, nothing unescaped."""
import json
from pathlib import Path

import pytest

from rlhi.report import fold_intervals, html_page, load_results, make_result, paper_value, paper_values, save_result, show_value, to_latex, to_markdown

ROOT = Path(__file__).resolve().parents[1]
HERE = {"profile": "tiny", "hardware": "a machine", "commit": "abc", "date": "2026-01-01"}


@pytest.mark.parametrize("lost", ["profile", "hardware", "commit", "date"])
def test_a_number_without_provenance_is_refused(lost):
    with pytest.raises(ValueError, match=lost):
        make_result("x", "X", [{"a": 1}], {k: v for k, v in HERE.items() if k != lost})


def test_ragged_rows_are_refused():
    with pytest.raises(ValueError, match="row 1"):
        make_result("x", "X", [{"a": 1}, {"b": 1}], HERE)


def test_intervals_stand_with_their_value():
    assert fold_intervals([{"points": 12.34, "low": -1.0, "high": 25.0, "n": 7}]) == [{"points": "12.3 [-1.00, 25.0]", "n": "7"}]
    assert fold_intervals([{"points": None, "low": None, "high": None}]) == [{"points": "not run"}]


@pytest.mark.parametrize("value, text", [(None, "not run"), (0.0, "0.00"), (0.12345, "0.12"), (0.0123, "0.0123"), (1234.5, "1234.5"), (True, "yes"), (["a", 1], "a, 1")])
def test_values_in_words(value, text):
    assert show_value(value) == text


@pytest.mark.parametrize("trap", ["<script>alert(1)</script>", "a | b", "50 % & $x_1$ #{}", "\\input{/etc/passwd}", "line\nbreak"])
def test_hostile_cells_stay_text(trap, tmp_path):
    result = make_result("x", trap, [{"cell": trap}], HERE, [trap])
    row = to_markdown(result).splitlines()[4]
    assert row.replace("\\|", "").count("|") == 2 and "<script" not in row
    assert "\\input" not in to_latex(result) and "<script" not in to_latex(result) or "script" in trap
    page = html_page(trap, trap, [(trap, [trap, result])], tmp_path / "p.html").read_text()
    assert "<script" not in page


def test_latex_special_characters():
    line = to_latex(make_result("x", "X", [{"cell": "50 % & $x_1$ #{}~^"}], HERE)).splitlines()[7]
    assert line == r"50 \% \& \$x\_1\$ \#\{\}\textasciitilde{}\textasciicircum{} \\"


def test_results_come_back_as_they_were(tmp_path):
    result = make_result("x", "X", [{"a": 1.5, "b": None}], HERE)
    save_result(result, tmp_path)
    (tmp_path / "other.figure.json").write_text(json.dumps({"figure": "y"}))
    assert load_results(tmp_path) == {"x": result}


def test_paper_values_keep_their_marks():
    values = paper_values(ROOT)
    assert {value["mark"] for value in values.values()} <= {"P", "D", "R", "S", "I", "?", "D/P"}
    assert paper_value(values, "alpacaeval.ubr.lc") == "77.9 % (P)"
    assert paper_value(values, "followups.reattempt_with_feedback.share") == "26.51 % (D)"
    assert paper_value(values, "diversity").startswith("unknown (D)")
