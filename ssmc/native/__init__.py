"""Runs what `ssmc export --format native` wrote, without torch: recorded calls of compiled kernels.

`model` is a program and its states; `code` loads the kernels, `memory` holds what they read and
write, `threads` share the work, `sampling` chooses tokens.
"""

from ssmc.native.model import NativeModel, load

__all__ = ["NativeModel", "load"]
