"""The presses of kvpress on the cases of our evaluation. See docs/reference.md.

Two environments meet here. ``cases`` and ``__main__`` are imported in ours; all else in the one
that ``make reference`` makes, and knows nothing of vLLM or of this package. Files of JSON lines
lie between them (``files``).
"""
