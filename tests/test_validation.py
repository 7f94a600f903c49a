"""Bad input ends in an error that says what was expected, what came and what to do, before anything has run; unusual input is right."""

import pytest

from .conftest import INTERPRETING
from .reliability.bad_inputs import BACKENDS, GROUPS_OF_KINDS, KINDS, markdown, outcome, summary

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@every_kind
def test_inputs(kind, backend):
    assert outcome(kind, backend) == ""


@pytest.mark.skipif(INTERPRETING, reason="about a machine where the kernels cannot run")
@every_kind
def test_inputs_where_the_kernels_cannot_run(kind):
    assert outcome(kind, "triton") == ""


def test_the_table_names_every_kind_once():
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 60
    lines = markdown({(KINDS[0].name, BACKENDS[0]): "gave a result"}).splitlines()
    assert len(lines) == len(KINDS) + 2
    assert "gave a result" in lines[2]
    assert len(summary({}).splitlines()) == len(GROUPS_OF_KINDS) + 2
