"""Figures of the report as inline SVG whose colours follow the page's light or dark scheme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fptq_onnx.analysis.result import Group, LayerSensitivity, StudyPoint
from fptq_onnx.errors import RuntimeUnavailableError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "ActivationView",
    "Drawing",
    "activation_histogram",
    "channel_heatmap",
    "front",
    "group_bars",
    "ranking_bars",
    "require_matplotlib",
    "threshold_map",
]

Array = npt.NDArray[Any]

# Placeholders that become CSS variables of the page: any colour that matplotlib writes once is as good as another.
_THEME = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--accent)",
    "#050505": "var(--warm)",
    "#060606": "var(--cool)",
    "#070707": "var(--card)",
    "#080808": "var(--good)",
}
_INK, _MUTED, _LINE, _ACCENT, _WARM, _COOL, _CARD, _GOOD = _THEME
# Inches at 72 points each: the widths of the page's column and of a phone.
_WIDE, _NARROW = 10.0, 4.75
_HEATMAP_COLUMNS = 192


def require_matplotlib() -> None:
    """Raise RuntimeUnavailableError where the extra [report] is not installed."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeUnavailableError("the report", f"needs {error.name}", "Install fptq-onnx[report]") from None


@dataclass(frozen=True)
class Drawing:
    """A figure in two widths, of which the page shows the one that fits.

    Attributes:
        title: What it shows.
        wide: SVG for a desktop.
        narrow: SVG for a phone.
        caption: How to read it, one or two sentences.
    """

    title: str
    wide: str
    narrow: str
    caption: str


@dataclass(frozen=True, eq=False)
class ActivationView:
    """An activation before and after quantization.

    Attributes:
        label: Layer that reads it.
        values: float32 [tokens, K] as the layer reads it, equalization applied.
        codes: int16 [tokens, K].
        limit: Clip point of a static scale, None per token.
        scheme: How it is quantized.
        snr_db: Of the rounded activation.
    """

    label: str
    values: Array
    codes: Array
    limit: float | None
    scheme: str
    snr_db: float


def _draw(title: str, caption: str, height: Callable[[float], float], paint: Callable[[Figure, bool], None]) -> Drawing:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    sides = []
    for width in (_WIDE, _NARROW):
        with rc_context(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": title,
                "font.family": "sans-serif",
                "font.size": 10.5,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.edgecolor": _LINE,
                "axes.labelcolor": _MUTED,
                "axes.titlesize": 11,
                "text.color": _INK,
                "xtick.color": _MUTED,
                "ytick.color": _MUTED,
                "axes.grid": False,
                "grid.color": _LINE,
                "legend.frameon": False,
            }
        ):
            figure = Figure(figsize=(width, height(width)), layout="constrained")
            paint(figure, width == _NARROW)
            sides.append(_svg(figure, f"{title} {'n' if width == _NARROW else 'w'}", title))
    return Drawing(title, sides[0], sides[1], caption)


def _svg(figure: Figure, identity: str, title: str) -> str:
    """The figure without prolog, in colours of the page, its ids unlike those of other figures."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", identity).strip("-").lower()
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{title}">', text)
    text = re.sub(r"font: ([0-9.]+px)[^;\"]*", r"font-size: \1", text)
    for placeholder, variable in _THEME.items():
        text = text.replace(placeholder, variable)
    return text


def ranking_bars(layers: Sequence[LayerSensitivity], unit: str, most: int = 24) -> Drawing:
    """Loss of each layer quantized alone, worst first, split by what makes its noise."""
    shown = [layer for layer in layers if layer.metric_loss is not None][:most]

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        count = min(len(shown), 14) if narrow else len(shown)
        rows = shown[:count]
        places = np.arange(count)
        losses = np.array([max(layer.metric_loss or 0.0, 0.0) for layer in rows])
        # The share of the noise power that the activation makes; the rest is the weights'.
        shares = np.array([_activation_share(layer) for layer in rows])
        axes.barh(places, losses * shares, color=_WARM, label="int8 activation", height=0.72)
        axes.barh(places, losses * (1 - shares), left=losses * shares, color=_COOL, label="int4 weights", height=0.72)
        axes.set_yticks(places, [layer.name for layer in rows], color=_INK)
        axes.invert_yaxis()
        axes.set_xlabel(f"loss of the layer quantized alone ({unit})")
        axes.set_ylabel("" if narrow else "layer")
        axes.legend(loc="lower right", title="noise of its output from")
        axes.grid(axis="x", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.margins(y=0.01)

    return _draw(
        "Sensitivity ranking",
        "Each layer was quantized alone, everything else float. Long bars are layers to act on first; the colours "
        "split a bar by what makes the noise in the layer's output.",
        lambda width: 0.24 * (min(len(shown), 14) if width == _NARROW else len(shown)) + 1.1,
        paint,
    )


def _activation_share(layer: LayerSensitivity) -> float:
    activation, weight = 10 ** (-layer.activation_snr_db / 10), 10 ** (-layer.weight_snr_db / 10)
    return activation / (activation + weight) if activation + weight > 0 else 0.5


def group_bars(groups: Sequence[Group], unit: str) -> Drawing:
    """Loss of each block, and of the parts and roles, quantized alone."""
    blocks = sorted((g for g in groups if g.kind == "block"), key=lambda g: int(g.name.split()[-1]))
    parts = [g for g in groups if g.kind != "block"]

    def paint(figure: Figure, narrow: bool) -> None:
        shape = (2, 1) if narrow else (1, 2)
        ratios = {"height_ratios": [1, 1]} if narrow else {"width_ratios": [1, 1.7]}
        left, right = figure.subplots(*shape, **ratios)
        places = np.arange(len(parts))
        left.barh(
            places, [g.metric_loss for g in parts], color=[_ACCENT if g.kind == "part" else _MUTED for g in parts]
        )
        left.set_yticks(places, [g.name for g in parts], color=_INK)
        left.invert_yaxis()
        left.set_xlabel(f"loss ({unit})")
        left.set_ylabel("module group")
        right.bar([int(g.name.split()[-1]) for g in blocks], [g.metric_loss for g in blocks], color=_ACCENT, width=0.78)
        right.xaxis.get_major_locator().set_params(integer=True)
        right.set_xlabel("block (depth)")
        right.set_ylabel(f"loss ({unit})")
        for axes in (left, right):
            axes.tick_params(length=0)
            axes.set_axisbelow(True)
        left.grid(axis="x", linewidth=0.8)
        right.grid(axis="y", linewidth=0.8)

    return _draw(
        "Groups of layers",
        "Left: all layers of one part (blue) or one role (grey) quantized together. Right: all layers of one block.",
        lambda width: 5.6 if width == _NARROW else 3.2,
        paint,
    )


def activation_histogram(view: ActivationView) -> Drawing:
    """Values and their int8 codes, both on a log scale, with clip points and the range of codes that is used."""

    def paint(figure: Figure, narrow: bool) -> None:
        before, after = figure.subplots(*((2, 1) if narrow else (1, 2)))
        values = view.values.ravel()
        edge = float(max(np.abs(values).max(initial=0), view.limit or 0.0)) or 1.0
        before.hist(values, bins=np.linspace(-edge, edge, 121), color=_WARM, log=True, histtype="stepfilled")
        if view.limit is not None:
            for side in (-view.limit, view.limit):
                before.axvline(side, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
            before.text(view.limit, 0.97, "clip ", ha="right", va="top", transform=before.get_xaxis_transform())
        before.set_xlabel("activation before quantization (float)")
        codes = view.codes.ravel()
        after.hist(codes, bins=np.arange(-128.5, 128.5, 2), color=_COOL, log=True, histtype="stepfilled")
        used = float(np.quantile(np.abs(codes), 0.95))
        after.axvspan(-used, used, color=_GOOD, alpha=0.16, linewidth=0)
        after.text(
            0.02,
            0.97,
            f"95 % of values\nin \u00b1{used:.0f} of \u00b1127",
            va="top",
            transform=after.transAxes,
            fontsize=9.5,
        )
        after.set_xlim(-130, 130)
        after.set_xlabel("int8 code after quantization")
        for axes in (before, after):
            axes.set_ylabel("values (count, log)")
            axes.tick_params(which="both", length=0)

    clip = "a scale per token" if view.limit is None else f"clip points at \u00b1{view.limit:.4g}"
    return _draw(
        f"Activation of {view.label}",
        f"Quantized {view.scheme}, {clip}; signal-to-noise ratio of the rounded activation {view.snr_db:.1f} dB.",
        lambda width: 4.6 if width == _NARROW else 2.5,
        paint,
    )


def channel_heatmap(maxima: Mapping[str, Sequence[Array]]) -> Drawing:
    """Per-channel maxima by depth, channels sorted by size, one panel per kind of activation."""
    kinds = {kind: rows for kind, rows in maxima.items() if rows}
    images = {kind: np.array([_binned(row) for row in rows]) for kind, rows in kinds.items()}
    top = max((float(image.max()) for image in images.values()), default=1.0)
    low = min((float(image.min()) for image in images.values()), default=1e-3)

    def paint(figure: Figure, narrow: bool) -> None:
        from matplotlib.colors import LogNorm

        floor = max(low, top * 1e-5)
        norm = LogNorm(vmin=floor, vmax=top)
        panels = figure.subplots(*((len(images), 1) if narrow else (1, len(images))), squeeze=False).ravel()
        mesh = None
        for axes, (kind, image) in zip(panels, images.items(), strict=True):
            mesh = axes.imshow(
                np.maximum(image, floor), norm=norm, aspect="auto", cmap="magma", interpolation="nearest",
                extent=(0, 100, len(image) - 0.5, -0.5),
            )  # fmt: skip
            axes.set_title(kind, color=_INK)
            axes.set_xlabel("channels by size (%)")
            axes.set_ylabel("block (depth)")
            axes.yaxis.get_major_locator().set_params(integer=True)
            axes.tick_params(length=0)
        if mesh is not None:
            bar = figure.colorbar(
                mesh, ax=list(panels), label="max |X| of the channel (activation units, log)", pad=0.02
            )
            bar.outline.set_visible(False)

    return _draw(
        "Channel maxima by depth",
        "One row per block, channels sorted by their largest magnitude in calibration. A bright right edge is outlier "
        "channels; a bright row is a block whose activations are large as a whole.",
        lambda width: 2.0 * len(images) + 0.5 if width == _NARROW else 3.3,
        paint,
    )


def _binned(channel_absmax: Array) -> Array:
    """Sorted maxima resampled to a common width; the largest channel is kept in the last column."""
    ordered = np.sort(np.maximum(channel_absmax, 1e-6))
    places = np.linspace(0, len(ordered) - 1, _HEATMAP_COLUMNS)
    resampled: Array = ordered[np.rint(places).astype(int)]
    return resampled


def threshold_map(grid: Mapping[tuple[float, float], StudyPoint], own: tuple[float, float], unit: str) -> Drawing:
    """Loss and static share for every pair of thresholds."""
    lower, upper = sorted({a for a, _ in grid}), sorted({b for _, b in grid})
    losses = np.full((len(lower), len(upper)), np.nan)
    for (a, b), point in grid.items():
        losses[lower.index(a), upper.index(b)] = point.loss

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        mesh = axes.imshow(losses, cmap="viridis_r", aspect="auto")
        span = (np.nanmin(losses), np.nanmax(losses))
        for (a, b), point in grid.items():
            row, column = lower.index(a), upper.index(b)
            bright = (point.loss - span[0]) / max(span[1] - span[0], 1e-12) < 0.55
            axes.text(
                column, row, f"{point.loss:.3g}\n{point.static_share:.0%}" + ("" if narrow else " static"),
                ha="center", va="center", color="#1a1a1a" if bright else "#ffffff", fontsize=9,
                fontweight="bold" if (a, b) == own else "normal",
            )  # fmt: skip
        axes.set_xticks(range(len(upper)), ["never" if b >= 1e6 else f"{b:g}" for b in upper])
        axes.set_yticks(range(len(lower)), [f"{a:g}" for a in lower])
        axes.set_xlabel("v1: per token from this range on (activation units)")
        axes.set_ylabel("v0: static up to this range")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(mesh, ax=axes, label=f"loss ({unit})", pad=0.02)
        bar.outline.set_visible(False)

    return _draw(
        "Threshold study",
        "Loss for pairs of thresholds, with the share of layers that are static. Between v0 and v1 activations are "
        "equalized. Pairs that decide alike share one measurement; the recipe's own pair is bold.",
        lambda width: 3.6,
        paint,
    )


def front(points: Sequence[StudyPoint], chosen: int, unit: str) -> Drawing:
    """Speed against loss of everything measured as a whole, with the front."""

    def paint(figure: Figure, narrow: bool) -> None:
        axes: Axes = figure.subplots()
        behind = [p for p in points if not p.on_front]
        ahead = sorted((p for p in points if p.on_front), key=lambda p: p.speedup)
        axes.scatter(
            [p.speedup for p in behind], [p.loss for p in behind], s=22, color=_MUTED, label="beaten by another"
        )
        axes.plot([p.speedup for p in ahead], [p.loss for p in ahead], "-o", color=_ACCENT, markersize=5, label="front")
        for point, marker, colour, name in (
            (points[0], "D", _WARM, "recipe asked for"),
            (points[chosen], "*", _GOOD, "proposal"),
        ):
            axes.scatter(
                [point.speedup], [point.loss], s=150 if marker == "*" else 55, marker=marker, color=colour,
                edgecolor=_CARD, linewidth=0.8, zorder=3, label=name,
            )  # fmt: skip
        axes.set_xlabel("speed (times the float model, sum of kernel times)")
        axes.set_ylabel(f"loss ({unit})")
        axes.legend(loc="best", fontsize=9.5)
        axes.grid(linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.margins(0.08)

    return _draw(
        "Accuracy and speed",
        "Every recipe that was measured as a whole; right and down is better. Times are those of one batch, added up "
        "from profiled kernels.",
        lambda width: 3.6,
        paint,
    )
