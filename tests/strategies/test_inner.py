import pytest

from fgl_app.errors import ConfigError
from fgl_app.phases import initial_arrays
from strategies import CheckedRounds
from strategies.inner import build_inner, strategy_names


def build(name="FedAvg", options="", weighting="examples", num_selected=3):
    return build_inner(name, options, num_selected=num_selected, weighting=weighting, evaluate_on_clients=False)


def test_all_of_flowers_averaging_strategies_are_known():
    assert {"FedAvg", "FedAvgM", "FedProx", "FedAdam", "FedYogi", "FedAdagrad", "FedMedian", "Krum"} <= set(
        strategy_names()
    )


@pytest.mark.parametrize("name", strategy_names())
def test_every_strategy_runs_a_round(make_grid, settings, name):
    options = {"QFedAvg": "client-learning-rate=0.01", "Bulyan": "num-malicious-nodes=0"}.get(name, "")
    start = initial_arrays(settings, settings.card.class_names())

    result = CheckedRounds(build(name, options), num_clients=3).start(make_grid(), start, num_rounds=1)

    assert list(result.arrays) == list(start)
    assert any((result.arrays[key].numpy() != start[key].numpy()).any() for key in start)


def test_options_reach_the_strategy():
    assert build("FedAdam", "eta=0.5 beta_1=0.8").eta == 0.5
    assert build("FedAdam", "beta-1=0.8").beta_1 == 0.8
    assert build("Krum", "num-malicious-nodes=1", num_selected=5).num_malicious_nodes == 1


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("FedAvgg", "", "FedAvg"),
        ("FedXgbBagging", "", "`strategy`"),
        ("FedAdam", "etta=1", "eta"),
        ("FedAdam", "eta=much", "KEY=NUMBER"),
        ("FedAdam", "eta=nan", "KEY=NUMBER"),
        ("FedAvg", "fraction_train=0.5", "none"),
    ],
)
def test_what_flower_does_not_know_is_refused_by_name(name, options, named):
    with pytest.raises(ConfigError, match=named):
        build(name, options)


# Blanchard et al. 2017: n >= 2 f + 3. El Mhamdi et al. 2018: n >= 4 f + 3.
@pytest.mark.parametrize(
    ("name", "hostile", "fewest"),
    [
        ("Krum", 1, 5), ("Krum", 4, 11), ("MultiKrum", 2, 7), ("Bulyan", 0, 3), ("Bulyan", 1, 7), ("Bulyan", 3, 15),
    ],
)  # fmt: skip
def test_rounds_of_too_few_clients_for_the_hostile_ones_are_refused_before_the_start(name, hostile, fewest):
    options = f"num-malicious-nodes={hostile}"

    assert build(name, options, num_selected=fewest).num_malicious_nodes == hostile
    with pytest.raises(
        ConfigError, match=f"{name} needs rounds of at least {fewest} .* may have {fewest - 1}."
    ) as said:
        build(name, options, num_selected=fewest - 1)
    assert ("Use another `strategy`" if hostile == 0 else f"Use at most {hostile - 1}") in str(said.value)


def test_krum_without_hostile_clients_chooses_among_any_number():
    assert build("Krum", num_selected=2).num_malicious_nodes == 0
    assert build("MultiKrum", "num-nodes-to-select=2", num_selected=2).num_malicious_nodes == 0


@pytest.mark.parametrize(("name", "number"), [("Krum", "-1"), ("MultiKrum", "0.5"), ("Bulyan", "-2")])
def test_the_hostile_clients_must_be_a_number_of_clients(name, number):
    with pytest.raises(ConfigError, match=f"must be a whole number from 0 on, but is {number}"):
        build(name, f"num-malicious-nodes={number}", num_selected=9)


def test_the_mean_is_weighted_by_examples_or_not(make_grid, settings):
    start = initial_arrays(settings, settings.card.class_names())
    replies = {}

    def one_round(weighting):
        grid = make_grid()
        strategy = CheckedRounds(build(weighting=weighting), num_clients=3)
        arrays = strategy.start(grid, start, num_rounds=1).arrays
        replies[weighting] = arrays["9.bias"].numpy()

    one_round("examples")
    one_round("uniform")

    # Dirichlet clients hold different numbers of images, so that the two means differ.
    assert (replies["examples"] != replies["uniform"]).any()


def test_fedprox_pulls_the_clients_towards_the_weights_that_they_received(make_grid, settings):
    start = initial_arrays(settings, settings.card.class_names())

    def distance(options):
        strategy = CheckedRounds(build("FedProx", options), num_clients=3)
        strategy.start(make_grid(), start, num_rounds=1)
        return strategy.update_metrics[1]["client_drift"]

    assert distance("proximal-mu=20.0") < 0.8 * distance("proximal-mu=0.0")
