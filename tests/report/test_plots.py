"""Figures: what is drawn is what was given, and nothing touches matplotlib's global state."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.image import imread

from sgr_kernels.report.covariance import DisplacementFunction, covariance_figure
from sgr_kernels.report.maps import heat_map
from sgr_kernels.report.plots import COLORS, Line, Panel, Tile, image_grid, line_figure, save


def panel(*lines, **options):
    return Panel("title", "x", "y", lines, **options)


def test_lines_error_bars_levels_and_marks_are_drawn_where_they_belong():
    lines = [
        Line("a", [0, 1, 2], [0.5, 0.6, 0.7], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]),
        Line("b", [0, 1, 2], [1, 2, 3], color=4, dashed=True, mark=1.5),
    ]
    (axes,) = line_figure([panel(*lines, levels=[(0.1, "chance")], y_range=(0, 4))], "above").axes
    (bars,) = axes.containers
    points, _, (segments,) = bars.lines
    assert np.allclose(points.get_xydata(), [[0, 0.5], [1, 0.6], [2, 0.7]])
    assert np.allclose([s[:, 1] for s in segments.get_segments()], [[0.4, 0.7], [0.5, 0.8], [0.6, 0.9]])
    dashed = next(line for line in axes.lines if line.get_label() == "b")
    assert dashed.get_linestyle() == "--"
    assert to_hex(dashed.get_color()) == COLORS[4]
    assert any(list(line.get_xdata()) == [1.5, 1.5] for line in axes.lines)
    assert any(list(line.get_ydata()) == [0.1, 0.1] for line in axes.lines if line.get_label() == "chance")
    assert axes.get_ylim() == (0, 4)
    assert sorted(text.get_text() for text in axes.get_legend().get_texts()) == ["a", "b", "chance"]


@pytest.mark.parametrize("panels", [1, 2, 3])
def test_a_long_title_stays_inside_the_figure(panels):
    title = "Certified accuracy on 1000 test images of mnist-sample; dotted: the most that 10000 draws can certify"
    figure = line_figure([Panel("", "x", "y", [Line("line", [0, 1], [0, 1])])] * panels, title)
    FigureCanvasAgg(figure).draw()
    assert " ".join(figure.get_suptitle().split()) == title
    box = figure._suptitle.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.y0 >= figure.axes[0].get_window_extent().y1


def test_evenly_spaced_ticks_keep_their_names():
    y = [0.1, 0.2, 0.3]
    (axes,) = line_figure([panel(Line("a", [1, 2, 16], y), x_ticks=[1, 2, 16])]).axes
    assert list(axes.lines[0].get_xdata()) == [0, 1, 2]
    lines = [Line(name, [1, 2, 16], y, y, y) for name in "abc"]
    (axes,) = line_figure([panel(*lines, x_ticks=[1, 2, 16])]).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "16"]
    positions = np.stack([bars.lines[0].get_xdata() for bars in axes.containers])
    assert np.abs(positions - [0, 1, 2]).max() < 0.2
    assert len(np.unique(positions[:, 0])) == 3


def test_names_of_many_lines_stand_beside_a_panel_and_all_lines_differ():
    lines = [Line(f"SGR, decay length {k}", [0, 1], [0, k], dashed=k == 0) for k in range(8)]
    figure = line_figure([panel(*lines)])
    (axes,) = figure.axes
    assert axes.get_legend() is None
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= axes.get_window_extent().x1
    assert box.x1 <= figure.bbox.x1
    assert len({(to_hex(line.get_color()), line.get_marker()) for line in axes.lines}) == 8


def test_cells_and_colour_bar_of_a_heat_map_are_both_in_percent():
    figure = heat_map(
        np.array([[0.5, 1.0, np.nan]]),
        ["a"],
        ["b", "c", "d"],
        title="t",
        row_title="",
        column_title="",
        bar_title="accuracy",
    )
    FigureCanvasAgg(figure).draw()
    axes, bar = figure.axes
    assert [text.get_text() for text in axes.texts] == ["50.0", "100.0", "–"]
    assert bar.get_ylabel() == "accuracy [%]"
    assert bar.get_yticklabels()[-1].get_text() == "100"


@pytest.mark.parametrize(("values", "expected"), [([0.37, 0.5, np.nan], (0.37, 0.5)), ([0.95, 0.99], (0.89, 0.99))])
def test_the_colours_of_a_heat_map_span_its_values_and_ten_points_at_least(values, expected):
    names = [str(k) for k in range(len(values))]
    figure = heat_map(np.array([values]), ["a"], names, title="", row_title="", column_title="", bar_title="")
    assert figure.axes[0].images[0].get_clim() == pytest.approx(expected)


def test_grid_shows_images_with_right_and_wrong_answers(tmp_path):
    rows = [(f"row {r}", [Tile(np.full((5, 5), 0.5), [("SGR: 3", True), ("GN: 8", False)], "a 3")] * 2) for r in "ab"]
    figure = image_grid(rows)
    assert len([axes for axes in figure.axes if axes.images]) == 4
    save(figure, tmp_path / "grid.png")
    image = imread(tmp_path / "grid.png")[..., :3]
    greenish = (image[..., 1] > image[..., 0] + 0.2) & (image[..., 1] > image[..., 2] + 0.1)
    reddish = (image[..., 0] > image[..., 1] + 0.5) & (image[..., 0] > image[..., 2] + 0.5)
    assert greenish.any()
    assert reddish.any()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_covariance_functions_are_divided_by_their_variance(channels):
    distance = np.arange(20)
    values = np.exp(-distance / 4) * (0.5 + 0.5 * np.eye(channels)[..., None]) * 7
    function = DisplacementFunction("f", values, 4.0)
    assert function.variance == pytest.approx(7)
    figure = covariance_figure([function, DisplacementFunction("g", values, np.inf)])
    drawn = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 20]
    pairs = channels * (channels + 1) // 2
    assert len(drawn) == (2 if channels == 1 else pairs)
    assert np.allclose(drawn[0].get_ydata(), np.exp(-distance / 4))
    if channels > 1:
        assert np.allclose(drawn[-1].get_ydata(), 0.5 * np.exp(-distance / 4))
        assert [line.get_linestyle() for line in drawn] == ["-"] * channels + ["--"] * (pairs - channels)
    verticals = [line for line in figure.axes[0].lines if list(line.get_xdata()) == [4.0, 4.0]]
    assert len(verticals) == 1


def test_a_zero_covariance_can_be_drawn(tmp_path):
    save(covariance_figure([DisplacementFunction("nothing", np.zeros((1, 1, 5)), np.nan)]), tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_no_global_state_is_touched():
    script = (
        "import sys; from sgr_kernels.report.plots import *\n"
        "save(line_figure([Panel('t', 'x', 'y', [Line('a', [0, 1], [0, 1])])]), '/dev/null')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
