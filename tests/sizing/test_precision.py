"""Names of points, and what a caller's size and precision fields allow: no server, no model."""

import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.generate.catalog import Catalog, SizeInfo
from server.api.generate.protocol import SizeFields
from server.api.generate.size_choice import SizeChooser
from server.api.http.errors import APIError
from server.config import Settings
from server.core.width import EXACT
from server.sizing.points import PointInfo
from server.sizing.spec import SizeError, SizeSpec, parse_precision, size_name
from server.sizing.tenants import Tenants, tenant_from_config

SIZES = tuple(range(16, 31))
WIDTHS = (4, 5, 6, 8, EXACT)
BYTES = {4: 0.59, 5: 0.72, 6: 0.84, 8: 1.09, EXACT: 1.5}


def catalog(widths: tuple[int, ...] = WIDTHS) -> Catalog:
    infos = {size: SizeInfo(size, size * 10**6, size << 20, 1024, size / 30) for size in SIZES}
    points = [PointInfo(s, w, {"prose": 0.1, "code": 0.2}, ("decode",), True) for s in (30, 16) for w in widths]
    return Catalog(("m",), infos, SIZES, {}, 4096, 32, widths=widths, bytes_per_weight=BYTES, points=tuple(points))


def choose(body: dict, model: str | None = None, widths=WIDTHS, key: dict | None = None, **settings):
    found = catalog(widths)
    own = tenant_from_config({"tenant": "t", **(key or {})}, lambda size: int(SizeSpec.parse(size).value))
    chooser = SizeChooser(found, Settings(**settings), Tenants([own]))
    return chooser.choose(SizeFields.model_validate(body), found.split_model(model), {}, "t")


def point(choice) -> tuple:
    return (choice.sizes[0], choice.sizes[-1], choice.min_width, choice.max_width)


@given(layers=st.integers(1, 10**5), width=st.sampled_from(WIDTHS))
def test_names_are_read_as_they_are_written_and_need_no_quoting(layers, width):
    name = size_name(layers, width)
    spec = SizeSpec.parse(name)
    assert (spec.kind, spec.value, EXACT if spec.width is None else spec.width) == ("layers", layers, width)
    assert urllib.parse.quote(name, safe="") == name and not set(name) & set('/\\:*?"<>|{}')
    assert str(spec) == name


def test_any_size_may_name_a_precision():
    for text, kind, width in [
        ("24L-q6", "layers", 6), ("24-Q6", "layers", 6), ("24L-exact", "layers", EXACT), ("75%-q4", "fraction", 4),
        ("0.75-q4", "fraction", 4), ("110M-q8", "parameters", 8), ("teacher-q5", "teacher", 5), ("auto-q6", "auto", 6),
    ]:  # fmt: skip
        spec = SizeSpec.parse(text)
        assert (spec.kind, spec.width) == (kind, width)
    for wrong in ("24L-", "24L-6", "24L-q", "24L-q16", "24L-fp8", "24L-q6-q8", "-q6", "q6"):
        with pytest.raises(SizeError):
            SizeSpec.parse(wrong)
    assert [parse_precision(text) for text in ("auto", "exact", "q6", "Q8")] == [None, EXACT, 6, 8]
    for wrong in (8, 8.0, True, "8", "int8", "fp16", "q", "", "q4 bits"):
        with pytest.raises(SizeError):
            parse_precision(wrong)


ALL = (16, 30, 4, EXACT)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, ALL),
        ({"size": "auto"}, ALL),
        ({"size": "24L"}, (24, 24, EXACT, EXACT)),  # as loaded, as ever
        ({"size": 24}, (24, 24, EXACT, EXACT)),
        ({"size": "24L-q6"}, (24, 24, 6, 6)),
        ({"size": "24L", "precision": "q6"}, (24, 24, 6, 6)),
        ({"size": "24L-q6", "precision": "q6"}, (24, 24, 6, 6)),
        ({"size": "24L", "precision": "auto"}, (24, 24, 4, EXACT)),
        ({"size": "24L", "min_precision": "q6"}, (24, 24, 6, EXACT)),
        ({"precision": "q5"}, (16, 30, 5, 5)),
        ({"size": "auto-q5"}, (16, 30, 5, 5)),
        ({"min_precision": "q5", "max_precision": "q8"}, (16, 30, 5, 8)),
        ({"min_precision": "q7"}, (16, 30, 8, EXACT)),
        ({"min_size": "20L"}, (20, 30, 4, EXACT)),
        ({"min_size": "20L-q6", "max_size": "28L"}, (20, 28, 6, EXACT)),
        ({"max_size": "auto-q8"}, (16, 30, 4, 8)),
    ],
)
def test_what_a_request_allows(body, expected):
    assert point(choose(body)) == expected


def test_what_a_model_id_allows():
    assert point(choose({}, "m:24L-q6")) == (24, 24, 6, 6)
    assert point(choose({"size": "24L"}, "m:24L-q6")) == (24, 24, 6, 6)
    assert point(choose({"precision": "q6"}, "m:24L")) == (24, 24, 6, 6)
    assert point(choose({}, "m")) == ALL and point(choose({}, "m:auto-q8")) == (16, 30, 8, 8)
    for model, body, param in [("m:24L-q3", {}, "model"), ("m:24L-q8", {"size": "24L-q6"}, "size"),
                               ("m:24L-q8", {"precision": "q6"}, "precision")]:  # fmt: skip
        with pytest.raises(APIError) as error:
            choose(body, model)
        assert error.value.param == param and error.value.status == (404 if param == "model" else 400)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"precision": "8"}, "precision"),
        ({"precision": "q3"}, "precision"),
        ({"size": "24L-q3"}, "size"),
        ({"size": "24L-q6", "precision": "q8"}, "precision"),
        ({"size": "24L-q6", "min_precision": "q8"}, "min_precision"),
        ({"precision": "q8", "max_precision": "q6"}, "max_precision"),
        ({"min_precision": "q8", "max_precision": "q6"}, "min_precision"),
        ({"min_size": "20L-q6", "min_precision": "q8"}, "min_precision"),
        ({"max_precision": "q3"}, "max_precision"),
        ({"workload": "poetry"}, "workload"),
        ({"size_schedule": [{"size": "16L-q3"}]}, "size_schedule.0.size"),
        ({"size_schedule": [{"size": "16L"}], "precision": "q6"}, "size_schedule"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(body, param):
    with pytest.raises(APIError) as error:
        choose(body)
    assert error.value.param == param and error.value.status == 400


def test_schedules_name_a_precision_for_each_leg():
    choice = choose({"size_schedule": [{"size": "16L-q4", "tokens": 8}, {"size": "30L"}]})
    assert choice.schedule == ((16, 8, 4), (30, 0, EXACT)) and point(choice) == (16, 16, 4, 4)


def test_a_server_without_the_dial_takes_what_exact_satisfies():
    for body in ({}, {"size": "24L"}, {"precision": "exact"}, {"min_precision": "q4"}, {"size": "24L-exact"}):
        assert point(choose(body, widths=(EXACT,)))[2:] == (EXACT, EXACT)
    for body, param in [({"precision": "q8"}, "precision"), ({"max_precision": "q8"}, "max_precision")]:
        with pytest.raises(APIError) as error:
            choose(body, widths=(EXACT,))
        assert error.value.param == param and "exact is" in error.value.message


def test_where_nothing_is_exact_a_size_means_the_widest():
    assert point(choose({"size": "24L"}, widths=(4, 6, 8))) == (24, 24, 8, 8)
    with pytest.raises(APIError, match="q8, q6, q4 are"):
        choose({"precision": "exact"}, widths=(4, 6, 8))


def test_server_and_key_bound_and_default():
    assert point(choose({}, precision="q6")) == (16, 30, 6, 6)
    assert point(choose({"precision": "q8"}, precision="q6")) == (16, 30, 8, 8)
    assert point(choose({"precision": "auto"}, precision="q6")) == ALL
    assert point(choose({"size": "24L"}, precision="q6")) == (24, 24, EXACT, EXACT)
    assert point(choose({}, size="24L-q6")) == (24, 24, 6, 6)
    assert point(choose({"precision": "exact"}, size="24L-q6")) == (24, 24, EXACT, EXACT)
    assert point(choose({}, min_precision="q6", max_size="28L-q8")) == (16, 28, 6, 8)
    assert point(choose({}, key={"max_precision": "q6"})) == (16, 30, 4, 6)
    assert point(choose({"size": "24L"}, key={"max_precision": "q6"})) == (24, 24, 6, 6)
    assert point(choose({}, precision="exact", key={"max_precision": "q6"})) == (16, 30, 6, 6)
    assert point(choose({}, key={"min_size": "20L-q6"})) == (20, 30, 6, EXACT)
    with pytest.raises(APIError) as error:
        choose({"precision": "q4"}, min_precision="q6")
    assert error.value.param == "precision"
    with pytest.raises(ValueError, match="min_precision is above"):
        tenant_from_config({"min_precision": "q8", "max_precision": "q6"}, int)


def test_workloads_come_from_request_key_or_server():
    assert choose({}).workload == "" and choose({"workload": "code"}).workload == "code"
    assert choose({}, workload="prose", key={"workload": "code"}).workload == "code"
    assert choose({}, workload="prose").workload == "prose"


def test_a_memory_budget_drops_bits_and_then_layers():
    found = catalog()
    pinned, free = choose({"size": "24L", "memory_budget_mb": 20}), choose({"memory_budget_mb": 20})
    with pytest.raises(APIError, match="24L, the smallest size allowed"):
        pinned.within_memory(found, 10)
    within = free.within_memory(found, 10)
    assert point(within) == (16, 30, 4, 6) and within.reason == "memory_budget"  # 30 MiB exact: 17 at 6 bits
    tight = choose({"memory_budget_mb": 10}).within_memory(found, 10)
    assert tight.max_width == 4 and 16 <= tight.sizes[-1] < 30
    plain = choose({"memory_budget_mb": 20}, widths=(EXACT,)).within_memory(catalog((EXACT,)), 10)
    assert point(plain) == (16, 19, EXACT, EXACT)


def test_cards_and_answers_say_both():
    found = catalog()
    ids = [card["id"] for card in found.cards()]
    assert ids[0] == "m" and set(ids[1:16]) == {f"m:{size}L" for size in SIZES} and len(ids) == len(set(ids)) == 24
    card = found.card("m:30L-q6")
    assert (card["layers"], card["precision"], card["expected_kl"]["code"]) == (30, "q6", 0.2)
    assert card["bytes"] < found.card("m:30L")["bytes"] and found.card("m:30L-exact")["id"] == "m:30L"
    assert found.card("m:21L-q4")["id"] == "m:21L-q4"  # any point is an id
    summary = found.infos[24].summary(6, "auto")
    assert (summary["name"], summary["layers"], summary["precision"]) == ("24L-q6", 24, "q6")
    assert {card["id"] for card in catalog((EXACT,)).cards()} == {"m", *(f"m:{size}L" for size in SIZES)}
