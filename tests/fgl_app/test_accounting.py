import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from opacus.accountants import RDPAccountant
from scipy.stats import norm

from fgl_app.config import parse_run_config
from fgl_app.privacy.accounting import clients_epsilon, images_epsilon, poisson_schedule
from fgl_app.reporting.guarantees import privacy_sections, privacy_statement


def test_the_bound_of_dp_sgd_is_that_of_its_papers():
    # Abadi et al. 2016, Section 3: q = 0.01, sigma = 4, 10,000 steps, delta 1e-5: the moments accountant gives 1.26.
    found = images_epsilon(4.0, [60_000], 1, batch_size=600, local_epochs=100, delta=1e-5)

    assert 0.9 < found < 1.26


def test_the_bound_of_dp_sgd_is_that_of_opacus():
    opacus = RDPAccountant()
    opacus.history = [(1.1, 64 / 500, 3 * 4 * 8)]  # three rounds of 4 epochs of ceil(500 / 64) steps

    found = images_epsilon(1.1, [500], 3, batch_size=64, local_epochs=4, delta=1e-5)

    assert found == pytest.approx(opacus.get_epsilon(1e-5), rel=1e-3)


def composed_delta(losses, probabilities, times, epsilon, width=4e-3):
    """Return delta at epsilon of a mechanism of these privacy losses, used so many times: E[max(0, 1 - e^(epsilon-L))].

    The losses are rounded to a grid and their distribution is convolved with itself.
    """
    cells = np.round(losses / width).astype(int)
    least = cells.min()
    one = np.bincount(cells - least, probabilities)
    size = (len(one) - 1) * times + 1
    total = np.fft.irfft(np.fft.rfft(one, 2 * size) ** times, 2 * size)[:size]
    of_all = (least * times + np.arange(size)) * width
    return float((np.clip(total, 0, None) * -np.expm1(np.minimum(0, epsilon - of_all))).sum())


def sampled_gaussian_delta(rate, noise, steps, epsilon, moved):
    """Return delta at epsilon of steps in which an image, drawn with this rate, moves the sum by C.

    Without it the sum moves by ``moved`` C: 0, or -1 where another image stands in its place.
    """
    x = np.linspace(-12 * noise - 1, 12 * noise + 1, 100_001)
    with_it = (1 - rate) * norm.pdf(x, 0, noise) + rate * norm.pdf(x, 1, noise)
    other = (1 - rate) * norm.pdf(x, 0, noise) + rate * norm.pdf(x, moved, noise)
    loss = np.log(with_it) - np.log(other)
    step = x[1] - x[0]
    return max(
        composed_delta(loss, with_it * step, steps, epsilon), composed_delta(-loss, other * step, steps, epsilon)
    )


@pytest.mark.parametrize(
    ("noise", "num_examples", "batch_size", "epochs", "rounds", "delta"),
    [(1.3, 40, 16, 2, 2, 1e-5), (0.8, 168, 64, 1, 3, 1e-4), (2.5, 500, 50, 1, 1, 1e-6)],
)
def test_dp_sgd_is_as_private_as_the_accountant_says(noise, num_examples, batch_size, epochs, rounds, delta):
    found = images_epsilon(noise, [num_examples], rounds, batch_size=batch_size, local_epochs=epochs, delta=delta)

    steps = rounds * epochs * math.ceil(num_examples / batch_size)
    at_found, below = (
        sampled_gaussian_delta(batch_size / num_examples, noise, steps, epsilon, moved=0.0)
        for epsilon in (found, 0.8 * found)
    )
    assert at_found <= delta < below  # a bound, and a tight one


@pytest.mark.parametrize(
    ("noise", "num_examples", "batch_size", "epochs", "rounds", "delta"),
    [(1.3, 40, 16, 2, 2, 1e-5), (3.0, 168, 64, 1, 5, 1e-4), (2.5, 500, 50, 1, 1, 1e-6)],
)
def test_replacing_an_image_of_dp_sgd_costs_what_the_accountant_says(
    noise, num_examples, batch_size, epochs, rounds, delta
):
    options = {"batch_size": batch_size, "local_epochs": epochs, "delta": delta}
    zeroed, replaced = (
        images_epsilon(noise, [num_examples], rounds, **options, replaced=each) for each in (False, True)
    )

    steps = rounds * epochs * math.ceil(num_examples / batch_size)
    at_zeroed, at_replaced = (
        sampled_gaussian_delta(batch_size / num_examples, noise, steps, epsilon, moved=-1.0)
        for epsilon in (zeroed, replaced)
    )
    assert at_replaced <= delta < at_zeroed


@pytest.mark.parametrize("noise", [0.7, 2.0])
def test_replacing_an_image_that_is_always_drawn_is_a_gaussian_mechanism_of_half_the_noise(noise):
    exact = PLDAccountant()
    exact.compose(dp_accounting.GaussianDpEvent(noise / 2), 6)

    found = images_epsilon(noise, [10], 3, batch_size=10, local_epochs=2, delta=1e-5, replaced=True)

    assert exact.get_epsilon(1e-5) < found < 1.25 * exact.get_epsilon(1e-5)


def test_the_client_with_the_largest_bound_counts():
    def epsilon(*num_examples, rounds=1):
        return images_epsilon(1.0, num_examples, rounds, batch_size=16, local_epochs=1, delta=1e-5)

    assert epsilon(40, 400) == epsilon(40) > epsilon(400)
    assert epsilon(40, rounds=2) > epsilon(40)


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_unknown_numbers_of_images_lose_as_much_as_the_worst_number(noise):
    def epsilon(*num_examples):
        return images_epsilon(noise, num_examples, 3, batch_size=16, local_epochs=2, delta=1e-5)

    # With little noise many steps of few images are worst, with more noise one image more than a batch.
    assert epsilon() >= max(epsilon(number) for number in (1, 16, 17, 40, 100, 129, 500, 5000))


def test_a_client_with_fewer_images_than_a_batch_draws_all_of_them():
    assert poisson_schedule(10, 64, 5) == (1.0, 5)
    assert poisson_schedule(130, 64, 2) == (64 / 130, 6)


def test_rounds_with_all_clients_compose_as_gaussian_mechanisms():
    exact = PLDAccountant()
    exact.compose(dp_accounting.GaussianDpEvent(2.0), 10)

    found = clients_epsilon(2.0, [(5, 5)] * 10, 1e-5)

    # The RDP accountant bounds from above, within a tenth.
    assert exact.get_epsilon(1e-5) < found < 1.1 * exact.get_epsilon(1e-5)
    assert clients_epsilon(2.0, [], 1e-5) == 0.0


def test_a_secret_draw_of_few_clients_lowers_the_bound_and_one_of_many_does_not_raise_it():
    everybody = clients_epsilon(1.0, [(50, 50)] * 20, 1e-5)

    assert clients_epsilon(1.0, [(1, 50)] * 20, 1e-5) < 0.6 * everybody
    assert clients_epsilon(1.0, [(49, 50)] * 20, 1e-5) == everybody  # replacement moves the sum by 2 C: no gain


def test_what_clients_know_of_their_own_draws_raises_epsilon():
    models, peer, all_others = (
        clients_epsilon(2.0, [(1, 50)] * 20, 1e-5, num_colluding=number) for number in (0, 1, 49)
    )

    assert (round(models, 2), round(peer, 2), round(all_others, 2)) == (1.67, 1.68, 12.30)


@pytest.mark.parametrize(
    ("noise", "count", "population", "rounds", "delta"),
    [(1.5, 2, 20, 10, 1e-5), (3.0, 5, 40, 30, 1e-6), (2.5, 1, 30, 8, 1e-4)],
)
@pytest.mark.parametrize("replaced", [False, True])
def test_drawn_clients_are_as_private_as_is_said_against_each_adversary(
    noise, count, population, rounds, delta, replaced
):
    def epsilon(num_colluding):
        drawn = [(count, population)] * rounds
        return clients_epsilon(noise, drawn, delta, num_colluding=num_colluding, replaced=replaced)

    def exact(num_colluding, epsilon):
        """Delta where the client sends C and all others -C, and none of those that collude was drawn."""
        left = population - num_colluding
        rate = min(1.0, count / left)
        # A drawn client moves the sum from that of the others by 2 C; with nothing in its place, by C.
        return sampled_gaussian_delta(rate, noise / 2, rounds, epsilon, moved=0.0 if replaced else 0.5)

    for num_colluding in (0, 1, population - 1):
        assert exact(num_colluding, epsilon(num_colluding)) <= delta
    assert exact(population - 1, 0.8 * epsilon(population - 1)) > delta
    assert exact(population - 1, epsilon(0)) > delta  # who knows the draw learns more than who does not


def histogram_delta(before, after, epsilon, delta, at):
    """Return delta at epsilon ``at`` of noised counts, by hand, from the law of what is sent for each prompt."""
    noise = np.arange(-400, 401)
    law = np.exp(-epsilon * np.abs(noise))
    law /= law.sum()
    tails = law[::-1].cumsum()[::-1]  # P(X >= x)
    threshold = 1 + noise[(tails <= delta) & (noise > 0)].min()

    def sent(count):
        """Probabilities of the counts from the threshold on, and of none."""
        shifted = np.interp(np.arange(threshold, 300) - count, noise, law) * (count > 0)
        return np.append(shifted, 1 - shifted.sum())

    first, second = (np.multiply.outer(sent(counts[0]), sent(counts[1])) for counts in (before, after))
    return max(np.maximum(0, one - math.exp(at) * other).sum() for one, other in ((first, second), (second, first)))


def test_replacing_an_image_changes_two_noised_counts_and_costs_twice_as_much():
    assert histogram_delta((14, 14), (13, 15), 1.0, 1e-5, at=1.0) == pytest.approx(0.34, abs=0.005)
    for epsilon, delta, before in ((0.5, 1e-4, (22, 20)), (2.0, 1e-6, (9, 1)), (1.5, 1e-5, (11, 10))):
        added = before[0], before[1] + 1
        replaced = before[0] - 1, before[1] + 1
        assert histogram_delta(before, added, epsilon, delta, at=epsilon) <= delta
        assert histogram_delta(before, replaced, epsilon, delta, at=epsilon) > delta
        assert histogram_delta(before, replaced, epsilon, delta, at=2 * epsilon) <= 2 * delta


PROMPTS = {"asked": "prompts"}
TRAIN = {"asked": "train", "round": 2, "drawn": [3, 3]}
TOLD = {"num_examples": [50, 100]}
EMBEDDINGS = {
    "prompt_level": "embedding", "embedding_summary": "mean", "embedding_clip": 10, "embedding_epsilon": 8.0,
}  # fmt: skip


def statement(run_config, releases, **settings):
    changed = {key.replace("_", "-"): value for key, value in settings.items()}
    return privacy_statement(parse_run_config(run_config | changed), releases)


def test_a_run_without_a_mechanism_states_nothing(run_config):
    assert statement(run_config, [PROMPTS, TRAIN]) is None


def test_rounds_of_fedavg_have_a_total_for_each_unit(run_config):
    found = statement(
        run_config, [TRAIN, TOLD] * 4, method="fedavg", weighting="uniform", client_dp="fixed", example_dp_noise=1.0
    )

    clients, images = found["mechanisms"]
    assert (clients["unit"], clients["epsilon"]) == (
        "one client",
        round(clients_epsilon(1.0, [(3, 3)] * 4, 1e-5), 4),
    )
    assert (images["unit"], images["delta"]) == ("one image", 1e-5)
    assert {item["unit"]: item["epsilon"] for item in found["total"]} == {
        "one client": clients["epsilon"],
        "one image": images["epsilon"],
    }


def test_prompts_and_rounds_add_up_and_what_nothing_hides_has_no_total(run_config):
    releases = [PROMPTS, TRAIN, TOLD]

    both = statement(run_config, releases, **EMBEDDINGS, example_dp_noise=1.0)
    prompts_only = statement(run_config, releases, **EMBEDDINGS)
    one_shot = statement(run_config, releases[:1], **EMBEDDINGS)
    rounds_only = statement(run_config, releases, example_dp_noise=1.0)

    prompts, images = both["mechanisms"]
    assert both["total"][0]["epsilon"] == pytest.approx(8.0 + images["epsilon"])
    assert both["total"][0]["delta"] == pytest.approx(2e-5)
    assert prompts["part"] == "prompts"
    assert one_shot["total"][0]["epsilon"] == 8.0
    assert prompts_only["total"][0]["epsilon"] is None
    assert "the model of every round" in prompts_only["total"][0]["sentence"]
    assert rounds_only["total"][0]["epsilon"] is None  # class-level prompts say which classes a client holds


def test_randomized_classes_and_noisy_rounds_bound_what_a_run_tells_of_a_client(run_config):
    found = statement(
        run_config, [PROMPTS, TRAIN], prompt_counts="withheld", classes_epsilon=0.5,
        weighting="uniform", client_dp="fixed",
    )  # fmt: skip

    total = {item["unit"]: item["epsilon"] for item in found["total"]}
    # Ten answers of 0.5 each, and one round.
    assert total["one client"] == pytest.approx(10 * 0.5 + clients_epsilon(1.0, [(3, 3)], 1e-5), abs=1e-3)
    assert total["one image"] is None  # one client's noise hides an image only together with all others


def test_noised_counts_hide_one_image_in_the_prompts(run_config):
    hidden = {"prompt_counts": "noised", "counts_epsilon": 2.0, "weighting": "uniform"}

    (once,), (twice,) = (statement(run_config, [PROMPTS] * times, **hidden)["total"] for times in (1, 2))

    assert [once[key] for key in ("unit", "relation", "epsilon", "delta")] == ["one image", "add or remove", 2.0, 1e-5]
    assert once["replaced"] == {"epsilon": 4.0, "delta": 2e-5}
    assert (twice["epsilon"], twice["delta"]) == (4.0, 2e-5)
    assert "(add or remove one image), against anybody, the server included." in once["sentence"]


def test_each_mechanism_names_its_relation_and_what_replacing_costs(run_config):
    images = statement(run_config, [PROMPTS, TRAIN, TOLD], **EMBEDDINGS, example_dp_noise=1.0)
    clients = statement(
        run_config, [PROMPTS, TRAIN], prompt_counts="withheld", classes_epsilon=0.5, weighting="uniform",
        client_dp="fixed",
    )  # fmt: skip
    found = [*images["mechanisms"], *clients["mechanisms"]]

    assert [(item["part"], item["relation"], item["unit"]) for item in found] == [
        ("prompts", "replace", "one image"),
        ("rounds", "zero out", "one image"),
        ("prompts", "add or remove", "one image"),
        ("prompts", "replace", "one client"),
        ("rounds", "zero out", "one client"),
    ]
    # Noise of twice the sensitivity: z / 2.
    half = clients_epsilon(0.5, [(3, 3)], 1e-5)
    costs = [item["replaced"]["epsilon"] for item in found]
    assert (costs[0], *costs[2:]) == (8.0, 1.0, 5.0, round(half, 4))
    assert costs[1] > found[1]["epsilon"]
    (table,) = privacy_sections(clients)[0].tables
    assert [row[2] for row in table.rows] == ["add or remove one image", "replace one client", "zero out one client"]


def test_totals_add_up_what_holds_for_one_relation(run_config):
    both = statement(run_config, [PROMPTS, TRAIN, TOLD], **EMBEDDINGS, example_dp_noise=1.0)
    rounds = both["mechanisms"][1]

    (total,) = both["total"]
    # That of replacing bounds leaving out, too, where noise hides 2 C.
    assert (total["relation"], total["epsilon"]) == ("zero out", pytest.approx(8.0 + rounds["epsilon"]))
    assert total["replaced"]["epsilon"] == pytest.approx(8.0 + rounds["replaced"]["epsilon"])
    assert total["against"] == "anybody, the server included"


def test_noise_on_the_mean_is_stated_against_those_who_know_their_own_draws(run_config):
    rows = [TRAIN | {"drawn": [1, 50]}] * 20
    private = {"method": "fedavg", "weighting": "uniform", "client_dp": "fixed", "client_dp_noise": 2.0}

    found = statement(run_config, rows, **private)

    (mechanism,), (total,) = found["mechanisms"], found["total"]
    assert round(mechanism["epsilon"], 2) == round(total["epsilon"], 2) == 12.30
    assert mechanism["against"] == total["against"] == "all other clients together, but not the server"
    assert [(item["against"], round(item["epsilon"], 2)) for item in mechanism["weaker"]] == [
        ("one other client", 1.68),
        ("somebody who sees the models alone", 1.67),
    ]
    assert "one other client: ε 1.68" in privacy_sections(found)[0].tables[0].rows[0][6]


def test_a_total_says_what_its_mechanisms_exclude(run_config):
    both = statement(run_config, [PROMPTS, TRAIN, TOLD], **EMBEDDINGS, example_dp_noise=1.0)
    clients = statement(run_config, [TRAIN], method="fedavg", weighting="uniform", client_dp="fixed")
    counts = statement(run_config, [PROMPTS], prompt_counts="noised", weighting="uniform")

    (sentence,) = (item["sentence"] for item in both["total"])
    for excluded in ("its class and domain", "how many images have them", "the number of images", "held-out images"):
        assert excluded in sentence.partition("Not bounded: ")[2]
    assert "measures that it reports" in clients["total"][0]["sentence"]
    assert "Not bounded" not in counts["total"][0]["sentence"]


@pytest.mark.parametrize(
    "hidden",
    [
        {"prompt_counts": "noised", "weighting": "uniform"},
        {"prompt_counts": "withheld", "classes_epsilon": 1.0, "weighting": "uniform"},
        EMBEDDINGS,
    ],
)
def test_no_noise_on_prompts_hides_the_images_on_which_sites_measure(run_config, hidden):
    own = statement(run_config, [PROMPTS], dataset="folder", class_names="cat,dog", **hidden)
    common = statement(run_config, [PROMPTS], **hidden)

    assert all("held-out images on which clients evaluate" in item["sentence"] for item in own["total"])
    assert not any("held-out" in item["sentence"] for item in common["total"])


def test_clients_that_say_one_place_count_as_one_that_was_asked_for_all_of_them(run_config):
    def epsilon(*places):
        rows = [TRAIN | {"drawn": [2, 6], "places": list(asked)} for asked in places]
        return statement(run_config, [*rows, TOLD], method="fedavg", example_dp_noise=1.0)["mechanisms"][0]["epsilon"]

    def of_rounds(number):
        return round(images_epsilon(1.0, [50, 100], number, batch_size=64, local_epochs=1, delta=1e-5), 4)

    assert epsilon([0, 1], [2, 3], [4, 5]) == of_rounds(1)
    assert epsilon([0, 1], [0, 2], [0, 3]) == of_rounds(3)
    assert epsilon([0, 0], [0, 1], [1, 0]) == of_rounds(3)


def test_rounds_that_asked_everybody_count_for_those_that_were_drawn_in_others(run_config):
    named = TRAIN | {"drawn": [1, 3], "places": [7]}

    found = statement(run_config, [TRAIN, named, TOLD], method="fedavg", example_dp_noise=1.0)["mechanisms"][0]

    assert found["epsilon"] == round(images_epsilon(1.0, [50, 100], 2, batch_size=64, local_epochs=1, delta=1e-5), 4)


def test_a_draw_that_the_ledger_names_lowers_no_bound(run_config):
    drawn = [TRAIN | {"drawn": [1, 50]}] * 20
    private = {"method": "fedavg", "weighting": "uniform", "client_dp": "fixed"}

    secret = statement(run_config, drawn, **private)["mechanisms"][0]
    named = statement(run_config, [row | {"places": [3]} for row in drawn], **private, example_dp_noise=1.0)

    models_alone = secret["weaker"][1]["epsilon"]
    assert models_alone == round(clients_epsilon(1.0, [(1, 50)] * 20, 1e-5), 4)
    assert named["mechanisms"][0]["epsilon"] == round(clients_epsilon(1.0, [(1, 1)] * 20, 1e-5), 4) > models_alone
    assert "weaker" not in named["mechanisms"][0]


def test_a_statement_of_a_version_that_named_no_exclusions_and_no_relation_is_shown(run_config):
    found = statement(run_config, [TRAIN], method="fedavg", weighting="uniform", client_dp="fixed")
    for item in found["mechanisms"]:
        for key in ("excludes", "relation", "replaced", "against"):
            del item[key]

    (section,) = privacy_sections(found)

    assert section.tables[0].rows[0][2] == "one client"
    assert section.tables[0].rows[0][-1] == found["mechanisms"][0]["protects"]
