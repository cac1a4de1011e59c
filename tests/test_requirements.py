"""The oldest releases that CI installs are the lower bounds that pyproject.toml names."""

from __future__ import annotations

import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it before Python 3.11

ROOT = Path(__file__).parent.parent
WITHOUT_OLDEST = {"torch"}  # 2.6 has no small build on PyPI: .ci/run installs the newest


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(lines: list[str]) -> dict[str, Requirement]:
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {each.name: each for each in parsed}


def version_of(requirement: Requirement, operator: str) -> Version:
    """The version of the requirement's only clause, which has this operator."""
    (clause,) = requirement.specifier
    assert clause.operator == operator, requirement
    return Version(clause.version)


def oldest() -> dict[str, Version]:
    pinned = requirements((ROOT / ".ci" / "oldest.txt").read_text().splitlines())
    return {name: version_of(each, "==") for name, each in pinned.items()}


def test_what_a_merge_needs_is_tried_at_its_lower_bound():
    needed = requirements([*project()["dependencies"], *project()["optional-dependencies"]["dataframe"]])
    bounds = {name: version_of(each, ">=") for name, each in needed.items() if name not in WITHOUT_OLDEST}
    tried = oldest()
    assert {name: tried.get(name) for name in bounds} == bounds


def test_what_the_tests_need_is_no_older_than_its_lower_bound():
    extras = project()["optional-dependencies"]
    bounds = {name: version_of(each, ">=") for name, each in requirements(extras["test"]).items()}
    bounds |= {name: version_of(each, ">=") for name, each in requirements(project()["dependencies"]).items()}
    tried = oldest()
    assert set(tried) <= set(bounds)
    assert {name: tried[name] for name in tried} == {name: bounds[name] for name in tried}
