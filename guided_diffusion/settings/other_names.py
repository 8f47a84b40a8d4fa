"""What else settings are called: by other flags of ours, by other tools, and by a slip of the hand."""

import difflib
from collections.abc import Mapping
from typing import Any

OTHER_NAMES = {
    "guide_scale": {"sag_scale"},
    "sag_scale": {"guide_scale"},
    "sel_attn_block": {"sag_block"},
    "sel_attn_depth": {"sag_block"},
    "sampler": {"use_ddim"},
    "use_ddim": {"sampler"},
}
"""Flags that say the same in another way: a later layer's one replaces an earlier layer's other."""

ELSEWHERE = {
    "num_inference_steps": ("steps", "timestep_respacing"),
    "ddim_steps": ("steps", "timestep_respacing"),
    "num_images_per_prompt": ("num_images",),
    "n_samples": ("num_images", "num_samples"),
    "guidance_scale": ("cfg_scale, which is guidance_scale − 1",),
    "cfg_scale": ("guidance_scale, which is 1 + cfg_scale",),
    "eta": ("ddim_eta",),
    "sampler": ("scheduler",),
    "pretrained_model_name_or_path": ("model", "model_path"),
    "model_id": ("model", "model_path"),
    "model_path": ("model",),
    "ckpt": ("model", "model_path"),
    "checkpoint": ("model", "model_path"),
    "torch_dtype": ("dtype", "use_fp16"),
    "mask_image": ("image_mask",),
    "output_dir": ("out_dir",),
    "outdir": ("out_dir",),
    "resolution": ("image_size",),
    "learning_rate": ("lr",),
    "train_batch_size": ("batch_size",),
    "train_data_dir": ("data_dir",),
}
"""What other tools call our settings, each with the names of ours that it may be and what is to be said of them."""


def hint(key: str, fields: Mapping[str, Any], flag: str = "") -> str:
    """What to say of an unknown key: what it is here, whose it is, or which is near. flag: how flags begin."""
    from .scripts import whose  # whose groups of settings are made with what imports this

    def named(name: str) -> str:
        return f"{flag}{name}" if flag else repr(name)

    key = key.replace("-", "_")
    if key in fields:
        return f"; did you mean {named(key)}?"
    for known in ELSEWHERE.get(key, ()):
        name, comma, remark = known.partition(",")
        if name in fields:
            return f"; did you mean {named(name)}{comma}{remark}?"
    if scripts := whose(key):
        return f"; it is of {scripts}"
    near = difflib.get_close_matches(key, fields, n=1)
    return f"; did you mean {named(near[0])}?" if near else ""
