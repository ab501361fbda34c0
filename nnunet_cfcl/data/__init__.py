"""The cases of a dataset: readers, attributes, patients, training cases and the pool."""
