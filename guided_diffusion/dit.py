"""The name `guided_diffusion.dit` for `networks.dit`: the same module, so that what is patched here acts there."""

import sys

from .networks import dit

sys.modules[__name__] = dit
