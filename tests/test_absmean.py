"""AbsMean against the paper in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tern_jax import AbsMean
from tests import reference
from tests.helpers import weights


def test_codes_and_scale_are_the_reference_s():
  w = weights((64, 40))
  method = AbsMean()
  got = method.discretize(w, *method.init(w))
  codes, scale = reference.absmean(w)
  np.testing.assert_array_equal(got.codes, codes)
  assert float(got.w_p) == pytest.approx(scale, rel=1e-5)


def test_the_gradient_passes_unchanged():
  w, g = weights(), weights(seed=1)
  method = AbsMean()
  got = jax.grad(lambda w: jnp.sum(method(w, *method.init(w)) * g))(w)
  np.testing.assert_array_equal(got, g)
