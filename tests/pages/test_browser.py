"""Walks a page in JupyterLab, in a real browser, as a learner does: top to bottom, single cells, exercises, keys.

JupyterLab gets copies of the notebooks: it saves what it shows. Screenshots are left in
build/browser. Run: python -m helpers test tests/pages/test_browser.py
"""

import re
from dataclasses import dataclass, field
from types import SimpleNamespace

import nbformat
import pytest
from support.jupyter import (
    CODE_CELL,
    Axe,
    Notebook,
    browser,
    elsewhere,
    expect,
    jupyterlab,
    need_chromium,
    take,
)

from course.exercises import pair

need_chromium()
# The page with the most to press. tests/nightly/test_browser.py walks the others.
WALKED = ["ChatModel"]

REGISTERED = re.compile(
    r"Successfully registered model '[\w-]+'\.|Created version '\d+' of model '[\w-]+'\."
    r"|Registered model '[\w-]+' already exists\. Creating a new version of this model\.\.\."
)
OUTPUT = ".jp-OutputArea-output"
# A cell that asks at a temperature, without a seed.
BY_CHANCE = "**warm"
UNSOLVED, SOLVED = re.compile("Not yet: "), re.compile("PASS\n")
FORMULA = "mjx-container, .MathJax"
SUMMARY = "table details > summary"
TAB_STOPS = 10  # of one cell at most: its own buttons and what stands in its outputs
WRAPPER_LINES = 45
# axe judges no colour of a text that it takes for hidden: what JupyterLab leaves out of the layout
# while it is out of view, and what any box clips, such as the page's body, whose height is 0. What
# then hangs out of the notebook needs the notebook's background.
ALL_IN_VIEW = f"""
    body, body :has({OUTPUT}) {{
        overflow: visible !important; content-visibility: visible !important; contain: none !important }}
    .jp-Notebook .jp-Cell {{ background: var(--jp-layout-color0) }}"""
CHANGE_THEME = "theme => jupyterapp.commands.execute('apputils:change-theme', {theme})"
HAS_FOCUS = "element => element === document.activeElement"
# tiny-phi3 is done before anybody could press a button.
SLOW = """
import time, helpers.show.playground
def slow(model, request, pieces=helpers.show.playground.pieces):
    for piece in pieces(model, request):
        time.sleep(0.2)
        yield piece
helpers.show.playground.pieces = slow
"""


@dataclass
class Walk:
    """A page that was walked, still open, and what was seen on the way; texts are by a cell's index."""

    name: str
    notebook: Notebook
    cells: list
    saved_alike: bool = False
    prompts: list = field(default_factory=list)
    red_lines: list = field(default_factory=list)
    untouched: dict = field(default_factory=dict)
    solved: dict = field(default_factory=dict)
    again: dict = field(default_factory=dict)

    def code(self):
        """Return the indexes of the code cells."""
        return [index for index, cell in enumerate(self.cells) if cell.cell_type == "code"]

    def find(self, text):
        """Return the index of the one code cell that holds a text."""
        (index,) = (index for index in self.code() if text in self.cells[index].source)
        return index

    def checks(self):
        """Return the indexes of the cells that check an exercise."""
        return [index for index in self.code() if 'check("' in self.cells[index].source]


@pytest.fixture(scope="module")
def chromium():
    with browser() as (context, asked):
        yield context, asked


@pytest.fixture(scope="module")
def lab(tiny, tmp_path_factory):
    """Start JupyterLab. The model is there before: its progress bars would be on the page."""
    with jupyterlab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture(scope="module")
def controls(chromium, lab):
    """Show a notebook in which the checks below find what they look for: their absence elsewhere says something."""
    sources = (
        'from helpers import show_table\nshow_table("$a$ and $b$", {"$5": "costs $6"})',
        'from IPython.display import HTML\nHTML("<p>$a$ and $b$</p>")',
        """HTML('<p style="color: #777; background: #888">Not to be read</p>')""",
        "1/0",
        "2",
    )
    cells = [nbformat.v4.new_markdown_cell("$x^2$"), *map(nbformat.v4.new_code_cell, sources)]
    # Without a kernel's name JupyterLab asks for one.
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}),
        lab.folder / "Controls.ipynb",
    )
    with lab.open(chromium[0], "Controls", len(sources)) as notebook:
        notebook.run_all()
        outputs = [notebook.cell(index).locator(OUTPUT) for index in (1, 2)]
        # JupyterLab loads MathJax when it needs it: once both formulas are there, a third one would
        # be.
        expect(notebook.cell(0).locator(FORMULA)).to_have_count(1)
        expect(outputs[1].locator(FORMULA)).to_have_count(2)
        take(notebook.page, "Controls")
        return SimpleNamespace(
            red_lines=notebook.red_lines(),
            prompts=notebook.prompts(),
            formulas=outputs[0].locator(FORMULA).count(),
            table=outputs[0].text_content(),
            faults=faults(notebook.page),
        )


def test_an_error_would_be_seen(controls):
    assert "ZeroDivisionError: division by zero" in controls.red_lines
    assert controls.prompts == ["[1]:", "[2]:", "[3]:", "[4]:", "[ ]:"]


def test_two_dollar_signs_in_a_table_are_no_mathematics(controls):
    assert controls.formulas == 0
    assert "$a$ and $b$" in controls.table
    assert "costs $6" in controls.table


def test_grey_on_grey_would_be_seen(controls):
    assert any(
        fault.startswith("color-contrast") and "Not to be read" in fault
        for fault in controls.faults
    )


@pytest.fixture(scope="module", params=WALKED)
def walk(request, chromium, lab):
    yield from walk_through(request.param, chromium, lab)


def walk_through(name, chromium, lab):
    """Open a page, save it, run all, solve the exercises, then run each cell once more by itself from the last up."""
    file = lab.folder / f"{name}.ipynb"
    before, cells = file.read_bytes(), nbformat.read(file, as_version=4).cells
    code_cells = sum(cell.cell_type == "code" for cell in cells)
    with lab.open(chromium[0], name, code_cells) as notebook:
        walk = Walk(name, notebook, cells)
        notebook.save()
        walk.saved_alike = file.read_bytes() == before
        notebook.run_all()
        walk.prompts = notebook.prompts()
        walk.red_lines = notebook.red_lines()
        picture(walk)
        walk.untouched = {index: notebook.text(index) for index in walk.code()}
        solve(walk)
        walk.solved = walk.untouched | {index: notebook.run(index) for index in walk.checks()}
        walk.again = {index: notebook.run(index) for index in reversed(walk.code())}
        walk.red_lines += notebook.red_lines()
        yield walk


def picture(walk):
    """Leave the README's picture of a page, and one of the wrapper as a learner's screen shows it."""
    for name, text in {"lab": "show_tokens(", "wrapper": "%%writefile"}.items():
        if any(text in walk.cells[index].source for index in walk.code()):
            cell = walk.notebook.cell(walk.find(text))
            cell.evaluate("cell => cell.scrollIntoView()")
            take(walk.notebook.page, f"{walk.name}-{name}")


def solve(walk):
    """Write each solution into its exercise's cell, and run it."""
    for exercise, solution in pair(nbformat.v4.new_notebook(cells=walk.cells)):
        index = next(index for index, cell in enumerate(walk.cells) if cell["id"] == exercise["id"])
        walk.notebook.write(index, solution)
        walk.notebook.run(index)


def test_saving_an_untouched_page_changes_no_byte(walk):
    assert walk.saved_alike


def test_every_code_cell_has_run(walk):
    assert walk.prompts == [f"[{number + 1}]:" for number in range(len(walk.code()))]


def test_no_error_and_no_warning_is_shown(walk):
    assert surprises(walk.red_lines) == []


def surprises(lines):
    return [line for line in lines if not REGISTERED.fullmatch(line)]


def test_an_untouched_exercise_gets_a_hint(walk):
    assert len(walk.checks()) >= 3
    assert [
        walk.untouched[index]
        for index in walk.checks()
        if not UNSOLVED.match(walk.untouched[index])
    ] == []
    assert not any("Traceback" in walk.untouched[index] for index in walk.checks())


def test_a_solution_passes(walk):
    assert [
        walk.solved[index] for index in walk.checks() if not SOLVED.match(walk.solved[index])
    ] == []


def test_each_cell_runs_again_by_itself_and_says_the_same(walk):
    first, again = (
        {index: comparable(walk.cells[index].source, text) for index, text in texts.items()}
        for texts in (walk.solved, walk.again)
    )
    assert sorted(again) == walk.code()
    assert {index: again[index] for index in again if again[index] != first[index]} == {}


def comparable(source, text):
    """Return what a cell says without what differs each time: ids, measured figures, lengths and times, chance."""
    if BY_CHANCE in source:
        text = text.splitlines()[0]
    text = re.sub(r"\b[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}\b", "ID", text)
    text = re.sub(r"(champion until now\s+)\S+", r"\1", text).replace("Overwriting", "Writing")
    text = re.sub(r"#+|-{2,}", " ", re.sub(r"\d[\d.,]*", "0", text))
    text = re.sub(r"(?m)^(caller 0) [ .rw]+$", r"\1", text)  # the bars of a timeline
    return re.sub(r"[ \t]+", " ", text)


def test_the_diagram_is_loaded(walk):
    for diagram in walk.notebook.page.locator(".jp-MarkdownCell img").all():
        assert diagram.evaluate("image => image.naturalWidth") > 0, diagram.get_attribute("src")


def test_the_signature_is_a_table(walk):
    chat = walk.name == "ChatModel"
    page, caption = walk.notebook.page, "Two signatures" if chat else "Signature"
    tables = page.locator(f"{CODE_CELL} table", has=page.locator(f"caption:text-is('{caption}')"))
    headings = ["llm/v1/chat", "slm-onnx"] if chat else ["Type", "Required", "Default"]
    expect(tables.first.locator("thead").first.locator("th")).to_have_text(
        ["Field", "Part", *headings]
    )


def test_a_champion_is_shown(walk):
    expect(
        walk.notebook.page.locator(f"{CODE_CELL} caption:text-is('The champion')")
    ).to_have_count(1)


def test_a_folded_field_opens_by_keyboard(walk):
    if walk.name == "CustomPythonWrapper":  # its signature has no field inside a field
        expect(walk.notebook.page.locator(SUMMARY)).to_have_count(0)
        return
    index = walk.find(
        "show_signature(model_info)"
        if walk.name == "TransformerPipeline"
        else "compare_signatures(t"
    )
    page, summary = walk.notebook.page, walk.notebook.cell(index).locator(SUMMARY).first
    walk.notebook.cell(index).locator(".jp-InputPrompt").click()
    for _ in range(TAB_STOPS):
        if summary.evaluate(HAS_FOCUS):
            break
        page.keyboard.press("Tab")
    assert summary.evaluate(HAS_FOCUS)
    rows = summary.locator("xpath=..").locator("tbody tr")
    expect(rows.first).not_to_be_visible()
    page.keyboard.press("Enter")
    expect(rows.first).to_be_visible()
    page.keyboard.press("Space")
    expect(rows.first).not_to_be_visible()


def test_the_wrapper_fits_a_screen(walk):
    wrappers = [cell for cell in walk.cells if "wrapper" in cell.metadata.get("tags", [])]
    assert len(wrappers) == (walk.name == "CustomPythonWrapper")
    assert [
        len(cell.source.splitlines())
        for cell in wrappers
        if len(cell.source.splitlines()) > WRAPPER_LINES
    ] == []


def test_the_playground_answers_stops_and_answers_again(walk):
    if walk.name != "ChatModel":
        expect(walk.notebook.page.get_by_role("button", name="Generate")).to_have_count(0)
        return
    page, form = walk.notebook.page, walk.notebook.cell(walk.find("show_playground("))
    generate, stop = (form.get_by_role("button", name=name) for name in ("Generate", "Stop"))
    answer, status = form.get_by_label("Answer"), form.get_by_role("status")
    form.get_by_label("Question").fill("Who are you?")
    generate.press("Enter")
    expect(status).to_contain_text("tokens per second")
    expect(answer).not_to_have_value("")
    for name, word in {"Raw request": "Who are you?", "Raw response": "completion_tokens"}.items():
        details = form.locator("details", has=page.get_by_text(name))
        expect(details.locator("pre")).not_to_be_visible()
        details.locator("summary").press("Enter")
        expect(details.locator("pre")).to_be_visible()
        expect(details.locator("pre")).to_contain_text(word)
    walk.notebook.execute(SLOW)
    limit = form.get_by_label("Max tokens")
    limit.fill("2048")
    limit.press("Tab")  # a number goes to the kernel when its field is left
    generate.press("Space")
    expect(stop).to_be_enabled()
    expect(answer).not_to_have_value("")
    stop.press("Space")
    expect(status).to_contain_text("Stopped after")
    take(page, "ChatModel-playground")
    limit.fill("8")
    limit.press("Tab")
    generate.click()
    expect(status).to_contain_text("8 tokens in")
    assert surprises(walk.notebook.red_lines()) == []


# Light last: JupyterLab remembers it for the next page.
@pytest.mark.parametrize("theme", ["JupyterLab Dark", "JupyterLab Light"])
def test_what_a_page_shows_can_be_read_in_both_themes(walk, theme):
    page = walk.notebook.page
    page.evaluate(CHANGE_THEME, theme)
    expect(page.locator("body")).to_have_attribute("data-jp-theme-name", theme)
    # It lies over the page while the theme comes.
    expect(page.locator("#jupyterlab-splash")).to_have_count(0)
    picture_of = {
        "TransformerPipeline": "show_tokens(",
        "CustomPythonWrapper": "compare_figures(",
        "ChatModel": "show_playground(",
    }
    walk.notebook.cell(walk.find(picture_of[walk.name])).evaluate("cell => cell.scrollIntoView()")
    take(page, f"{walk.name}-{theme.split()[1].lower()}")
    assert faults(page) == []


def faults(page):
    """Return the serious and critical faults that axe finds in the outputs of a page's cells."""
    shown = {"include": [[OUTPUT]]}
    found = Axe().run(page, shown, {"resultTypes": ["violations"]}).response["violations"]
    style = page.add_style_tag(content=ALL_IN_VIEW)
    colours = Axe().run(page, shown, {"runOnly": ["color-contrast"]}).response
    style.evaluate("style => style.remove()")
    judged = sum(len(rule["nodes"]) for rule in colours["passes"] + colours["violations"])
    assert judged >= page.locator(OUTPUT).count(), "axe took some text for hidden"
    return [
        f"{rule['id']}: {node['html'][:200]}: {node['failureSummary']}"
        for rule in [rule for rule in found if rule["id"] != "color-contrast"]
        + colours["violations"]
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


def test_no_request_leaves_this_machine(walk, chromium):
    assert len(chromium[1]) > 100
    assert elsewhere(chromium[1]) == []
