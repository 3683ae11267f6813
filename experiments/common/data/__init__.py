"""Data to classify, images or text, fed by restorable iterators.

Data sets come from tensorflow-datasets, prepared once in the array_record
format and read without TensorFlow. `load_dataset` decodes a set into uint8
arrays, or, where images differ in size, into `Images` that are decoded where
they are asked for; `batches` and `eval_batches` turn a split into the
standardized batches that training and evaluation consume:

```python
mnist = load_dataset("mnist")
train = batches(mnist.train, 128, seed=0, mean=mnist.mean, std=mnist.std)
batch = next(train)  # {"input": float32 [128, 28, 28, 1], "label": int32 [128]}
train.set_state(train.get_state())  # a JSON-able dict that resumes bit for bit
```

Text, see `text`, is windows of tokens, each with the token that follows it for
its label.
"""

from experiments.common.data import augment as augment
from experiments.common.data import resident as resident
from experiments.common.data import text as text
from experiments.common.data.dataset import Dataset as Dataset
from experiments.common.data.dataset import (
  channel_statistics as channel_statistics,
)
from experiments.common.data.dataset import load_dataset as load_dataset
from experiments.common.data.digits import Digits as Digits
from experiments.common.data.directory import is_prepared as is_prepared
from experiments.common.data.directory import (
  resolve_data_dir as resolve_data_dir,
)
from experiments.common.data.feed import batches as batches
from experiments.common.data.feed import eval_batches as eval_batches
from experiments.common.data.feed import standardize as standardize
from experiments.common.data.prepared import SPLITS as SPLITS
from experiments.common.data.prepared import load as load
from experiments.common.data.sets import SETS as SETS
from experiments.common.data.sets import DataSet as DataSet
from experiments.common.data.splits import Arrays as Arrays
from experiments.common.data.splits import Images as Images
from experiments.common.data.splits import arrays as arrays
from experiments.common.errors import (
  DataNotPreparedError as DataNotPreparedError,
)
