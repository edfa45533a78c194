import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from opacus.accountants import RDPAccountant

from fgl_app.config import parse_run_config
from fgl_app.privacy.accounting import clients_epsilon, images_epsilon, poisson_schedule
from fgl_app.reporting.guarantees import privacy_statement


def test_the_bound_of_dp_sgd_is_that_of_its_papers():
    # Abadi et al. 2016, Section 3: q = 0.01, sigma = 4, 10,000 steps, delta 1e-5: the moments accountant gives 1.26.
    found = images_epsilon(4.0, {"0": [60_000]}, batch_size=600, local_epochs=100, delta=1e-5)

    assert 0.9 < found < 1.26


def test_the_bound_of_dp_sgd_is_that_of_opacus():
    opacus = RDPAccountant()
    opacus.history = [(1.1, 64 / 500, 3 * 4 * 8)]  # three rounds of 4 epochs of ceil(500 / 64) steps

    found = images_epsilon(1.1, {"0": [500] * 3}, batch_size=64, local_epochs=4, delta=1e-5)

    assert found == pytest.approx(opacus.get_epsilon(1e-5), rel=1e-3)


def test_the_client_with_the_largest_bound_counts():
    def epsilon(**num_examples):
        return images_epsilon(1.0, num_examples, batch_size=16, local_epochs=1, delta=1e-5)

    assert epsilon(small=[40], large=[400]) == epsilon(small=[40]) > epsilon(large=[400])
    assert epsilon(once=[40], twice=[40, 40]) == epsilon(twice=[40, 40]) > epsilon(once=[40])


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


FEDERATED = {"phase": "federated", "drawn": [3, 3], "num_examples": {"0": 100, "1": 50}}


def statement(run_config, rounds, **settings):
    changed = {key.replace("_", "-"): value for key, value in settings.items()}
    return privacy_statement(parse_run_config(run_config | changed), rounds)


def test_a_run_without_a_mechanism_states_nothing(run_config):
    assert statement(run_config, [{"phase": "one-shot"}, {"phase": "federated"}]) is None


def test_rounds_of_fedavg_have_a_total_for_each_unit(run_config):
    found = statement(
        run_config, [FEDERATED] * 4, method="fedavg", weighting="uniform", client_dp="fixed", example_dp_noise=1.0
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
    rounds = [{"phase": "one-shot"}, FEDERATED]
    embeddings = {
        "prompt_level": "embedding", "embedding_summary": "mean", "embedding_clip": 10, "embedding_epsilon": 8.0,
    }  # fmt: skip

    both = statement(run_config, rounds, **embeddings, example_dp_noise=1.0)
    prompts_only = statement(run_config, rounds, **embeddings)
    one_shot = statement(run_config, rounds[:1], **embeddings)
    rounds_only = statement(run_config, rounds, example_dp_noise=1.0)

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
        run_config, [{"phase": "one-shot"}, FEDERATED], prompt_counts="withheld", classes_epsilon=0.5,
        weighting="uniform", client_dp="fixed",
    )  # fmt: skip

    total = {item["unit"]: item["epsilon"] for item in found["total"]}
    # Ten answers of 0.5 each, and one round.
    assert total["one client"] == pytest.approx(10 * 0.5 + clients_epsilon(1.0, [(3, 3)], 1e-5), abs=1e-3)
    assert total["one image"] is None  # one client's noise hides an image only together with all others


def test_noised_counts_hide_one_image_in_the_prompts(run_config):
    found = statement(
        run_config, [{"phase": "one-shot"}], prompt_counts="noised", counts_epsilon=2.0, weighting="uniform"
    )

    assert [(item["unit"], item["epsilon"], item["delta"]) for item in found["total"]] == [("one image", 2.0, 1e-5)]
