"""Weights in and out: strict loading, the expert store, published names, golden files."""

from ca2st.weights.errors import WeightsDamageError, WeightsMismatchError
from ca2st.weights.experts import expert_state, load_expert
from ca2st.weights.golden import GoldenReport, check_golden
from ca2st.weights.published import load_published, published_names, to_published
from ca2st.weights.store import ExpertStore
from ca2st.weights.strict import LoadReport, load_strictly

__all__ = [
    "ExpertStore",
    "GoldenReport",
    "LoadReport",
    "WeightsDamageError",
    "WeightsMismatchError",
    "check_golden",
    "expert_state",
    "load_expert",
    "load_published",
    "load_strictly",
    "published_names",
    "to_published",
]
