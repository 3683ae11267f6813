"""How a matrix of codes lies in memory, and how a product reads it."""

import abc
from typing import ClassVar

from tern_jax.core.types import Array
from tern_jax.inference import forms
from tern_jax.inference.matrix import Size


class Layout(abc.ABC):
  """What a layout does; `layouts.LAYOUTS` has one of each.

  All arrays are those of one matrix: a stack of them comes with `jax.vmap`.
  """

  #: Ranks of its arrays.
  ranks: ClassVar[tuple[int, ...]]

  @abc.abstractmethod
  def build(self, codes: Array, size: Size) -> tuple[Array, ...]:
    """Returns the arrays of codes, int8 [inputs, outputs]."""

  @abc.abstractmethod
  def codes(self, arrays: tuple[Array, ...], size: Size) -> Array:
    """Returns codes, int8 [inputs, outputs], the inverse of `build`."""

  def product(
    self,
    x: Array,
    arrays: tuple[Array, ...],
    w_p: Array,
    w_n: Array,
    size: Size,
    int8: bool,
  ) -> Array:
    """Returns float32 [rows, outputs]; of unpacked codes, if nothing is faster.

    Args:
      x: float32 [rows, inputs].
      arrays: what `build` returned.
      w_p: float32 [groups or 1, outputs or 1].
      w_n: the same.
      size: of the matrix, no part of which is 0.
      int8: whether x is rounded, as by `forms.quantize`.
    """
    codes = self.codes(arrays, size)
    return forms.of_codes(x, codes, w_p, w_n, size, int8)
