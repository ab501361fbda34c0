"""The pretraining objectives, one file each."""
