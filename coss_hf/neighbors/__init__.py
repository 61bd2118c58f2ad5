"""The teacher's nearest neighbours of every training image."""

from coss_hf.utils.lazy import lazy_names

_HOMES = {
    "add_neighbors": "mining",
    "check_neighbors": "columns",
    "nearest_neighbors": "mining",
    "neighbor_hashes": "columns",
    "search": "mining",
    "with_columns": "columns",
}
__all__ = list(_HOMES)
__getattr__ = lazy_names(__name__, _HOMES)
