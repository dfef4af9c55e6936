"""Whatever the OpenAPI document allows, and what it does not: no answer is the server's fault.

    pytest tests/fuzz/test_http.py --run-slow

`PHIKIT_FUZZ_EXAMPLES` sets how many requests each path is sent.
"""

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.unit.serve.house import at_hand, make_tool_tokenizer, running, small_engine

from phikit.chat.render import renderer_for
from phikit.generate.language_model import LanguageModel
from phikit.serve.limits import Limits
from phikit.serve.models import ModelShelf

schemathesis = pytest.importorskip("schemathesis", reason="needs the extra `fuzz`")
pytest.importorskip("schemathesis.checks")
EXAMPLES = int(os.environ.get("PHIKIT_FUZZ_EXAMPLES", "60"))
POSTED = (
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings"),
    *("/api/show", "/api/chat", "/api/generate"),
)
PATHS = (
    *("/health", "/metrics", "/v1/models", "/v1/models/{name}"),
    *("/api/version", "/api/tags", "/api/ps", *POSTED),
)


@pytest.fixture(scope="module")
def api(tiny_model):
    tokenizer = make_tool_tokenizer()
    model = tiny_model(vocab_size=tokenizer.size)
    loaded = LanguageModel(model, tokenizer, renderer_for(tokenizer, "phi4-mini"))
    shelf = ModelShelf({"tiny": at_hand(loaded)}, make_engine=small_engine)
    limits = Limits(shutdown_s=1, new_tokens=8, request_timeout_s=60)
    with running(shelf, limits=limits) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")
        assert all(model.worker.idle for model in shelf.loaded)


def test_every_path_is_asked(api):
    assert set(api) == set(PATHS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "path"),
    [*(("positive", path) for path in PATHS), *(("negative", path) for path in POSTED)],
)
def test_no_answer_is_the_servers_fault(api, mode: str, path: str):
    """Statuses, media types and bodies are those of the document, whatever is sent."""
    [operation] = api[path].values()
    kind = schemathesis.GenerationMode(mode)

    @settings(
        max_examples=EXAMPLES,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
    )
    @given(case=operation.as_strategy(generation_mode=kind), names_ours=st.booleans())
    def check(case: Any, names_ours: bool) -> None:
        # Half of the requests name the model that is there, or few would get far.
        if names_ours and isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body = {**case.body, "model": "tiny"}
        # What has the right form may still be refused: 10,000 replies, an image that is none.
        case.call_and_validate(excluded_checks=[schemathesis.checks.positive_data_acceptance])

    check()
