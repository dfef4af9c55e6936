r"""The process in which `phikit.evals.verify.Verifier` runs math-verify; started as a script.

One JSON line in, `[gold, answer]`; one JSON line out, `{"equal": bool, "error": str | None}`; the
first line out says whether the imports worked. A start costs sympy and no torch.

    python -P verify_worker.py MEMORY_BYTES TIMEOUT_S
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from typing import TextIO

from phikit.base.worker import limit_memory, limit_processor

Compare = Callable[[str, str], bool]


def load_compare() -> Compare:
    """math-verify on two LaTeX expressions, with its own SIGALRM limits off."""
    from math_verify import LatexExtractionConfig, parse, verify

    # One extraction rule, tried on the whole answer: with the default ones "3 or 42" would be
    # searched for its last number, and a reply could hedge.
    whole = [LatexExtractionConfig(boxed_match_priority=0)]

    def read(text: str) -> list:
        return parse(f"\\boxed{{{text}}}", whole, fallback_mode="no_fallback", parsing_timeout=0)

    def compare(gold: str, answer: str) -> bool:
        return verify(read(gold), read(answer), timeout_seconds=None)

    return compare


def serve(compare: Compare, answers: TextIO, timeout_s: float) -> None:
    for line in sys.stdin:
        limit_processor(timeout_s)
        try:
            reply = {"equal": bool(compare(*json.loads(line))), "error": None}
        except MemoryError:
            reply = {"equal": False, "error": "out of memory"}
        except Exception as error:
            reply = {"equal": False, "error": f"{type(error).__name__}: {str(error)[:200]}"}
        print(json.dumps(reply), file=answers, flush=True)


def main() -> None:
    memory_bytes, timeout_s = int(sys.argv[1]), float(sys.argv[2])
    # Replies leave through a private descriptor; what a library prints must not mix with them.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.disable()
    limit_memory(memory_bytes)
    try:
        compare = load_compare()
        compare("x + 1", "1 + x")  # builds the parser's tables, half a second that is not a check's
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
        return
    print(json.dumps({"error": None}), file=answers, flush=True)
    serve(compare, answers, timeout_s)


if __name__ == "__main__":
    main()
