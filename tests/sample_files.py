"""Samples as files, for what reads them."""

import json

import numpy as np


def pictures(n=10, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3)).astype(np.uint8)


def shard(folder, first, images, labels=None):
    folder.mkdir(parents=True, exist_ok=True)
    about = np.frombuffer(json.dumps({"first": first}).encode(), np.uint8)
    more = {} if labels is None else {"arr_1": labels}
    np.savez(folder / f"shard_{first:06d}.npz", about=about, arr_0=images, **more)
