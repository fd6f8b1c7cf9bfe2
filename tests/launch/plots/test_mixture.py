"""The plot of a mixture."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")  # a GPU machine without network may lack it

from launch.plots.mixture import draw_mixture


def test_the_legend_gives_each_corpus_its_mean_share(tmp_path: Path):
    draw_mixture(str(tmp_path / "a.svg"), ["web", "code"], np.array([[3, 1], [1, 3], [2, 0], [0, 0]]), 40)
    text = (tmp_path / "a.svg").read_text()
    assert "<!-- web (50.0%) -->" in text and "<!-- code (25.0%) -->" in text  # (3/4 + 1/4 + 1 + 0) / 4, (1/4 + 3/4) / 4
    draw_mixture(str(tmp_path / "a.png"), ["web"], np.array([[1], [2]]), 2)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_another_suffix_is_refused_before_anything_is_drawn(tmp_path: Path):
    with pytest.raises(ValueError, match=r"--picture .*a.pdf: name a .png or .svg file"):
        draw_mixture(str(tmp_path / "a.pdf"), ["web"], np.array([[1]]), 1)
    assert not list(tmp_path.iterdir())
