r"""Extraction and comparison: bounded in time and memory for any text a model may write."""

import os
import signal
import sys
import time
from fractions import Fraction

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phikit.base.errors import ConfigError
from phikit.evals import verify
from phikit.evals.verify import Verdict, Verifier, equal, extract_answer, parse_number

latex = st.text(alphabet="\\{}boxed123 +-/.,%$<>thinkfrac^()e", max_size=60)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed {3}", "3"),
        (r"\boxed{4} and \boxed{5", "4"),
        (r"<think>\boxed{1}</think>\boxed{2}", "2"),
        (r"<think>\boxed{1}</think> no box", None),
        (r"<think>\boxed{1}", None),
        (r"\boxed{}", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_last_balanced_box_after_the_thinking(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is 5, so 12.", "12"),
        ("that makes 1,234.50 dollars", "1,234.50"),
        ("x2 is -3/4", "-3/4"),
        (r"\boxed{9} or 10", "9"),
        ("none at all", None),
    ],
)
def test_lenient_falls_back_on_the_last_number(text, answer):
    assert extract_answer(text, lenient=True) == answer


@given(latex, st.sampled_from(["7", r"\frac{1}{2}", r"a \{ b", "x^{2}"]))
def test_a_box_at_the_end_is_always_found(before, inner):
    assert extract_answer(f"{before}</think>\\boxed{{{inner}}}") == inner


@given(latex)
def test_extraction_and_comparison_never_raise(text):
    extract_answer(text)
    extract_answer(text, lenient=True)
    equal("42", text)
    assert equal(text, text) is True


@pytest.mark.parametrize(
    "hostile",
    [r"\boxed{" * 50_000, "{" * 300_000, "1," * 150_000, "9" * 300_000, "- " * 150_000],
)
def test_extraction_takes_one_pass(hostile):
    started = time.process_time()  # a quadratic pass would take minutes
    extract_answer(hostile)
    extract_answer(hostile, lenient=True)
    equal("42", hostile)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1234", "1,234"),
        ("1234", "1{,}234"),
        ("0.5", "1/2"),
        (r"\frac{1}{2}", r"\dfrac12"),
        ("-3/2", r"-1\frac{1}{2}"),
        ("1.5", "1 1/2"),
        ("300", r"3 \times 10^{2}"),
        ("300", "3e2"),
        ("50%", "0.5"),
        ("50", r"50\%"),
        ("50 percent", "1/2"),
        ("5", "$5$"),
        ("5", r"\$5"),
        ("5", "5."),
        ("5", "5.00"),
        ("-5", "−5"),
        ("no", r"\text{No}"),
        ("3x+4", "3x + 4"),
        (r"\left(1,2\right)", "(1,2)"),
    ],
)
def test_equal_numbers_and_spellings(gold, answer):
    assert equal(gold, answer) is True and equal(answer, gold) is True


@pytest.mark.parametrize(
    ("gold", "answer"), [("5", "6"), ("1/3", "0.333"), ("0.5", "5%"), ("7", "-7"), ("10", "1")]
)
def test_different_numbers(gold, answer):
    assert equal(gold, answer) is False


@pytest.mark.parametrize(
    "answer", ["x+1", "5 cm", "1, 234", "1/0", "1e999999999", "9" * 10**6, "2^10", "", "½"]
)
def test_what_arithmetic_cannot_decide_is_left_open(answer):
    assert equal("1234", answer) is None


@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_written_fractions_compare_as_numbers(left, right):
    assert equal(str(left), str(right)) is (left == right)


@given(st.integers(-(10**30), 10**30))
def test_thousands_separators_change_nothing(number):
    assert parse_number(f"{number:,}") == (Fraction(number), False)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**9)))
def test_decimals_are_exact(number):
    parsed = parse_number(f"{number:f}")
    assert parsed is not None and parsed.value == Fraction(number)


@pytest.fixture(scope="module")
def verifier():
    pytest.importorskip("math_verify", reason="needs the extra `eval`")
    with Verifier(timeout_s=20.0) as shared:  # far above any check here, on a busy machine too
        yield shared


@pytest.fixture(scope="module")
def impatient():
    pytest.importorskip("math_verify", reason="needs the extra `eval`")
    with Verifier(timeout_s=2.0) as shared:
        yield shared


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("2\\sqrt{2}", "\\sqrt{8}", True),
        ("x+1", "1+x", True),
        ("x+1", "y+1", False),
        ("5", "x=5", True),
        ("(1,2)", "(1, 2)", True),
        ("12", "12 \\text{ dollars}", True),
        ("42", "3 or 42", False),
        ("42", "\\text{the answer is } 42", False),
        ("42", "", False),
    ],
)
def test_symbolic_comparison(verifier, gold, answer, same):
    assert verifier.check([(gold, answer)]) == [Verdict(same)]


@pytest.mark.parametrize("bomb", ["9^{9^{9^{9}}}", "7^{10^{9}}", "(" * 300 + "1" + ")" * 300])
def test_a_bomb_ends_at_the_limit_and_the_next_check_works(impatient, bomb):
    impatient.check([("x+1", "x+2")])  # starts the worker, whose imports are not a check's time
    started = time.monotonic()
    (verdict,) = impatient.check([("9", bomb)])
    assert verdict == Verdict(False, "timed out after 2 s")
    assert 2 <= time.monotonic() - started < 10
    assert impatient.check([("x+1", "1+x")]) == [Verdict(True)]


def worker_processes() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "verify_worker" in str(p.cmdline())]


@pytest.fixture
def fresh():
    """A verifier of its own, and the process it starts."""
    pytest.importorskip("math_verify", reason="needs the extra `eval`")
    before = worker_processes()
    with Verifier(timeout_s=20.0) as verifier:
        assert verifier.check([("5", "6"), ("1/2", "0.5")]) == [Verdict(False), Verdict(True)]
        assert worker_processes() == before  # numbers need no process
        verifier.check([("x+1", "1+x")])
        (worker,) = set(worker_processes()) - set(before)
        yield verifier, worker
    assert worker_processes() == before


def test_a_killed_worker_is_replaced(fresh):
    verifier, worker = fresh
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert verifier.check([("z+1", "1+z")]) == [Verdict(True)]


def test_a_worker_is_recycled(fresh, monkeypatch):
    verifier, worker = fresh
    monkeypatch.setattr(verify, "_RECYCLE", 1)
    assert verifier.check([("z+1", "1+z")]) == [Verdict(True)]
    assert not worker.is_running()


def test_results_keep_the_order_of_the_pairs_with_several_workers():
    pytest.importorskip("math_verify", reason="needs the extra `eval`")
    pairs = [("x+1", f"{i}+x") for i in range(8)] + [("3", "3"), ("4", "5")]
    with Verifier(timeout_s=20.0, workers=2) as pool:
        equals = [verdict.equal for verdict in pool.check(pairs * 2)]
    assert equals == ([i == 1 for i in range(8)] + [True, False]) * 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows another process's limits")
def test_a_worker_cannot_take_all_memory_nor_spin_after_its_parent_died(fresh):
    _, worker = fresh
    assert worker.rlimit(psutil.RLIMIT_AS) == (2 * 1024**3, 2 * 1024**3)
    assert worker.rlimit(psutil.RLIMIT_CPU)[0] < sum(worker.cpu_times()[:2]) + 20 + 3


def test_an_endless_answer_is_not_sent_to_a_worker(verifier):
    (verdict,) = verifier.check([("42", "x" * 10**6)])
    assert verdict == Verdict(False, f"{10**6} characters, more than {verify.MAX_CHARS}")


def test_impossible_limits_are_refused():
    with pytest.raises(ConfigError, match="timeout_s=0"):
        Verifier(timeout_s=0)
