"""Tenants from a key file, and how the limits of request, key and server combine."""

import pytest

from server.api.generate.catalog import Catalog, SizeInfo
from server.api.generate.protocol import SizeFields
from server.api.generate.size_choice import SizeChooser
from server.api.http.auth import KeyRing, read_key_file, tenant_name
from server.api.http.errors import APIError
from server.config import Settings
from server.core.request import Budget
from server.options import SettingsError
from server.sizing.spec import SizeSpec
from server.sizing.tenants import merge_budget

SIZES = tuple(range(16, 31))
KEYS = """
- {key: gold, tenant: gold, weight: 3, min_size: 24L, slo_ttft_ms: 800, priority: -1, slo_policy: strict}
- {key: free, tenant: free, max_size: 20L, rank: 1, memory_budget_mb: 300, max_concurrent: 4}
- plain
"""


@pytest.fixture
def chooser(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(KEYS)
    infos = {size: SizeInfo(size, size * 10**6, size << 20, 1024, size / 30) for size in SIZES}
    catalog = Catalog(("m",), infos, SIZES, {}, 4096, 32)
    settings = Settings(api_key_file=str(path), slo_ttft_ms=2000, slo_tpot_ms=100, priority=5)
    ring = KeyRing.from_settings(settings)
    tenants = ring.sizing(lambda size: catalog.resolve(SizeSpec.parse(size), "key"))
    return SizeChooser(catalog, settings, tenants)


def choose(chooser, tenant="", headers=None, **body):
    return chooser.choose(SizeFields.model_validate(body), None, headers or {}, tenant)


def test_two_keys_of_a_tenant_say_the_same_of_it(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text("- {key: old, tenant: a, max_size: 20L}\n- {key: new, tenant: a, max_size: 20L}\n")
    assert len(KeyRing.from_settings(Settings(api_key_file=str(path))).tenants) == 2
    path.write_text("- {key: old, tenant: a, max_size: 20L}\n- {key: new, tenant: a}\n")
    with pytest.raises(SettingsError, match="tenant 'a' do not say the same"):
        KeyRing.from_settings(Settings(api_key_file=str(path)))


def test_without_keys_a_request_can_only_let_others_go_first(chooser):
    """A lower number goes first, and there everybody would be the one before all others."""
    assert [choose(chooser, priority=asked).priority for asked in (-7, 5, 9)] == [5, 5, 9]
    assert choose(chooser, "plain", priority=-7).priority == -7


def test_a_key_has_its_own_floor_ceiling_limits_and_share(chooser):
    unnamed = tenant_name("plain")
    gold, free, plain = (choose(chooser, tenant) for tenant in ("gold", "free", unnamed))
    assert (gold.sizes[0], gold.sizes[-1], gold.reason, gold.priority) == (24, 30, "auto", -1)
    assert (free.sizes[0], free.sizes[-1], free.reason, free.priority) == (16, 20, "tenant_ceiling", 5)
    assert plain.sizes == SIZES
    assert (gold.budget.ttft, gold.budget.tpot, gold.budget.strict) == (0.8, 0.1, True)
    assert (free.budget.ttft, free.budget.memory, free.budget.strict) == (2.0, 300 << 20, False)
    assert gold.budget.inherited == {"ttft", "tpot"}
    assert chooser.tenants.weight("gold") == 3 and chooser.tenants.rank("free") == 1


def test_the_request_has_the_last_word_within_its_bounds(chooser):
    body = {"slo": {"ttft_ms": 50}, "slo_policy": "best_effort", "priority": 7}
    choice = choose(chooser, "gold", {"x-slo-tpot-ms": "30"}, **body)
    assert (choice.budget.ttft, choice.budget.tpot, choice.budget.strict, choice.priority) == (0.05, 0.03, False, 7)
    assert choice.budget.inherited == frozenset()
    for wrong in ({"size": "20L"}, {"min_size": "16L"}, {"size_schedule": [{"size": "16L"}]}):
        with pytest.raises(APIError, match=r"24L \.\. 30L are"):
            choose(chooser, "gold", **wrong)
    with pytest.raises(APIError, match="disagree"):
        choose(chooser, headers={"x-slo-ttft-ms": "9"}, slo={"ttft_ms": 10})
    with pytest.raises(APIError, match="not a positive number"):
        choose(chooser, headers={"x-slo-ttft-ms": "soon"})


def test_memory_budgets_name_what_is_needed(chooser):
    assert choose(chooser, memory_budget_mb=25).within_memory(chooser.catalog, 1024).sizes == tuple(range(16, 25))
    for body in ({"memory_budget_mb": 5}, {"memory_budget_mb": 20, "size_schedule": [{"size": "30L"}]}):
        with pytest.raises(APIError, match="needs") as error:
            choose(chooser, **body).within_memory(chooser.catalog, 1024)
        assert error.value.param == "memory_budget_mb"


def test_merging_keeps_what_the_caller_said():
    merged = merge_budget(Budget(ttft=1.0), Budget(ttft=2.0, tpot=0.1), Budget(tpot=0.2, e2e=9.0))
    assert (merged.ttft, merged.tpot, merged.e2e, merged.inherited) == (1.0, 0.1, 9.0, {"tpot", "e2e"})


@pytest.mark.parametrize(
    "entry, message",
    [
        ("{key: a, tenant: x, weigth: 2}", "there is no setting 'weigth'"),
        ("{key: a, tenant: x, weight: 0}", "weight must be a number above 0"),
        ("{key: a, tenant: x, min_size: big}", "is not a size"),
        ("{key: a, tenant: x, slo_policy: maybe}", "best_effort or strict"),
        ("{key: a, tenant: x, rank: 0.5}", "rank must be a whole number"),
        ("{key: a, max_concurrent: 0}", "max_concurrent must be a whole number"),
        ("{tenant: x}", "key"),
    ],
)
def test_a_mistake_in_the_key_file_is_named(tmp_path, entry, message):
    path = tmp_path / "keys.yaml"
    path.write_text(f"- {entry}\n")
    with pytest.raises(SettingsError, match=message):
        read_key_file(path)
