"""Weights in and out: checkpoints of others, strict loading, the expert store, published names, golden files."""

from ca2st.weights.errors import ForeignFileRefusedError, WeightsDamageError, WeightsMismatchError
from ca2st.weights.expert_files import ExpertStore, expert_state, load_expert, load_expert_file
from ca2st.weights.golden import GoldenReport, check_golden
from ca2st.weights.hub import HubAccess, fetch
from ca2st.weights.importer import ImportOptions, ImportReport, import_weights
from ca2st.weights.model_file import ExportReport, export_model, read_model_file
from ca2st.weights.published import load_published, published_names, to_published
from ca2st.weights.tensor_files import LoadReport, load_strictly
from ca2st.weights.transfer import TransferReport, transfer_weights

__all__ = [
    "ExpertStore",
    "ExportReport",
    "ForeignFileRefusedError",
    "GoldenReport",
    "HubAccess",
    "ImportOptions",
    "ImportReport",
    "LoadReport",
    "TransferReport",
    "WeightsDamageError",
    "WeightsMismatchError",
    "check_golden",
    "expert_state",
    "export_model",
    "fetch",
    "import_weights",
    "load_expert",
    "load_expert_file",
    "load_published",
    "load_strictly",
    "published_names",
    "read_model_file",
    "to_published",
    "transfer_weights",
]
