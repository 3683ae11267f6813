"""The methods once more, in plain NumPy and float64, as in the papers."""

import math

import numpy as np
import scipy.special

#: Shares of empty clusters count as this much.
TINY = float(np.finfo(np.float32).tiny)


def wdr(theta, alpha, sharp=False):
  w = np.tanh(np.asarray(theta, np.float64))
  if sharp:
    return float(np.sum((np.abs(w) - (w**2 > alpha / 2)) ** 2) / 2)
  return float(np.sum((alpha - w**2) * w**2))


def wdr_grad(theta, alpha, sharp=False):
  w = np.tanh(np.asarray(theta, np.float64))
  if sharp:
    return (w - np.sign(w) * (w**2 > alpha / 2)) * (1 - w**2)
  return 2 * w * (1 - w**2) * (alpha - 2 * w**2)


def predicted_sparsity(sigma, alpha):
  return math.erf(math.atanh(math.sqrt(alpha / 2)) / (sigma * math.sqrt(2)))


def codes_at_sparsity(x, sparsity):
  """Codes with exactly round(sparsity * n) zeros, the smallest magnitudes."""
  x = np.asarray(x)
  zeros = np.argsort(np.abs(x).ravel())[: round(sparsity * x.size)]
  codes = np.sign(x).astype(np.int8).ravel()
  codes[zeros] = 0
  return codes.reshape(x.shape)


def twn(w, threshold=0.7, channel_axis=None):
  """Codes and scale of ternary weight networks."""
  w = np.asarray(w, np.float64)
  axes, keep = _axes(w, channel_axis)
  delta = threshold * np.mean(np.abs(w), axis=axes, keepdims=keep)
  beyond = np.abs(w) > delta
  scale = np.sum(np.abs(w) * beyond, axis=axes, keepdims=keep) / np.maximum(
    np.sum(beyond, axis=axes, keepdims=keep), 1
  )
  return (np.sign(w) * beyond).astype(np.int8), scale


def absmean(w):
  """Codes and scale of BitNet b1.58."""
  w = np.asarray(w, np.float64)
  scale = np.mean(np.abs(w))
  return np.clip(np.round(w / scale), -1, 1).astype(np.int8), scale


def ttq_codes(w, threshold=0.05):
  w = np.asarray(w, np.float64)
  beyond = np.abs(w) > threshold * np.max(np.abs(w))
  return (np.sign(w) * beyond).astype(np.int8)


def sca_alpha(theta, alpha):
  """Codes of latents at the barrier |tanh(theta)| = sqrt(alpha / 2)."""
  w = np.tanh(np.asarray(theta, np.float64))
  return (np.sign(w) * (np.abs(w) > math.sqrt(alpha / 2))).astype(np.int8)


def ec2t_shares(w, w_p, w_n, min_p_0=0.5):
  """P of the centroids 0, +, -, in this order."""
  centroids = (np.zeros_like(w_p), w_p, -w_n)
  nearest = np.argmin([(w - c) ** 2 + 0 * w for c in centroids], 0)
  shares = np.array([np.mean(nearest == i) for i in range(3)])
  if shares[0] < min_p_0:
    shares[1:] *= (1 - min_p_0) / (1 - shares[0])
    shares[0] = min_p_0
  return shares


def ec2t_lambda_max(w, w_p, w_n, min_p_0=0.5):
  p_0, p_p, p_n = ec2t_shares(w, w_p, w_n, min_p_0)
  lam_p = (w.max() ** 2 - (w.max() - w_p) ** 2) / (np.log2(p_0) - np.log2(p_p))
  w_min = abs(w.min())
  lam_n = (w_min**2 - (w_min - w_n) ** 2) / (np.log2(p_0) - np.log2(p_n))
  return min(lam_p, lam_n)


def ec2t_codes(w, w_p, w_n, lam, min_p_0=0.5):
  """The argmin of the paper, 0 listed first so that ties go there."""
  shares = ec2t_shares(w, w_p, w_n, min_p_0)
  bits = -np.log2(np.maximum(shares, TINY))
  centroids = (np.zeros_like(w_p), w_p, -w_n)
  costs = [(w - c) ** 2 + lam * b for c, b in zip(centroids, bits, strict=True)]
  return np.array([0, 1, -1])[np.argmin(costs, 0)]


def inverse_mills(t):
  """Inverse Mills ratio in float64, by the scaled complementary erf."""
  t = np.asarray(t, np.float64)
  return np.sqrt(2 / np.pi) / scipy.special.erfcx(t / np.sqrt(2))


def inverse_mills_grad(t):
  """Its derivative; from t = 1e3 the cancellation in float64 is too large."""
  t = np.asarray(t, np.float64)
  far = 1 - 1 / np.maximum(t, 1) ** 2
  return np.where(t < 1e3, inverse_mills(t) * (inverse_mills(t) - t), far)


def tga(w, delta, mean=False, channel_axis=None):
  """Codes, scale and derivative of the scale, as in the paper."""
  w = np.asarray(w, np.float64)
  axes, keep = _axes(w, channel_axis)
  mu = np.mean(w, axes, keepdims=keep) * mean
  sigma = np.sqrt(np.mean((w - mu) ** 2, axes, keepdims=keep))
  delta = np.clip(np.asarray(delta, np.float64), 0, 3 * sigma)
  codes = (w > mu + delta).astype(np.int8) - (w < mu - delta).astype(np.int8)
  return (
    codes,
    mu + sigma * inverse_mills(delta / sigma),
    inverse_mills_grad(delta / sigma),
  )


def _axes(w, channel_axis):
  """Axes of a statistic of each channel, and whether they are kept."""
  if channel_axis is None:
    return None, False
  return tuple(i for i in range(w.ndim) if i != channel_axis % w.ndim), True
