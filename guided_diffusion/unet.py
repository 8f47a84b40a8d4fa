"""guided-diffusion's name for `networks.unet`: the same module, so that what is patched here acts there."""

import sys

from .networks import unet

sys.modules[__name__] = unet
