r"""The process in which `phikit.chat.template_process` runs a chat template; started as a script.

A first line out says that it is ready. Then one JSON line in, `{"template": str, "renders":
[variables, ...]}`, and one JSON line out, `{"texts": [...], "error": str | None}`.

A template is a stranger's program. Jinja's sandbox keeps it from Python's internals, but not from
loops within loops or from doubling a string; the limits of this process do. A start
costs jinja and no torch.

The environment is that of `transformers` (`utils/chat_template_utils.py`), less the clock.

    python -P template_worker.py MEMORY_BYTES TIMEOUT_S MAX_CHARS
"""

import json
import sys
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from phikit.base.worker import limit_memory, limit_processor


class GenerationBlocks(Extension):
    """`{% generation %}`, which marks replies for training, is read as its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja's interface

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        return caller()


class PlainNamespace(Namespace):
    """A namespace whose attributes cannot shadow Python's own."""

    def __init__(*args: Any, **values: Any) -> None:
        for name in values:
            _refuse_private(name)
        Namespace.__init__(*args, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: str) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}")


@lru_cache(maxsize=1)
def compiled(template: str) -> Template:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols]
    )

    def tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    made.filters["tojson"] = tojson
    made.globals.update(raise_exception=raise_exception, namespace=PlainNamespace)
    del made.globals["dict"]
    return made.from_string(template)


def render(request: dict[str, Any], max_chars: int) -> list[str]:
    template = compiled(request["template"])
    texts = []
    for variables in request["renders"]:
        pieces, size = [], 0
        for piece in template.generate(variables):
            size += len(piece)
            if size > max_chars:
                raise ValueError(f"it writes more than {max_chars} characters")
            pieces.append(piece)
        texts.append("".join(pieces))
    return texts


def answer(reply: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


def main() -> None:
    memory_bytes, timeout_s, max_chars = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    limit_memory(memory_bytes)
    answer({"error": None})  # ready: the imports are done
    for line in sys.stdin:
        limit_processor(timeout_s)
        try:
            reply = {"texts": render(json.loads(line), max_chars), "error": None}
        except MemoryError:
            reply = {"texts": [], "error": "it needs too much memory"}
        except Exception as error:  # a template may raise anything
            reply = {"texts": [], "error": f"{type(error).__name__}: {str(error)[:200]}"}
        answer(reply)


if __name__ == "__main__":
    main()
