"""Whether sample i of one run and sample i of another began from the same noise: then their differences are paired."""

from evaluations.sources import Source

MADE_OF = (
    "seed", "image_size", "labels", "balanced_labels", "num_classes", "prompts", "base_samples", "init_image",
    "strength", "samples_version",
)  # fmt: skip
"""What decides the noise and the label of sample i; what a run does not say is as in a run that does not say it."""


def why_not_paired(first: Source, second: Source) -> str:
    """Why two sets of samples are not paired; empty if they are, by what their runs say of themselves."""
    if not (first.images and second.images):
        return f"{(second if first.images else first).path} holds statistics, but no images"
    if len(first.images) != len(second.images):
        return f"{first.path} holds {len(first.images)} images, {second.path} {len(second.images)}"
    for source in (first, second):
        if not isinstance(source.about.get("identity"), dict):
            return f"{source.path} has no manifest.json that says how it was made (--paired: sample i is sample i)"
    one, other = (source.about["identity"] for source in (first, second))
    for name in MADE_OF:
        if one.get(name) != other.get(name):
            return f"{name} is {one.get(name)!r} in {first.path}, {other.get(name)!r} in {second.path}"
    return ""
