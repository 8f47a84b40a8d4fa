from setuptools import find_packages, setup

# The configurations stand beside the package in a clone, and inside it where it is installed.
setup(
    packages=[*find_packages(include=["guided_diffusion*", "evaluations*"]), "guided_diffusion.configs"],
    package_dir={"guided_diffusion.configs": "configs"},
)
