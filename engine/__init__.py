"""Floor 2: the inference engine on one device group. Importing this package alone does not import torch."""
