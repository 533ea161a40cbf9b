"""All tests compute on one thread: workers share the cores, and what is compared was summed in one order."""

import torch

torch.set_num_threads(1)
