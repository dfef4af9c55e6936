r"""The process in which `phikit.evals.verify.Verifier` runs math-verify; started as a script.

One JSON line in, `[gold, answer]`; one JSON line out, `{"equal": bool, "error": str | None}`; the
first line out says whether the imports worked. Nothing of phikit is imported, so a start costs
sympy and no torch. The parent owns the wall clock; this side limits memory and, so that a worker
whose parent was killed does not spin for ever, processor time.

    python -P verify_worker.py MEMORY_BYTES TIMEOUT_S
"""

import json
import logging
import math
import os
import sys
from collections.abc import Callable
from typing import TextIO

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


def limit(memory_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def rearm_cpu_limit(timeout_s: float) -> None:
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + timeout_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def serve(compare: Compare, answers: TextIO, timeout_s: float) -> None:
    for line in sys.stdin:
        rearm_cpu_limit(timeout_s)
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
    limit(memory_bytes)
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
