"""How neighbours are searched: the options that recipes and library share."""

from dataclasses import dataclass, field

from coss_hf.utils.messages import parameter_names

SEARCHES = ("auto", "exact", "ivf", "hnsw")
# By the data type of unit rows: what rounding may take from the cosine of equal images.
ROUNDING = {"float32": 1e-6, "float16": 2e-4}


@dataclass
class SearchOptions:
    """Options of the neighbour search, named as on the command line.

    Raises:
        ValueError: a value out of range.
    """

    neighbors_search: str = field(
        default="auto",
        metadata={
            "help": "How neighbours are searched: exact, or an index with measured recall: ivf (inverted lists), "
            "hnsw (a graph). auto: exact up to "
            "100,000 images (1,000,000 on a GPU), ivf beyond.",
            "choices": list(SEARCHES),
        },
    )
    neighbors_recall: float = field(
        default=0.99, metadata={"help": "Share of the exact neighbours that ivf and hnsw must find; probes are raised."}
    )
    neighbors_max_similarity: float | None = field(
        default=None,
        metadata={
            "help": "Leave out near-duplicates, others whose cosine is this or more, where neighbours are searched; "
            "those that came with a dataset stay."
        },
    )
    neighbors_dtype: str = field(
        default="float32",
        metadata={"help": "Data type of the embeddings on disk and in the index.", "choices": ["float32", "float16"]},
    )
    neighbors_keep_embeddings: bool = field(
        default=False, metadata={"help": "Keep the embeddings on disk when the neighbours are found."}
    )

    @parameter_names()
    def __post_init__(self):
        if self.neighbors_search not in SEARCHES:
            raise ValueError(f"--neighbors_search {self.neighbors_search}: choose one of {', '.join(SEARCHES)}.")
        if not 0 < self.neighbors_recall <= 1:
            raise ValueError(f"--neighbors_recall {self.neighbors_recall}: give a share above 0 and up to 1.")
        if self.neighbors_max_similarity is not None and not -1 < self.neighbors_max_similarity <= 1:
            raise ValueError(
                f"--neighbors_max_similarity {self.neighbors_max_similarity}: give a cosine above -1 and up to 1 "
                f"(0.95, say), or leave it out."
            )
        if self.neighbors_dtype not in ("float32", "float16"):
            raise ValueError(f"--neighbors_dtype {self.neighbors_dtype}: choose float32 or float16.")

    @property
    def max_similarity(self) -> float:
        """The cosine from which others are left out, less what rounding may take from that of equal images."""
        if self.neighbors_max_similarity is None:
            return float("inf")
        return self.neighbors_max_similarity - ROUNDING[self.neighbors_dtype]
