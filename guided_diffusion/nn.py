"""guided-diffusion's name for `networks.layers`: the same module, so that what is patched here acts there."""

import sys

from .networks import layers

sys.modules[__name__] = layers
