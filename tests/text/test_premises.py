"""Circumstances by the stems of their words."""

import pytest

from appliance.text import premises


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("Hij komt uit de gevangenis.", {"prison": {"gevangenis"}}),
        ("She has HIV, and was in prison.", {"illness": {"hiv"}, "prison": {"prison"}}),
        ("Er ist schwer krebskrank.", {"illness": {"krebs"}}),
        ("Ona jest bez  dokumentów.", {"no papers": {"bez  dokumentów"}}),
        ("En hiver il fait froid.", {}),
    ],
)
def test_stated(text: str, stated: dict[str, set[str]]) -> None:
    assert premises.stated(text) == stated
