"""Float nets that were trained before, by an earlier run or elsewhere."""

import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments.common.errors import UsageError
from tern_jax.checkpoint import Checkpointer, absolute
from tern_jax.core.paths import path_str

#: What torchvision calls the parts of `models.ImageNetResNet`.
_NAMES = {
  "stem": "conv1",
  "stem_norm": "bn1",
  "head": "fc",
  "shortcut": "downsample.0",
  "shortcut_norm": "downsample.1",
  "kernel": "weight",
  "scale": "weight",
  "mean": "running_mean",
  "var": "running_var",
}


def load(path: str, like: Any) -> Any:
  """Loads the variables of a float net.

  Args:
    path: directory of a float net of an earlier run, as in `runs/float`, or a
      safetensors file of a ResNet with torchvision's names.
    like: {"params": parameters, and the other variables}, or their shapes.

  Returns:
    The variables, float32 arrays on the host.

  Raises:
    UsageError: there is no such net, or it does not fit.
    CheckpointError: the checkpoint is damaged, or does not fit.
  """
  place = absolute(path)
  if place.is_file():
    return from_torchvision(_read(path), like)
  record, kept = place / "config.json", place / "checkpoints" / "float"
  if not (record.is_file() and kept.is_dir()):
    raise UsageError(
      f"float_from={path} is neither a file nor the directory of a float net,"
      " which has checkpoints/float in it: give one of runs/float, or a"
      " safetensors file."
    )
  rest = {k: v for k, v in like.items() if k != "params"}
  wanted = {"params": like["params"]}
  averaged = json.loads(record.read_text()).get("ema") is not None
  if averaged:
    # The average lies beside the parameters, and is what was evaluated.
    wanted = {"opt_state": {"average": like["params"]}}
  wanted = {"state": {**wanted, "model_state": rest}}
  with Checkpointer(kept) as saved:
    found, _, _ = saved.restore(wanted, partial=True)
  found = jax.device_get(found["state"])
  params = found["opt_state"]["average"] if averaged else found["params"]
  return {"params": params, **found["model_state"]}


def _read(path: str) -> dict[str, np.ndarray]:
  try:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file
  except ImportError as error:
    raise UsageError(
      f'float_from={path} needs safetensors: pip install "tern_jax[export]".'
    ) from error
  try:
    return load_file(path)
  except SafetensorError as error:
    raise UsageError(
      f"float_from={path} is no safetensors file: {error}."
    ) from error


def from_torchvision(tensors: Mapping[str, np.ndarray], like: Any) -> Any:
  """Converts the tensors of a ResNet of torchvision to our variables.

  Kernels [O, I, H, W] become [H, W, I, O], and [O, I] becomes [I, O].

  Args:
    tensors: {name: tensor}, such as "layer1.0.conv1.weight"; the counts named
      "num_batches_tracked" are left out.
    like: variables of `models.ImageNetResNet`, or their shapes.

  Returns:
    The same tree of float32 arrays.

  Raises:
    UsageError: names or shapes are not those of the network.
  """
  rest = {k for k in tensors if not k.endswith("num_batches_tracked")}
  wrong = []

  def take(keys: Any, leaf: Any) -> np.ndarray:
    name = torchvision_name(path_str(keys))
    tensor = tensors.get(name)
    if tensor is not None:
      rest.discard(name)
      tensor = tensor.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(tensor.ndim))
    found = None if tensor is None else tensor.shape
    if found != leaf.shape:
      wrong.append(f"{name} is {found or 'missing'}, not {leaf.shape}")
      return np.zeros(leaf.shape, np.float32)
    return np.ascontiguousarray(tensor, np.float32)

  variables = jax.tree_util.tree_map_with_path(take, like)
  wrong += [f"{name} has no place" for name in sorted(rest)]
  if wrong:
    more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    raise UsageError(
      "The tensors are not those of the network, by torchvision's names and in"
      f" our order of axes: {'; '.join(wrong[:3])}{more}. Give those of the"
      " same --model, trained on as many classes."
    )
  return variables


def torchvision_name(path: str) -> str:
  """Returns torchvision's name of a variable of `models.ImageNetResNet`.

  >>> torchvision_name("params/layer1_block0/conv2/kernel")
  'layer1.0.conv2.weight'
  >>> torchvision_name("batch_stats/layer2_block0/shortcut_norm/mean")
  'layer2.0.downsample.1.running_mean'
  """
  parts = [_NAMES.get(part, part) for part in path.split("/")[1:]]
  name = ".".join(parts).replace("_block", ".")
  return re.sub(r"\bnorm(\d)", r"bn\1", name)
