import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import roc_auc_score

from fgl_app.audit.membership_check import verdict
from fgl_app.config import default_run_config, parse_run_config
from fgl_app.data.images import ImageSet
from fgl_app.data.sources import load_split
from fgl_app.models import build_model
from fgl_app.privacy.lira import one_sided_lira, random_halves
from fgl_app.privacy.membership import (
    SIGNS,
    attack,
    balanced,
    guessing_p_value,
    measures,
    roc,
    scaled_confidence,
)
from fgl_app.training import evaluate, normalize, train

PROBABILITIES = np.array([0.7, 0.2, 0.1])
CPU = torch.device("cpu")


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("label", "modified"),
    [
        (0, -0.3 * math.log(0.7) - 0.2 * math.log(0.8) - 0.1 * math.log(0.9)),  # sure and right: small
        (1, -0.8 * math.log(0.2) - 0.7 * math.log(0.3) - 0.1 * math.log(0.9)),  # sure and wrong: large
    ],
)
def test_the_four_measures_are_those_of_the_papers(label, modified):
    found = measures(np.log(PROBABILITIES)[None], [label])

    p = PROBABILITIES[label]
    entropy = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1))
    assert found["confidence"] == pytest.approx([p])
    assert found["loss"] == pytest.approx([-math.log(p)])
    assert found["entropy"] == pytest.approx([entropy])
    assert found["modified entropy"] == pytest.approx([modified])


def test_certain_answers_give_finite_measures():
    found = measures([[1000.0, 0.0], [1000.0, 0.0]], [0, 1])

    assert found["loss"].tolist() == [0, 1000]
    assert found["confidence"].tolist() == [1, 0]
    assert found["entropy"].tolist() == [0, 0]
    # -(1 - 0) log F_1 - F_0 log(1 - F_0), and 1 - F_0 is F_1 = exp(-1000).
    assert found["modified entropy"].tolist() == [0, 2000]
    assert scaled_confidence([[1000.0, 0.0]], [0]).tolist() == [1000]


@given(arrays(np.float64, (4, 5), elements=st.floats(-30, 30)), st.lists(st.integers(0, 4), min_size=4, max_size=4))
def test_measures_agree_with_their_formulas_where_no_probability_rounds(logits, labels):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    true = np.eye(5, dtype=bool)[labels]

    found = measures(logits, labels)

    assert np.allclose(found["entropy"], -(p * np.log(p)).sum(axis=1))
    naive = np.where(true, -(1 - p) * np.log(p), -p * np.log(np.maximum(1 - p, 1e-30))).sum(axis=1)
    safe = (1 - p).min(axis=1) > 1e-6
    assert np.allclose(found["modified entropy"][safe], naive[safe], rtol=1e-5)
    assert all(np.isfinite(values).all() and (values >= 0).all() for values in found.values())


def test_the_attack_agrees_with_scikit_learn_and_lies_in_its_interval():
    members, others = rng().normal(1, 1, 400), rng().normal(0, 1, 300)

    found = attack(members, others, 1, rng())

    truth = [1] * 400 + [0] * 300
    assert found.auc.value == pytest.approx(roc_auc_score(truth, np.concatenate([members, others])))
    assert found.gap.value == pytest.approx(members.mean() - others.mean())
    assert attack(members, others, -1, rng(), 2).gap.value == pytest.approx(others.mean() - members.mean())
    assert found.least_fpr == 1 / 300
    # 3 of 300 others lie above the threshold that 1 % allows, and none above that of 0.1 %.
    for rate, allowed in ((0.01, 3), (0.001, 0)):
        threshold = np.sort(others)[::-1][allowed]
        assert found.tpr[rate].value == pytest.approx((members > threshold).mean())
    for estimate in (found.gap, found.auc, *found.tpr.values()):
        assert estimate.low <= estimate.value <= estimate.high
        assert estimate.low < estimate.high


def test_guessing_finds_members_as_often_as_a_random_ranking():
    orders = list(itertools.permutations("mmmooo"))

    # At least two members stand before the second other.
    seconds = [[place for place, side in enumerate(order) if side == "o"][1] for order in orders]
    share = np.mean([second - 1 >= 2 for second in seconds])

    assert guessing_p_value(2, 1, 3, 3) == pytest.approx(share)
    assert guessing_p_value(0, 0, 3, 3) == 1


def test_a_few_exposed_members_are_told_though_the_area_is_that_of_guessing():
    others = np.arange(240.0)
    members = others + np.where(others % 20 == 0, 1000, 0)  # 12 of 240 are exposed
    attacks = {measure: attack(members, others, 1, rng()) for measure in SIGNS}

    said = verdict("FedAvg", attacks, 240)

    assert attacks["loss"].auc.low < 0.5 < attacks["loss"].auc.value < 0.54
    assert said.startswith("FedAvg: some members can be told from other images")
    assert "With no false alarm among 240 others the attack by " in said
    assert re.search(r"finds 5\.0 % of the members \(2\.\d to [789]\.\d %\), guessing 0\.4 %\.$", said)


def test_guesses_of_many_measures_and_rates_expose_nobody():
    def guesses(draws):
        return {measure: attack(draws.normal(size=240), draws.normal(size=240), 1, draws, 50) for measure in SIGNS}

    said = [verdict("FedAvg", guesses(np.random.default_rng(seed)), 240) for seed in range(20)]

    # At a level of 5 % five or more of twenty have a probability of 0.003.
    assert sum("some members can be told" in each for each in said) < 5
    assert any("members cannot be told from other images; the best attack, by " in each for each in said)


def test_the_interval_of_a_gap_holds_zero_where_its_sign_is_open():
    same, apart = (attack(rng().normal(shift, 1, 200), rng().normal(0, 1, 200), 1, rng(), 200) for shift in (0, 1))

    assert same.gap.low < 0 < same.gap.high
    assert same.auc.low < 0.5 < same.auc.high
    assert apart.gap.low > 0.5


@settings(max_examples=50)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=30), st.lists(st.integers(-3, 3), min_size=2, max_size=30))
def test_swapping_members_or_sign_mirrors_the_curve(members, others):
    one, other = np.array(members, dtype=float), np.array(others, dtype=float)

    area = attack(one, other, 1, rng(), 2).auc.value

    assert attack(other, one, 1, rng(), 2).auc.value == pytest.approx(1 - area)
    assert attack(one, other, -1, rng(), 2).auc.value == pytest.approx(1 - area)
    assert attack(np.exp(one), np.exp(other), 1, rng(), 2).auc.value == pytest.approx(area)
    fpr, tpr = roc(one, other, 1)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(tpr) >= 0).all()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_as_many_members_as_others_of_every_class_are_attacked(member_labels, other_labels):
    members, others = balanced(member_labels, other_labels, 1000, rng())

    assert sorted(member_labels[row] for row in members) == sorted(other_labels[row] for row in others)
    assert len(set(members)) == len(members)
    for label in range(4):
        expected = min(member_labels.count(label), other_labels.count(label))
        assert sum(member_labels[row] == label for row in members) == expected


def test_halves_leave_every_image_out_equally_often():
    inside = random_halves(11, 6, rng())

    assert inside.sum(axis=0).tolist() == [3] * 11
    assert {int(count) for count in inside.sum(axis=1)} == {5, 6}


def test_lira_compares_each_image_with_the_models_that_left_it_out():
    shadows = np.array([[1.0, 9.0], [3.0, 9.0], [9.0, 4.0], [9.0, 8.0]])
    inside = np.array([[False, True], [False, True], [True, False], [True, False]])

    scores = one_sided_lira(np.array([4.0, 4.0]), shadows, inside)

    # Means of 2 and 6; squares 1 + 1 + 4 + 4 over two degrees of freedom.
    assert scores == pytest.approx(np.array([2.0, -2.0]) / math.sqrt(5))


@pytest.fixture(scope="module")
def digits():
    """Three times sixty real images, and twice three hundred."""
    chosen = parse_run_config(default_run_config() | {"image-size": 16})
    data = load_split(chosen.card, chosen.data, "train", 0)
    order = rng().permutation(len(data)).tolist()
    return [data.take(order[start:end]) for start, end in ((0, 60), (60, 120), (120, 180), (180, 480), (480, 780))]


def trained_on(data: ImageSet, epochs: int = 60):
    model = build_model("cnn", 10, 16, seed=0)
    generator = torch.Generator().manual_seed(0)
    train(
        model, data, epochs=epochs, batch_size=16, learning_rate=0.01, weight_decay=0.0, augmentation="none",
        generator=generator, device=CPU,
    )  # fmt: skip
    return model.eval()


def logits(model, data: ImageSet):
    with torch.inference_mode():
        return model(normalize(data.images)).numpy()


def scores(model, data: ImageSet):
    return measures(logits(model, data), data.labels.numpy())


def test_an_over_trained_classifier_gives_its_members_away(digits):
    members, others, *_ = digits
    model = trained_on(members)

    inside, outside = scores(model, members), scores(model, others)

    assert evaluate(model, members, CPU).accuracy == 1
    found = {name: attack(inside[name], outside[name], sign, rng(), 200) for name, sign in SIGNS.items()}
    assert all(each.auc.value > 0.6 for each in found.values())
    assert found["loss"].auc.low > 0.5
    assert found["loss"].gap.low > 0


def test_a_classifier_that_saw_neither_does_not(digits):
    _, _, seen, members, others = digits
    model = trained_on(seen)

    inside, outside = scores(model, members), scores(model, others)

    found = {name: attack(inside[name], outside[name], sign, rng(), 200) for name, sign in SIGNS.items()}
    assert all(0.42 < each.auc.value < 0.58 for each in found.values())


def test_lira_finds_the_members_of_an_over_trained_classifier(digits):
    members, others, unseen, *_ = digits
    pool = ImageSet(torch.cat([members.images, others.images]), torch.cat([members.labels, others.labels]))
    inside = random_halves(len(pool), 8, rng())
    labels = pool.labels.numpy()
    halves = [pool.take(half.nonzero()[0].tolist()) for half in inside]
    shadows = np.stack([scaled_confidence(logits(trained_on(half, 30), pool), labels) for half in halves])

    def area(data: ImageSet) -> float:
        target = scaled_confidence(logits(trained_on(data, 30), pool), labels)
        found = one_sided_lira(target, shadows, inside)
        return attack(found[:60], found[60:], 1, rng(), 50).auc.value

    assert area(members) > max(0.7, area(unseen) + 0.1)
