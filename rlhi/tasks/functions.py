"""What the YAML files beside this one call; lm-eval loads it by path, so it holds nothing but names."""
from rlhi.reasoning import gold_of, grade_result, load_problems  # noqa: F401
