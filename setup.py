"""Packaging: metadata and requirements live in settings.ini, which nbdev reads too."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
EXTRAS = {
    "vllm": ["vllm>=0.31"],
    "ray": ["ray[data]>=2.50"],
    "eval": ["lm-eval==0.4.13", "alpaca-eval==0.6.6", "setuptools<82", "math-verify[antlr4-13-2]>=0.9"],
}
EXTRAS["dev"] = [line for line in Path("requirements/dev.in").read_text().splitlines()
                 if line.strip() and not line.startswith("#")]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    packages=find_packages(include=["rlhi", "rlhi.*"]),
    package_data={"rlhi": ["prompts/*", "data/*", "data/followup_adapter/*", "tasks/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=EXTRAS,
    entry_points={"console_scripts": cfg["console_scripts"].split("\n")},
)
