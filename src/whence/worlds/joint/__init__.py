"""A transformer with joint attention whose weights are set by hand, so that what each word draws, and where, is known.

No trained joint-attention model is small enough to ship; this one has nothing to learn.
"""
