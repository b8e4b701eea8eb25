"""Sampling against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.sampling import Sampling, sample


def frequencies(logits, sampling, n=4000):
    keys = jax.random.split(jax.random.key(0), n)
    draw = jax.jit(jax.vmap(lambda key: sample(logits[None], key, sampling)[0]))
    return np.bincount(draw(keys), minlength=logits.size) / n


LOGITS = jnp.log(jnp.array([0.1, 0.4, 0.3, 0.2]))


@pytest.mark.parametrize(
    ("sampling", "want"),
    [
        (Sampling(temperature=1.0), [0.1, 0.4, 0.3, 0.2]),
        (Sampling(temperature=0.5), [1 / 30, 16 / 30, 9 / 30, 4 / 30]),
        (Sampling(temperature=1.0, top_k=2), [0, 4 / 7, 3 / 7, 0]),
        (Sampling(temperature=1.0, top_p=0.65), [0, 4 / 7, 3 / 7, 0]),
        (Sampling(temperature=1.0, top_p=0.75), [0, 4 / 9, 3 / 9, 2 / 9]),
        (Sampling(temperature=1.0, top_p=1e-6), [0, 1, 0, 0]),
        (Sampling(temperature=1.0, top_k=9), [0.1, 0.4, 0.3, 0.2]),
        (Sampling(), [0, 1, 0, 0]),
    ],
)
def test_sampling_distribution(sampling, want):
    """4000 draws: three standard deviations are below 0.025; what is cut off never comes."""
    got = frequencies(LOGITS, sampling)
    np.testing.assert_allclose(got, want, atol=0.025)
    assert (got[np.asarray(want) == 0] == 0).all()


@pytest.mark.parametrize(
    "kwargs",
    [{"temperature": -1.0}, {"temperature": 1e-40}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}],
)
def test_sampling_refuses(kwargs):
    (name,) = kwargs
    with pytest.raises(ValueError, match=f"{name}={kwargs[name]}"):
        Sampling(**kwargs)
