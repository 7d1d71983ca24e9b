"""The workflows of .github and the snippets of docs/ci.md against the published schemas, and what their steps do.

Run: python -m helpers test tests/unit/course/test_workflows.py
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from check_jsonschema import main as check_jsonschema
from click.testing import CliRunner
from support import ROOT
from support.workflows import WORKFLOWS, read_jobs, read_snippets, read_workflow, run_steps

from course.execute import find_notebook
from course.tiers import TIERS

DOCUMENT = ROOT / "docs" / "ci.md"
# The file that each snippet of the document is, as its schema is called.
SNIPPETS = dict(
    zip(
        ("github-workflows", "gitlab-ci", "azure-pipelines"),
        read_snippets(DOCUMENT, "yaml"),
        strict=True,
    )
)
# Minutes that a tier takes on this project's slowest machine, with set-up.
MINUTES = {"check": 3, "test": 15, "nightly": 90}


def check_schema(schema, *paths):
    result = CliRunner().invoke(check_jsonschema, ["--builtin-schema", schema, *map(str, paths)])
    assert result.exit_code == 0, result.output


def test_the_workflows_and_their_action_fit_githubs_schemas_and_each_job_has_a_timeout():
    check_schema("vendor.github-workflows", *WORKFLOWS)
    check_schema("custom.github-workflows-require-timeout", *WORKFLOWS)
    check_schema("vendor.github-actions", ROOT / ".github" / "actions" / "set-up" / "action.yml")


@pytest.mark.parametrize("schema", SNIPPETS)
def test_a_snippet_of_the_document_fits_its_services_schema(schema, tmp_path):
    (tmp_path / "snippet.yml").write_text(SNIPPETS[schema], encoding="utf-8")
    check_schema(f"vendor.{schema}", tmp_path / "snippet.yml")


def test_zizmor_finds_no_unpinned_action_no_injection_and_no_surplus_permission():
    program = shutil.which("zizmor", path=Path(sys.executable).parent)
    result = subprocess.run(
        [program, "--offline", "--quiet", "--no-progress", ROOT / ".github"],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_each_pinned_action_says_its_version_and_has_one_hash():
    files = [*WORKFLOWS, ROOT / ".github" / "actions" / "set-up" / "action.yml"]
    lines = [
        line.strip()
        for path in files
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.match(r"\s*-? ?uses: (?!\$/)", line)
    ]
    found = {
        re.fullmatch(r"-? ?uses: (\S+)@([0-9a-f]{40})  # (v\d+\.\d+\.\d+)", line).groups()
        for line in lines
    }
    assert len(found) == len({name for name, _, _ in found}) == 4


@pytest.mark.parametrize("tier", TIERS)
def test_a_job_has_more_time_than_its_tier_takes_and_always_keeps_junit(tier):
    (job,) = [
        job
        for job in read_jobs()
        if f"python -m helpers {tier} --junitxml=build/junit.xml" in str(job["steps"])
    ]
    assert job["timeout-minutes"] >= 2 * MINUTES[tier]
    upload = job["steps"][-1]
    assert upload["if"] == "always()"
    assert "build/junit.xml" in upload["with"]["path"]
    assert "executed" in upload["with"]["path"] or tier == "check"


def test_workflows_that_events_start_replace_or_wait_for_each_other():
    for path in WORKFLOWS:
        started_by = read_workflow(path)["on"]
        assert ("concurrency" in read_workflow(path)) == ("workflow_call" not in started_by), (
            path.name
        )


def test_the_call_in_the_document_has_ten_lines_and_inputs_that_there_are():
    assert len(SNIPPETS["github-workflows"].strip().splitlines()) <= 10
    (job,) = yaml.safe_load(SNIPPETS["github-workflows"])["jobs"].values()
    assert (ROOT / re.search(r"\.github/workflows/\w+\.yml", job["uses"])[0]).exists()
    inputs = read_workflow(ROOT / ".github" / "workflows" / "pages.yml")["on"]["workflow_call"][
        "inputs"
    ]
    assert set(job["with"]) <= set(inputs)
    assert find_notebook(job["with"]["page"]).exists()
    table = re.findall(r"^\| `([a-z-]+)` \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert table == list(inputs)


# --- what the steps run, with programs that note how they were called ----------------------------

PAGE = "build/pages --junit build/pages/junit.xml --json build/pages/results.json"


@pytest.mark.parametrize(
    ("inputs", "called"),
    [
        ({"PAGE": "ChatModel"}, ["notebook", "ChatModel"]),
        (
            {
                "PAGE": "$(touch broken)",
                "MODEL": "hub:a/b",
                "SOLVED": "true",
                "PARAMETERS": 'question=Who\'s "a=b" `id`?\n\nmax_tokens=7\n',
            },
            [
                "notebook",
                "$(touch broken)",
                "-p",
                "model",
                "hub:a/b",
                "--solved",
                "-p",
                "question",
                'Who\'s "a=b" `id`?',
                "-p",
                "max_tokens",
                "7",
            ],
        ),
    ],
)
def test_the_page_gets_its_inputs_as_they_are_and_the_summary_says_how_to_repeat_it(
    tmp_path, inputs, called
):
    done = run_steps(
        "pages.yml", "page", tmp_path, {"MODEL": "", "SOLVED": "false", "PARAMETERS": "", **inputs}
    )
    assert done.returncode == 0, done.said
    assert done.calls == [["python", "-m", "helpers", *called, "--output", *PAGE.split()]]
    (line,) = [line for line in done.summary.splitlines() if line.startswith("python")]
    repeated = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {line}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert repeated.stdout.splitlines() == ["python", "-m", "helpers", *called]
    assert not list(tmp_path.rglob("broken"))


def test_a_parameter_without_a_value_is_refused(tmp_path):
    done = run_steps(
        "pages.yml",
        "page",
        tmp_path,
        {"PAGE": "ChatModel", "MODEL": "", "SOLVED": "", "PARAMETERS": "x"},
    )
    assert (done.returncode, done.calls) == (1, [])


@pytest.mark.parametrize(
    ("printed", "pages"),
    [
        ("ChatModel\nTransformerPipeline\n", '["ChatModel","TransformerPipeline"]'),
        ("", "[]"),
    ],
)
def test_a_pull_request_runs_those_of_the_pages_of_run_that_it_touches(tmp_path, printed, pages):
    done = run_steps(
        "pull-request.yml", "changed", tmp_path, {"BASE": "main"}, stand_ins={"python": printed}
    )
    assert done.calls == [["python", "-m", "helpers", "changed", "--run", "--since", "origin/main"]]
    assert done.output == f"pages={pages}\n"


@pytest.mark.parametrize(
    ("open_issues", "last"), [("7\n", ["issue", "comment", "7"]), ("", ["issue", "create"])]
)
def test_a_failed_night_opens_one_issue_and_comments_on_it_while_it_is_open(
    tmp_path, open_issues, last
):
    done = run_steps(
        "nightly.yml",
        "report",
        tmp_path,
        {"RESULT": "failure", "RUN": "https://run"},
        stand_ins={"gh": open_issues},
    )
    assert done.returncode == 0, done.said
    assert [call[1:3] for call in done.calls] == [["label", "create"], ["issue", "list"], last[:2]]
    assert done.calls[-1][1 : 1 + len(last)] == last
    assert "https://run" in done.calls[-1][-1]
