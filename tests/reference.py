"""The methods once more, in plain NumPy and float64, as in the papers."""

import math

import numpy as np


def wdr(theta, alpha):
  w = np.tanh(np.asarray(theta, np.float64))
  return float(np.sum((alpha - w**2) * w**2))


def wdr_grad(theta, alpha):
  w = np.tanh(np.asarray(theta, np.float64))
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
  axes = None
  if channel_axis is not None:
    axes = tuple(i for i in range(w.ndim) if i != channel_axis % w.ndim)
  keep = axes is not None
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
