"""The mean of an image's patches, as a module of sentence-transformers.

For students whose network gives other tokens, too, and whose embedding leaves them out. This file is copied next to
such a student's weights, where ``SentenceTransformer(name, trust_remote_code=True)`` runs it; it needs torch alone.
"""

import json
from pathlib import Path

from torch import Tensor, nn


class PatchPooling(nn.Module):
    """Mean of the tokens from number ``first`` to ``last``, which is left out.

    Args:
        dimension: of a token.
        first: number of tokens before those of patches: class, register and distillation tokens.
        last: a negative number, to leave tokens after those of patches out; None where there are none.
        channels_last: whether the tokens are a map ``(b, h, w, dimension)``, which sentence-transformers takes for
            one with its channels first.
    """

    def __init__(self, dimension: int, first: int = 0, last: int | None = None, channels_last: bool = False):
        super().__init__()
        self.config = {"dimension": dimension, "first": first, "last": last, "channels_last": channels_last}

    def forward(self, features: dict[str, Tensor], **options) -> dict[str, Tensor]:
        """Add ``sentence_embedding`` ``(b, d)`` to features with ``token_embeddings`` ``(b, tokens, d)``."""
        tokens = features["token_embeddings"]
        if self.config["channels_last"]:
            # It is (b, w * d, h) by now.
            tokens = tokens.unflatten(1, (-1, self.config["dimension"])).permute(0, 3, 1, 2).flatten(1, 2)
        features["sentence_embedding"] = tokens[:, self.config["first"] : self.config["last"]].mean(1)
        return features

    def get_embedding_dimension(self) -> int:
        """Dimension of the embeddings."""
        return self.config["dimension"]

    get_sentence_embedding_dimension = get_embedding_dimension

    def save(self, folder: str, **options) -> None:
        """Write ``config.json``."""
        Path(folder, "config.json").write_text(json.dumps(self.config))

    @classmethod
    def load(cls, folder: str) -> "PatchPooling":
        """Build the module that ``save`` wrote."""
        return cls(**json.loads(Path(folder, "config.json").read_text()))
