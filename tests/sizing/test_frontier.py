"""Two dials: which points of depth and width are ever worth choosing."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from server.cost.frontier import Point, QualityTable, front, never_best

POINTS = [Point(depth, width) for depth, width in itertools.product((16, 22, 28, 30), (4, 6, 8, 12))]
figures = st.fixed_dictionaries({point: st.integers(1, 20).map(float) for point in POINTS})


@given(seconds=figures, kl=figures)
def test_a_front_is_what_nothing_beats(seconds, kl):
    found = front(seconds, kl)
    for point in POINTS:
        beaten = any(
            seconds[other] <= seconds[point]
            and kl[other] <= kl[point]
            and (seconds[other], kl[other]) != (seconds[point], kl[point])
            for other in POINTS
        )
        twins = [other for other in POINTS if (seconds[other], kl[other]) == (seconds[point], kl[point])]
        assert any(twin in found for twin in twins) is not beaten and len(set(twins) & set(found)) <= 1
    assert [seconds[point] for point in found] == sorted(seconds[point] for point in found)


@given(regimes=st.lists(figures, min_size=1, max_size=3), kl=figures)
def test_what_is_never_best_is_on_no_front(regimes, kl):
    never = never_best(regimes, kl)
    for point in POINTS:
        assert (point in never) is not any(point in front(seconds, kl) for seconds in regimes)


def test_bits_before_depth_where_a_step_waits_for_memory():
    """Figures of the default pair (MB read in a decode step, KL): 30 layers at 6 bits beat fewer layers at 12."""
    megabytes = {Point(30, 6): 109.0, Point(28, 12): 191.0, Point(22, 12): 159.0, Point(16, 12): 128.0}
    kl = {Point(30, 6): 0.02, Point(28, 12): 0.15, Point(22, 12): 0.5, Point(16, 12): 0.9}
    assert front(megabytes, kl) == [Point(30, 6)]
    by_layers = {point: float(point.depth) for point in kl}  # where arithmetic binds, bits are free and layers count
    assert front(by_layers, kl) == [Point(16, 12), Point(22, 12), Point(28, 12), Point(30, 6)]
    assert never_best([megabytes], kl) == set(kl) - {Point(30, 6)} and not never_best([megabytes, by_layers], kl)


def test_cells_that_were_not_measured_are_sums_and_the_worst_kind_counts():
    table = QualityTable(
        by_depth={"prose": {16: 0.8, 30: 0.0}, "code": {16: 1.8, 30: 0.0}},
        by_width={"prose": {6: 0.02, 12: 0.0}, "code": {6: 0.05, 12: 0.0}},
        measured={"prose": {Point(16, 6): 0.9}},
    )
    assert table.kl(Point(16, 6), "prose") == 0.9 and table.kl(Point(16, 6), "code") == 1.85
    assert table.kl(Point(16, 6)) == 1.85 and table.kl(Point(30, 12)) == 0.0
    assert abs(table.additive_error("prose") - 0.08) < 1e-12 and table.additive_error("code") == 0.0
