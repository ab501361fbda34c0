"""CHRO-maps: pictures in which the colour of a voxel says what the segmentation network holds it to be."""
