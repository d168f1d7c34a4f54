"""docs/python.md and its notebook say the same, and every cell runs."""

import json
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def cells(kind: str) -> list[str]:
    """The sources of the notebook's cells of a kind."""
    notebook = json.loads((DOCS / "python.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_page_shows_every_cell_of_the_notebook():
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    assert [cell for cell in cells("code") if f"```python\n{cell}\n```" not in page] == []
    assert page.count("```python") == len(cells("code"))


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in cells("code"):
        exec(compile(cell, "python.ipynb", "exec"), names)
    printed = capsys.readouterr().out
    assert "60 responses in" in printed
    assert "['evaluate of round 0', 'dpo of round 1', 'evaluate of round 1']" in printed
    assert len(names["answers"][0].texts) == 3
    rewarded = [pair for pair in names["pairs"] if len(pair.chosen[-1]["content"][0]["text"]) > 0]
    assert rewarded
    for pair in rewarded:
        chosen, rejected = (pair.chosen[-1]["content"][0]["text"], pair.rejected[-1]["content"][0]["text"])
        assert len(chosen) < len(rejected)
