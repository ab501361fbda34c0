"""CHRO-maps in nnU-Net's prediction."""
