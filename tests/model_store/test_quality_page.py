"""docs/quality.md and docs/stochastic_patching.md say what the default pair's quality.json and docs/data say."""

from benchmarks import quality_page


def test_the_pages_are_up_to_date():
    assert quality_page.main(["--check"]) == 0
    assert all(svg.lstrip().startswith("<?xml") for svg in quality_page.plots().values())
