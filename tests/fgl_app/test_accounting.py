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


def composed_delta(losses, probabilities, times, epsilon, width=1e-3):
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
    x = np.linspace(-12 * noise - 1, 12 * noise + 1, 400_001)
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

    once, twice = (statement(run_config, [PROMPTS] * times, **hidden)["total"] for times in (1, 2))

    assert [(item["unit"], item["epsilon"], item["delta"]) for item in once] == [("one image", 2.0, 1e-5)]
    assert [(item["unit"], item["epsilon"], item["delta"]) for item in twice] == [("one image", 4.0, 2e-5)]


def test_a_total_says_what_its_mechanisms_exclude(run_config):
    both = statement(run_config, [PROMPTS, TRAIN, TOLD], **EMBEDDINGS, example_dp_noise=1.0)
    clients = statement(run_config, [TRAIN], method="fedavg", weighting="uniform", client_dp="fixed")
    counts = statement(run_config, [PROMPTS], prompt_counts="noised", weighting="uniform")

    (sentence,) = (item["sentence"] for item in both["total"])
    for excluded in ("its class", "numbers of prompts", "number of images", "held-out images"):
        assert excluded in sentence.partition("Not bounded: ")[2]
    assert "measures that it reports" in clients["total"][0]["sentence"]
    assert "Not bounded" not in counts["total"][0]["sentence"]


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

    assert secret["epsilon"] == round(clients_epsilon(1.0, [(1, 50)] * 20, 1e-5), 4)
    assert named["mechanisms"][0]["epsilon"] == round(clients_epsilon(1.0, [(1, 1)] * 20, 1e-5), 4)
    assert secret["epsilon"] < named["mechanisms"][0]["epsilon"]


def test_a_statement_of_a_version_that_named_no_exclusions_is_shown(run_config):
    found = statement(run_config, [TRAIN], method="fedavg", weighting="uniform", client_dp="fixed")
    for item in found["mechanisms"]:
        del item["excludes"]

    (section,) = privacy_sections(found)

    assert section.tables[0].rows[0][-1] == found["mechanisms"][0]["protects"]
