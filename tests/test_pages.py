"""README.md and docs/ say what the data says, point at what exists, and stay short."""

import importlib
import json
import re
from pathlib import Path

import pytest

from benchmarks import pages
from model_store.store import StoreError
from studies import training_recipes_report as recipes_report

USER_PAGES = ("README.md", *(f"docs/{name}.md" for name in (
    "api", "benchmarks", "deployment", "quality", "reliability", "scheduling"
)))  # fmt: skip
FOLDERS = ("server/", "model_store/", "deploy/", "recipes/", "benchmarks/", "studies/", "tests/", "docs/")


def current_pages():
    """Every page that says what is true now: not the log, which says what was."""
    return [page for page in [*pages.pages(), pages.API_PAGE] if page.parent.name != "log"]


def test_the_pages_are_up_to_date():
    assert pages.main(["--check"]) == 0
    assert all(svg.lstrip().startswith("<?xml") for svg in pages.plots().values())


def test_the_sizes_are_those_of_the_pair():
    try:
        found = pages.sizes_of_the_pair()
    except StoreError as error:
        pytest.skip(f"the default teacher cannot be had here: {error}")
    assert found == json.loads((pages.DATA / "sizes.json").read_text())


def test_a_table_that_nothing_prints_is_an_error():
    with pytest.raises(KeyError):
        pages.fill("<!-- table: unheard_of -->\n<!-- end -->", {})


def test_recording_keeps_the_output_of_a_command(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "RECORDED", tmp_path / "recorded.json")
    pages.RECORDED.write_text("{}")
    args = pages.argparse.Namespace(record="hello", machine="a machine", command=["echo", "a  b"])
    assert pages.record(args) == 0
    entry = json.loads(pages.RECORDED.read_text())["hello"]
    shown = pages.recorded_table(entry)
    assert shown.startswith("`echo 'a  b'`, a machine, 20") and "```\na  b\n```" in shown
    assert pages.recorded_table(entry | {"output": ["| a |", "|---|"]}).endswith(":\n\n| a |\n|---|\n")
    args.command = ["false"]
    assert pages.record(args) != 0 and list(json.loads(pages.RECORDED.read_text())) == ["hello"]


@pytest.mark.parametrize("page", [*pages.pages(), pages.API_PAGE], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, section in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        if not target.startswith("http"):
            other = page.parent / target if target else page
            assert other.exists(), target
            assert not section or section in sections(other), f"{target}#{section}"


def sections(page):
    """What a link can name: headings as GitHub writes them in addresses."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", current_pages(), ids=lambda page: page.name)
def test_paths_and_modules_that_pages_name_exist(page):
    text = page.read_text()
    for name in re.findall(r"`([\w./-]+)`", text):
        if name.startswith(FOLDERS) and "*" not in name:
            assert (pages.ROOT / name).exists(), name
    for module in re.findall(r"python -m ((?:server|deploy|recipes|benchmarks|studies)[\w.]*)", text):
        path = pages.ROOT / module.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), module


SOURCES = [path for folder in ("server", "model_store", "deploy", "recipes", "benchmarks")
           for suffix in ("py", "h", "cpp") for path in (pages.ROOT / folder).rglob(f"*.{suffix}")]  # fmt: skip


@pytest.fixture(scope="module")
def classes():
    """Class -> the text of the files that define it."""
    found: dict[str, str] = {}
    for path in SOURCES:
        text = path.read_text()
        for name in re.findall(r"^(?:class|struct)\s+(\w+)", text, re.MULTILINE):
            found[name] = found.get(name, "") + text
    return found


@pytest.mark.parametrize("page", ["docs/architecture.md", "server/kernels/README.md"])
def test_names_of_the_code_that_developer_pages_use_exist(page, classes):
    everything = "\n".join(path.read_text() for path in SOURCES)
    for name in re.findall(r"`([A-Za-z_][\w.]*)(?:\(.*?\))?`", (pages.ROOT / page).read_text()):
        first, _, member = name.partition(".")
        if name.endswith((".h", ".py", ".md", ".cpp")):
            assert any(path.name == Path(name).name for path in SOURCES) or (pages.ROOT / name).exists(), name
        elif re.match(r"[A-Z][a-z]", first):
            assert first in classes, name
            assert re.search(rf"\b{member}\b", classes[first]), name
        elif first not in ("transformers", "kept"):
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", everything), name


def test_arrows_of_the_graph_are_imports():
    page = (pages.ROOT / "docs/architecture.md").read_text()
    for one, other in re.findall(r"^  (\w+) --> (\w+)$", page, re.MULTILINE):
        folder = pages.ROOT / "server" / one
        files = folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
        name = other if other == "model_store" else rf"server(\.| import ){other}"
        assert any(re.search(rf"^\s*(from|import) {name}\b", path.read_text(), re.MULTILINE) for path in files), one


@pytest.mark.parametrize("name", ["light", "dark", "phone"])
def test_pictures_of_the_playground_show_the_pair_and_the_page(name):
    image = pytest.importorskip("PIL.Image")
    with image.open(pages.IMAGES / f"playground-{name}.png") as picture:
        shown = picture.info["Description"]
    rows = json.loads((pages.DATA / "sizes.json").read_text())["sizes"]
    sizes = {f"{row['size']}L": row for row in rows}
    low, high = (f"{row['parameters'] / 1e6:.0f} M" for row in (rows[0], rows[-1]))
    assert f"smollm2-135m-instruct: {len(rows)} sizes, {low} to {high} parameters" in shown
    assert f"1,000 tokens\n{rows[-1]['kv_bytes_per_token'] / 1e3:.0f} MB\n" in shown
    named = set(re.findall(r"\b(\d+L)(?:-q\d)?\b", shown))
    assert {"16L", "30L"} <= named <= set(sizes)
    for size, parameters in re.findall(r"^(?:auto → )?(\d+L)(?:-q\d)?\s+(\d+ M) parameters$", shown, re.MULTILINE):
        assert parameters == f"{sizes[size]['parameters'] / 1e6:.0f} M", size
    # The page as it is now: what it calls its parts stands in the picture.
    markup = (pages.ROOT / "server/api/playground/index.html").read_text()
    missing = [title for title in re.findall(r"<h2[^>]*>([^<]+)<", markup) if title not in shown]
    assert missing == ["This server asks for a key"]


SCRIPTS = [f"{folder}.{path.stem}" for folder in ("benchmarks", "studies", "recipes")
           for path in sorted((pages.ROOT / folder).glob("*.py")) if path.stem != "__init__"]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_still_find_what_they_import(script):
    importlib.import_module(script)


def test_pages_for_users_stay_short():
    # A cell's border, a bullet and a ratio's colon are no words.
    texts = {name: (pages.ROOT / name).read_text().split() for name in USER_PAGES}
    words = {name: sum(any(map(str.isalnum, word)) for word in text) for name, text in texts.items()}
    assert sum(words.values()) <= 12_000, words


def test_gain_is_paired_over_windows():
    that = {"kl": 1.0, "kl_windows": [0.5, 1.0, 1.5]}
    this = {"kl": 0.9, "kl_windows": [0.4, 0.9, 1.4]}  # better by 0.1 in every window, whatever their spread
    found = recipes_report.gain(that, this)
    assert abs(found["kl"] + 0.1) < 1e-12 and found["kl_ci"] < 1e-12
    assert "kl_ci" not in recipes_report.gain({"kl": 1.0}, this)


def test_tables_by_size_and_by_name_are_each_others_transpose():
    measured = {"16": {"perplexity_ratio": 2.0, "kl": 0.5}, "17": {"perplexity_ratio": 1.5, "kl": 0.25}}
    rows: dict[str, recipes_report.Rows] = {"a": measured, "b": {}}
    lines = recipes_report.comparison(rows).splitlines()
    assert lines[2:] == ["| 16L | 2.00x / 0.500 | - |", "| 17L | 1.50x / 0.250 | - |"]
    lines = recipes_report.by_line(rows).splitlines()
    assert lines[0] == "| size | 16L | 17L |"
    assert lines[2:] == ["| a | 2.00x / 0.500 | 1.50x / 0.250 |", "| b | - | - |"]


def test_gains_are_told_by_student_and_size():
    students = {"alone": {"16": {"kl": 2.0}, "17": {"kl": 1.0}}, "patched": {"16": {"kl": 1.5}, "17": {"kl": 1.0}}}
    found = recipes_report.gains(students, "alone")
    assert found == {"patched": {"16": {"kl": -0.5}, "17": {"kl": 0.0}}}
    assert recipes_report.verdict(found).splitlines()[1].endswith("lower at 1 of 2 sizes, mean difference -0.250")
    assert recipes_report.gains(students, "cosine") == {}


def test_the_overlap_is_that_of_the_text_or_said_to_be_unknown():
    checked = {"share": 4e-5, "checked": 50_000, "against": ["training_text.npz"]}
    said = "Of the held-out text's runs of 13 words, 0.0040% also occur"
    assert pages.overlap({"text_overlap": checked}).startswith(said)
    assert "not checked" in pages.overlap({})
