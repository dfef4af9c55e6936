"""Whatever the OpenAPI document allows, and what it does not: no answer is the server's fault.

pytest tests/fuzz/test_http.py --run-slow
"""

import os

import pytest
from hypothesis import HealthCheck, settings
from tests.unit.serve.house import at_hand, running, small_engine

from phikit.chat.render import renderer_for
from phikit.generate.language_model import LanguageModel
from phikit.serve.limits import Limits
from phikit.serve.models import ModelShelf

schemathesis = pytest.importorskip("schemathesis", reason="needs the extra `fuzz`")
EXAMPLES = int(os.environ.get("PHIKIT_FUZZ_EXAMPLES", "60"))


@pytest.fixture(scope="module")
def api(tiny_model, nano_tokenizer):
    loaded = LanguageModel(tiny_model(), nano_tokenizer, renderer_for(nano_tokenizer, "phi4-mini"))
    shelf = ModelShelf({"tiny": at_hand(loaded), "0": at_hand(loaded)}, make_engine=small_engine)
    limits = Limits(shutdown_s=1, new_tokens=8, request_timeout_s=60)
    with running(shelf, limits=limits) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")
        assert all(model.worker.idle for model in shelf.loaded)


schema = schemathesis.pytest.from_fixture("api")


@schemathesis.hook
def map_body(context, body):
    """Half of the requests name a model that is there, or nothing would get far."""
    if (
        isinstance(body, dict)
        and isinstance(body.get("model"), str)
        and len(body["model"]) % 2 == 0
    ):
        return {**body, "model": "tiny"}
    return body


@pytest.mark.slow
@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
    database=None,
)
def test_no_answer_is_the_servers_fault(case):
    case.call_and_validate()
