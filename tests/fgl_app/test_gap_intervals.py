"""Intervals of gaps hold their level where nothing leaks, whatever images the runs share."""

import numpy as np
import pytest
from scipy.stats import norm, t
from sklearn.metrics import roc_auc_score

from fgl_app.privacy.gap_intervals import Scored, area, gap, over_images
from fgl_app.privacy.lira import one_sided_lira, two_sided_lira
from fgl_app.privacy.membership import guessing_rate

IMAGES, SIDE, SEEDS = 1198, 240, 3
"""The private digits, and how many of them an audit compares on either side."""


def divided(rng, shared):
    """For each seed, which images are members and which are others."""
    first = rng.permutation(IMAGES)
    for _ in range(SEEDS):
        if shared == "none":
            order = rng.permutation(IMAGES)
            yield order[SIDE : 2 * SIDE], order[:SIDE]
        elif shared == "test":
            yield rng.permutation(first[SIDE:])[:SIDE], first[:SIDE]
        else:
            yield first[SIDE : 2 * SIDE], first[:SIDE]


def without_leak(rng, shared):
    """Losses of two models per seed that know nothing of the division; hard images are hard for both, in their ways."""
    hard, own_way = rng.exponential(size=IMAGES) ** 2, rng.exponential(size=IMAGES)
    models, placebos = [], []
    for members, others in divided(rng, shared):
        rows = np.concatenate([members, others])
        noise = 0.3 * rng.normal(size=(2, IMAGES))
        model, placebo = hard * (1 + noise[0]) + own_way * (1 + noise[1]), hard * (1 + 0.3 * rng.normal(size=IMAGES))
        models.append(Scored(rows, SIDE, -model[rows]))
        placebos.append(Scored(rows, SIDE, -placebo[rows]))
    return models, placebos


def students(values):
    return t.interval(0.95, len(values) - 1, np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5)


@pytest.mark.parametrize("statistic", [gap, area])
@pytest.mark.parametrize("shared", ["none", "test", "both"])
def test_without_a_leak_the_interval_holds_zero_19_times_in_20(shared, statistic):
    rng, held, repetitions = np.random.default_rng(17), 0, 600 if statistic is gap else 200
    for _ in range(repetitions):
        found = over_images(*without_leak(rng, shared), statistic)
        held += found.low <= 0 <= found.high

    # Within three binomial standard deviations.
    assert abs(held - 0.95 * repetitions) <= 3 * (repetitions * 0.95 * 0.05) ** 0.5


@pytest.mark.parametrize(("shared", "excluded"), [("none", 0.1), ("test", 0.15), ("both", 0.3)])
def test_students_interval_of_absolute_gaps_over_seeds_excludes_zero_without_a_leak(shared, excluded):
    """What Table 3 showed before: the reason for the intervals above."""
    rng, out = np.random.default_rng(17), 0
    for _ in range(300):
        models, _ = without_leak(rng, shared)
        out += students([abs(over_images([model], None, gap).value) for model in models])[0] > 0

    assert out / 300 > excluded


def test_a_leak_is_outside_the_interval():
    rng = np.random.default_rng(3)
    models, placebos = without_leak(rng, "test")
    leaking = [Scored(each.ids, SIDE, each.values + 2.0 * (np.arange(2 * SIDE) < SIDE)) for each in models]

    leak, none = (over_images(each, placebos, gap) for each in (leaking, models))

    assert leak.low > 0
    assert leak.value == pytest.approx(none.value + 2.0)


@pytest.mark.parametrize(("num_members", "num_others"), [(7, 5), (40, 60), (2, 2)])
def test_one_models_interval_is_that_of_two_independent_means(num_members, num_others):
    rng = np.random.default_rng(num_members)
    members, others = rng.normal(1, 2, num_members), rng.normal(0, 1, num_others)

    found = over_images(
        [Scored(np.arange(num_members + num_others), num_members, np.append(members, others))], None, gap
    )

    error = (members.var(ddof=1) / num_members + others.var(ddof=1) / num_others) ** 0.5
    assert found.value == pytest.approx(members.mean() - others.mean())
    assert (found.low, found.high) == pytest.approx(norm.interval(0.95, found.value, error))


def test_runs_on_the_same_images_with_the_same_scores_are_one_run():
    rng = np.random.default_rng(0)
    one = Scored(np.arange(60), 30, rng.normal(size=60))
    other = Scored(np.arange(60, 120), 30, one.values)  # the same scores of other images

    single, same, independent = (over_images(each, None, gap) for each in ([one], [one] * 3, [one, other]))

    assert (same.low, same.high) == pytest.approx((single.low, single.high))
    assert independent.high - independent.low == pytest.approx((single.high - single.low) / 2**0.5)


@pytest.mark.parametrize("digits", [1, 6])  # with many equal scores, and with hardly any
def test_the_area_and_its_error_agree_with_scikit_learn_and_delongs_components(digits):
    rng = np.random.default_rng(digits)
    members, others = rng.normal(0.5, 1, 50).round(digits), rng.normal(0, 1, 70).round(digits)
    wins = (members[:, None] > others) + 0.5 * (members[:, None] == others)

    value, shares = area(members, others)

    assert value == pytest.approx(roc_auc_score([1] * 50 + [0] * 70, np.append(members, others)))
    delong = wins.mean(axis=1).var(ddof=1) / 50 + wins.mean(axis=0).var(ddof=1) / 70
    assert (shares**2).sum() == pytest.approx(delong)


@pytest.mark.parametrize(
    ("rate", "num_others", "percent"),
    [(0.001, 240, 0.41), (0.01, 240, 1.24), (0.001, 2000, 0.15), (0.01, 2000, 1.05)],
)
def test_guessing_finds_more_than_its_false_alarms_among_few_others(rate, num_others, percent):
    assert round(100 * guessing_rate(rate, num_others), 2) == percent


@pytest.mark.parametrize(("rate", "num_members", "num_others"), [(0.05, 30, 50), (0.1, 80, 15), (0.02, 10, 120)])
def test_random_rankings_find_as_many_members_as_guessing_is_said_to(rate, num_members, num_others):
    rng, found, repetitions = np.random.default_rng(5), [], 4000
    allowed = int(rate * num_others + 1e-9)
    for _ in range(repetitions):
        scores = rng.random(num_members + num_others)
        threshold = np.sort(scores[num_members:])[-allowed - 1]
        found.append((scores[:num_members] > threshold).mean())

    error = np.std(found) / repetitions**0.5
    assert np.mean(found) == pytest.approx(guessing_rate(rate, num_others), abs=4 * error)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_both_forms_of_offline_lira_are_those_of_the_paper_and_of_its_code(seed):
    rng = np.random.default_rng(seed)
    shadows, target = rng.normal(3, 2, (8, 20)), rng.normal(3, 2, 20)
    inside = np.arange(8)[:, None] % 2 == rng.integers(0, 2, 20)
    outside = np.array([shadows[~inside[:, image], image] for image in range(20)])  # [images, models]

    paper = one_sided_lira(target, shadows, inside)
    code = two_sided_lira(target, shadows, inside)

    # The paper: Pr[Z <= phi] of Z ~ N(mean, s^2), here with one s^2 pooled over the images.
    pooled = np.sqrt(outside.var(axis=1, ddof=1).mean())
    assert norm.cdf(paper) == pytest.approx(norm.cdf(target, outside.mean(axis=1), pooled))
    # The code (mi_lira_2021, offline, fix_variance): minus the log-density under the median, and std over everything.
    assert code == pytest.approx(-norm.logpdf(target, np.median(outside, axis=1), np.std(outside)))


def test_a_model_that_is_less_sure_than_the_shadows_alarms_the_two_sided_form_only():
    shadows, inside = np.array([[1.0], [2.0], [3.0], [9.0]]), np.array([[False], [False], [False], [True]])
    low, usual, high = (np.array([value]) for value in (-6.0, 2.0, 10.0))

    assert one_sided_lira(low, shadows, inside) < one_sided_lira(usual, shadows, inside)
    assert two_sided_lira(low, shadows, inside) == pytest.approx(two_sided_lira(high, shadows, inside))
    assert two_sided_lira(low, shadows, inside) > two_sided_lira(usual, shadows, inside)
