"""Hypothesis without its clock (this machine may be busy) and without its random seed."""

import os

# Two threads a process: matrices are small here, and workers share the machine.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import hypothesis
import torch

hypothesis.settings.register_profile("gradacc", deadline=None, derandomize=True, print_blob=False)
hypothesis.settings.load_profile("gradacc")
torch.set_num_threads(2)
