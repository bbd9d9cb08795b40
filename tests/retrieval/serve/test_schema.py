"""The server against its own OpenAPI, by schemathesis."""

import warnings

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from qf.retrieval.serve.app import make_app
from qf.retrieval.serve.limits import Door

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.specs.openapi.checks import positive_data_acceptance


LIMITS = settings(
    max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)


def test_every_answer_is_as_the_schema_says(collection):
    schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(collection, Door(), 2**20, 64))
    checked = []
    for found in schema.get_all_operations():
        operation = found.ok()

        @LIMITS
        @given(operation.as_strategy())
        def check(case):
            case.call_and_validate(excluded_checks=[positive_data_acceptance])  # "dog +" fits the schema

        check()
        checked.append(operation.label)
    assert len(checked) == 9
