import copy

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from clients.local_training import train_locally
from clients.private_training import train_privately
from fgl_app.data.images import ImageSet
from fgl_app.errors import ConfigError
from fgl_app.models import build_model
from fgl_app.training import normalize

CPU = torch.device("cpu")


def noise_images(seed, count=40):
    """Images and labels without any relation: what a model knows of them it knows by heart."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.randint(4, (count,), generator=generator))


def trained(model, data, *, privately=None, epochs=1, batch_size=16, learning_rate=0.05, seed=0, proximal_mu=0.0):
    own = copy.deepcopy(model)
    options = {
        "local_epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "augmentation": "none",
        "generator": torch.Generator().manual_seed(seed), "device": CPU, "proximal_mu": proximal_mu,
    }  # fmt: skip
    if privately is None:
        train_locally(own, data, **options)
    else:
        noise, clip = privately
        train_privately(own, data, noise_multiplier=noise, clipping_norm=clip, **options)
    return own


def moved(before, after):
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return torch.cat([(new - old).detach().flatten() for old, new in pairs])


@pytest.fixture
def cnn():
    return build_model("cnn", 4, 8, seed=0)


def attack_auc(model, members, others):
    """AUC of the attack that takes images of small loss for members (Yeom et al. 2018)."""
    model.eval()
    with torch.no_grad():
        losses = [
            nn.functional.cross_entropy(model(normalize(data.images)), data.labels, reduction="none")
            for data in (members, others)
        ]
    return roc_auc_score([1] * len(members) + [0] * len(others), -torch.cat(losses))


def test_dp_sgd_lowers_what_an_over_trained_classifier_tells_of_its_images(cnn):
    members, others = noise_images(1), noise_images(2)

    plain = attack_auc(trained(cnn, members, epochs=40), members, others)
    private = attack_auc(trained(cnn, members, epochs=40, privately=(2.0, 1.0)), members, others)

    assert plain > 0.9
    assert private < plain - 0.2


def test_a_step_without_noise_is_the_mean_of_clipped_gradients(cnn):
    data = noise_images(1, count=5)
    clip, rate = 0.5, 0.1

    stepped = trained(cnn, data, privately=(0.0, clip), batch_size=8, learning_rate=rate)  # all images, one step

    total = torch.zeros(sum(weight.numel() for weight in cnn.parameters()))
    for index in range(len(data)):
        loss = nn.functional.cross_entropy(
            cnn(normalize(data.images[index : index + 1])), data.labels[index : index + 1]
        )
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(cnn.parameters()))])
        total += gradient * min(1.0, clip / float(gradient.norm()))
    weights = torch.cat([weight.detach().flatten() for weight in cnn.parameters()])
    expected = -rate * (total / len(data) + 1e-4 * weights)
    torch.testing.assert_close(moved(cnn, stepped), expected, rtol=1e-3, atol=1e-5)


def test_the_noise_has_the_deviation_that_it_should(cnn):
    data = noise_images(1, count=10)
    noise, clip, rate = 3.0, 0.5, 0.1

    steps = moved(cnn, trained(cnn, data, privately=(noise, clip), batch_size=16, learning_rate=rate))

    # The noise of each weight is z C / n = 0.15, times the step size; the gradient itself is at most C in all.
    assert float(steps.std()) == pytest.approx(rate * noise * clip / len(data), rel=0.02)


def test_one_seed_gives_other_noise_and_another_draw_each_time(cnn):
    data = noise_images(1)

    noisy = [moved(cnn, trained(cnn, data, privately=(1.0, 1.0), seed=0)) for _ in range(2)]
    drawn = [moved(cnn, trained(cnn, data, privately=(0.0, 1.0), seed=0)) for _ in range(2)]

    assert not torch.equal(*noisy)
    assert not torch.equal(*drawn)


def test_a_step_in_which_nobody_is_drawn_and_one_of_many_parts_are_taken(cnn):
    data = noise_images(1, count=100)

    rarely = moved(cnn, trained(cnn, data, privately=(0.1, 1.0), batch_size=2, learning_rate=0.01))  # 50 steps
    at_once = moved(cnn, trained(cnn, data, privately=(0.0, 1e9), batch_size=100, learning_rate=0.1))
    ordinary = moved(cnn, trained(cnn, data, batch_size=100, learning_rate=0.1))

    assert torch.isfinite(rarely).all()
    torch.testing.assert_close(at_once, ordinary, rtol=1e-3, atol=1e-6)  # four parts of at most 32


def test_fedprox_pulls_back_behind_the_noise(cnn):
    data = noise_images(1)

    far, near = (
        moved(cnn, trained(cnn, data, privately=(1.0, 1.0), epochs=5, proximal_mu=mu)).norm() for mu in (0.0, 10.0)
    )

    assert near < 0.8 * far


def test_a_model_that_opacus_cannot_train_is_refused_in_a_sentence():
    with pytest.raises(ConfigError, match="Use model=cnn"):
        trained(build_model("resnet18", 4, 8, seed=0), noise_images(1, count=4), privately=(1.0, 1.0))
