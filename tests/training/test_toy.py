"""The toy in the plane: it learns, and its costs are those of its couplings."""

import numpy as np
import pytest
from tests.draws import SEED

from consistency.training.toy import SIGMA_MAX, Toy, train_toy

pytestmark = pytest.mark.statistical
UNTRAINED = 0.5  # an untrained network answers with nearly the origin, this far from either mode


@pytest.fixture(scope="module")
def toys() -> dict[str, Toy]:
    return {name: train_toy(name, SEED, steps=800, followed=1024, measured=1024) for name in ("ic", "gc")}


@pytest.mark.slow
def test_samples_gather_at_both_modes(toys: dict[str, Toy]) -> None:
    for name, toy in toys.items():
        upper, lower = (np.linalg.norm(toy.samples - np.array([0, y]), axis=1) for y in (0.5, -0.5))
        assert np.median(np.minimum(upper, lower)) < UNTRAINED / 2, name
        assert 0.4 < (upper < lower).mean() < 0.6, name
        assert toy.loss[-100:].mean() < 0.5 * toy.loss[:100].mean(), name


@pytest.mark.slow
def test_the_cost_of_ic_is_constant_and_known_and_that_of_gc_falls_below_it(toys: dict[str, Toy]) -> None:
    ic, gc = toys["ic"], toys["gc"]
    exact = 0.25 + 2 * 1e-4 + 2  # E||x||^2 + E||z||^2
    assert bool((abs(ic.cost - exact) < 4 * ic.cost_se).all())
    assert len(set(ic.cost.round(6))) == 1
    assert abs(gc.cost[0] - exact) < 4 * gc.cost_se[0]
    assert gc.cost[-1] < 0.8 * exact
    assert gc.cost[-1] < gc.cost[len(gc.cost) // 2] < gc.cost[0]


@pytest.mark.slow
def test_paths_are_lines_for_ic_and_end_at_the_endpoints_for_gc(toys: dict[str, Toy]) -> None:
    ic, gc = toys["ic"], toys["gc"]
    np.testing.assert_allclose(ic.paths[-1], ic.data + SIGMA_MAX * ic.noise, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gc.paths - gc.endpoints, ic.paths - ic.data, rtol=0, atol=1e-4)
    # The boundary condition: at the smallest time the endpoint is where x_t is.
    np.testing.assert_allclose(gc.endpoints[0], gc.data + gc.times[0] * gc.noise, rtol=0, atol=1e-6)


def test_a_toy_is_a_function_of_its_seed() -> None:
    one, same, other = (train_toy("gc", seed, steps=5, measured=32, followed=4) for seed in (0, 0, 1))
    for name in ("loss", "paths", "samples", "cost"):
        assert np.array_equal(getattr(one, name), getattr(same, name))
        assert not np.array_equal(getattr(one, name), getattr(other, name))


def test_arms_of_one_seed_start_from_the_same_network_and_data() -> None:
    ic, gc, ot = (train_toy(name, 0, steps=1, measured=32, followed=32) for name in ("ic", "gc", "ot"))
    assert np.array_equal(ic.data, gc.data)
    assert np.array_equal(ic.noise, gc.noise)
    assert np.array_equal(np.sort(ic.noise, 0), np.sort(ot.noise, 0))
    assert ot.cost[0] < ic.cost[0]
