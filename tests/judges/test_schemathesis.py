"""schemathesis reads the OpenAPI document and sends what it may hold, right and wrong: no 5xx, and every
answer in the shape that the document states."""

from __future__ import annotations

import httpx2 as httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

pytestmark = pytest.mark.slow

EXAMPLES = 8
CHECKS = [not_a_server_error, response_schema_conformance, status_code_conformance]


def test_the_server_keeps_to_its_document(serve_judged, tmp_path):
    settings_file = tmp_path / "server.yaml"
    settings_file.write_text("max_output_tokens: 16\nmax_sequences: 4\n")
    server, _ = serve_judged("--config", str(settings_file))
    document = httpx.get(f"{server}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=server)
    seen = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        seen[operation.label] = judge(operation)
    assert len(seen) == sum(len(set(path) & {"get", "post"}) for path in document["paths"].values())
    assert all(seen.values()), seen
    assert httpx.get(f"{server}/health").status_code == 200
    assert httpx.post(f"{server}/v1/completions", json={"prompt": "fine"}).status_code == 200


def judge(operation):
    """The number of requests sent to one operation."""
    count = 0

    @given(case=operation.as_strategy())
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def call(case):
        nonlocal count
        count += 1
        case.validate_response(case.call(timeout=120), checks=CHECKS)

    call()
    return count
