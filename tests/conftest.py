"""Hypothesis without its clock (the machine may be busy) and without its random seed; one thread, since models are tiny."""

import hypothesis
import torch

hypothesis.settings.register_profile("gradacc", deadline=None, derandomize=True, print_blob=False)
hypothesis.settings.load_profile("gradacc")
torch.set_num_threads(1)
