"""Keras 3 on JAX: any optax transformation as the optimizer of `model.fit`."""

from typing import Any, NoReturn

import jax
import optax

from tern_jax.core.paths import path_str
from tern_jax.core.types import Array, PyTree

try:
  import keras
except ImportError as error:
  raise ImportError(
    "tern_jax.keras needs Keras 3 on JAX: pip install 'tern_jax[keras]', and"
    " set the environment variable KERAS_BACKEND=jax before Keras is imported."
  ) from error

if keras.config.backend() != "jax":
  raise ImportError(
    f"tern_jax.keras needs Keras on JAX, but its backend is"
    f" {keras.config.backend()}: set the environment variable KERAS_BACKEND=jax"
    " before Keras is imported."
  )


class Optimizer(keras.optimizers.Optimizer):
  """An optax transformation that Keras trains with, `tern_jax.wrap` above all.

  The transformation sees the trainable variables as `{path: array}`, of the
  paths that Keras gives them, such as "sequential/dense/kernel". Its state lies
  in variables of the optimizer, so that Keras saves and restores it along with
  the weights (`model.save_weights`).

      tx = tern_jax.recipe(0.8, steps).optimizer()
      model.compile(tern_jax.keras.Optimizer(tx), loss="mse")
      model.fit(x, y)
      packed = tern_jax.pack(tx.tern.finalize(model.optimizer.state))

  Args:
    tx: the transformation; its rate is in it.

  Raises:
    NotImplementedError: the learning rate is set, which a transformation has as
      its own schedule; or its configuration is asked for, as `model.save` does.
  """

  def __init__(self, tx: optax.GradientTransformation):
    super().__init__(learning_rate=1.0)
    # Keras would make a list of its own of a tuple.
    self._init, self._update = tx

  def build(self, variables: list[keras.Variable]) -> None:
    """Makes the state for the variables that are trained."""
    if self.built:
      return
    super().build(variables)
    start = self._init({v.path: v.value for v in variables})
    leaves, self._structure = jax.tree_util.tree_flatten_with_path(start)
    self._leaves = [
      self._variable(path_str(path).replace("/", "_"), leaf)
      for path, leaf in leaves
    ]

  def _variable(self, name: str, leaf: Array) -> keras.Variable:
    variable = self.add_variable(
      leaf.shape, initializer="zeros", dtype=str(leaf.dtype), name=name
    )
    variable.assign(leaf)
    return variable

  @property
  def state(self) -> PyTree:
    """State of the transformation, for `ParamTransform.finalize`."""
    if not self.built:
      raise ValueError(
        "The optimizer has no state before model.fit, or optimizer.build("
        "model.trainable_variables)."
      )
    return jax.tree.unflatten(self._structure, [v.value for v in self._leaves])

  def apply(self, grads: list[Array], trainable_variables: Any = None) -> None:
    """Updates the variables by their gradients."""
    variables = trainable_variables or self._trainable_variables
    if not self.built:
      self.build(variables)
    params = {v.path: v.value for v in variables}
    updates, state = self._update(
      dict(zip(params, grads, strict=True)), self.state, params
    )
    moved: Any = optax.apply_updates(params, updates)
    for variable in variables:
      variable.assign(moved[variable.path])
    for variable, leaf in zip(
      self._leaves, jax.tree.leaves(state), strict=True
    ):
      variable.assign(leaf)
    self.iterations.assign_add(1)

  @property
  def learning_rate(self) -> NoReturn:  # pyrefly: ignore
    """Is in the transformation."""
    raise AttributeError(
      "The learning rate is in the optax transformation of this optimizer: give"
      " that a schedule."
    )

  @learning_rate.setter
  def learning_rate(self, value: object) -> NoReturn:
    del value
    raise NotImplementedError(
      "The learning rate is in the optax transformation of this optimizer, and"
      " Keras cannot set it: give that a schedule, or optax.inject_hyperparams."
    )

  def get_config(self) -> NoReturn:
    """Raises: a transformation is functions, which cannot be written."""
    raise NotImplementedError(
      "An optax transformation cannot be written into a Keras file: save with"
      " model.save_weights, or the ternary weights with tern_jax.save_packed."
    )
