"""The pretraining loop, its data, monitors and checkpoints; knows no nnU-Net class."""
