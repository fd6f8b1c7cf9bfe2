"""The plot of loss against context length."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")  # a GPU machine without network may lack it

from launch.plots.contexts import draw_contexts


def test_the_suffix_chooses_the_format_and_the_legend_names_the_curves(tmp_path: Path):
    curves = {"rope": [(256, 3.0), (512, 9.0)], "rerope,window=64": [(256, 3.0), (512, 2.9)]}
    draw_contexts(tmp_path / "a.png", curves, 256)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    draw_contexts(tmp_path / "a.svg", curves, 256, title="Held-out loss")
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    text = (tmp_path / "a.svg").read_text()
    comments = ("rope", "rerope,window=64", "trained length 256", "Held-out loss", "context (tokens)")
    assert all(f"<!-- {comment} -->" in text for comment in comments), "matplotlib writes text as outlines with a comment"
