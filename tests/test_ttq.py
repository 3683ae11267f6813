"""TTQ against the paper in NumPy, and its gradients in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tern_jax import TTQ
from tests import reference
from tests.helpers import weights


def test_codes_and_cluster_means():
  w = weights((64, 40))
  method = TTQ(threshold=0.3)
  scales, state = method.init(w)
  codes = reference.ttq_codes(w, 0.3)
  got = method.discretize(w, scales, state)
  np.testing.assert_array_equal(got.codes, codes)
  magnitude = np.abs(np.asarray(w))
  assert float(scales["w_p"]) == pytest.approx(magnitude[codes > 0].mean())
  assert float(scales["w_n"]) == pytest.approx(magnitude[codes < 0].mean())
  ones, _ = TTQ(start="one").init(w)
  assert {name: float(s) for name, s in ones.items()} == {
    "w_n": 1.0,
    "w_p": 1.0,
  }


@pytest.mark.parametrize("channel_axis", [None, -1])
def test_gradients_in_closed_form(channel_axis):
  w, g = weights(), weights(seed=1)
  method = TTQ(threshold=0.3, channel_axis=channel_axis)
  scales, state = method.init(w)
  codes = reference.ttq_codes(w, 0.3)

  def loss(w, scales):
    return jnp.sum(method(w, scales, state) * g)

  d_w, d_scales = jax.grad(loss, (0, 1))(w, scales)
  factor = np.where(
    codes > 0, scales["w_p"], np.where(codes < 0, scales["w_n"], 1)
  )
  np.testing.assert_allclose(d_w, factor * g, rtol=1e-5)
  axis, keep = (None, False) if channel_axis is None else (0, True)
  for name, sign in (("w_p", 1), ("w_n", -1)):
    total = np.sum(sign * np.asarray(g) * (codes == sign), axis, keepdims=keep)
    np.testing.assert_allclose(d_scales[name], total, rtol=1e-4, atol=1e-5)


def test_bad_input():
  with pytest.raises(ValueError, match="threshold must lie in"):
    TTQ(threshold=1.0)
  with pytest.raises(ValueError, match='must be "means" or "one"'):
    TTQ(start="two")
