"""The page from which Ollama makes a model out of a GGUF file.

Ollama does not run the chat template inside the file: it wants a Go template, and settings of its
own. Its default context is a few thousand tokens whatever the model can do, and its default
sampling cuts and penalises; so all of these are written out.

Source: Ollama, `docs/modelfile.md`.
"""

from phikit.chat.go_template import go_template
from phikit.chat.tokenizer import Tokenizer
from phikit.weights.load import Loaded

CONTEXT_TOKENS = 8192
"""What Ollama is to make room for if nothing is said; keys and values of it are held in memory."""
TEMPERATURE = 0.6


def modelfile(
    loaded: Loaded, file: str, *, context: int | None = None, temperature: float = TEMPERATURE
) -> str:
    """The text of a Modelfile.

    Args:
        loaded: the model that the GGUF file holds.
        file: name of the GGUF file, which lies beside the Modelfile.
        context: tokens that prompt and reply may have together; None is `CONTEXT_TOKENS`, or the
            model's own limit if that is less.
        temperature: at which replies are drawn, unless a request says otherwise.

    Raises:
        ChatError: there is no Go template for the model's chat format.
    """
    renderer = loaded.renderer
    thinks = renderer.thinks or "reasoning" in renderer.name
    template = go_template(renderer, thinks=thinks)
    limit = loaded.config.max_context
    num_ctx = min(context or CONTEXT_TOKENS, limit)
    stops = [_name(loaded.tokenizer, id_) for id_ in renderer.stop_ids]
    lines = [
        f"# ollama create NAME -f THIS_FILE, then: ollama run NAME. The model's limit: {limit}.",
        f"FROM ./{file}",
        f'TEMPLATE """{template}"""',
        *(f'PARAMETER stop "{stop}"' for stop in stops),
        f"PARAMETER num_ctx {num_ctx}",
        f"PARAMETER temperature {temperature:g}",
        "# Draw from all tokens, and penalise none, as phikit does.",
        "PARAMETER top_k 0",
        "PARAMETER top_p 1",
        "PARAMETER repeat_penalty 1",
    ]
    return "\n".join(lines) + "\n"


def _name(tokenizer: Tokenizer, id_: int) -> str:
    return tokenizer.decode([id_], keep_special=True)
