"""Package discovery that pyproject.toml cannot express: two source roots, and configs/ shipped inside llada_mega."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["llada_mega*"]), *find_packages("kernels"), "llada_mega.configs"],
    package_dir={"llada_kernels": "kernels/llada_kernels", "llada_mega.configs": "configs"},
    package_data={"": ["py.typed", "templates/*"], "llada_mega.configs": ["**/*.yaml"]},
)
