"""What the scripts share: data, checkpoints, run folders, devices, and the training and evaluation loops."""
