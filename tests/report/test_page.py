"""Tables and pages as text."""

from sgr_kernels.report.page import Page, percent, text_table


def test_terminal_tables_are_aligned():
    table = text_table(["network", "PGD"], [["clean", "3.0"], ["SGR", "41.5"]])
    assert table.splitlines() == ["network   PGD", "-------  ----", "clean     3.0", "SGR      41.5"]


def test_shares_read_as_percentages():
    assert percent(0.9161) == "91.6 %"
    assert percent(1, (0.89, 1)) == "100.0 % (89.0 to 100.0)"


def test_a_page_is_markdown(tmp_path):
    page = Page("Title")
    page.heading("Part")
    page.text("Words.")
    page.table(["a", "b"], [["1|2", "3"]])
    page.figure("picture.png", "A picture. Of something.")
    page.code("sgr demo")
    page.write(tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == (
        "# Title\n\n## Part\n\nWords.\n\n| a | b |\n| --- | ---: |\n| 1\\|2 | 3 |\n\n"
        "![A picture](picture.png)\n\nA picture. Of something.\n\n```\nsgr demo\n```\n"
    )
