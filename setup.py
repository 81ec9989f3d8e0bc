"""Package the library `dejavu` with its two leaf applications and its data folders mapped under the one import name."""

from setuptools import find_packages, setup

LEAVES = {
    "dejavu.cli": "cli",
    "dejavu.benchmarks": "benchmarks",
    "dejavu.launch": "launch",
    "dejavu.kernels": "kernels",
}

setup(
    packages=find_packages(include=["dejavu", "dejavu.*"]) + list(LEAVES),
    package_dir=LEAVES,
    package_data={
        "dejavu": ["py.typed"],
        "dejavu.launch": ["*"],
        "dejavu.kernels": ["*.cu", "*.cuh"],
        "dejavu.benchmarks": ["*.yaml"],
    },
)
