"""Functional optimizers: ``params, state = optimizer.step(params, grads, state)``."""

from gradacc.optim._adam import AdamState, adam, adamw
from gradacc.optim._by_path import ByPathState, Predicate, by_path
from gradacc.optim._clip import clip_by_global_norm
from gradacc.optim._from_torch import TorchState, from_torch
from gradacc.optim._from_torchopt import GradientTransformation, from_torchopt
from gradacc.optim._loss_scale import LossScaleState, dynamic_loss_scale, scaled_loss
from gradacc.optim._lr import schedule
from gradacc.optim._optimizer import (
    CheckFunction,
    InitFunction,
    LearningRate,
    Optimizer,
    OptimizerReport,
    ReportFunction,
    StepFunction,
)
from gradacc.optim._sgd import SgdState, sgd
from gradacc.optim._sharded import ShardedState, sharded
from gradacc.optim._skip import SkipState, skip_nonfinite
from gradacc.optim._spikes import SpikesState, skip_spikes

__all__ = [
    "AdamState",
    "ByPathState",
    "CheckFunction",
    "GradientTransformation",
    "InitFunction",
    "LearningRate",
    "LossScaleState",
    "Optimizer",
    "OptimizerReport",
    "Predicate",
    "ReportFunction",
    "SgdState",
    "ShardedState",
    "SkipState",
    "SpikesState",
    "StepFunction",
    "TorchState",
    "adam",
    "adamw",
    "by_path",
    "clip_by_global_norm",
    "dynamic_loss_scale",
    "from_torch",
    "from_torchopt",
    "scaled_loss",
    "schedule",
    "sgd",
    "sharded",
    "skip_nonfinite",
    "skip_spikes",
]
