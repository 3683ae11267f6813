"""Names of the types that signatures share."""

from collections.abc import Callable, Hashable

import jax
from jaxtyping import Array as Array
from jaxtyping import Float, Int
from jaxtyping import PyTree as PyTree

#: A dict of named arrays that a method keeps for one weight array.
Arrays = dict[str, Array]
#: Floating-point arrays, of any one shape in a signature.
Floats = Float[Array, "*shape"]
#: A floating-point scalar: a Python number or a 0-d array, maybe traced.
Scalar = float | Float[Array, ""]
#: A step: a Python number or a 0-d integer array, maybe traced.
Count = int | Int[Array, ""]
#: A function of the step count.
Schedule = Callable[[Array], Scalar]
#: Axes that keep statistics of their own, as `numerics.reduced_axes` takes.
ChannelAxis = int | tuple[int, ...] | None
#: Where a leaf is in a tree, as `jax.tree_util` tells.
KeyPath = tuple[Hashable, ...]
#: What is known of an array before it exists: its shape and dtype.
Shaped = jax.ShapeDtypeStruct
#: The state of a method: {path: {name: array}}.
State = dict[str, Arrays]
