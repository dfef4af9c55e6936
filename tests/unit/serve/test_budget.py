import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.stub_endpoint import StubServer, fails, hangs_up, says, slow, stub_endpoint

from phikit.base.errors import ConfigError, RemoteError, ReplyTimeoutError, StorageError
from phikit.chat.message import Message
from phikit.generate.chat import ChatOptions
from phikit.generate.remote import Remote, RemoteConfig
from phikit.generate.reply import Piece
from phikit.serve import budget
from phikit.serve.budget import Budget, BudgetConfig, BudgetError, Metered, Sums

ASK = [Message("user", "3 + 4?")]
COST = (11 * 1.0 + 5 * 2.0) / 1e6
"""What the stub's answer costs at the prices below."""


def meter(server: StubServer, bounds: BudgetConfig) -> Metered:
    prices = {"price_in": 1.0, "price_out": 2.0, "retries": 0, "timeout_s": 5}
    config = RemoteConfig.resolve({"base_url": server.url, "model": "big", **prices})
    return Metered(Remote(config), Budget(bounds))


def test_calls_are_counted_and_stop():
    with stub_endpoint() as server:
        cloud = meter(server, BudgetConfig(calls_per_run=2))
        for _ in range(2):
            cloud.answer(ASK, ChatOptions())
        with pytest.raises(BudgetError, match="calls_per_run=2"):
            cloud.answer(ASK, ChatOptions())
        assert len(server.requests) == 2
        assert cloud.budget.run == pytest.approx((2, 2 * COST))


def test_money_stops_before_it_is_spent():
    options = ChatOptions(max_new_tokens=10)
    with stub_endpoint() as server:
        most = meter(server, BudgetConfig()).remote.config.worst_cost(ASK, options)
        cloud = meter(server, BudgetConfig(cost_per_run=most + 1.5 * COST))
        cloud.answer(ASK, options)
        cloud.answer(ASK, options)
        with pytest.raises(BudgetError, match="cost_per_run"):
            cloud.answer(ASK, options)
        assert len(server.requests) == 2


def test_a_day_is_shared_by_processes_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bounds = BudgetConfig(calls_per_day=2, file=tmp_path / "new" / "budget.sqlite")
    with stub_endpoint() as server:
        meter(server, bounds).answer(ASK, ChatOptions())
        second = meter(server, bounds)
        second.answer(ASK, ChatOptions())
        assert second.budget.run.calls == 1
        assert second.budget.today == pytest.approx((2, 2 * COST))
        with pytest.raises(BudgetError, match="calls_per_day=2"):
            meter(server, bounds).answer(ASK, ChatOptions())

        class Tomorrow(datetime):
            @classmethod
            def now(cls, tz: object = None) -> datetime:
                return datetime.now(UTC) + timedelta(days=1)

        monkeypatch.setattr(budget, "datetime", Tomorrow)
        second.answer(ASK, ChatOptions())
        assert second.budget.today.calls == 1


def test_calls_at_once_do_not_overspend(tmp_path: Path):
    bounds = BudgetConfig(calls_per_day=5, file=tmp_path / "budget.sqlite")
    budgets = [Budget(bounds) for _ in range(4)]
    refused = threading.Semaphore(0)

    def spend(number: int) -> None:
        try:
            budgets[number % 4].spend(0.5)
        except BudgetError:
            refused.release()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(spend, range(16)))
    assert budgets[0].today == Sums(5, 2.5)
    assert sum(each.run.calls for each in budgets) == 5
    assert sum(refused.acquire(blocking=False) for _ in range(16)) == 11


def test_what_was_not_answered_costs_nothing_and_what_is_unknown_in_full():
    options = ChatOptions(timeout_s=0.3)
    with stub_endpoint() as server:
        cloud = meter(server, BudgetConfig())
        most = cloud.remote.config.worst_cost(ASK, options)
        server.script = [fails(500), fails(400), hangs_up, slow(1.0)]
        for spent in (Sums(), Sums(), Sums(1, most), Sums(2, 2 * most)):
            with pytest.raises((RemoteError, ReplyTimeoutError)):
                cloud.answer(ASK, options)
            assert cloud.budget.run == pytest.approx((spent.calls, spent.cost))


def test_streams_are_settled_and_abandoned_ones_count_in_full():
    with stub_endpoint() as server:
        cloud = meter(server, BudgetConfig())
        list(cloud.stream(ASK, ChatOptions()))
        assert cloud.budget.run == pytest.approx((1, COST))
        server.script = [says("a long story")]
        stream = cloud.stream(ASK, ChatOptions())
        assert isinstance(next(stream), Piece)
        stream.close()  # pyright: ignore[reportAttributeAccessIssue]
        most = cloud.remote.config.worst_cost(ASK, ChatOptions())
        assert cloud.budget.run == pytest.approx((2, COST + most))


def test_bad_files_and_bounds(tmp_path: Path):
    with pytest.raises(ConfigError, match="needs `file`"):
        BudgetConfig.resolve({"cost_per_day": 1.0})
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(b"this is no database, but it is long enough to look like one" * 20)
    with pytest.raises(StorageError, match="cannot keep the budget"):
        Budget(BudgetConfig(calls_per_day=1, file=damaged))
    with pytest.raises(StorageError):
        Budget(BudgetConfig(calls_per_day=1, file=tmp_path))
