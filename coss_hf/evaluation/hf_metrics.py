"""The evaluation as metrics of the ``evaluate`` library. They are constructed directly and never use the network.

``evaluate`` takes seconds to import: import this module only where its metrics are wanted.
"""

import evaluate
import torch
from datasets import Features, Sequence, Value

from coss_hf.evaluation.agreement import mean_cosine, neighbor_overlap
from coss_hf.evaluation.knn import knn_accuracy
from coss_hf.evaluation.linear_probe import linear_probe

EMBEDDING = Sequence(Value("float32"))
LABELLED = Features({"predictions": EMBEDDING, "references": Value("int64")})
PAIRED = Features({"predictions": EMBEDDING, "references": EMBEDDING})

LABELLED_INPUTS = """
Args:
    predictions: embeddings of the test images, (m, d).
    references: their class numbers, (m,).
    bank: embeddings of the un-augmented training images, (n, d).
    bank_labels: their class numbers, (n,).
"""
PAIRED_INPUTS = """
Args:
    predictions: the student's embeddings, (m, d_s).
    references: the teacher's embeddings of the same images in the same order, (m, d_t).
"""


def _embeddings(rows) -> torch.Tensor:
    return torch.as_tensor(rows, dtype=torch.float32)


class KNNAccuracy(evaluate.Metric):
    """Accuracy of the weighted k-nearest-neighbour classifier."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of images whose class is the vote of their k nearest training images by cosine of the "
            "embeddings, each vote weighted by exp(cosine / temperature).",
            citation="@inproceedings{wu2018unsupervised, title={Unsupervised Feature Learning via Non-Parametric "
            "Instance Discrimination}, author={Wu, Zhirong and Xiong, Yuanjun and Yu, Stella X. and Lin, Dahua}, "
            "booktitle={CVPR}, year={2018}}",
            inputs_description=LABELLED_INPUTS
            + "    k: neighbours, one number or several (20 by default).\n    temperature: 0.07 by default.\n"
            "Returns:\n    knn{k}: accuracy in [0, 1], for every k.\n",
            features=LABELLED,
            reference_urls=["https://arxiv.org/abs/1805.01978", "https://arxiv.org/abs/2104.14294"],
        )

    def _compute(self, predictions, references, bank, bank_labels, k=20, temperature=0.07):
        ks = (k,) if isinstance(k, int) else tuple(k)
        bank, bank_labels = _embeddings(bank), torch.as_tensor(bank_labels)
        return knn_accuracy(bank, bank_labels, _embeddings(predictions), torch.as_tensor(references), ks, temperature)


class LinearProbe(evaluate.Metric):
    """Accuracy of a linear classifier on the frozen embeddings."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Accuracy of multinomial logistic regression on standardised embeddings; its learning rate is "
            "chosen on a part of the training images, the test images are read once.",
            citation="@article{oquab2023dinov2, title={DINOv2: Learning Robust Visual Features without Supervision}, "
            "author={Oquab, Maxime and others}, journal={arXiv:2304.07193}, year={2023}}",
            inputs_description=LABELLED_INPUTS
            + "    seed: of the held-out part and of the order of the batches (0 by default).\n"
            "Returns:\n    probe: accuracy in [0, 1].\n",
            features=LABELLED,
            reference_urls=["https://arxiv.org/abs/2304.07193"],
        )

    def _compute(self, predictions, references, bank, bank_labels, seed=0):
        train, labels = _embeddings(bank), torch.as_tensor(bank_labels)
        result = linear_probe(train, labels, _embeddings(predictions), torch.as_tensor(references), seed=seed)
        return {"probe": result["accuracy"]}


class NeighborOverlap(evaluate.Metric):
    """Share of nearest neighbours that student and teacher have in common; needs no labels."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of every image's k nearest other images, by cosine, that student and teacher have in "
            "common, averaged over the images.",
            citation="@inproceedings{huh2024platonic, title={The Platonic Representation Hypothesis}, author={Huh, "
            "Minyoung and Cheung, Brian and Wang, Tongzhou and Isola, Phillip}, booktitle={ICML}, year={2024}}",
            inputs_description=PAIRED_INPUTS
            + "    k: neighbours (10 by default).\nReturns:\n    overlap{k}: a number in [0, 1].\n",
            features=PAIRED,
            reference_urls=["https://arxiv.org/abs/2405.07987"],
        )

    def _compute(self, predictions, references, k=10):
        return {f"overlap{k}": neighbor_overlap(_embeddings(predictions), _embeddings(references), k)}


class MeanCosine(evaluate.Metric):
    """Mean cosine between the student's and the teacher's embeddings; needs no labels."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Cosine between the student's and the teacher's embedding of an image, averaged over the "
            "images. The dimensions must agree: use the embeddings after the student's head where it has one.",
            citation="@inproceedings{singh2024simple, title={Simple Unsupervised Knowledge Distillation With Space "
            "Similarity}, author={Singh, Aditya and Wang, Haohan}, booktitle={ECCV}, year={2024}}",
            inputs_description=PAIRED_INPUTS + "Returns:\n    cosine: a number in [-1, 1].\n",
            features=PAIRED,
            reference_urls=["https://arxiv.org/abs/2409.13939"],
        )

    def _compute(self, predictions, references):
        return {"cosine": mean_cosine(_embeddings(predictions), _embeddings(references))}
