"""Guidance, on a mixture whose components are the classes: everything in closed form."""

import pytest
import torch
from torch.testing import assert_close

from score_models import EDM, Autocast, Classes, ScoreModel, classifier_free, conditioned
from score_models.checks import randomise
from score_models.networks import MLP
from sde_lib import VPSDE
from sde_lib.oracles import GaussianMixture

SDE, T = VPSDE(), torch.tensor(0.3)
MEANS = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.5]], dtype=torch.float64)
MIXTURE = GaussianMixture(MEANS, 0.6)
X = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 1, 0])


class Known:
    """The exact conditional model: class i is component i, no class the mixture."""

    cond = Classes(3)

    def __init__(self):
        self.sizes = []

    def score(self, x, t, cond):
        self.sizes.append(len(x))
        t = torch.as_tensor(t).expand(len(x))
        rows = []
        for i, label in enumerate(cond):
            data = MIXTURE if label == 3 else GaussianMixture(MEANS[label][None], 0.6)
            rows.append(data.score(SDE)(x[i : i + 1], t[i : i + 1]))
        return torch.cat(rows)


def log_prob_of_class(x, labels):
    """log p(c | x_t), by Bayes."""
    under = torch.cat(
        [
            GaussianMixture(MEANS[label][None], 0.6).log_prob(x[i : i + 1], SDE, T)
            for i, label in enumerate(labels)
        ]
    )
    return under - torch.log(torch.tensor(3.0)) - MIXTURE.log_prob(x, SDE, T)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("t", [T, T.expand(5)])
def test_guided_score_is_that_of_the_mixture_plus_the_scaled_gradient_of_the_class(scale, t):
    x = X.clone().requires_grad_()
    (pull,) = torch.autograd.grad(log_prob_of_class(x, LABELS).sum(), x)
    wanted = MIXTURE.score(SDE)(X, T) + scale * pull
    model = Known()
    assert_close(classifier_free(model, LABELS, scale)(X, t), wanted)
    assert model.sizes == [2 * len(X)], "one pass"


def test_a_bound_condition_is_that_of_each_row_and_one_row_holds_for_all():
    model = Known()
    assert_close(conditioned(model.score, LABELS)(X, T), model.score(X, T, LABELS))
    one = torch.tensor([1])
    assert_close(conditioned(model.score, one)(X, T), model.score(X, T, one.expand(5)))
    assert_close(classifier_free(model, one, 1.0)(X, T), model.score(X, T, one.expand(5)))


def test_guidance_sees_what_a_network_is_conditioned_on_through_half_precision():
    network = randomise(MLP((2,), 8, 1, cond=Classes(3))).eval()
    x, one = X.float(), torch.tensor([1])
    plain = ScoreModel(network, SDE, EDM(0.5))
    half = ScoreModel(Autocast(network, torch.bfloat16), SDE, EDM(0.5))
    wanted = 2 * plain.score(x, T, one.expand(5)) - plain.score(x, T, Classes(3).null(5))
    assert_close(classifier_free(plain, one, 2.0)(x, T), wanted)
    # three numbers of 8 bits each, the largest of the output about one
    off = (classifier_free(half, one, 2.0)(x, T) - wanted).abs().max()
    assert float(off.detach()) < 3 * 2**-6 * float(wanted.abs().max())


def test_an_unconditional_model_cannot_be_guided():
    model = ScoreModel(MLP((2,), 8, 1), SDE, EDM(0.5))
    with pytest.raises(ValueError, match="unconditional.*network.cond"):
        classifier_free(model, LABELS, 2.0)
    with pytest.raises(ValueError, match="scale"):
        classifier_free(Known(), LABELS, -1.0)
