"""Requests that schemathesis makes of the API's own description."""

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]


def test_no_request_breaks_the_server_or_its_description(server):
    description = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    paths = set()
    for result in description.get_all_operations():
        operation = result.ok()
        paths.add(operation.path)

        @given(case=operation.as_strategy())
        @settings(
            max_examples=20,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case):
            case.call_and_validate(checks=CHECKS)

        check()
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize", "/metrics"} <= paths
