"""Everything that knows nnU-Net's internals."""
