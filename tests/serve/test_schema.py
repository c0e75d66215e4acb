"""What the OpenAPI schema allows and what it does not: nothing of it makes the server fail."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import effort

schemathesis = pytest.importorskip("schemathesis")


@pytest.mark.slow  # as all that needs the packages of `make test-all`
def test_no_failures(served: Any) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", served.client.app, headers={"Host": "127.0.0.1"})
    modes = list(schemathesis.GenerationMode)
    seen = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        strategy = st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes])

        @settings(
            max_examples=effort.examples(2, 300),
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=strategy)
        def no_failure(case: Any) -> None:
            response = case.call(headers={"Host": "127.0.0.1"})
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        no_failure()
        seen.add((operation.method.upper(), operation.path))
    assert ("POST", "/v1/chat/completions") in seen and len(seen) >= 14
