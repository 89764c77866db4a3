"""Templates: escaped where they are HTML, complete, and part of the package."""

import tomllib
from pathlib import Path

import pytest
from jinja2 import UndefinedError

import orpo_ray.reports
from orpo_ray.reports.page import render
from tests.conftest import ROOT

FOLDER = Path(orpo_ray.reports.__file__).parent


def test_values_are_escaped_in_html():
    page = render("data.html.j2", title="<i>a run", parts=[], columns=[])
    assert "<title>&lt;i&gt;a run</title>" in page
    assert "<i>" not in page


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(UndefinedError, match="'parts' is undefined"):
        render("data.html.j2", title="a run", columns=[])


def test_the_wheel_has_every_template():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["orpo_ray.reports"]
    packaged = {path for pattern in patterns for path in FOLDER.glob(pattern)}
    assert packaged == set((FOLDER / "templates").iterdir())
