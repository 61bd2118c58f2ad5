"""The evaluation as metrics of the ``evaluate`` library.

``evaluate_embeddings``, and so ``Evaluator`` and the recipes, compute k-NN accuracy, linear probe and retrieval through
these classes. Others construct them, or load them by the path of a folder below ``coss_hf/evaluation/metrics``::

    import evaluate

    metric = evaluate.load("path/to/coss_hf/evaluation/metrics/knn_accuracy")
    metric.compute(predictions=test, references=test_labels, train_features=train, train_labels=train_labels, k=20)

Neither uses the network. Tensors that ``compute`` is given go to the function below the metric (``knn_accuracy``,
``linear_probe``, ``retrieval``, ...) as they are: same device, same data type, same result bit for bit. Lists, arrays
and what ``add`` or ``add_batch`` collect pass through the library's Arrow file, as float32.

``evaluate`` takes seconds to import: import this module only where its metrics are wanted.
"""

import torch
from datasets import Features, Sequence, Value
from torch import Tensor

from coss_hf.evaluation.agreement import mean_cosine, neighbor_overlap
from coss_hf.evaluation.knn import knn_accuracy
from coss_hf.evaluation.linear_probe import linear_probe
from coss_hf.evaluation.retrieval import retrieval
from coss_hf.utils.packages import import_installed

evaluate = import_installed("evaluate")

EMBEDDING = Sequence(Value("float32"))
LABELLED = Features({"predictions": EMBEDDING, "references": Value("int64")})
PAIRED = Features({"predictions": EMBEDDING, "references": EMBEDDING})

LABELLED_INPUTS = """
Args:
    predictions: embeddings of the test images, (m, d).
    references: class numbers of the test images, (m,).
    train_features: embeddings of the un-augmented train images, (n, d).
    train_labels: class numbers of the train images, (n,).
"""
RETRIEVAL_INPUTS = """
Args:
    predictions: embeddings of the queries, (m, d).
    references: class numbers of the queries, (m,).
    gallery: embeddings of the gallery, (n, d).
    gallery_labels: class numbers of the gallery, (n,).
"""
PAIRED_INPUTS = """
Args:
    predictions: the student's embeddings, (m, d_s).
    references: the teacher's embeddings of the same images in the same order, (m, d_t).
"""


def _embeddings(first, second) -> tuple[Tensor, Tensor]:
    """Tensors as they are; where one came through Arrow or is no tensor, both as float32."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first, second
    return torch.as_tensor(first, dtype=torch.float32), torch.as_tensor(second, dtype=torch.float32)


def _numbers(k: int | tuple[int, ...]) -> tuple[int, ...]:
    return (k,) if isinstance(k, int) else tuple(k)


class EmbeddingMetric(evaluate.Metric):
    """A metric that hands the tensors of one call over as they are."""

    def compute(self, *, predictions=None, references=None, **kwargs):
        """Compute the metric of the inputs given here, or of those added before; tensors are used as they are."""
        tensors = isinstance(predictions, Tensor) and isinstance(references, Tensor)
        if tensors and self.writer is None and self.num_process == 1:
            return self._compute(predictions, references, **kwargs)
        return super().compute(predictions=predictions, references=references, **kwargs)


class KNNAccuracy(EmbeddingMetric):
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

    def _compute(self, predictions, references, train_features, train_labels, k=20, temperature=0.07):
        test_features, train_features = _embeddings(predictions, train_features)
        return knn_accuracy(
            train_features,
            torch.as_tensor(train_labels),
            test_features,
            torch.as_tensor(references),
            ks=_numbers(k),
            temperature=temperature,
        )


class LinearProbe(EmbeddingMetric):
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

    def _compute(self, predictions, references, train_features, train_labels, seed=0):
        test_features, train_features = _embeddings(predictions, train_features)
        result = linear_probe(
            train_features,
            torch.as_tensor(train_labels),
            test_features,
            torch.as_tensor(references),
            seed=seed,
        )
        return {"probe": result["accuracy"]}


class Retrieval(EmbeddingMetric):
    """Recall at k and mean average precision of image retrieval by cosine."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Retrieval of images of the query's class from a gallery ordered by cosine of the embeddings: "
            "the share of queries with such an image among the k nearest, and the mean over queries of the precision "
            "at each such image. At most 1,000 queries are taken, drawn with a fixed seed.",
            citation="@book{manning2008introduction, title={Introduction to Information Retrieval}, author={Manning, "
            'Christopher D. and Raghavan, Prabhakar and Sch{\\"u}tze, Hinrich}, publisher={Cambridge University '
            "Press}, year={2008}}",
            inputs_description=RETRIEVAL_INPUTS
            + "    k: ranks of the recalls, one number or several (1 and 10 by default).\n"
            "Returns:\n    recall{k}: a number in [0, 1], for every k.\n"
            "    map: mean average precision in [0, 1].\n",
            features=LABELLED,
            reference_urls=["https://nlp.stanford.edu/IR-book/", "https://arxiv.org/abs/2006.13525"],
        )

    def _compute(self, predictions, references, gallery, gallery_labels, k=(1, 10)):
        queries, gallery = _embeddings(predictions, gallery)
        return retrieval(
            queries,
            torch.as_tensor(references),
            gallery,
            torch.as_tensor(gallery_labels),
            ks=_numbers(k),
        )


class NeighborOverlap(EmbeddingMetric):
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
        student, teacher = _embeddings(predictions, references)
        return {f"overlap{k}": neighbor_overlap(student, teacher, k)}


class MeanCosine(EmbeddingMetric):
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
        student, teacher = _embeddings(predictions, references)
        return {"cosine": mean_cosine(student, teacher)}
