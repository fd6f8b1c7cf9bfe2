"""The report as a browser shows it: no console errors, plots visible, two runs compared."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")  # a GPU machine without network may lack it
import matplotlib.image
from matplotlib.colors import to_rgb

from data.storage import replace_file
from launch.commands.report import read_histories, write_report
from launch.plots.figures import COLOURS
from trainer.monitoring.config import LogConfig
from trainer.monitoring.metrics import Metrics

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium)")

MEASURE = """<script>
const boxes = [...document.querySelectorAll("figure svg")].map(svg => {
  const box = svg.getBoundingClientRect();
  const curves = [...svg.querySelectorAll("path")].filter(path => path.getTotalLength() > 100).length;
  return {name: svg.getAttribute("aria-label"), width: box.width, height: box.height, curves, text: svg.textContent};
});
document.body.insertAdjacentHTML("beforeend", '<pre id="measured"></pre>');
document.getElementById("measured").textContent = JSON.stringify(boxes);
</script>"""


def _browse(page: Path, *arguments: str) -> subprocess.CompletedProcess:
    assert BROWSER is not None
    return subprocess.run(
        [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent / 'browser'}", "--window-size=1200,1600",
            *arguments, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


def _console(ended: subprocess.CompletedProcess) -> list[str]:
    return [line for line in ended.stderr.splitlines() if "CONSOLE" in line]


def _run(directory: Path, scale: float) -> Path:
    metrics = Metrics(replace_file, directory, LogConfig(tensorboard=False), config={})
    for step in range(1, 101):
        record = {"kind": "train", "step": step, "tokens": 100 * step, "loss": scale + 10 / step, "grad_norm": 1.0 / step}
        metrics.record({**record, "learning_rate": scale / step, "tokens_per_second": 1000 * scale, "data_share": 0.5})
    metrics.close()
    return directory


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that compares two runs."""
    folder = tmp_path_factory.mktemp("runs")
    return write_report(read_histories([str(_run(folder / "first", 2.0)), str(_run(folder / "second", 3.0))]))


def test_two_runs_are_compared_without_a_console_error(page: Path, tmp_path: Path):
    measured_page = tmp_path / "measured.html"
    measured_page.write_text(page.read_text().replace("</body>", f"{MEASURE}</body>"))
    ended = _browse(measured_page, "--dump-dom")
    assert _console(ended) == []
    measured = re.findall(r'<pre id="measured">(.*?)</pre>', ended.stdout, re.DOTALL)[-1]  # the script's text comes before
    boxes = {box["name"]: box for box in json.loads(html.unescape(measured))}
    assert list(boxes) == ["Loss", "Learning rate", "Gradient norm", "Throughput", "Where the time goes"]
    for box in boxes.values():
        assert box["width"] > 300 and box["height"] > 60
        assert "first" in box["text"] and "second" in box["text"]
    assert boxes["Loss"]["curves"] >= 2


def test_both_runs_are_to_be_seen(page: Path, tmp_path: Path):
    shot = tmp_path / "shot.png"
    _browse(page, f"--screenshot={shot}")
    pixels = matplotlib.image.imread(shot)[..., :3]
    for colour in COLOURS[:2]:
        near = np.abs(pixels - np.array(to_rgb(colour))).max(axis=-1) < 0.05
        assert near.sum() > 1000
        assert np.ptp(np.nonzero(near)[0]) > 500, "the colour runs through several plots"


def test_a_console_error_would_be_seen(tmp_path: Path):
    page = tmp_path / "bad.html"
    page.write_text("<!doctype html><body><script>undefinedFunction()</script></body>")
    assert any("undefinedFunction" in line for line in _console(_browse(page, "--dump-dom")))
