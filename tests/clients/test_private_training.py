import copy
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn

from clients.local_training import train_locally
from clients.private_training import draw_images, train_privately
from fgl_app.data.images import ImageSet
from fgl_app.errors import ConfigError
from fgl_app.models import build_model
from fgl_app.rng import derive_seed
from fgl_app.training import augment, augment_by, normalize

CPU = torch.device("cpu")


def noise_images(seed, count=40):
    """Images and labels without any relation: what a model knows of them it knows by heart."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.randint(4, (count,), generator=generator))


def trained(
    model, data, *, privately=None, epochs=1, batch_size=16, learning_rate=0.05, proximal_mu=0.0, augmentation="none",
    secret=None,
):  # fmt: skip
    own = copy.deepcopy(model)
    options = {
        "local_epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "augmentation": augmentation,
        "device": CPU, "proximal_mu": proximal_mu,
    }  # fmt: skip
    if privately is None:
        train_locally(own, data, generator=torch.Generator().manual_seed(0), **options)
    else:
        noise, clip = privately
        train_privately(own, data, noise_multiplier=noise, clipping_norm=clip, secret=secret, **options)
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


def test_the_noise_is_not_one_of_four_billion_that_somebody_may_try(cnn):
    """A seed of PyTorch's CPU generator counts by its last 32 bits, whatever secret it derives from."""
    data, secret = noise_images(1, count=10), 2**127 + 12345

    found = moved(cnn, trained(cnn, data, privately=(100.0, 1.0), batch_size=16, secret=secret))

    guessed = torch.Generator().manual_seed(derive_seed(secret, "noise") % 2**32)
    tried = torch.cat(
        [torch.normal(0.0, 1.0, weight.shape, generator=guessed).flatten() for weight in cnn.parameters()]
    )
    assert abs(float(torch.corrcoef(torch.stack([tried, found]))[0, 1])) < 0.1


def test_noise_draw_and_crops_are_new_each_time(cnn):
    data = noise_images(1)

    noisy = [moved(cnn, trained(cnn, data, privately=(1.0, 1.0), batch_size=40)) for _ in range(2)]
    drawn = [moved(cnn, trained(cnn, data, privately=(0.0, 1.0))) for _ in range(2)]
    cropped = [
        moved(cnn, trained(cnn, data, privately=(0.0, 1.0), batch_size=40, augmentation="crop")) for _ in range(2)
    ]

    assert not torch.equal(*noisy)
    assert not torch.equal(*drawn)
    assert not torch.equal(*cropped)


class Recording(nn.Module):
    """Keeps the pixels that the model is trained on."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, pixels):
        self.seen.append(pixels.detach())
        return self.model(pixels)


def digits():
    part = load_digits()
    images = torch.from_numpy(part.images[:168] * 15).to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous()
    return ImageSet(images, torch.from_numpy(part.target[:168]))


@pytest.mark.parametrize(("data", "batch_size"), [(noise_images(1, count=3), 2), (digits(), 64)])
def test_an_image_that_joins_moves_neither_the_draw_nor_the_crops_of_the_others(data, batch_size):
    count, rate, steps = len(data), batch_size / len(data), math.ceil(len(data) / batch_size)
    without = data.take(list(range(count - 1)))
    joined = 0
    for secret in range(5):
        seen = []
        for images, expected in ((data, batch_size), (without, rate * len(without))):  # of one rate
            model = Recording(build_model("cnn", 10, 8, seed=0))
            options = {"batch_size": expected, "augmentation": "crop-flip", "secret": secret}
            seen.append(torch.cat(trained(model, images, privately=(1.0, 1.0), **options).seen))
        drawn = torch.cat([draw_images(secret, step, count, rate)[0] for step in range(steps)])
        joined += int((drawn == count - 1).sum())

        assert torch.equal(seen[0][drawn < count - 1], seen[1])
    assert joined > 0


def clipped_gradients(model, pixels, labels, clip=1.0):
    """Gradients of single images, each scaled to a norm of at most ``clip``, ``[N, W]``."""
    rows = []
    for index in range(len(labels)):
        loss = nn.functional.cross_entropy(model(pixels[index : index + 1]), labels[index : index + 1])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        rows.append(gradient * min(1.0, clip / float(gradient.norm())))
    return torch.stack(rows).double().numpy()


def divergence(first, second, noise, epsilon, samples=300_000):
    """Hockey-stick divergence max(0, P - e^epsilon Q) of mixtures of Gaussians, by Monte Carlo."""
    centres = np.stack([centre for mixture in (first, second) for centre, _ in mixture])
    basis = np.linalg.svd(centres, full_matrices=False)[2][: np.linalg.matrix_rank(centres)]
    generator = np.random.default_rng(0)
    (p, at), (_, of_second) = (
        (np.array([share for _, share in mixture]), np.stack([basis @ centre for centre, _ in mixture]))
        for mixture in (first, second)
    )
    x = at[generator.choice(len(p), samples, p=p)] + noise * generator.standard_normal((samples, at.shape[1]))

    def log_density(places, shares):
        exponents = [
            np.log(share) - ((x - place) ** 2).sum(1) / (2 * noise**2)
            for place, share in zip(places, shares, strict=True)
        ]
        return np.logaddexp.reduce(exponents)

    shares = np.array([share for _, share in second])
    return float(np.maximum(0, 1 - np.exp(epsilon + log_density(of_second, shares) - log_density(at, p))).mean())


@pytest.mark.parametrize(("rate", "noise", "epsilon"), [(2 / 3, 0.35, 6.0), (0.5, 0.3, 7.0), (0.8, 0.4, 5.0)])
def test_crops_of_each_image_keep_the_bound_that_crops_of_the_batch_break(rate, noise, epsilon):
    data = noise_images(1, count=3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    nn.init.zeros_(model[1].weight), nn.init.zeros_(model[1].bias)

    def released(sums_of, rows):
        """The sums of each draw of these images, with its probability."""
        draws = itertools.chain.from_iterable(itertools.combinations(rows, size) for size in range(len(rows) + 1))
        shares = {draw: rate ** len(draw) * (1 - rate) ** (len(rows) - len(draw)) for draw in draws}
        return [(sums_of(draw), share) for draw, share in shares.items()]

    crops = draw_images(0, 0, 3, 1.0)[1]
    by_image = clipped_gradients(model, augment_by(data.images, "crop-flip", crops), data.labels)

    def of_the_batch(draw):
        pixels = augment(data.images[list(draw)], "crop-flip", torch.Generator().manual_seed(0)) if draw else None
        return clipped_gradients(model, pixels, data.labels[list(draw)]).sum(0) if draw else 0 * by_image[0]

    # With noise N(0, z^2) on either: the accountant's mechanism is (1 - q) N(0, z^2) + q N(1, z^2) against N(0, z^2).
    x = np.linspace(-10, 11, 1_000_001)
    absent, present = norm.pdf(x, 0, noise), norm.pdf(x, 1, noise)
    bound = np.trapezoid(np.maximum(0, (1 - rate - np.exp(epsilon)) * absent + rate * present), x)

    secretly, publicly = (
        divergence(released(sums_of, (0, 1, 2)), released(sums_of, (1, 2)), noise, epsilon)
        for sums_of in (lambda draw: by_image[list(draw)].sum(0), of_the_batch)
    )

    assert secretly == pytest.approx(bound, rel=0.02)  # every gradient has the norm 1, so that it is reached
    assert publicly > 2 * bound


def test_a_model_with_dropout_is_refused_because_its_masks_are_those_of_a_batch():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 4))

    with pytest.raises(ConfigError, match="without dropout"):
        trained(model, noise_images(1, count=4), privately=(1.0, 1.0))


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
