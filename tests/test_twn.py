"""TWN against the paper in NumPy, and its straight-through gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tern_jax import TWN
from tests import reference
from tests.helpers import weights


@pytest.mark.parametrize("channel_axis", [None, -1, 0])
def test_codes_and_scale_are_the_reference_s(channel_axis):
  w = weights((64, 40))
  method = TWN(channel_axis=channel_axis)
  got = method.discretize(w, *method.init(w))
  codes, scale = reference.twn(w, 0.7, channel_axis)
  np.testing.assert_array_equal(got.codes, codes)
  np.testing.assert_allclose(got.w_p, scale, rtol=1e-5)
  np.testing.assert_array_equal(got.w_p, got.w_n)


def test_zeros_of_a_gaussian_are_those_of_theory():
  w = weights((1000, 1000))
  method = TWN()
  codes = method.discretize(w, *method.init(w)).codes
  # erf(0.7 sqrt(2 / pi) / sqrt(2)): mean|w| is sqrt(2 / pi) sigma.
  assert float(jnp.mean(codes == 0)) == pytest.approx(0.4235, abs=0.002)


def test_the_gradient_passes_unchanged():
  w, g = weights(), weights(seed=1)
  method = TWN()
  args = method.init(w)
  got = jax.grad(lambda w: jnp.sum(method(w, *args) * g))(w)
  np.testing.assert_array_equal(got, g)


def test_bad_input():
  with pytest.raises(ValueError, match="threshold must lie in"):
    TWN(threshold=-1.0)
  with pytest.raises(ValueError, match="sparsity must lie in"):
    TWN(sparsity=1.0)
