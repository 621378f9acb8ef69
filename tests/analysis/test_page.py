"""The page: complete in itself, labelled everywhere, and seen by a browser in both schemes and on a phone."""

from __future__ import annotations

import html
import io
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
from planted import Analyzed

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
LABELS = {
    "Sensitivity ranking": ["loss of the layer quantized alone (nats per token)"],
    "Groups of layers": ["loss (nats per token)", "block (depth)"],
    "Activation of block.1.fc1": ["activation before quantization (float)", "int8 code after quantization", "count"],
    "Channel maxima by depth": ["channels by size (%)", "block (depth)", "activation units"],
    "Threshold study": ["v1: per token from this range on", "v0: static up to this range", "loss (nats per token)"],
    "Accuracy and speed": ["speed (times the float model", "loss (nats per token)"],
}


def _page(outlier: Analyzed) -> str:
    return (outlier.report / "report.html").read_text(encoding="utf-8")


def test_nothing_is_fetched(outlier: Analyzed) -> None:
    page = _page(outlier)
    assert not re.search(r"(?:https?:)?//[a-z]", re.sub(r"base64,[A-Za-z0-9+/=\s]+", "base64,", page))
    assert not re.search(r"<(?:link|iframe|object|embed)\b|@import|<script[^>]+src", page)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in sources)
    references = {source[1:] for source in sources if source.startswith("#")}
    references |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert references <= set(re.findall(r'\bid="([^"]+)"', page))


def test_every_figure_has_axes_with_units(outlier: Analyzed) -> None:
    figures = re.findall(r"<figure.*?</figure>", _page(outlier), flags=re.DOTALL)
    titles = [html.unescape(re.search(r"<h3>(.*?)</h3>", figure).group(1)) for figure in figures]  # type: ignore[union-attr]
    assert set(LABELS) <= set(titles)
    for title, figure in zip(titles, figures, strict=True):
        for drawing in re.findall(r"<svg.*?</svg>", figure, flags=re.DOTALL):
            shown = html.unescape(" ".join(re.findall(r"<text[^>]*>(.*?)</text>", drawing, flags=re.DOTALL)))
            for label in LABELS.get(title, LABELS["Activation of block.1.fc1"]):
                assert label in shown, f"{title}: {label}"


def test_the_page_follows_the_colour_scheme(outlier: Analyzed) -> None:
    page = _page(outlier)
    assert "prefers-color-scheme: dark" in page
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "var(--ink)" in drawings and "var(--accent)" in drawings
    assert not re.search(r"#0[1-8]0[1-8]0[1-8]\b", drawings)
    assert not re.search(r"(?:stroke|fill): #000000", drawings)


def _chromium(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None, "no Chromium: apt-get install chromium"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=180)


def _screenshot(page: Path, folder: Path, scheme: str) -> np.ndarray:
    from matplotlib.image import imread

    target = folder / f"{scheme}.png"
    preferred = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    _chromium(folder, *preferred, "--window-size=1100,5200", f"--screenshot={target}", page.as_uri())
    return np.asarray(imread(io.BytesIO(target.read_bytes())))[..., :3]


def test_a_browser_shows_the_page_in_both_schemes(outlier: Analyzed, tmp_path: Path) -> None:
    page = outlier.report / "report.html"
    light, dark = (_screenshot(page, tmp_path, scheme) for scheme in ("light", "dark"))
    assert light.shape == dark.shape == (5200, 1100, 3)
    background = [image[600:, :10].mean() for image in (light, dark)]
    assert background[0] > 0.9 and background[1] < 0.15
    # Orange and teal of the figures, in each: they are drawn, not only their frames.
    for image in (light, dark):
        red, green, blue = (image[..., channel] for channel in range(3))
        assert np.count_nonzero((red > 0.8) & (green > 0.4) & (green < 0.7) & (blue < 0.45)) > 5000
        assert np.count_nonzero((red < 0.4) & (green > 0.55) & (blue > 0.55)) > 5000


def test_a_phone_shows_the_page_without_scrolling_sideways(outlier: Analyzed, tmp_path: Path) -> None:
    """In a frame of 390 pixels, as no window of Chromium is that narrow."""
    inner = html.escape(_page(outlier), quote=True)
    script = (
        "const f = document.querySelector('iframe'), d = f.contentDocument;"
        "const seen = [...d.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width > 0);"
        "document.title = [d.documentElement.scrollWidth, seen.length, d.querySelectorAll('figure').length,"
        " Math.min(...seen.map(s => s.getBoundingClientRect().width))].join(' ');"
    )
    frame = tmp_path / "frame.html"
    style = "width:390px;height:800px;border:0"
    tag = f'<title>-</title><iframe style="{style}" srcdoc="{inner}" onload="{script}"></iframe>'
    frame.write_text(tag, encoding="utf-8")
    shown = _chromium(tmp_path, "--virtual-time-budget=10000", "--dump-dom", frame.as_uri()).stdout
    width, drawings, figures, narrowest = re.search(r"<title>(.*?)</title>", shown).group(1).split()  # type: ignore[union-attr]
    assert int(width) == 390
    assert int(drawings) == int(figures) > 6
    assert float(narrowest) > 300
