"""Every name of guided-diffusion's modules is here, with its parameters in its order and with its defaults."""

import pytest

from door_names import MODULES, assert_is_upstreams

NAMES = [(module, name) for module, names in MODULES.items() for name in names]


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda part: part)
def test_names_and_signatures_are_upstreams(module, name):
    assert_is_upstreams(module, name)
