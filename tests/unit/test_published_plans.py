"""Published tables, predicted from one fitted row of each."""

import pytest

from benchmarks import published_plans
from benchmarks.ascend.published import PUBLISHED


@pytest.fixture(scope="module")
def wan_21():
    (table,) = (one for one in published_plans.tables() if one.link)
    return table, published_plans.fitted(table)


def test_the_table_of_plans_has_all_13_rows(wan_21):
    table, _ = wan_21
    assert len(table.rows) == 13 and table.rows[0].seconds == 560.8
    speed_ups = [one.speed_up for one in PUBLISHED if one.speed_up is not None]
    assert [table.rows[0].seconds / row.seconds for row in table.rows[2:]] == pytest.approx(speed_ups, rel=0.01)


def test_fitted_rows_are_met_and_rows_of_four_and_more_cards_are_predicted_within_a_tenth(wan_21):
    table, fit = wan_21
    errors = {row.name: published_plans.predicted(row, fit.rates) / row.seconds - 1 for row in table.rows}
    assert abs(errors["1_card"]) < 1e-3 and abs(errors[table.link]) < 1e-3
    several = [error for row in table.rows for error in [errors[row.name]] if published_plans.cards(row) >= 4]
    assert len(several) == 8 and max(map(abs, several)) < 0.1, errors


def test_the_chosen_plans_are_the_published_best_ones_or_equal_to_them(wan_21):
    table, fit = wan_21
    found = {one.cards: one for one in published_plans.chosen_plans(table, fit.rates)}
    assert {cards: round(one.slower, 3) for cards, one in found.items()} == {2: 0.015, 4: 0.0, 8: 0.0}


def test_every_table_has_a_row_to_fit_and_others_to_predict():
    names = {one.name for one in PUBLISHED}
    for table in published_plans.tables():
        assert len(table.rows) > 1 and all(row.workload.name in names for row in table.rows)
        assert len({row.workload.card for row in table.rows}) == 1
