"""Functional optimizers: ``params, state = optimizer.step(params, grads, state)``."""

from gradacc.optim._adam import AdamState as AdamState
from gradacc.optim._adam import adam as adam
from gradacc.optim._adam import adamw as adamw
from gradacc.optim._by_path import ByPathState as ByPathState
from gradacc.optim._by_path import by_path as by_path
from gradacc.optim._clip import clip_by_global_norm as clip_by_global_norm
from gradacc.optim._from_torch import TorchState as TorchState
from gradacc.optim._from_torch import from_torch as from_torch
from gradacc.optim._from_torchopt import from_torchopt as from_torchopt
from gradacc.optim._loss_scale import LossScaleState as LossScaleState
from gradacc.optim._loss_scale import dynamic_loss_scale as dynamic_loss_scale
from gradacc.optim._loss_scale import scaled_loss as scaled_loss
from gradacc.optim._lr import schedule as schedule
from gradacc.optim._optimizer import Optimizer as Optimizer
from gradacc.optim._sgd import SgdState as SgdState
from gradacc.optim._sgd import sgd as sgd
from gradacc.optim._skip import SkipState as SkipState
from gradacc.optim._skip import skip_nonfinite as skip_nonfinite
