"""The house's own rules: what is documented, and how large it may be."""

import importlib.util
from pathlib import Path

from house import count_settings, settings_by_group

from stepwiser_jax import config

ROOT = Path(__file__).parents[2]


def test_every_setting_is_documented_where_it_is_defined():
    silent = [
        f"{group}.{name}"
        for group, names in settings_by_group().items()
        for name in names
        if not getattr(config, group).model_fields[name].description
    ]
    assert silent == []


def test_there_are_no_more_settings_than_a_user_can_know():
    assert count_settings() <= 131


def test_the_page_of_settings_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_settings", ROOT / "docs/make_settings.py")
    assert spec is not None and spec.loader is not None
    make_settings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_settings)
    message = "run: python docs/make_settings.py > docs/settings.md"
    assert (ROOT / "docs" / "settings.md").read_text() == make_settings.page(), message
