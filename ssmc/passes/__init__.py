"""The passes, one a file; a pass called `fold-norm` lives in `fold_norm.py`."""
