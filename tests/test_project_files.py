"""Files about the project: valid, and of the same version."""

import re
from pathlib import Path

import yaml

from layerskip import __version__

ROOT = Path(__file__).parents[1]


def test_the_citation_names_the_software_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"
    paper = citation["preferred-citation"]
    assert (paper["type"], paper["year"]) == ("conference-paper", 2024)
    names = [author["family-names"] for author in paper["authors"]]
    assert (names[0], names[-1], len(names)) == ("Elhoushi", "Wu", 13)
    assert all(author["given-names"] for author in paper["authors"])


def test_the_changelog_begins_with_this_version_and_its_date():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.findall(r"^## \[(.+)\] - (.+)$", text, re.MULTILINE)[0]
    assert version == __version__
    assert date == str(
        yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["date-released"]
    )


def test_workflows_and_forms_are_yaml():
    files = [*(ROOT / ".github").rglob("*.yml")]
    assert len(files) >= 4
    for file in files:
        assert yaml.safe_load(file.read_text(encoding="utf-8")), file
    for form in ("bug.yml", "feature.yml"):
        fields = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE" / form).read_text())
        assert {"name", "description", "body"} <= fields.keys()
        assert all(item["attributes"]["label"] for item in fields["body"])


def test_addresses_of_the_project_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'Source = "{citation["repository-code"]}"' in project
