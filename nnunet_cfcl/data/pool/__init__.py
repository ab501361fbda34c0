"""The pool: further images without manual labels, and silver labels."""
