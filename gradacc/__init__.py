"""gradacc: gradient accumulation as a function transform.

``accumulate(loss_fn, steps=k)(params, batch)`` is ``torch.func.grad(loss_fn)(params, batch)`` in the memory of a
micro-batch.
"""

from gradacc import checkpoint as checkpoint
from gradacc import data as data
from gradacc import optim as optim
from gradacc._accumulate import accumulate as accumulate
from gradacc._accumulate import accumulate_and_value as accumulate_and_value
from gradacc._accumulator import Accumulator as Accumulator
from gradacc._accumulator import accumulator as accumulator
from gradacc._all_reduce import all_reduce as all_reduce
from gradacc._mean import Mean as Mean
from gradacc._module import functional as functional
from gradacc._train import TrainState as TrainState
from gradacc._train import train_step as train_step
from gradacc._version import __version__ as __version__
